"""One request's life in the part that every adapter drives."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from bundles import TERMS, small_bundle

from marginroute import view as v
from marginroute.adapters import metrics
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.operation import OperationSettings, event_path, open_gateway
from marginroute.record_log import RecordLog
from marginroute.replay import replay
from marginroute.rules import LeastInFlight

ANSWER = Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 120)


@pytest.fixture
def made(bundle, tmp_path):
    def make(mode="live", **more):
        settings = ModeSettings(mode)
        gateway = Gateway(bundle, RecordLog(tmp_path / "log.jsonl"), settings, **more)
        gateways.append(gateway)
        return gateway

    gateways = []
    yield make
    for gateway in gateways:
        gateway.close()


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "acting"), [("shadow", False), ("live", True)])
def test_the_verdict_and_the_record_say_who_acts(made, tmp_path, mode, acting):
    gateway = made(mode)
    verdict = gateway.decide(Facts("a", 100))
    assert verdict.acting is acting and verdict.attempt == 1
    gateway.sent("a", "small/0", streamed=True)
    assert gateway.state.in_flight == 1
    assert gateway.finished("a", ANSWER) and not gateway.finished("a", ANSWER)
    (record,) = records(tmp_path)
    assert record["mode"] == ("live" if acting else "shadow")
    assert record["choice"] == verdict.decision.name and record["status"] == "completed"
    assert gateway.state.in_flight == gateway.pending == 0


def test_what_the_contract_refuses_is_not_the_guards(made):
    gateway = made()
    decision = gateway.decide(Facts("a", 100, standing="refused")).decision
    assert (decision.kind, decision.guard) == ("shed", "")
    decision = gateway.decide(Facts("b", 100, available=())).decision
    assert (decision.kind, decision.guard) == ("shed", "missing")
    assert gateway.status()["acted"]["guard_share"] == 0.5


def test_a_retry_does_not_keep_those_behind_it_from_being_written_off(made):
    now_s = [0.0]
    gateway = made(clock=lambda: now_s[0], stale_after_s=10.0)
    gateway.sent("a", gateway.decide(Facts("a", 100)).decision.name, True)
    gateway.decide(Facts("b", 100))
    now_s[0] = 9.0
    gateway.attempt_failed("a")
    assert gateway.decide(Facts("a", 100)).attempt == 2
    now_s[0] = 11.0
    gateway.decide(Facts("c", 100))
    assert [gateway.waited_s(id) for id in "abc"] == [11.0, None, 0.0]


def test_a_retry_avoids_what_failed(made, tmp_path):
    gateway = made()
    first = gateway.decide(Facts("a", 100, available=("small/0", "large/0")))
    assert gateway.decide(Facts("a", 100, available=("small/0", "large/0"))) is first  # nothing has failed
    gateway.sent("a", first.decision.name, True)
    gateway.attempt_failed("a")
    second = gateway.decide(Facts("a", 100, available=("small/0", "large/0")))
    assert second.attempt == 2 and second.acting
    assert {first.decision.name, second.decision.name} == {"small/0", "large/0"}
    gateway.sent("a", second.decision.name, True)
    gateway.attempt_failed("a")
    third = gateway.decide(Facts("a", 100, available=("small/0", "large/0")))
    assert third.attempt == 3 and third.decision.name != "shed"  # all have failed: all are tried again
    gateway.finished("a", Outcome("failed", e2e_s=1.0))
    assert [r["status"] for r in records(tmp_path)] == ["", "", "failed"]
    assert len({(r["id"], r["decided_at_s"]) for r in records(tmp_path)}) == 3
    assert records(tmp_path)[1]["request"]["waited_s"] >= 0.0


def test_a_shed_request_is_told_when_to_come_back(made):
    gateway = made()
    for i in range(400):
        gateway.decide(Facts(f"{i}", 2000, available=("small/0",)))
        gateway.sent(f"{i}", "small/0", True)
    verdict = gateway.decide(Facts("late", 2000, available=("small/0",)))
    assert verdict.decision.kind == "shed"
    assert 1.0 < verdict.retry_after_s <= 60.0


def test_exploration_only_where_it_acts_and_within_its_limit(made, tmp_path):
    gateway = made(explore=(0.5, 1.0))
    for i in range(200):
        gateway.decide(Facts(str(i), 100))
        gateway.finished(str(i), Outcome("shed"))
    drawn = records(tmp_path)
    assert {r["choice"] for r in drawn} == {"small/0", "large/0", "api"}
    likely = max(r["probability"] for r in drawn)
    assert likely == pytest.approx(0.5 + 0.5 / 3)
    for record in drawn:
        assert record["probability"] in (likely, pytest.approx(0.5 / 3))
        assert record["support"] == ["small/0", "large/0", "api"]
    share = np.mean([r["probability"] < likely for r in drawn])
    assert abs(share - 1 / 3) < 5 * (2 / 9 / 200) ** 0.5  # binomial, five standard deviations
    quiet = made("shadow", explore=(0.5, 1.0))
    assert {quiet.decide(Facts(f"q{i}", 100)).decision.probability for i in range(50)} == {1.0}


def test_a_decision_of_the_guard_is_not_explored(made):
    gateway = made(explore=(0.9, 100.0))
    for c in (0, 1):
        gateway.state.scraped(c, 0.0, 0.0, 0.0, age_s=1000.0)
    decisions = [gateway.decide(Facts(str(i), 100)).decision for i in range(50)]
    assert {d.guard for d in decisions} == {"stale"} and {d.probability for d in decisions} == {1.0}


def test_a_replica_that_may_not_be_chosen_makes_nothing_stale(made):
    """It is down and answers no scrape; once it may be chosen again, its age counts."""
    gateway = made("live")
    gateway.state.scraped(0, 0.0, 0.0, 0.0, age_s=1000.0)
    down = gateway.decide(Facts("a", 100, available=["large/0", "api"])).decision
    assert (down.guard, down.policy, down.left_out) == ("", gateway.bundle.policy.name, ())
    assert gateway.decide(Facts("b", 100, available=["small/0"])).decision.guard == "stale"
    view = gateway.state.view(100, available=[1, 2])
    guarded = gateway.bundle.guarded()
    for policy in (guarded, dataclasses.replace(guarded, fast=None)):
        assert policy.decide(view).guard == ""
        many = v.View(view.layout, view.signals[:, None], view.request[:, None], view.legal[None])
        assert not policy.objects(many)[0]


def test_a_replica_that_is_too_old_is_left_out_while_there_are_others(made, tmp_path):
    gateway = made("live", explore=(0.9, 100.0))
    gateway.state.scraped(0, 0.0, 0.0, 0.0, age_s=1000.0)
    decisions = [gateway.decide(Facts(str(i), 100)).decision for i in range(50)]
    assert {d.guard for d in decisions} == {""} and {d.left_out for d in decisions} == {("small/0",)}
    assert {d.name for d in decisions} == {"large/0", "api"}  # what is drawn neither is the one left out
    assert gateway.left_out == {"small/0": 50}
    gateway.state.scraped(0, 0.0, 0.0, 0.0)
    assert gateway.decide(Facts("back", 100)).decision.left_out == ()
    gateway.close()
    assert {tuple(r["legal"]) for r in records(tmp_path)} == {
        ("large/0", "api", "shed"),
        ("small/0", "large/0", "api", "shed"),
    }
    assert replay(tmp_path / "log.jsonl", gateway.bundle).handed_over == 0


def test_metrics_say_what_was_left_out(made):
    pytest.importorskip("prometheus_client", reason="pip install prometheus-client")
    gateway = made("live")
    gateway.state.scraped(1, 0.0, 0.0, 0.0, age_s=1000.0)
    gateway.decide(Facts("a", 100))
    source = SimpleNamespace(gateway=gateway, took=metrics.Histogram(), errors={})
    assert 'marginroute_stale_total{candidate="large/0"} 1.0' in metrics.exposition(source).decode()


def test_what_is_shed_is_not_explored(made):
    gateway = made(explore=(0.9, 100.0))
    for i in range(400):
        gateway.decide(Facts(f"{i}", 2000, available=("small/0",)))
        gateway.sent(f"{i}", "small/0", True)
    late = [gateway.decide(Facts(f"late {i}", 2000, available=("small/0",))).decision for i in range(30)]
    assert {(d.kind, d.probability, d.support) for d in late} == {("shed", 1.0, ())}


def test_exploration_needs_expected_usd(tmp_path):
    bundle = dataclasses.replace(small_bundle(), policy=LeastInFlight("least-in-flight"))
    with pytest.raises(InputError, match="least-in-flight has none"):
        Gateway(bundle, RecordLog(tmp_path / "log.jsonl"), explore=(0.1, 0.0))


def test_margin_against_the_fallback_by_hand(made):
    """Every fourth request: usage 0.1 and 1 x 0.0019 ... by the contract of TERMS, less cost, less the expectation."""
    gateway = made()
    view = gateway.state.view(100)
    fallback = gateway.bundle.fallback.decide(view).candidate
    expected_usd = gateway.bundle.estimate.assess(view).margin_usd[fallback]
    for i in range(8):
        gateway.decide(Facts(str(i), 100))
        gateway.finished(str(i), ANSWER)
    acted = gateway.status()["acted"]
    usage_usd = 100 * TERMS["input_usd_per_token"] + 120 * TERMS["output_usd_per_token"]
    p_bad = 1.0 - view.signals[v.P_GOOD_PRIOR, 0]
    refund_usd = p_bad * (usage_usd * TERMS["refund_share"] + TERMS["bad_answer_usd"])
    cost_usd = 100 * 1e-7 + 120 * 2e-7
    surplus_usd = usage_usd - refund_usd - cost_usd - expected_usd
    assert acted["requests"] == 8 and acted["slo_attainment"] == 1.0 and acted["error_rate"] == 0.0
    assert acted["surplus_usd_per_1k_requests"] == pytest.approx(1e3 * surplus_usd, rel=0.02)


def test_a_swap_carries_what_is_in_flight_over_by_name(made, tmp_path):
    gateway = made()
    for id, name in (("a", "small/0"), ("b", "large/0"), ("c", "api")):
        gateway.decide(Facts(id, 100, "premium", "code"))
        gateway.sent(id, name, True)
    gateway.first_token("b")
    gateway.state.scraped(1, 5.0, 6.0, 0.7)
    before = gateway.state.view(10, "premium", "code")
    old, layout = gateway.bundle, gateway.bundle.layout
    order = [1, 2, 3, 4, 5]  # small/0 is gone
    turned = dataclasses.replace(
        layout,
        names=tuple(layout.names[c] for c in order),
        kind=layout.kind[order],
        station=layout.station[order],
        tier=layout.tier[order],
    )
    bundle = dataclasses.replace(old, layout=turned, static_signals=old.static_signals[:, order], digest="f" * 64)
    bundle = dataclasses.replace(bundle, allowed=old.allowed[:, order])
    gateway.swap(bundle)
    after = gateway.state.view(10, "premium", "code")
    rows = [v.IN_FLIGHT, v.DECODING, v.PENDING_PREFILL_TOKENS, v.WAITING, v.RUNNING, v.KV_USAGE, v.RECENT_TTFT_S]
    np.testing.assert_array_equal(after.signals[rows][:, :2], before.signals[rows][:, 1:3])
    assert after.request[v.SEQUENCE] == before.request[v.SEQUENCE] + 1
    assert gateway.state.in_flight == 2  # the one at small/0 left with it
    for id, name in (("a", "small/0"), ("b", "large/0"), ("c", "api")):
        assert gateway.finished(id, dataclasses.replace(ANSWER, served_by=name))
    assert gateway.state.in_flight == gateway.pending == 0
    assert [(r["served_by"], r["bundle"]) for r in records(tmp_path)] == [
        (name, old.digest[:12]) for name in ("small/0", "large/0", "api")
    ]
    assert gateway.decide(Facts("d", 100)).decision.name in turned.names


def test_swaps_under_load_lose_no_decision(made, bundle, tmp_path):
    """Four threads decide while the bundle is swapped: one record each, and nothing stays in flight."""
    gateway, stop, errors = made(), threading.Event(), []

    def client(k):
        try:
            for i in range(150):
                id = f"{k}-{i}"
                verdict = gateway.decide(Facts(id, 100))
                gateway.sent(id, verdict.decision.name, True)
                gateway.first_token(id)
                gateway.finished(id, ANSWER)
        except Exception as error:
            errors.append(error)

    def swapper():
        while not stop.is_set():
            gateway.swap(bundle)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    swaps = threading.Thread(target=swapper)
    for thread in (swaps, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    swaps.join()
    assert errors == [] and gateway.pending == gateway.state.in_flight == 0
    ids = [r["id"] for r in records(tmp_path)]
    assert len(ids) == len(set(ids)) == 600
    assert not gateway.state.counters()["decoding_tokens"].any()


def test_a_rollback_is_written_and_outlives_the_process(bundle_folder, tmp_path):
    settings = OperationSettings(str(bundle_folder), str(tmp_path / "log.jsonl"), mode="live")
    gateway = open_gateway(settings)
    gateway.switch.roll_back("by hand")
    assert not gateway.decide(Facts("a", 10)).acting
    (event,) = (json.loads(line) for line in event_path(settings.log).read_text().splitlines())
    assert (event["event"], event["reason"]) == ("rollback", "by hand")
    again = open_gateway(settings)
    status = again.status()
    assert (status["state"], status["reason"]) == ("rolled back", "by hand") and 590 < status["left_s"] <= 600
    assert not again.decide(Facts("b", 10)).acting
    event_path(settings.log).write_text(json.dumps(event | {"until_s": 1.0}) + "\nbroken")
    assert open_gateway(settings).decide(Facts("c", 10)).acting


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"rollback": {"bad": 1}}, "rollback.bad is unknown; legal: error_rate"),
        ({"rollback": 3}, "rollback must map limits"),
        ({"mode": "on"}, "mode = 'on'"),
        ({"prefix_block_tokens": -1}, "prefix_block_tokens -1"),
        ({"log_keep": 0}, "log_keep 0"),
        ({"stale_after_s": float("nan")}, "stale_after_s = nan"),
        ({"lease_s": 0.0}, "lease_s = 0.0; legal is a finite number above 0"),
    ],
)
def test_settings_say_what_is_wrong(bundle_folder, tmp_path, more, says):
    with pytest.raises(InputError, match=says):
        open_gateway(OperationSettings(str(bundle_folder), str(tmp_path / "log.jsonl"), **more))


def test_a_judged_answer_surprises_once(made):
    gateway = made()
    gateway.decide(Facts("a", 100))
    gateway.sent("a", "small/0", True)
    assert not gateway.judged("a", False)  # it is not answered yet
    gateway.finished("a", ANSWER)
    layout = gateway.bundle.layout
    tier = layout.tier[layout.names.index("small/0")]
    view = gateway.state.view(100)
    fitted = gateway._runtime.policy.quality
    expected = view.signals[v.P_GOOD_PRIOR, 0] if fitted is None else fitted.p_good(view)[0]
    assert gateway.judged("a", False) and not gateway.judged("a", False)
    told = gateway.state.view(100).signals[v.SURPRISE : v.TIER_CONFIDENCE + 1]
    assert told[:, 0] == pytest.approx(2 * [-expected, 1.0 / 11.0])
    assert not told[:, (layout.tier != tier) | (layout.kind > v.PROVIDER)].any()
    gateway.swap(small_bundle())
    assert gateway.state.view(100).signals[v.SURPRISE : v.TIER_CONFIDENCE + 1] == pytest.approx(told)
