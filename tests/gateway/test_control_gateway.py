"""A controller at a gateway: what it sees, and that its levers are carried out by what the gateway can do."""

import asyncio
import dataclasses
import json
import math
import time

import numpy as np
import pytest
from bundles import Records, small_bundle

from marginroute import control
from marginroute import view as v
from marginroute.adapters import metrics
from marginroute.adapters.desk import Desk
from marginroute.adapters.http import HttpSettings
from marginroute.adapters.http_app import App
from marginroute.control import ControlLayout, Levers, decode, encode
from marginroute.control_loop import ControlLoop, Report, second_of_week
from marginroute.control_rules import standard_rules
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.operation import OperationSettings

LAYOUT = ControlLayout(
    pool_names=("small", "large"),
    class_names=("standard", "premium", "batch"),
    provider_names=("api",),
    tick_s=60.0,
    min_replicas=np.array([1.0, 1.0]),
    max_replicas=np.array([5.0, 5.0]),
    start_replicas=np.array([1.0, 2.0]),
    slots=np.array([8.0, 8.0]),
    lag_s=np.array([300.0, 300.0]),
    requests_per_s=np.array([1.0, 1.0]),
    deadline_s=np.array([np.inf, np.inf, 1000.0]),
    season_per_s=np.array([[1.0, 1.0, 1.0]]),
    allowance=np.array([10.0]),
    refill_per_s=np.array([0.5]),
)


class Told:
    """A controller that does as it is told, and remembers what it saw."""

    name, layout = "told", LAYOUT

    def __init__(self, **levers):
        self.views, self.levers = [], levers

    def act(self, view):
        self.views.append(view)
        rest = {
            "caps": [[8.0, 8.0]],
            "replicas": [[1.0, 2.0]],
            "release_per_s": [0.0],
            "spill_share": [[0.0] * 3],
            "shed_share": [[0.0] * 3],
        }
        return encode(LAYOUT, Levers(**{name: np.array(x) for name, x in (rest | self.levers).items()}))

    def decide(self, view):
        return decode(self.layout, self.act(view))

    def anew(self):
        return self


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def with_controller(controller):
    return dataclasses.replace(small_bundle(), controller=controller)


@pytest.fixture
def make():
    made = []

    def gateway(controller, can=("shed", "defer", "hold"), mode="live", **more):
        more = {"clock": Clock(), "waiting": (10.0, 30.0), **more}
        made.append(Gateway(with_controller(controller), Records(), ModeSettings(mode), can, **more))
        made[-1].holding.stop()  # turns are taken by hand
        made[-1].turn()
        return made[-1]

    yield gateway
    for one in made:
        one.close()


def test_what_a_controller_sees(make):
    controller = Told()
    gateway = make(controller)
    clock = gateway.clock
    first = controller.views[-1]
    assert first.fresh.tolist() == [True] and first.pools[0, 0, control.READY] == 1.0
    assert first.time_s[0] == pytest.approx(second_of_week(time.time()), abs=5.0)
    for i in range(6):
        gateway.decide(Facts(f"a{i}", 100, "standard", available=("small/0", "api")))
        gateway.sent(f"a{i}", "small/0" if i < 5 else "api", True)
    gateway.finished("a0", Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 120))
    gateway.finished("a1", Outcome("completed", "small/0", 5.0, 9.0, 5.0, 9.0, 100, 120))  # misses its TTFT
    gateway.finished("a2", Outcome("failed", e2e_s=1.0))
    gateway.decide(Facts("b", 100, "batch"))
    clock.now_s += 60.0
    gateway.turn()
    view = controller.views[-1]
    assert view.fresh.tolist() == [False] and len(controller.views) == 2
    assert view.classes[0].tolist() == [[6.0, 2.0, 1.0, 1.0], [0.0] * 4, [1.0, 0.0, 0.0, 0.0]]
    assert view.held[0].tolist() == [[0.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0]]
    small, large = view.pools[0]
    assert small[[control.READY, control.IN_FLIGHT, control.WAITING, control.CAP]].tolist() == [1.0, 2.0, 0.0, 8.0]
    # large/0 was available to the batch request; of two wanted one is there, the other comes 300 s after the order
    assert large[[control.READY, control.STARTING, control.NEXT_READY_S]].tolist() == [1.0, 1.0, 240.0]
    assert view.allowance[0, 0] == 10.0  # one call, and 30 refilled
    assert view.fast[0, 0] == pytest.approx((600 * math.exp(-0.1) + 6) / (600 * math.exp(-0.1) + 60))


def test_an_autoscaler_that_knows_better_is_believed(make):
    controller = Told()
    gateway = make(controller)
    assert gateway.reported("large", Report(3.0, 1.0, 2.0, 17.0)) and not gateway.reported("none", Report(1.0))
    gateway.clock.now_s += 60.0
    gateway.turn()
    pool = controller.views[-1].pools[0, 1]
    assert pool[[control.READY, control.STARTING, control.DRAINING, control.NEXT_READY_S]].tolist() == [3, 1, 2, 17]


def test_batch_work_is_held_released_at_the_rate_and_decided_again(make):
    gateway = make(Told(release_per_s=[0.1]))
    woken = []
    for i in range(3):
        verdict = gateway.decide(Facts(f"b{i}", 100, "batch"))
        assert verdict.held and verdict.decision.kind == "defer"
        assert gateway.on_line(f"b{i}", lambda i=i: woken.append(i))
    assert woken == [0] and gateway.status()["held"] == 3
    again = gateway.decide(Facts("b0", 100, "batch"))
    assert not again.held and again.decision.kind == "replica" and again.attempt == 2
    gateway.clock.now_s += 10.1
    gateway.turn()
    assert woken == [0, 1]
    gateway.clock.now_s += 10.1
    gateway.turn()
    assert woken == [0, 1, 2]
    for i in (1, 2):
        assert gateway.decide(Facts(f"b{i}", 100, "batch")).decision.kind == "replica"
    assert gateway.pending == 3 and [r.choice for r in gateway._records] == ["defer"] * 3
    gateway.finished("b2", Outcome("completed", "small/0", 21.0, 22.0, 0.1, 1.0, 100, 120))
    last = gateway._records[-1]
    assert last.choice != "defer" and last.request["waited_s"] == pytest.approx(20.2)
    assert last.request["deadline_left_s"] == pytest.approx(1000.0 - 20.2)


def test_work_that_is_due_leaves_though_nothing_is_released(make):
    gateway, woken = make(Told(release_per_s=[0.0])), []
    gateway.decide(Facts("b", 100, "batch"))
    gateway.on_line("b", lambda: woken.append(1))
    gateway.clock.now_s += 979.0
    gateway.turn()
    assert not woken
    gateway.clock.now_s += 1.1  # deadline 1,000 s less twice hold_s
    gateway.turn()
    assert woken


def test_shares_are_spread_evenly(make):
    gateway = make(Told(shed_share=[[0.25, 0.0, 0.0]], spill_share=[[0.0, 0.5, 0.0]]))
    kinds = {}
    for i in range(40):
        for name in ("standard", "premium"):
            id = f"{name}{i}"
            kinds.setdefault(name, []).append(gateway.decide(Facts(id, 100, name)).decision.kind)
            gateway.finished(id, Outcome("shed"))
    assert kinds["standard"].count("shed") == 10 and kinds["standard"][3::4] == ["shed"] * 10
    assert kinds["premium"][1::2] == ["provider"] * 20 and "shed" not in kinds["premium"]


def test_a_gateway_that_cannot_hold_or_shed_keeps_to_what_it_can(make):
    gateway = make(Told(shed_share=[[1.0, 0.0, 0.0]], caps=[[1.0, 1.0]]), can=())
    for i in range(20):
        verdict = gateway.decide(Facts(str(i), 100, ("standard", "batch")[i % 2]))
        assert verdict.decision.kind in ("replica", "provider") and not verdict.held
        assert not gateway.sent(str(i), verdict.decision.name, True)
    assert gateway.state.view(1).signals[v.IN_FLIGHT_CAP].min() == v.UNLIMITED


def test_caps_are_kept_and_shown(make):
    gateway = make(Told(caps=[[2.0, 4.0]]), priority={"premium": 1})
    view = gateway.state.view(1)
    assert view.signals[v.IN_FLIGHT_CAP, :3].tolist() == [2.0, 4.0, v.UNLIMITED]
    woken = []
    for i, name in enumerate(("standard", "standard", "standard", "premium")):
        gateway.decide(Facts(str(i), 100, name))
        waits = gateway.sent(str(i), "small/0", True)
        assert waits == (i >= 2) == gateway.sent(str(i), "small/0", True)  # asked twice
        if waits:
            gateway.on_line(str(i), lambda i=i: woken.append(i))
    view = gateway.state.view(1)
    assert (view.signals[v.IN_FLIGHT, 0], view.signals[v.HELD, 0], gateway.status()["queued"]) == (4.0, 2.0, 2)
    gateway.finished("0", Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 12))
    assert woken == [3]  # by priority
    gateway.attempt_failed("1")
    assert woken == [3, 2]
    gateway.finished("3", Outcome("abandoned"))
    gateway.finished("2", Outcome("abandoned"))
    assert gateway.state.in_flight == 0 and gateway.status()["queued"] == 0


def test_who_does_not_come_back_is_given_up(make):
    gateway = make(Told(caps=[[1.0, 1.0]]))
    for i in range(2):
        gateway.decide(Facts(str(i), 100))
        gateway.sent(str(i), "small/0", True)
    gateway.on_line("1", lambda: None)
    gateway.on_line("1", None)
    gateway.clock.now_s += 40.0
    gateway.turn()
    assert (gateway.pending, gateway.state.in_flight) == (1, 1) and gateway._records[-1].status == "abandoned"


@pytest.mark.parametrize(("mode", "wanted"), [("live", {"small": 5, "large": 2}), ("shadow", None), ("canary", None)])
def test_replicas_are_wanted_only_where_the_controller_acts(make, mode, wanted):
    gateway = make(Told(replicas=[[5.0, 2.0]]), mode=mode)
    assert gateway.replicas_wanted() == wanted
    assert gateway.status()["replicas"] == {"small": 5, "large": 2}


def test_a_controller_that_fails_leaves_the_levers(make):
    class Broken(Told):
        def act(self, view):
            if self.views:
                raise ValueError("broken")
            return super().act(view)

    gateway = make(Broken(replicas=[[3.0, 2.0]]))
    gateway.clock.now_s += 60.0
    with pytest.raises(ValueError, match="broken"):
        gateway.turn()
    assert gateway.replicas_wanted() == {"small": 3, "large": 2}


def test_the_thread_counts_a_tick_that_fails():
    class Broken(Told):
        def act(self, view):
            raise ValueError("broken")

    gateway = Gateway(with_controller(Broken()), Records(), ModeSettings("live"), ("shed", "defer"))
    until_s = time.monotonic() + 5.0
    while not gateway.holding.errors and time.monotonic() < until_s:
        time.sleep(0.01)
    assert gateway.holding.errors and gateway.decide(Facts("a", 100)).decision.kind == "replica"
    gateway.close()


@pytest.mark.parametrize("name", sorted(standard_rules(LAYOUT)))
def test_the_tuned_rules_run_at_a_gateway(make, name):
    gateway = make(standard_rules(LAYOUT)[name])
    for tick in range(5):
        for i in range(30):
            gateway.decide(Facts(f"{tick}-{i}", 100, LAYOUT.class_names[i % 3]))
        gateway.clock.now_s += 60.0
        gateway.turn()
    status = gateway.status()
    assert status["ticks"] == 6 and all(1 <= n <= 5 for n in status["replicas"].values())


def test_a_controller_for_other_pools_is_refused():
    other = ControlLayout.from_dict({**LAYOUT.to_dict(), "pool_names": ("tiny", "large")})
    with pytest.raises(InputError, match=r"pool 'tiny'.*small, large, api"):
        ControlLoop(standard_rules(other)["static"], small_bundle().layout)


def test_a_swap_goes_on_with_levers_and_lines(make):
    gateway = make(Told(replicas=[[4.0, 2.0]], release_per_s=[0.0]))
    gateway.decide(Facts("b", 100, "batch"))
    gateway.swap(with_controller(Told(release_per_s=[5.0])))
    assert gateway.replicas_wanted() == {"small": 4, "large": 2} and gateway.status()["held"] == 1
    woken = []
    gateway.on_line("b", lambda: woken.append(1))
    gateway.clock.now_s += 60.0
    gateway.turn()
    assert woken and gateway.replicas_wanted() == {"small": 1, "large": 2}


@pytest.fixture
def app(monkeypatch, tmp_path):
    controllers = [Told(caps=[[1.0, 1.0]], replicas=[[4.0, 2.0]], release_per_s=[20.0])]
    monkeypatch.setattr(OperationSettings, "load", lambda self: (with_controller(controllers[0]), None))
    settings = HttpSettings(
        "unused", str(tmp_path / "log.jsonl"), mode="live", can=("shed", "defer", "hold"), hold_s=1.0, reload_s=None
    )
    made = App(Desk(settings, "http"))
    yield made
    made.desk.close()


async def ask(app, path, body=None, gone=None):
    """(status, answer); `gone` is set when the caller hangs up."""
    parts, sent = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}], []

    async def receive():
        if parts:
            return parts.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": []}, receive, send)
    return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else (0, None)


def test_callers_wait_on_the_line_for_room(app):
    async def play():
        await asyncio.sleep(0.05)  # the first tick
        only = {"available": ["small/0"], "prompt_tokens": 10, "wait_s": 5.0}
        _, first = await ask(app, "/v1/decide", {"id": "1", **only})
        second = asyncio.create_task(ask(app, "/v1/decide", {"id": "2", **only}))
        third = asyncio.create_task(ask(app, "/v1/decide", {"id": "3", **only}))
        _, short = await ask(app, "/v1/decide", {"id": "4", **only, "wait_s": 0.05})
        assert not first["held"] and short["held"] and not second.done()
        await ask(app, "/v1/events", {"events": [{"event": "finished", "id": "1", "status": "completed"}]})
        _, answer = await asyncio.wait_for(second, 5.0)
        assert answer["candidate"] == "small/0" and not answer["held"] and not third.done()
        gone = asyncio.Event()
        fifth = asyncio.create_task(ask(app, "/v1/decide", {"id": "5", **only}, gone))
        await asyncio.sleep(0.05)
        gone.set()
        assert await asyncio.wait_for(fifth, 5.0) == (0, None)
        await ask(app, "/v1/events", {"events": [{"event": "finished", "id": "2", "status": "failed"}]})
        _, answer = await asyncio.wait_for(third, 5.0)
        assert not answer["held"]
        _, later = await ask(app, "/v1/decide", {"id": "4", **only, "wait_s": 0.0})
        assert later["held"] and app.desk.gateway.status()["queued"] == 2

    asyncio.run(play())


def test_batch_work_waits_for_its_release_and_scale_targets_can_be_read(app):
    async def play():
        await asyncio.sleep(0.05)
        asked = {"prompt_tokens": 10, "class": "batch", "deadline_left_s": 500.0, "wait_s": 5.0}
        answers = await asyncio.gather(*(ask(app, "/v1/decide", {"id": f"b{i}", **asked}) for i in range(3)))
        assert {a["kind"] for _, a in answers} <= {"replica", "provider"}
        _, held = await ask(app, "/v1/decide", {"id": "b9", **asked, "wait_s": 0.0})
        assert held["held"] and held["kind"] == "defer"
        assert await ask(app, "/v1/scale") == (200, {"pools": {"small": {"replicas": 4}, "large": {"replicas": 2}}})
        told = {"event": "replicas", "pool": "small", "ready": 3}
        assert await ask(app, "/v1/events", {"events": [told]}) == (200, {"known": 1})
        app.desk.gateway.switch.roll_back("by hand")
        assert (await ask(app, "/v1/scale"))[0] == 409

    asyncio.run(play())
    text = metrics.exposition(app.desk).decode()
    assert 'marginroute_replicas_wanted{acting="false",pool="small"} 4.0' in text
    assert "marginroute_held 1.0" in text and "marginroute_release_per_second 10.0" in text
