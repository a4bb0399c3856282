"""Writes a decision log to practise on, as a gateway that acts and explores would have written it.

quickstart is played by the rule that many gateways ship, least requests in flight, with a tenth of the requests
explored by a near alternative, so that off-policy estimates have something to work with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.baselines import baselines_for
from envs import announce_compilation
from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation.simulated_log import write_log
from marginroute.cli import Parser, main_guard
from marginroute.errors import InputError
from marginroute.exploration import ExploringPolicy


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Writes the log."""
    parser = Parser(prog="examples/practice_log.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("decisions.jsonl"), metavar="FILE", help="(decisions.jsonl)")
    parser.add_argument("--minutes", type=int, default=30, metavar="N", help="of 300 requests (30)")
    arguments = parser.parse_args(argv)
    if arguments.minutes < 1:
        raise InputError(f"--minutes {arguments.minutes} is not legal; legal is 1 or more")
    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists, and records are appended to a log; name another file with --out")
    announce_compilation()
    long = {"horizon_s": 60.0 * arguments.minutes, "requests_per_episode": 300 * arguments.minutes}
    scenario, rules = load_scenario("quickstart", long), baselines_for(load_scenario("quickstart"))
    policy = ExploringPolicy(rules["least-in-flight"], rules["bid-price"], share=0.1, limit_usd=0.02)
    written = write_log(arguments.out, Plant(scenario), policy, [0])
    print(f"{arguments.out}: {written:,} decisions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
