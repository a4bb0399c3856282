"""A gateway that is told of a call without a first token: the View of the world, a second call, and no leak."""

import json

import by_hand
import numpy as np
import pytest
from bundles import small_bundle
from by_hand import API, ONE, TWO_A, TWO_B
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http_app import REASON, call, decide, make  # noqa: F401 (the fixture)
from test_view_parity import bundle_of

from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.adapters import http_api, schema
from marginroute.capabilities import GATEWAYS, abilities
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.telemetry import GatewayState


class Log:
    """Keeps records in memory."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)
        return True

    def close(self):
        pass


class Clock:
    """Moves by hand."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def gateway(can=("shed", "hedge"), mode="live", **options):
    clock, log = Clock(), Log()
    made = Gateway(small_bundle(), log, ModeSettings(mode), abilities("http", can), clock=clock, **options)
    return made, clock, log


def in_flight(made):
    return {name: n for name, n in zip(made.bundle.layout.names, made.state.counters()["in_flight"], strict=True) if n}


def slow(made, clock, id="r", prompt_tokens=500):
    """A request that the policy has sent somewhere and that has waited for ten seconds."""
    first = made.decide(Facts(id, prompt_tokens, "premium", "chat")).decision.name
    made.sent(id, first, True)
    clock.now_s += 10.0
    return first


def test_the_view_is_the_worlds(tmp_path):
    """The API has it for 0.2 s: who has it, what may be done, and every counter."""
    world = by_hand.scenario(tmp_path, {"plans.classes.metered.hedge_after_s": 0.2})
    bundle, clock = bundle_of(Plant(world)), Clock()
    worlds = FleetWorlds(world, 1)
    worlds.load(0, by_hand.workload(world, {"p_good_prior": bundle.prior.p_good(0.0).tolist()}))
    worlds.step(np.array([API]))
    theirs = worlds.view()[0]
    state = GatewayState(bundle, clock, can=("shed", "cache", "hedge"))
    state.view(100, attempt=1)
    state.begin("r", API, 100)
    clock.now_s += 0.2
    mine = state.view(100, attempt=2, waited_s=0.2, under_way=(API, 0.2))
    rows = [v.UNDER_WAY_S, v.TRIED, v.IN_FLIGHT, v.PENDING_PREFILL_TOKENS, v.P_GOOD_PRIOR, v.RECENT_TTFT_S]
    np.testing.assert_allclose(mine.signals[rows], theirs.signals[rows], rtol=1e-12)
    np.testing.assert_array_equal(mine.legal, theirs.legal)
    assert mine.request[v.WAITED_S] == theirs.request[v.WAITED_S] == 0.2
    assert bundle.policy.decide(mine).name == bundle.policy.decide(theirs).name
    assert {ONE, TWO_A, TWO_B, API} == set(np.flatnonzero(mine.legal))


def test_the_second_call_answers():
    made, clock, log = gateway()
    first = slow(made, clock)
    verdict = made.hedge("r")
    second = verdict.decision.name
    assert verdict.acting and second != first and in_flight(made) == {first: 1.0, second: 1.0}
    clock.now_s += 0.3
    made.first_token("r", candidate=second)
    assert in_flight(made) == {second: 1.0}
    made.progress("r", 5)
    made.finished("r", Outcome("completed", second, 10.3, 11.0, prompt_tokens=500, output_tokens=40))
    assert in_flight(made) == {} and made.pending == 0
    assert made.status()["hedges"] == {"asked": 1, "sent": 1, "won": 1}
    static, index = made.bundle.static_signals, made.bundle.layout.names.index
    answer = 500 * static[v.INPUT_USD, index(second)] + 40 * static[v.OUTPUT_USD, index(second)]
    assert log.records[-1].cost_usd == pytest.approx(answer + 500 * static[v.INPUT_USD, index(first)])
    assert log.records[-1].served_by == second


@pytest.mark.parametrize("told", [True, False])
def test_the_first_call_answers(told):
    """Whether its first token was told or not, the second call leaves the counters."""
    made, clock, _ = gateway()
    first = slow(made, clock)
    made.hedge("r")
    if told:
        made.first_token("r")
        assert in_flight(made) == {first: 1.0}
    made.finished("r", Outcome("completed", first, 10.3, 11.0, prompt_tokens=500, output_tokens=40))
    assert in_flight(made) == {} and made.status()["hedges"]["won"] == 0


def test_what_fails_leaves_the_other():
    made, clock, _ = gateway()
    first = slow(made, clock)
    second = made.hedge("r").decision.name
    made.attempt_failed("r", first)
    assert in_flight(made) == {second: 1.0}
    assert made.decide(Facts("r", 500, "premium", "chat")).decision.name == first  # not decided anew: one goes on
    made.attempt_failed("r", second)
    assert in_flight(made) == {}
    third = made.decide(Facts("r", 500, "premium", "chat"))
    assert third.attempt == 2 and third.decision.name not in (first, second)
    made.finished("r", Outcome("abandoned"))
    assert made.pending == 0 and in_flight(made) == {}


def test_when_to_wait():
    """After the first token, for the second time, and where nobody else may: who has it is the answer."""
    made, clock, _ = gateway()
    first = slow(made, clock)
    assert made.hedge("r", available=[first]).decision.name == first
    assert made.hedge("r").decision.name != first
    assert made.hedge("r").decision.name == first and made.status()["hedges"] == {"asked": 3, "sent": 1, "won": 0}
    made.finished("r", Outcome("abandoned"))
    first = slow(made, clock, "s")
    made.first_token("s")
    assert made.hedge("s").decision.name == first


def test_a_shadow_counts_no_second_call():
    made, clock, _ = gateway(mode="shadow")
    first = slow(made, clock)
    verdict = made.hedge("r")
    assert not verdict.acting and verdict.decision.name != first and in_flight(made) == {first: 1.0}


def test_who_cannot_is_never_asked():
    for name, row in GATEWAYS.items():
        assert ("hedge" in row.can) == (name == "http")
        made = Gateway(small_bundle(), Log(), ModeSettings("live"), abilities(name, set(row.can) - {"hedge"}))
        made.decide(Facts("r", 500))
        made.sent("r", "api", True)
        assert made.hedge("r") is None
        made.close()
    made, _, _ = gateway()
    assert made.hedge("nobody") is None
    made.decide(Facts("r", 500))  # and not sent
    assert made.hedge("r") is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2), st.booleans()), max_size=40))
def test_nothing_leaks(steps):
    """Whatever is told in whatever order: counters never go below zero, and are empty when all have finished."""
    made, clock, _ = gateway(can=("shed", "hedge", "hold"))
    names = made.bundle.layout.names[:3]
    for kind, number, flag in steps:
        id, candidate = f"r{number}", names[(number + kind + flag) % 3]
        clock.now_s += 0.5
        if kind == 0:
            made.decide(Facts(id, 100 + number, "premium", "chat"))
        elif kind == 1:
            made.sent(id, candidate, flag)
        elif kind in (2, 3):
            made.hedge(id, None if flag else [candidate])
        elif kind == 4:
            made.first_token(id, candidate=candidate if flag else "")
        elif kind == 5:
            made.progress(id, 3)
        elif kind == 6:
            made.attempt_failed(id, candidate if flag else "")
        else:
            made.finished(id, Outcome("completed" if flag else "abandoned", candidate, 1.0, 2.0, output_tokens=9))
        assert all((counts >= 0.0).all() for counts in made.state.counters().values())
    for number in range(3):
        made.finished(f"r{number}", Outcome("abandoned"))
    assert made.state.in_flight == 0 and made.pending == 0
    made.close()


def test_the_sidecar_takes_it(make):  # noqa: F811
    app = make(can=("shed", "hedge"))
    first = decide(app, id="r", prompt_tokens=500, streamed=True)["candidate"]

    def hedge(app, id):
        status, _, body = call(app, "POST", "/v1/hedge", {"id": id, "explain": True})
        answer = json.loads(body)
        schema.check(answer, {**http_api.HEDGE, "properties": http_api.HEDGE["properties"] | REASON})
        assert status == 200 and (answer["candidate"] == "") == answer["wait"]
        return answer

    answer = hedge(app, "r")
    assert answer["acting"] and "margin" in answer["reason_usd"] and answer["candidate"] != first
    told = {"event": "first_token", "id": "r", "candidate": first}
    assert call(app, "POST", "/v1/events", {"events": [told]})[0] == 200
    assert hedge(app, "r")["wait"] and hedge(app, "gone")["wait"]
    assert call(app, "POST", "/v1/hedge", {})[0] == 422
    other = make()
    decide(other, id="r", prompt_tokens=500, streamed=True)
    assert hedge(other, "r")["wait"]  # it has no such ability
    assert b"/v1/hedge" in call(app, "GET", "/openapi.json")[2]
