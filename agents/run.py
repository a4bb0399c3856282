"""The run folder: everything needed to repeat, resume, evaluate and export a training.

- run.json: command, seed, versions, scenario name and hash, status, history of validations, gate
- scenario.json: the resolved scenario
- training.json: the training configuration
- baselines.yaml: tuned baselines
- policy.zip: Stable-Baselines3's archive of the policy chosen on validation
- checkpoints/: archives of the training, the newest is what --resume continues from
- tb/: TensorBoard
- bundle/: the export, as the gate decided
"""

from __future__ import annotations

import json
import platform
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agents.baselines import write_text
from agents.config import TrainingConfig
from envs.scenario import Scenario
from marginroute import __version__, bundle
from marginroute.errors import InputError
from marginroute.policy import Policy

PACKAGES = ("torch", "stable-baselines3", "gymnasium", "numpy", "numba", "optuna", "scipy")


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"python": platform.python_version(), "marginroute": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Run:
    """A run folder.

    Args:
        folder: where it is or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def policy_path(self) -> Path:
        """The archive of the chosen policy."""
        return self.folder / "policy.zip"

    @property
    def bundle_path(self) -> Path:
        """The exported bundle."""
        return self.folder / "bundle"

    def create(self, scenario: Scenario, config: TrainingConfig, seed: int, command: str) -> None:
        """Starts a new run folder.

        Raises:
            InputError: the folder holds something already.
        """
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} is not empty; name a new folder with --out, or go on with --resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "scenario.json", scenario.model_dump_json(indent=1) + "\n")
        write_text(self.folder / "training.json", config.model_dump_json(indent=1) + "\n")
        self.update(
            command=command,
            seed=seed,
            scenario={"name": scenario.name, "hash": scenario.hash},
            versions=versions(),
            status="started",
            history=[],
        )

    def info(self) -> dict[str, Any]:
        """Content of run.json.

        Raises:
            InputError: not a run folder.
        """
        path = self.folder / "run.json"
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            raise InputError(f"{self.folder} is not a run folder ({path.name} is missing or broken)") from None

    def update(self, **values: Any) -> None:
        """Sets entries of run.json."""
        path = self.folder / "run.json"
        data = self.info() if path.exists() else {}
        write_text(path, json.dumps({**data, **values}, indent=1) + "\n")

    def scenario(self) -> Scenario:
        """The scenario as it was resolved."""
        return Scenario.model_validate_json(self._text("scenario.json"), strict=False)

    def config(self) -> TrainingConfig:
        """The training configuration."""
        return TrainingConfig.model_validate_json(self._text("training.json"))

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except OSError:
            raise InputError(f"{self.folder} is not a complete run folder ({name} is missing)") from None

    def newest_checkpoint(self) -> Path:
        """The archive to resume from.

        Raises:
            InputError: there is none, or the newest one is not a complete archive.
        """
        archives = sorted((self.folder / "checkpoints").glob("step_*.zip"))
        if not archives:
            raise InputError(f"{self.folder} has no checkpoint to resume from; start again without --resume")
        return check_archive(archives[-1])


def check_archive(path: Path) -> Path:
    """The path of a Stable-Baselines3 archive, if it is whole.

    Raises:
        InputError: missing or corrupt.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None and {"data", "policy.pth"} <= set(zipfile.ZipFile(path).namelist()):
            return path
    except (OSError, zipfile.BadZipFile):
        pass
    raise InputError(f"{path} is missing or corrupt; resume from another checkpoint or train again")


def load_policy(folder: Path) -> Policy:
    """The guarded policy of a run folder or a bundle.

    Raises:
        InputError: neither, an unfinished run, or a bundle that does not verify.
    """
    if (folder / "manifest.json").is_file():
        return bundle.load(folder).guarded()
    run = Run(folder)
    status = run.info().get("status")
    if not (run.bundle_path / "manifest.json").is_file():
        raise InputError(
            f"{folder} has no exported policy (status: {status}); finish it with train.py --resume {folder}"
        )
    return bundle.load(run.bundle_path).guarded()
