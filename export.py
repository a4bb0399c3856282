# PYTHON_ARGCOMPLETE_OK
"""Writes the bundle of a finished run: the policy that a gateway loads.

Try:
  python export.py runs/quickstart --out bundles/quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from marginroute.cli import Parser, main_guard, note
from marginroute.errors import InputError


def parser() -> Parser:
    """The command line."""
    parse = Parser.from_doc("export.py", __doc__)
    parse.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle")
    parse.add_argument(
        "--quality", type=Path, metavar="FILE", help="predictor of python -m agents quality, its models named as tiers"
    )
    parse.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="evaluate.py --json of this run, for the model card"
    )
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Exports; bad input exits 2 and leaves no folder."""
    args = parser().parse_args(argv)
    from agents import baselines
    from agents.archive import load_archive
    from agents.export import export
    from agents.network import ScorerPolicy
    from agents.run import Run
    from agents.train import router_scenario
    from envs.plant import Plant
    from marginroute.bundle import check_folder
    from marginroute.control_policy import learned_of
    from marginroute.features import FeatureSpec
    from marginroute.predictor import load as load_predictor

    check_folder(args.out)
    run = Run(args.run)
    info = run.info()
    if info.get("status") != "finished":
        raise InputError(f"{args.run} is not finished (status: {info.get('status')}); train.py --resume {args.run}")
    advice, fallback = baselines.advice_and_fallback(run.folder / baselines.FILE, run.config().fitted)
    evaluation = {"gate": info["gate"]}
    if args.evaluation is not None:
        evaluation |= read_evaluation(args.evaluation, info["scenario"]["name"])
    predictor = None if args.quality is None else load_predictor(args.quality)
    scenario = run.scenario()
    if predictor is not None and scenario.workload.difficulty.signal_auc is None:
        note(
            "note: the policy was trained on a prior that does not know the task; for a gateway that predicts from the "
            "prompt, train with workload.difficulty.signal_auc = the predictor's AUC (docs/quality.md)"
        )
    levers, learned = None, load_archive(run.policy_path, None) if info["gate"]["learned"] else None
    assert learned is None or isinstance(learned.policy, ScorerPolicy)
    if learned is None:
        advice = baselines.router_beside(run.folder / baselines.FILE, run.config().fitted)
    if "controller" in info:
        from agents.control_run import exported_levers
        from envs.control_plant import ControlPlant

        levers = exported_levers(run, ControlPlant(scenario))
        evaluation["controller_gate"] = info["controller"]["gate"]
    bundle = export(
        Plant(router_scenario(scenario)),
        None if learned is None else learned.policy,
        advice,
        None if learned is None else FeatureSpec.from_dict(learned.policy_kwargs["spec"]),
        fallback,
        args.out,
        evaluation,
        {key: info[key] for key in ("command", "seed", "versions")},
        predictor,
        levers,
    )
    controller = "" if bundle.controller is None else f"; controller learned: {learned_of(bundle.controller)}"
    found = f"policy {bundle.policy.name}, learned: {bundle.learned}{controller}"
    print(f"{args.out}: {found}; read it: marginroute inspect {args.out}")
    return 0


EVALUATION = ("scenario", "episodes", "best_heuristic", "paired", "bounds", "gap_closed", "calibration", "assumptions")
OF_POLICY = (
    *("margin_usd_per_1k_requests", "contribution_margin_usd_per_1k_requests", "revenue_usd_per_1k_requests"),
    *("slo_attainment", "quality", "shed", "actions", "accounts"),
)


def read_evaluation(path: Path, scenario: str) -> dict[str, object]:
    """Headline figures of an evaluation document for the model card."""
    try:
        document = json.loads(path.read_text())
        found = {key: document[key] for key in EVALUATION}
        found["policies"] = {
            name: {key: policy[key] for key in OF_POLICY} for name, policy in document["policies"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a file written by evaluate.py --json of this version") from None
    if found["scenario"] != scenario:
        raise InputError(f"{path} is of scenario {found['scenario']!r}, the run of {scenario!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
