"""What the benchmarks of Envoy and of the sidecar share: a bundle of quickstart's fleet, and a server of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from marginroute.errors import InputError

START_S = 120.0


def small_bundle_folder(folder: Path) -> Path:
    """A bundle of quickstart's candidates and contracts under an untuned bid price."""
    from agents.export import make_bundle
    from envs.plant import Plant
    from envs.scenario import load_scenario
    from envs.vector_env import default_advice
    from marginroute import bundle as bundles
    from marginroute.rules import LeastInFlight

    plant = Plant(load_scenario("quickstart"))
    fallback = LeastInFlight("least-in-flight", use_providers=True)
    path = folder / "bundle"
    bundles.save(make_bundle(plant, default_advice(plant), fallback, {}, {}), path)
    return path


class Server:
    """A module that serves on a Unix socket, the last of its words.

    Args:
        module: it, and its other words.
        folder: for socket and output.
    """

    def __init__(self, module: Sequence[str], folder: Path) -> None:
        self.uds, self._output = str(folder / "server.sock"), folder / "server.txt"
        words = ["-m", *module, self.uds]
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen([sys.executable, *words], cwd=common.ROOT, stdout=output, stderr=output)

    def wait(self) -> None:
        """Returns when it listens.

        Raises:
            InputError: it ended, or did not listen in time.
        """
        end_s = time.monotonic() + START_S
        while not os.path.exists(self.uds):
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise InputError(f"the server did not start: {self._output.read_text()[-500:]}")
            time.sleep(0.05)
        time.sleep(0.5)

    def cpu_s(self) -> float:
        """CPU seconds that it has used."""
        return common.cpu_s(self._process.pid)

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(30.0)


def adapter(command: str, bundle: Path, folder: Path, settings: Mapping[str, Any]) -> Server:
    """`marginroute COMMAND` (`serve` or `envoy`) of a bundle, with settings of the adapter."""
    config = folder / f"{command}.yaml"
    config.write_text(json.dumps({"log": str(folder / f"{command}.jsonl"), **settings}))
    return Server(["marginroute", command, str(bundle), "--config", str(config), "--uds"], folder)
