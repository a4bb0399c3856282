"""End-to-end PPO environment steps per CPU-second on `quickstart`, mask and candidate scorer included.

`env_steps_per_cpu_s` is train.py's path: rollouts in one kernel call over all worlds, elapsed-time discount, PPO's
update; `taught_env_steps_per_cpu_s` the same with the update by teaching, which the first half of a training has.
The reference is the same environment, network and hyperparameters behind 8 single environments in Stable-Baselines3's
DummyVecEnv, with its own rollout loop (scalar discount, ledger reward), in the same process. `stock_sb3` is PPO as it
is usually set up there: MlpPolicy, no mask, 8 environments, batch 64, 10 epochs; `stock_sbx` the same on JAX, where
sbx-rl is installed (its threads count as CPU time). CleanRL's package (0.4.8) drives gym, not gymnasium, and so none of
these environments. Wall figures run one and two processes at once, one thread each; they are meaningful on idle cores
only.
"""

from __future__ import annotations

import sys

from benchmarks import common
from marginroute.cli import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    arguments = common.parser(__doc__).parse_args(argv)
    from benchmarks import training_runs

    figures, settings = training_runs.measured(arguments.quick)
    common.emit(
        "training", figures, network="candidate scorer with mask (stock: MlpPolicy 64x64 tanh, no mask)", **settings
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
