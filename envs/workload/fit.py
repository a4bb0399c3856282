"""Fits the generator to a trace and tries it on rows that it was not fitted to.

    python -m envs.workload.fit FILE [--trace-format NAME] [--fit-share 0.6] [--out WORKLOAD.yaml]

The first part of the trace is fitted (of sessions that are recorded whole: the first sessions), the rest is compared
with streams of the same length from the fitted generator. Printed are the sections of a workload file, with those
comparisons as comments; `--fit-share 1` fits everything and compares with nothing.

Arrivals: bursts on several time scales whose dispersion is the recorded one, or a hidden Markov chain with Poisson
counts per second by Baum-Welch, where the stream falls silent as independent bursts cannot (`--arrivals`). Lengths:
mixtures of lognormals by expectation-maximisation. With tenants, each of the largest clients gets arrivals and lengths
of its own; with sessions or block hashes, chats are fitted by `envs.workload.fit_sessions`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from envs.workload.fit_check import compare
from envs.workload.fit_model import Sizes, fit, parts
from envs.workload.fit_text import text_of
from envs.workload.traces import READERS, parse_columns, read_trace
from marginroute.cli import main_guard
from marginroute.errors import InputError
from marginroute.whole_file import write_whole


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m envs.workload.fit", description="Fit workload figures to a trace.")
    parser.add_argument("trace", help="file of recorded requests")
    parser.add_argument("--trace-format", default="", choices=READERS, metavar="NAME", help="default: told from it")
    parser.add_argument("--columns", help="csv: our_name=name_in_file,...")
    parser.add_argument("--prompt-components", type=int, default=8, help="lognormal components of prompt lengths")
    parser.add_argument("--output-components", type=int, default=6, help="lognormal components of output lengths")
    parser.add_argument("--arrivals", default="auto", choices=("auto", "bursts", "mmpp"), help="process (auto)")
    parser.add_argument("--states", type=int, default=5, help="states of mmpp (5)")
    parser.add_argument("--clients", type=int, default=12, help="clients with figures of their own (12)")
    parser.add_argument("--kinds", type=int, default=10, help="kinds of sessions (10)")
    parser.add_argument("--fit-share", type=float, default=0.6, help="share that is fitted (0.6); the rest is tried on")
    parser.add_argument("--alternate-s", type=float, default=0.0, metavar="S", help="fit every second stretch of S s")
    parser.add_argument("--from-s", type=float, default=0.0, help="servegen: start of the sampled stretch")
    parser.add_argument("--to-s", type=float, help="servegen: its end")
    parser.add_argument("--draws", type=int, default=8, help="streams drawn to compare with (8)")
    parser.add_argument("--title", default="", help="title of the workload file")
    parser.add_argument("--source", default="", help="where the trace comes from, with its licence")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the sections to a file too")
    options = parser.parse_args(argv)
    if not 0.1 <= options.fit_share <= 1.0:
        raise InputError(f"--fit-share {options.fit_share:g} is not legal; legal is 0.1 to 1")
    if options.states < 2:
        raise InputError(f"--states {options.states} is not legal; legal is 2 or more")
    columns = parse_columns(options.columns) if options.columns else None
    stretch = {"start_s": options.from_s, "end_s": options.to_s}
    trace = read_trace(options.trace, options.trace_format, columns, **stretch)
    lengths = (options.prompt_components, options.output_components)
    sizes = Sizes(*lengths, options.clients, options.arrivals, options.states, options.kinds)
    fitted_rows, later = parts(trace, options.fit_share, options.alternate_s)
    model = fit(fitted_rows, sizes)
    name = Path(options.trace).name
    notes = [f"Fitted to all {trace.n_requests:,} requests of {name}; how it does on others: docs/workloads.md."]
    if later is not None:
        notes = [f"Fitted to {fitted_rows.n_requests:,} of {trace.n_requests:,} requests of {name}:"]
        notes += compare(model, fitted_rows, later, options.draws)
    text = text_of(model, notes, options.title, options.source)
    print(text, end="")
    if options.out is not None:
        write_whole(options.out, text)
    return 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
