# PYTHON_ARGCOMPLETE_OK
"""The gateway's command line, also as `python -m marginroute`: inspect a bundle, learn, replay a log, serve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from marginroute import __version__
from marginroute.cli import Parser, main_guard

if TYPE_CHECKING:
    from marginroute.adapters.listen import Listen


def _inspect(arguments: argparse.Namespace) -> int:
    from marginroute.card import model_card

    sys.stdout.write(model_card(arguments.bundle))
    return 0


def _capabilities(arguments: argparse.Namespace) -> int:
    from marginroute import capabilities

    if arguments.json:
        import json

        rows = [dict(zip(capabilities.COLUMNS, row, strict=True)) for row in capabilities.rows()]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        sys.stdout.write(capabilities.markdown())
    return 0


def _feedback(arguments: argparse.Namespace) -> int:
    from marginroute import feedback_log

    return feedback_log.run(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from marginroute import replay

    return replay.run(arguments)


def _envoy(arguments: argparse.Namespace) -> int:
    from marginroute.adapters import envoy
    from marginroute.adapters.desk import read_settings

    settings = read_settings(envoy.EnvoySettings, arguments.config, _operation(arguments))
    if arguments.print_envoy:
        sys.stdout.write(envoy.configuration(arguments.print_envoy, settings, _listen(arguments), arguments.envoy_port))
        return 0
    return envoy.run(settings, _listen(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    from marginroute.adapters import http
    from marginroute.adapters.desk import read_settings

    given = _operation(arguments) | {"token_file": arguments.token_file}
    return http.run(read_settings(http.HttpSettings, arguments.config, given), _listen(arguments))


def _operation(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {"bundle": arguments.bundle, "log": arguments.log, "mode": arguments.mode}


def _listen(arguments: argparse.Namespace) -> Listen:
    from marginroute.adapters.listen import listen_from

    tls = (arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    return listen_from(arguments.uds, arguments.host, arguments.port, tls)


def _serving(command: argparse.ArgumentParser, port: int) -> None:
    """Arguments of everything that serves a bundle."""
    command.add_argument("bundle", metavar="BUNDLE", nargs="?", help="folder written by export.py")
    command.add_argument("--config", metavar="FILE", help="YAML file of settings (docs/gateways.md)")
    command.add_argument("--log", metavar="FILE", help="JSONL file that decision records are appended to")
    command.add_argument("--mode", choices=("shadow", "canary", "live"), help="how far it may act (default: shadow)")
    where = command.add_argument_group("where it listens")
    where.add_argument("--uds", metavar="PATH", help="Unix socket, in place of --host and --port")
    where.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    where.add_argument("--port", type=int, default=port, help=f"TCP port (default: {port})")
    where.add_argument("--tls-cert", metavar="PEM", help="certificate; needed where other machines can reach it")
    where.add_argument("--tls-key", metavar="PEM", help="its key")
    where.add_argument("--tls-client-ca", metavar="PEM", help="let in only clients with a certificate of this CA")


EXAMPLES = {
    "inspect": "marginroute inspect bundles/quickstart",
    "capabilities": "marginroute capabilities",
    "feedback": "marginroute feedback decisions.jsonl bundles/quickstart --out feedback.json",
    "replay": "marginroute replay decisions.jsonl bundles/next\nmarginroute replay decisions.jsonl bundles/next --json",
    "serve": """
        marginroute serve bundles/quickstart --log decisions.jsonl
        marginroute serve --config marginroute.yaml --uds /run/marginroute.sock
        """,
    "envoy": """
        marginroute envoy bundles/quickstart --config picker.yaml
        marginroute envoy --config picker.yaml --print-envoy headers
        """,
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="marginroute",
        description="Run exported routing policies beside a gateway.",
        examples="\n".join(EXAMPLES[name] for name in ("inspect", "replay")) + "\nmarginroute COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"marginroute {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=summary, description=summary, examples=EXAMPLES[name])
        sub.set_defaults(run=run)
        return sub

    inspect = command("inspect", _inspect, "Verify a bundle and print its model card.")
    inspect.add_argument("bundle", metavar="BUNDLE", help="folder written by export.py")
    able = command("capabilities", _capabilities, "Print what each gateway can see and do.")
    able.add_argument("--json", action="store_true", help="JSON in place of a Markdown table")
    learn = command("feedback", _feedback, "Correct P(good answer) by the feedback in a decision log.")
    learn.add_argument("log", type=Path, metavar="LOG", help="decision records, JSON lines")
    learn.add_argument("bundle", metavar="BUNDLE", help="folder that the log was written with")
    learn.add_argument("--feedback", type=Path, metavar="FILE", help='JSON lines: {"id": ..., "thumb": "down", ...}')
    learn.add_argument("--start", metavar="FILE", help="--out of an earlier run that the gateway ran with")
    learn.add_argument("--half-life", type=float, default=float("inf"), metavar="N", help="answers (default: no decay)")
    learn.add_argument("--out", type=Path, metavar="FILE", help="what the gateway loads (setting `feedback`)")
    again = command("replay", _replay, "Decide a log again with a bundle and show what changes.")
    again.add_argument("log", type=Path, metavar="LOG", help="decision records, JSON lines")
    again.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle for the same candidates")
    again.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    sidecar = command("serve", _serve, "Decide for any gateway that calls HTTP.")
    _serving(sidecar, 9003)
    sidecar.add_argument("--token-file", metavar="FILE", help="token that callers must show (Authorization: Bearer)")
    picker = command("envoy", _envoy, "Pick endpoints for Envoy, over ext_proc (Gateway API Inference Extension).")
    _serving(picker, 9002)
    printed = picker.add_argument_group("instead of picking")
    modes = ("observe", "headers", "buffered", "full-duplex")
    printed.add_argument("--print-envoy", choices=modes, help="print a configuration of Envoy for this picker")
    printed.add_argument("--envoy-port", type=int, default=10000, help="that Envoy listens on (default: 10000)")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main(None))
