"""The bundle: a trained policy on disk, as data that any gateway can verify and run.

A bundle is a folder of up to seven files, none of which can execute anything:

    manifest.json   everything but arrays: format, versions, scenario, layout, contract terms, candidate constants,
                    advice and fallback heuristics, FeatureSpec with its normaliser, guard limits, evaluation table,
                    sha256 of the other files, and `digest`, the sha256 of the manifest itself without that field
    weights.npz     network weights by name (absent if the gate exported the heuristic: `learned: none`)
    policy.onnx     the same network with its normaliser as an ONNX graph, for gateways in other languages
    parity.npz      observations and the logits and choices that the trained policy gave for them
    quality.npz     predictor of P(good answer) from a prompt's text, where one was exported along
    controller.npz, controller_parity.npz
                    the same as weights and parity of the controller, where one was learned; its rule and layout stand
                    in the manifest (`marginroute.control_policy`)

`load` refuses a bundle whose hashes, format or feature version differ, and one whose network does not reproduce the
parity vectors to 1e-5, or whose predictor does not reproduce the manifest's probe to 1e-9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from marginroute import __version__, control_policy, heuristics
from marginroute.bundle_files import FORMAT, arrays_of, npz_bytes, number, read_manifest, verified, write
from marginroute.bundle_shape import check_predictor, check_shape
from marginroute.control_rules import Controller
from marginroute.drift import Histograms
from marginroute.errors import InputError
from marginroute.features import FEATURE_VERSION, FeatureSpec
from marginroute.features import split as split_observation
from marginroute.guard import GuardedPolicy, GuardLimits
from marginroute.margin_rule import MarginRule
from marginroute.policy import WEIGHT_NAMES, Network, Policy, ResidualPolicy
from marginroute.predictor import QualityPredictor
from marginroute.quality import QualityPrior
from marginroute.rate_limits import RateLimit, rate_limits_from
from marginroute.rules import RuleOfThumb
from marginroute.view import REQUEST_NAMES, SIGNAL_NAMES, Array, Layout

PARITY_TOLERANCE = 1e-5
PROBE = "Write a Python function that returns the 12 largest primes below n.\nWhy does it stop? \u00bfPor qu\u00e9?"
PROBE_TOLERANCE = 1e-9
CONTROLLER_FILES = (control_policy.WEIGHTS_FILE, control_policy.PARITY_FILE)
FILES = ("weights.npz", "policy.onnx", "parity.npz", "quality.npz", *CONTROLLER_FILES)  # beside the manifest


@dataclass(frozen=True, eq=False)
class Bundle:
    """A policy and everything a gateway needs to run it.

    Attributes:
        policy: the policy, without guard.
        fallback: heuristic that the guard hands over to.
        limits: the guard's limits.
        layout: candidates.
        static_signals: (S_static, C) candidate constants, first rows of `View.signals`.
        slots: (P,) sequence slots of a replica of each pool.
        terms: contract terms by class name and term name.
        allowed: (K, C) bool, candidates that each class is entitled to.
        output_tokens: expected output tokens by class and task, (K, J).
        prior: public prior of P(good) by tier.
        scenario: name and hash of the scenario that it was trained for.
        evaluation: the table it was judged by, free form.
        provenance: versions, command, seed, training time.
        predictor: of P(good answer) from the prompt, its models named as tiers; None: the prior is all there is.
        controller: sets the levers of a control tick, `controller.decide(view)`; None: the scenario has no controller.
        histograms: of context features in training, which drift is judged by; None: it is not.
        rate_limits: of providers, by name; those that are missing have none.
        digest: sha256 of the manifest that it was loaded from; empty for a bundle in the making.
    """

    policy: Policy
    fallback: MarginRule | RuleOfThumb
    limits: GuardLimits
    layout: Layout
    static_signals: Array
    slots: Array
    terms: dict[str, dict[str, float]]
    allowed: Array
    output_tokens: Array
    prior: QualityPrior
    scenario: dict[str, str]
    evaluation: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    predictor: QualityPredictor | None = None
    controller: Controller | None = None
    histograms: Histograms | None = None
    rate_limits: Mapping[str, RateLimit] = field(default_factory=dict)
    digest: str = ""

    @property
    def learned(self) -> str:
        """`residual` if a network corrects the advice, `none` if a heuristic was exported."""
        return "residual" if isinstance(self.policy, ResidualPolicy) else "none"

    @property
    def estimate(self) -> MarginRule | None:
        """The margin rule that puts USD on candidates: the policy itself or its advice; None: a rule without money."""
        rule = self.policy.advice if isinstance(self.policy, ResidualPolicy) else self.policy
        return rule if isinstance(rule, MarginRule) else None

    def required_estimate(self) -> MarginRule:
        """The same; raises InputError where there is none."""
        if self.estimate is None:
            raise InputError(
                f"exploration needs expected USD, and {self.policy.name} has none; legal is a bundle whose policy is a "
                "margin rule or a network that corrects one"
            )
        return self.estimate

    def guarded(self) -> GuardedPolicy:
        """The policy as a gateway should run it."""
        guarded = GuardedPolicy(self.policy, self.fallback, self.limits)
        return guarded.prepared(self.layout, self.static_signals)


def _described(predictor: QualityPredictor) -> dict[str, Any]:
    """What the manifest says of a predictor; `auc` is null where it was not measured."""
    return {
        "models": list(predictor.models),
        "auc": [float(x) if np.isfinite(x) else None for x in predictor.auc],
        "source": predictor.source,
        "probe": {"text": PROBE, "p_good": predictor.p_good(PROBE).tolist()},
    }


def parity_logits(policy: ResidualPolicy, observation: Array) -> Array:
    """Masked logits (B, C) of the numpy runtime for flat observations (B, D)."""
    spec = policy.spec
    n_candidates = (observation.shape[-1] - spec.n_context) // (spec.n_candidate + 2)
    candidate, context, advice, legal = split_observation(observation, n_candidates, spec)
    return np.where(legal > 0.5, policy.folded.logits(candidate, context, advice), -np.inf)


def check_folder(folder: Path) -> None:
    """Raises InputError where no bundle may be written: a file, or a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a new folder for the export")
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise InputError(f"{folder} exists and is not a bundle; name a new folder for the export")


def save(
    bundle: Bundle,
    folder: Path,
    parity: dict[str, Array] | None = None,
    onnx: bytes | None = None,
    control_parity: dict[str, Array] | None = None,
) -> None:
    """Writes a bundle; the folder appears complete or not at all.

    Args:
        bundle: what to write.
        folder: where; must not exist, or be an earlier bundle, which is replaced.
        parity: `observation` (B, D) and the trained policy's `logits` (B, C); required for a learned policy.
        onnx: a learned policy's network as an ONNX file, for gateways in other languages.
        control_parity: `inputs` (B, D + A) and the trained controller's `correction` (B, A); for a learned one.

    Raises:
        InputError: the folder exists and is not a bundle.
    """
    check_folder(folder)
    policy, files = bundle.policy, {}
    advice = policy.advice if isinstance(policy, ResidualPolicy) else policy
    assert isinstance(advice, MarginRule | RuleOfThumb)
    if isinstance(policy, ResidualPolicy):
        assert parity is not None
        files = {"weights.npz": npz_bytes(policy.network.arrays()), "parity.npz": npz_bytes(parity)}
        if onnx is not None:
            files["policy.onnx"] = onnx
    if bundle.predictor is not None:
        check_predictor(bundle.predictor, bundle.layout)
        files["quality.npz"] = bundle.predictor.to_bytes()
    if isinstance(bundle.controller, control_policy.LearnedController):
        assert control_parity is not None
        archives = bundle.controller.network.arrays(), control_parity
        files |= {name: npz_bytes(x) for name, x in zip(CONTROLLER_FILES, archives, strict=True)}
    manifest = {
        "format": FORMAT,
        "feature_version": FEATURE_VERSION,
        "marginroute_version": __version__,
        "policy": policy.name,
        "learned": bundle.learned,
        "scenario": bundle.scenario,
        "layout": bundle.layout.to_dict(),
        "signals": list(SIGNAL_NAMES),
        "request": list(REQUEST_NAMES),
        "static_signals": bundle.static_signals.tolist(),
        "slots": bundle.slots.tolist(),
        "terms": bundle.terms,
        "allowed": {
            name: [c for c, may in zip(bundle.layout.names, row, strict=True) if may]
            for name, row in zip(bundle.layout.class_names, bundle.allowed, strict=True)
        },
        "rate_limits": {name: limit.to_dict() for name, limit in bundle.rate_limits.items()},
        "output_tokens": bundle.output_tokens.tolist(),
        "prior": bundle.prior.to_dict(),
        "quality": None if bundle.predictor is None else _described(bundle.predictor),
        "advice": heuristics.to_dict(advice),
        "fallback": heuristics.to_dict(bundle.fallback),
        "spec": policy.spec.to_dict() if isinstance(policy, ResidualPolicy) else None,
        "guard": bundle.limits.to_dict(),
        "drift": None if bundle.histograms is None else bundle.histograms.to_dict(),
        "controller": None if bundle.controller is None else control_policy.described(bundle.controller),
        "evaluation": bundle.evaluation,
        "provenance": bundle.provenance,
    }
    write(folder, manifest, files, check=load)


def load(folder: str | Path) -> Bundle:
    """Reads and verifies a bundle.

    Raises:
        InputError: missing, tampered with, incompatible, inconsistent, or not reproducing its parity vectors.
    """
    folder = Path(folder)
    try:
        bundle = _load(folder, read_manifest(folder))
        check_shape(bundle, str(folder))
        return bundle
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} lacks something that this marginroute needs ({error}); export it again") from None


def _load(folder: Path, manifest: dict[str, Any]) -> Bundle:
    if manifest["signals"] != list(SIGNAL_NAMES) or manifest["request"] != list(REQUEST_NAMES):
        raise InputError(f"{folder} was exported for other View signals; train and export the policy again")
    for name in manifest["sha256"]:
        if name not in FILES:
            raise InputError(f"{folder} names a file {name!r} that is no part of a bundle; legal: {', '.join(FILES)}")
        verified(folder, name, manifest["sha256"])
    policy: Policy = heuristics.from_dict(manifest["advice"])
    if manifest["learned"] == "residual":
        weights = arrays_of(folder, "weights.npz", manifest["sha256"])
        parity = arrays_of(folder, "parity.npz", manifest["sha256"])
        assert isinstance(policy, MarginRule)
        network = Network(*(weights[name] for name in WEIGHT_NAMES))
        policy = ResidualPolicy(manifest["policy"], policy, FeatureSpec.from_dict(manifest["spec"]), network)
        ours, theirs = parity_logits(policy, parity["observation"]), parity["logits"]
        legal = ours != -np.inf
        if not np.allclose(ours[legal], theirs[legal], rtol=0.0, atol=PARITY_TOLERANCE):
            raise InputError(f"{folder} does not reproduce its parity vectors to {PARITY_TOLERANCE} on this machine")
    predictor = None
    if manifest.get("quality") is not None:
        data = verified(folder, "quality.npz", manifest["sha256"])
        predictor = QualityPredictor.from_bytes(data, str(folder / "quality.npz"))
        probe = manifest["quality"]["probe"]
        if not np.allclose(predictor.p_good(probe["text"]), probe["p_good"], rtol=0.0, atol=PROBE_TOLERANCE):
            raise InputError(f"{folder} does not reproduce its probe prompt to {PROBE_TOLERANCE} on this machine")
    controller = manifest.get("controller")
    if controller is not None:

        def arrays(name: str) -> dict[str, Array]:
            return arrays_of(folder, name, manifest["sha256"])

        controller = control_policy.read(controller, arrays, str(folder))
    histograms = None
    if manifest.get("drift") is not None and isinstance(policy, ResidualPolicy):
        histograms = Histograms.from_dict(manifest["drift"], policy.spec)
    layout = Layout.from_dict(manifest["layout"])
    return Bundle(
        policy=policy,
        fallback=heuristics.from_dict(manifest["fallback"]),
        limits=GuardLimits(**manifest["guard"]),
        layout=layout,
        static_signals=np.array([[number(x) for x in row] for row in manifest["static_signals"]]),
        slots=np.array(manifest["slots"], dtype=np.float64),
        terms={k: {name: number(x) for name, x in row.items()} for k, row in manifest["terms"].items()},
        allowed=np.array([np.isin(layout.names, manifest["allowed"][name]) for name in layout.class_names]),
        output_tokens=np.array(manifest["output_tokens"], dtype=np.float64),
        prior=QualityPrior.from_dict(manifest["prior"]),
        scenario=dict(manifest["scenario"]),
        evaluation=dict(manifest["evaluation"]),
        provenance=dict(manifest["provenance"]),
        predictor=predictor,
        controller=controller,
        histograms=histograms,
        rate_limits=rate_limits_from(manifest.get("rate_limits", {})),
        digest=manifest["digest"],
    )
