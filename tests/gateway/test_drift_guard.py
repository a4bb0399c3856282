"""Drift by PSI and KS: arithmetic on paper, silent without drift, loud with it, and what follows at a gateway."""

import dataclasses
import math

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import features
from marginroute.drift import BINS, FEWEST, KS_LIMIT, WINDOW, DriftMonitor, Histograms, histograms_of, ks, psi
from marginroute.facts import Facts
from marginroute.features import feature_spec
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings

SPEC = feature_spec(small_bundle().layout)
PLACE = {f.name: i for i, f in enumerate(SPEC.context)}


def contexts(rng, n, length=6.0, code=0.3, load=1.0):
    """(n, G) contexts of random requests."""
    made = np.zeros((n, SPEC.n_context), dtype=np.float32)
    made[:, PLACE["class_standard"]] = 1.0
    task = rng.random(n) < code
    made[:, PLACE["task_code"]], made[:, PLACE["task_chat"]] = task, ~task
    made[:, PLACE["prompt_tokens"]] = rng.normal(length, 1.0, n)
    made[:, PLACE["expected_output_tokens"]] = rng.choice([4.0, 5.0, 6.0], n)
    made[:, PLACE["value_usd"]] = rng.normal(2.0, 0.5, n)
    made[:, PLACE["difficulty_signal"]] = rng.normal(0.0, 1.0, n)
    made[:, PLACE["fleet_fill"]] = load
    return made


@pytest.fixture(scope="module")
def histograms():
    return histograms_of(contexts(np.random.default_rng(0), 4096), SPEC)


def test_psi_and_ks_by_hand():
    """Two bins, 0.5 and 0.5 in training, 0.8 and 0.2 now: PSI = 0.3 ln 1.6 + 0.3 ln 2.5, KS = 0.3."""
    recent, training = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    raw = 0.3 * math.log(1.6) + 0.3 * math.log(2.5)
    assert psi(recent, training, 1e12, 1e12) == pytest.approx(raw)
    assert psi(recent, training, 100.0, 1e12) == pytest.approx(raw - 0.01)
    assert ks(recent, training) == pytest.approx(0.3)
    assert psi(training, training, 100.0, 100.0) == 0.0


def test_histograms_are_deciles_and_survive_the_manifest(histograms):
    assert "fleet_fill" not in histograms.names and {"class_standard", "prompt_tokens"} <= set(histograms.names)
    i = histograms.names.index("prompt_tokens")
    assert histograms.shares[i] == pytest.approx(np.full(BINS, 0.1), abs=0.01)
    assert histograms.shares.sum(axis=1) == pytest.approx(1.0)
    again = Histograms.from_dict(histograms.to_dict(), SPEC)
    assert again.names == histograms.names and np.allclose(again.edges, histograms.edges)
    assert np.allclose(again.shares, histograms.shares, atol=1e-6)


def test_without_drift_it_is_silent_and_load_says_nothing(histograms):
    """A dozen windows of the same distribution, at any load."""
    for seed in range(12):
        monitor = DriftMonitor(histograms)
        for row in contexts(np.random.default_rng(seed + 1), WINDOW, load=seed):
            monitor.saw(row)
        assert not monitor.drifted, (seed, monitor.worst, monitor.values())


@pytest.mark.parametrize(
    ("change", "feature"), [({"length": 7.5}, "prompt_tokens"), ({"code": 0.8}, "task_c"), ({"length": 4.0}, "prompt")]
)
def test_drift_is_found_and_forgotten(histograms, change, feature):
    rng, monitor = np.random.default_rng(9), DriftMonitor(histograms)
    for row in contexts(rng, WINDOW):
        monitor.saw(row)
    assert not monitor.drifted
    for row in contexts(rng, WINDOW, **change):
        monitor.saw(row)
    assert monitor.drifted and monitor.worst.startswith(feature) and monitor.ks.max() > KS_LIMIT
    for row in contexts(rng, WINDOW):
        monitor.saw(row)
    assert not monitor.drifted and monitor._counts.sum(axis=1) == pytest.approx(WINDOW)


def test_what_a_gateway_cannot_see_does_not_count(histograms):
    blind, seeing = DriftMonitor(histograms, ("difficulty_signal",)), DriftMonitor(histograms)
    rows = contexts(np.random.default_rng(3), FEWEST)
    rows[:, PLACE["difficulty_signal"]] = 0.0
    for row in rows:
        blind.saw(row)
        seeing.saw(row)
    assert seeing.worst == "difficulty_signal" and not blind.drifted


class Nowhere:
    def write(self, record):
        return True

    def close(self):
        pass


def test_a_gateway_hands_over_on_drift_and_back():
    """Prompts ten times as long as in training; then as in training again."""
    plain = Gateway(small_bundle(), Nowhere())
    rng = np.random.default_rng(0)
    rule = plain.bundle.estimate

    def context(tokens):
        view = plain.state.view(tokens)
        return features.context_features(view, rule.assess(view))

    seen = histograms_of(np.stack([context(int(t)) for t in rng.lognormal(5.0, 0.7, 2000)]), SPEC)
    bundle = dataclasses.replace(small_bundle(), histograms=seen)
    gateway = Gateway(bundle, Nowhere(), ModeSettings("live"))
    gateway.drift.every_s = 0.0

    def play(n, mean, start):
        return [
            gateway.decide(Facts(f"{start}-{i}", int(t))).decision.guard
            for i, t in enumerate(rng.lognormal(mean, 0.7, n))
        ]

    assert set(play(WINDOW, 5.0, "a")) == {""}
    assert play(WINDOW, 7.3, "b")[-1] == "drift" and gateway.drift.worst in ("prompt_tokens", "value_usd")
    assert play(WINDOW + 100, 5.0, "c")[-1] == ""
    gateway.drift.every_s = 3600.0
    before = gateway.drift._n
    play(20, 5.0, "d")
    assert gateway.drift._n <= before + 1  # not every request is looked at
    gateway.close()
    plain.close()


def test_no_candidate_is_there():
    gateway = Gateway(small_bundle(), Nowhere(), ModeSettings("live"))
    decision = gateway.decide(Facts("a", 100, available=())).decision
    assert (decision.guard, decision.kind, decision.policy) == ("missing", "shed", "least-in-flight")
    gateway.close()
