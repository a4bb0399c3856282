"""A gateway that is told what a verifier turned down: its View is the world's, and it may deliver what is in hand."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, ONE, TWO_A
from test_view_parity import bundle_of

from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.adapters import http_api, schema
from marginroute.errors import InputError
from marginroute.facts import Trial
from marginroute.quality import QualityPrior
from marginroute.telemetry import GatewayState

VERIFIER = {"sensitivity": 0.9, "specificity": 0.8, "max_attempts": 4, "verify_s": 0.05}


@pytest.mark.parametrize("luck", ["shared", "independent"])
def test_the_view_is_the_worlds(tmp_path, luck):
    overrides = {"fleet.verifiers": {"tests": VERIFIER}, "workload.difficulty.luck": luck}
    world = by_hand.scenario(tmp_path, overrides)
    bundle = dataclasses.replace(bundle_of(Plant(world)), prior=Plant(world).prior)
    prior = bundle.prior.p_good(0.0)
    made = by_hand.workload(world, {"p_good_prior": prior.tolist(), "good": [0, 0, 1]})
    made = dataclasses.replace(made, attempt_luck=np.full((1, 4, 3), [[-1.5, 1.0, 1.0]]))
    worlds = FleetWorlds(world, 1)
    worlds.load(0, made)
    state, tiers = GatewayState(bundle, can=("cache",)), ()
    for choice, tier in ((ONE, "weak"), (TWO_A, "strong"), (API, "hosted")):
        worlds.step(np.array([choice]))
        tiers += (tier,)
        theirs = worlds.view()[0]
        score = float(theirs.request[v.VERIFIER_SCORE])
        mine = state.view(100, trial=Trial(tiers, score, waited_s=1.0))
        rows = [v.P_GOOD_PRIOR, v.TRIED, v.SIMILARITY, v.ENTRY_AGE_S]
        np.testing.assert_allclose(mine.signals[rows], theirs.signals[rows], rtol=1e-12)
        rows = [v.TURNED_DOWN, v.VERIFIER_SCORE]
        np.testing.assert_array_equal(mine.request[rows], theirs.request[rows])
        assert mine.legal[4] and theirs.legal[4]
    assert not GatewayState(bundle).view(100, trial=Trial(tiers, 0.5)).legal[4]  # it has nowhere to keep answers
    with pytest.raises(InputError, match="tier"):
        state.view(100, trial=Trial(("nobody",), 0.5))


def test_the_prior_in_a_bundle_says_whose_luck_it_is(hand_plant):
    prior = dataclasses.replace(hand_plant.prior, shared_luck=False)
    assert QualityPrior.from_dict(prior.to_dict()).shared_luck is False
    old = {key: value for key, value in prior.to_dict().items() if key != "shared_luck"}
    assert QualityPrior.from_dict(old).shared_luck is True


def test_the_sidecar_takes_it(hand_plant):
    legal = http_api.decide_schema(hand_plant.layout)
    schema.check({"trial": {"tiers": ["weak", "strong"], "score": 0.3}}, legal)
    with pytest.raises(InputError, match="score is missing"):
        schema.check({"trial": {"tiers": ["weak"]}}, legal)
