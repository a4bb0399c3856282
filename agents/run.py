"""The run folder: everything needed to repeat, resume, evaluate and export a training.

- run.json: command, seed, versions, scenario name and hash, status, history of validations, gate
- scenario.json: the resolved scenario
- training.json: the training configuration
- baselines.yaml: tuned baselines
- policy.zip: Stable-Baselines3's archive of the policy chosen on validation
- checkpoints/: archives of the training, the newest is what --resume continues from
- controller.zip, controllers/: the same of the controller, where the scenario has one
- tb/: TensorBoard
- bundle/: the export, as the gate decided
"""

from __future__ import annotations

import json
import platform
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from agents.config import TrainingConfig
from envs.scenario import Scenario
from marginroute import __version__, bundle
from marginroute.errors import InputError
from marginroute.view import Layout
from marginroute.whole_file import replacing

Model = TypeVar("Model", Scenario, TrainingConfig)
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
    def controller_path(self) -> Path:
        """The archive of the controller that was best on the engine."""
        return self.folder / "controller.zip"

    def controller_checkpoint(self, steps: int) -> Path:
        """The archive of the controller's training after so many ticks."""
        return self.folder / "controllers" / f"step_{steps:010d}.zip"

    def newest_controller(self) -> Path | None:
        """The archive that the controller's training goes on from; None: it has not got as far as a first one."""
        return max((self.folder / "controllers").glob("step_*.zip"), default=None)

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made ({error.strerror}); name a new folder with --out") from None
        self._write("scenario.json", scenario.model_dump_json(indent=1, by_alias=True) + "\n")
        self._write("training.json", config.model_dump_json(indent=1) + "\n")
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
            data = json.loads(path.read_text())
            if {"command", "seed", "scenario", "versions", "history"} <= data.keys():
                return dict(data)
        except (OSError, ValueError, AttributeError):
            pass
        raise InputError(f"{self.folder} is not a run folder ({path.name} is missing or broken)")

    def update(self, **values: Any) -> None:
        """Sets entries of run.json."""
        data = self.info() if (self.folder / "run.json").exists() else {}
        self._write("run.json", json.dumps({**data, **values}, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as partial:
            partial.write_text(text)

    def scenario(self) -> Scenario:
        """The scenario as it was resolved."""
        return self._read("scenario.json", Scenario)

    def config(self) -> TrainingConfig:
        """The training configuration."""
        return self._read("training.json", TrainingConfig)

    def _read(self, name: str, model: type[Model]) -> Model:
        try:
            return model.model_validate_json((self.folder / name).read_text(), strict=False)
        except OSError:
            raise InputError(f"{self.folder} is not a complete run folder ({name} is missing)") from None
        except ValueError:
            raise InputError(f"{self.folder / name} is broken or of another version; train again") from None

    @property
    def has_checkpoint(self) -> bool:
        """Whether it got as far as a first checkpoint."""
        return any((self.folder / "checkpoints").glob("step_*.zip"))

    def newest_checkpoint(self) -> Path:
        """The archive to resume from.

        Raises:
            InputError: there is none, or the newest one is not a complete archive.
        """
        archives = sorted((self.folder / "checkpoints").glob("step_*.zip"))
        if not archives:
            raise InputError(f"{self.folder} has no checkpoint to resume from; start again without --resume")
        return check_archive(archives[-1])


@dataclass(frozen=True)
class Training:
    """A run that is carried out, and what all stages need of it.

    Attributes:
        run: its folder.
        scenario: as it was resolved, overrides and the log's changes included.
        config: its settings.
        seed: of the training.
        started_s: `time.monotonic()` when the command started.
        resumed: whether the stages go on where they were interrupted.
    """

    run: Run
    scenario: Scenario
    config: TrainingConfig
    seed: int
    started_s: float
    resumed: bool = False


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


def check_fits(layout: Layout, scenario: Scenario, folder: Path) -> None:
    """Refuses a policy that was made for other pools, providers, tiers, classes or tasks; replicas may differ.

    Raises:
        InputError: the first difference.
    """
    stations = (*scenario.pool_names, *scenario.provider_names)
    for what, theirs, ours in (
        ("pools and providers", layout.station_names, stations),
        ("tiers", layout.tier_names, scenario.tier_names),
        ("classes", layout.class_names, scenario.class_names),
        ("tasks", layout.task_names, scenario.task_names),
    ):
        if theirs != ours:
            raise InputError(
                f"{folder} was trained for the {what} {', '.join(theirs)}; scenario {scenario.name!r} has "
                f"{', '.join(ours)}; train on that scenario"
            )


def load_bundle(folder: Path, scenario: Scenario | None = None) -> bundle.Bundle:
    """The bundle of a run folder, or the bundle that the folder is, for the scenario that it will decide in.

    Raises:
        InputError: neither, an unfinished run, a bundle that does not verify, or one of another fleet.
    """
    read = bundle.load(_bundle_folder(folder))
    if scenario is not None:
        check_fits(read.layout, scenario, folder)
    return read


def _bundle_folder(folder: Path) -> Path:
    if (folder / "manifest.json").is_file():
        return folder
    run = Run(folder)
    status = run.info().get("status")
    if not (run.bundle_path / "manifest.json").is_file():
        raise InputError(
            f"{folder} has no exported policy (status: {status}); finish it with train.py --resume {folder}"
        )
    return run.bundle_path
