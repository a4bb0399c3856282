"""Which replicas the guard leaves out, and when it hands over instead: every case of a small fleet, by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import view as v
from marginroute.view import View

FRESH_S, OLD_S = 60.0, 60.001  # the limit is 60 s


def expected(legal, old, way=None):
    """(left out, whether the fallback decides) of small/0, large/0 and api."""
    stale = {c for c in (0, 1) if legal[c] and old[c]}
    left = stale - {way}
    others = {c for c in (0, 1, 2) if legal[c]} - left
    if others & {0, 1} or (others and len(left) == 1):
        return left, bool(stale - left)
    return set(), bool(stale)


def view_of(bundle, legal, old, way=None):
    n = bundle.layout.n_candidates
    signals, request = np.zeros((len(v.SIGNALS), n)), np.ones(len(v.REQUEST))
    signals[: v.N_STATIC_SIGNALS], signals[v.IN_FLIGHT_CAP] = bundle.static_signals, v.UNLIMITED
    signals[v.TELEMETRY_AGE_S, :2] = np.where(old, OLD_S, FRESH_S)
    request[[v.CLASS_INDEX, v.TASK_INDEX, v.WAITED_S]] = 0.0
    if way is not None:
        signals[v.UNDER_WAY_S, way] = 0.5
    return View(bundle.layout, signals, request, np.array([*legal, False, False, way is None]))


CASES = [
    (legal, old, way)
    for legal in itertools.product((False, True), repeat=3)
    for old in itertools.product((False, True), repeat=2)
    for way in (None, 0, 1)
    if way is None or legal[way]
]


@pytest.mark.parametrize(("legal", "old", "way"), CASES)
def test_every_case(legal, old, way):
    bundle = small_bundle()
    left, fallback = expected(legal, old, way)
    view, guarded = view_of(bundle, legal, old, way), bundle.guarded()
    trusted = guarded.trusted(view)
    assert set(np.flatnonzero(view.legal & ~trusted.legal)) == left
    assert (trusted.legal == guarded.trusted(trusted).legal).all()
    many = View(view.layout, view.signals[:, None], view.request[:, None], view.legal[None])
    for policy in (guarded, replace(guarded, fast=None)):
        decision = policy.decide(view)
        assert decision.guard == ("stale" if fallback else "")
        assert set(decision.left_out) == {bundle.layout.names[c] for c in left}
        assert policy.objects(many)[0] == fallback and policy.decide_batch(many)[0] == decision.candidate
        handed = policy.hand_over(view, "drift")
        assert (handed.guard, handed.left_out) == ("drift", decision.left_out)
        assert handed.candidate not in left


def test_an_unknown_age_is_not_left_out_but_handed_over():
    bundle = small_bundle()
    view = view_of(bundle, (True, True, True), (False, False))
    view.signals[v.TELEMETRY_AGE_S, 0] = np.nan
    decision = bundle.guarded().decide(view)
    assert (decision.guard, decision.left_out) == ("stale", ())
