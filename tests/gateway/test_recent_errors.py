"""The share of recent errors: the gateway's own count is the world's."""

import numpy as np
import pytest
from test_telemetry import Clock, small_bundle

from envs.fleet.state import record_array
from envs.world_elastic import note_call
from envs.world_state import OWN
from marginroute import view as v
from marginroute.latency import recent_errors
from marginroute.telemetry import GatewayState


def errors(state):
    """`recent_errors` of all candidates now."""
    return state.view(50).signals[v.RECENT_ERRORS]


def test_one_error_counts_a_fifth_and_halves_in_ten_seconds():
    clock = Clock()
    state = GatewayState(small_bundle(), clock)
    state.begin("a", 1, 50)
    state.end("a", "failed")
    assert errors(state).tolist() == pytest.approx([0.0, 0.2, 0.0, 0.0, 0.0, 0.0])
    clock.now_s += 10.0
    assert errors(state)[1] == pytest.approx(0.1)


def test_users_who_leave_say_nothing_about_a_candidate():
    state = GatewayState(small_bundle(), Clock())
    for status in ("abandoned", "shed", "completed"):
        state.begin("a", 0, 50)
        state.end("a", status)
    assert not errors(state).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_gateway_counts_as_the_world_does(seed):
    rng, clock = np.random.default_rng(seed), Clock()
    state, own = GatewayState(small_bundle(), clock), record_array(2, OWN)
    for step in range(60):
        clock.now_s += float(rng.exponential(4.0))
        candidate, failed = int(rng.integers(2)), bool(rng.random() < 0.4)
        state.begin(str(step), candidate, 50)
        state.end(str(step), "failed" if failed else "completed", 5)
        note_call(own[candidate], failed, clock.now_s)
        theirs = [recent_errors(mine["error_share"], clock.now_s - mine["error_at_s"]) for mine in own]
        np.testing.assert_allclose(errors(state)[:2], theirs, rtol=1e-12, atol=1e-15)
    assert errors(state)[:2].any()
