"""Scenario = fleet + plans + workload + horizon: the only place that knows configuration files.

`load_scenario("quickstart")` reads `configs/scenarios/quickstart.yaml`, replaces the names in it by the files they
mean, applies overrides, checks everything, and turns list prices into numbers. What comes out is immutable and has a
hash; whatever else the project needs (arrays of terms, the engine's fleet, workloads) is compiled from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from envs import scenario_checks, scenario_compile, scenario_faults, scenario_files, scenario_terms
from envs.scenario_drift import DriftSection, drift_laws
from envs.scenario_family import DRAWS, Range, check_family, drawn, under, without_ranges_of
from envs.scenario_fleet import FleetSection
from envs.scenario_plans import PlansSection
from envs.scenario_section import Name, NonNegative, Positive, Section
from envs.scenario_workload import WorkloadSection
from envs.workload.drift import draw_drifts
from envs.workload.generator import generate
from envs.workload.requests import Workload
from envs.workload.spec import WorkloadSpec
from envs.workload.traces import FORMATS, Trace, read_trace
from envs.workload.traces_window import block, window
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.fleet.spec import FleetSpec

Array = np.ndarray[Any, Any]
Split = Literal["train", "validation", "heldout"]

SPLIT_CODE = {"train": 0, "validation": 1, "heldout": 2}
_SEED_SALT = 0x6D617267  # "marg": keeps workload streams apart from anyone else's use of the same seed
_FAMILY_SALT = 0x66616D69  # "fami"
_BILLING_SALT = 0x62696C6C  # "bill"
_FAULT_SALT = 0x6661756C  # "faul"
_DRIFT_SALT = 0x64726966  # "drif"


def _format(name: str) -> str:
    if name and name not in FORMATS:
        raise ValueError(f"trace format {name!r} is not legal; legal is {', '.join(FORMATS)}")
    return name


class TraceSection(Section):
    """Recorded requests in place of generated arrivals and lengths."""

    path: str = Field(description="File of the trace; not part of the scenario's hash.")
    format: Annotated[str, AfterValidator(_format)] = Field(
        "", description=f"Layout of the file: {', '.join(FORMATS)}; empty: told from its content."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="csv: our column name to the file's.")
    block_tokens: Annotated[int, Field(ge=1)] = Field(512, description="csv: prompt tokens per number in hash_ids.")
    start_s: NonNegative = Field(0.0, description="servegen: start of the sampled stretch.")
    end_s: Positive | None = Field(None, description="servegen: its end; left out: one hour later.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="servegen: of the sample.")
    session_gap_s: NonNegative = Field(60.0, description="agent-sessions: seconds between starts of sessions.")
    sha256: str = Field("", description="Digest of the file, filled in when it is read.")


class ControlSection(Section):
    """The controller's clock."""

    tick_s: Positive = Field(60.0, description="Seconds between two decisions of the controller.")


class Scenario(Section):
    """A complete, resolved scenario."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$")] = Field(
        description="Name shown in reports and given to run folders."
    )
    description: str = Field("", description="One line about the scenario.")
    fleet: FleetSection = Field(description="What can answer, or the name of a file in configs/fleets.")
    plans: PlansSection = Field(description="What customers pay, or the name of a file in configs/plans.")
    workload: WorkloadSection = Field(description="What is asked, or the name of a file in configs/workloads.")
    horizon_s: Positive = Field(description="Length of an episode in seconds.")
    requests_per_episode: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Exact number of requests of an episode at load_scale 1; left out: whatever arrives."
    )
    load_scale: Positive = Field(
        1.0, description="Multiplies arrivals per second; a trace is played that much faster than recorded."
    )
    trace: TraceSection | None = Field(None, description="Recorded requests; left out: the generator.")
    drift: dict[Name, DriftSection] = Field(
        default_factory=dict, description="What changes inside an episode without notice, by a name of its own."
    )
    objective: Literal["margin", "margin_and_lifetime"] = Field(
        "margin", description="What rewards add up to: margin, or margin less lifetime value lost (retention)."
    )
    control: ControlSection | None = Field(
        None, description="The controller's clock; left out: replicas, caps and holding stay as they are."
    )
    ranges: dict[str, Range] = Field(
        default_factory=dict, description="Dotted keys in which the worlds of the scenario differ, and how."
    )
    conditions: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="Named changes, dotted keys to values, for examination only."
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """(K,) customer classes."""
        return tuple(self.plans.classes)

    @property
    def task_names(self) -> tuple[str, ...]:
        """(J,) task types."""
        return tuple(self.workload.tasks)

    @property
    def tier_names(self) -> tuple[str, ...]:
        """(T,) models."""
        return tuple(self.fleet.tiers)

    @property
    def pool_names(self) -> tuple[str, ...]:
        """(P,) pools of replicas."""
        return tuple(self.fleet.pools)

    @property
    def provider_names(self) -> tuple[str, ...]:
        """(V,) third-party APIs."""
        return tuple(self.fleet.providers)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the resolved scenario, names and prices replaced by content.

        Conditions do not enter: nothing is tuned or trained under them, and each is a scenario with a hash of its own.
        Neither do titles and descriptions.
        """
        data = _without_prose({key: value for key, value in self.resolved().items() if key != "conditions"})
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def resolved(self) -> dict[str, Any]:
        """The whole scenario as plain data without machine-dependent notes; what the hash is taken of.

        Keys at their defaults are left out, so that a key that a later version adds changes no hash.
        """
        data = self.model_dump(mode="json", exclude_defaults=True)
        for provider in data["fleet"].get("providers", {}).values():
            provider.pop("price_source", None)  # the figures count, not the release that listed them
        data.get("trace", {}).pop("path", None)
        return data

    @cached_property
    def workload_spec(self) -> WorkloadSpec:
        """The workload's distributions as plain numbers."""
        return scenario_compile.workload_spec(self)

    @cached_property
    def expected_output_tokens(self) -> Array:
        """(J,) mean output tokens per task: what an operator's history tells before the first request."""
        lengths = {id(mixture): mixture for mixture in self.workload_spec.output_lengths}
        means = {key: mixture.mean_tokens() for key, mixture in lengths.items()}
        return np.array([means[id(mixture)] for mixture in self.workload_spec.output_lengths])

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Scenario:
        """A changed copy; what was derived from the old values is derived anew."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("hash", "workload_spec", "expected_output_tokens", "variants"):
            copy.__dict__.pop(name, None)
        if update and "trace" in update and update["trace"] is None:
            copy.__dict__.pop("recorded", None)
        return copy

    def terms(self) -> Array:
        """(K,) contracts of the classes, `envs.economics.plans.TERMS`."""
        return scenario_terms.terms(self)

    def fleet_spec(self) -> FleetSpec:
        """The fleet as the engine takes it."""
        return scenario_compile.fleet_spec(self)

    def generate(self, seed: int, split: Split = "train") -> Workload:
        """The workload of one episode; the same bytes for the same split and seed.

        Splits never share a stream: a seed of `train` says nothing about the same seed of `heldout`.
        """
        variant, rng = self.stream(seed, split)
        member = self.variants[variant]
        given = None
        if member.recorded is not None:
            given = window(
                member.recorded, SPLIT_CODE[split], member.horizon_s, rng, member.class_names, member.load_scale
            )
        entropy = (SPLIT_CODE[split], int(seed), _SEED_SALT)
        drifts = draw_drifts(drift_laws(member), (*entropy, _DRIFT_SALT))
        faults = scenario_faults.faults(member, (*entropy, _FAULT_SALT), drifts)
        billing = scenario_terms.billing(member, (*entropy, _BILLING_SALT))
        return generate(member.workload_spec, rng, given, drifts, variant=variant, faults=faults, billing=billing)

    def stream(self, seed: int, split: Split) -> tuple[int, np.random.Generator]:
        """Which of `variants` an episode plays in, and the generator that its workload is drawn with."""
        if split not in SPLIT_CODE:
            raise InputError(f"split {split!r} is not legal; legal is {', '.join(SPLIT_CODE)}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed} is not legal; legal is 0 to {2**32 - 1}")
        variant = SPLIT_CODE[split] * DRAWS + seed % DRAWS if self.ranges else 0
        return variant, np.random.default_rng([SPLIT_CODE[split], int(seed), _SEED_SALT])

    def block(self, seed: int, split: Split) -> int:
        """Which episode-long block of its part of the trace an episode starts in; -1 without a trace."""
        variant, rng = self.stream(seed, split)
        member = self.variants[variant]
        if member.recorded is None:
            return -1
        return block(member.recorded, SPLIT_CODE[split], member.horizon_s, rng, member.load_scale)

    @cached_property
    def variants(self) -> tuple[Scenario, ...]:
        """What `Workload.variant` means: the draws of every split, or the scenario alone where nothing has a range."""
        if not self.ranges:
            return (self,)
        rngs = [np.random.default_rng([code, i, _FAMILY_SALT]) for code in SPLIT_CODE.values() for i in range(DRAWS)]
        return tuple(drawn(self, rng.random(len(self.ranges))) for rng in rngs)

    def under(self, condition: str) -> Scenario:
        """The scenario under one of its held-out conditions; every world is alike there."""
        return under(self, condition)

    @cached_property
    def recorded(self) -> Trace | None:
        """The recorded requests, if the scenario has any."""
        if self.trace is None:
            return None
        options = self.trace.model_dump(include={"block_tokens", "start_s", "end_s", "seed", "session_gap_s"})
        trace = read_trace(self.trace.path, self.trace.format, self.trace.columns or None, **options)
        if self.trace.sha256 and self.trace.sha256 != _digest(self.trace.path):
            raise InputError(f"{self.trace.path}: is not the file that the run began with; legal is the same content")
        return trace


def _digest(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        text = "".join(f"{file.relative_to(path)} {_digest(str(file))}\n" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_prose(data: Any) -> Any:
    if isinstance(data, list):
        return [_without_prose(item) for item in data]
    if not isinstance(data, dict):
        return data
    prose = {key for key in ("title", "description") if isinstance(data.get(key), str)}
    return {key: _without_prose(value) for key, value in data.items() if key not in prose}


def load_scenario(
    name_or_path: str | Path = "quickstart",
    overrides: Mapping[str, Any] | None = None,
    trace: str | Path | None = None,
    trace_format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Scenario:
    """Reads, checks and resolves a scenario.

    Args:
        name_or_path: a name in `configs/scenarios`, or the path of a YAML file.
        overrides: values by dotted key, such as {"fleet.pools.large.replicas": 2}; strings are parsed as YAML. What is
            set so has no range any more.
        trace: file of recorded requests that replace generated arrivals and lengths.
        trace_format: its layout, one of `envs.workload.traces.FORMATS`; None: told from its content.
        columns: for `csv`, our column names to the file's.

    Raises:
        InputError: one sentence: file or override, key path, value, what is legal.
    """
    overrides = dict(overrides or {})
    path = scenario_files.locate(name_or_path, "scenario")
    raw = {"name": path.stem, **scenario_files.read_yaml(path)}
    data, files = scenario_files.compose(raw, path, overrides)
    data = scenario_files.apply_overrides(Scenario, without_ranges_of(data, overrides), overrides)
    if trace is not None:
        trace_path = str(Path(trace).resolve())
        data["trace"] = {"path": trace_path, "format": trace_format or "", "columns": dict(columns or {})}
        if trace_format and trace_format not in FORMATS:
            raise InputError(f"trace format {trace_format!r} is not legal; legal is {', '.join(FORMATS)}")
    scenario = _validated(data, files, overrides)
    found = list(scenario_checks.problems(scenario))
    if found:
        raise scenario_files.cross_error(found, files, overrides)
    scenario = _resolved(scenario, files, overrides)
    check_family(scenario, conditions=not overrides or any(key.startswith("conditions") for key in overrides))
    return scenario


def _validated(data: dict[str, Any], files: Mapping[str, str], overrides: Mapping[str, Any]) -> Scenario:
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise scenario_files.input_error(error, Scenario, data, files, overrides) from None


def _resolved(scenario: Scenario, files: Mapping[str, str], overrides: Mapping[str, Any]) -> Scenario:
    """Replaces list-price names and profile names by their content, and notes the trace's digest."""

    def place(*path: str) -> str:
        return scenario_files.place(["fleet", *path], files, overrides)

    fleet = scenario_compile.with_profiles(scenario_compile.with_prices(scenario.fleet, place), place)
    update: dict[str, Any] = {"fleet": fleet}
    if scenario.trace is not None:
        _check_trace_classes(scenario)
        digest = _digest(scenario.trace.path)
        update["trace"] = scenario.trace.model_copy(update={"sha256": digest})
        update["requests_per_episode"] = None
    return scenario.model_copy(update=update)


def _check_trace_classes(scenario: Scenario) -> None:
    """A class column that was asked for must name the scenario's classes."""
    trace = scenario.recorded
    if trace is None or trace.class_name is None or "class" not in scenario.trace.columns:
        return
    unknown = np.flatnonzero(~np.isin(trace.class_name, scenario.class_names))
    if len(unknown):
        row, legal = int(unknown[0]), ", ".join(scenario.class_names)
        name = trace.class_name[row]
        raise InputError(f"{trace.path}, line {row + 2}: class {str(name)!r} is not in the plans; legal is {legal}")
