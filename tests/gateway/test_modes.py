"""Which requests are acted on, and when that stops."""

import pytest

from marginroute.errors import InputError
from marginroute.modes import ModeSettings, ModeSwitch, Result, position
from marginroute.rollback import RollbackLimits


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


LIMITS = RollbackLimits(window_s=100.0, min_requests=20, hold_s=500.0, probation_share=0.5)
OKAY = Result(False, True, 0.0, 1.0)


def switch_of(mode="live", limits=LIMITS, **more):
    events, clock = [], Clock()
    return ModeSwitch(ModeSettings(mode, rollback=limits, **more), clock, events.append), clock, events


def play(switch, clock, seconds, result=OKAY, guarded=False, per_s=1):
    """Requests in a row, each finished at once; the share that was acted on."""
    acted = 0
    for i in range(int(seconds) * per_s):
        clock.now_s += 1.0 / per_s
        acts = switch.acts(f"{clock.now_s}-{i}")
        switch.decided(acts, guarded)
        switch.finished(acts, result(acts) if callable(result) else result)
        acted += acts
    return acted / (int(seconds) * per_s)


def test_shadow_acts_on_nothing_and_live_on_everything():
    assert play(*switch_of("shadow")[:2], 300) == 0.0
    assert play(*switch_of("live")[:2], 300) == 1.0


def test_a_canary_keeps_its_tenants_and_a_growing_share_adds_to_them():
    names = [f"tenant {i}" for i in range(4000)]
    chosen = []
    for share in (0.1, 0.1, 0.3):
        switch, _, _ = switch_of("canary", canary_share=share)
        chosen.append({name for name in names if switch.acts(f"request of {name}", name)})
    assert chosen[0] == chosen[1] < chosen[2]
    # binomial: 5 standard deviations of 4,000 draws
    assert abs(len(chosen[0]) / 4000 - 0.1) < 5 * (0.09 / 4000) ** 0.5
    assert abs(len(chosen[2]) / 4000 - 0.3) < 5 * (0.21 / 4000) ** 0.5
    assert position("tenant 0") == pytest.approx(0.32155, abs=1e-5)  # the same on every machine


def test_a_canary_by_session_request_or_named_tenant():
    by_session, _, _ = switch_of("canary", canary_share=0.5, canary_by="session")
    assert len({by_session.acts(f"r{i}", "a", "one session") for i in range(50)}) == 1
    assert len({by_session.acts(f"r{i}") for i in range(50)}) == 2  # no session: each by itself
    by_request, _, _ = switch_of("canary", canary_share=0.5, canary_by="request")
    assert len({by_request.acts(f"r{i}", "a", "one session") for i in range(50)}) == 2
    named, _, _ = switch_of("canary", canary_share=0.0001, canary_tenants=("acme",))
    assert named.acts("r", "acme") and not named.acts("r", "other")


@pytest.mark.parametrize(
    ("result", "guarded", "says"),
    [
        (Result(True), False, "requests acted on failed over the last 100 s; the limit is 10.0%"),
        (Result(False, False), False, "SLO attainment was 6"),
        (Result(False, True, -0.5, 1.0), False, "below the fallback's over the last 100 s; the limit is 200"),
        (OKAY, True, "of the decisions over the last 100 s; the limit is 50%"),
    ],
)
def test_each_limit_rolls_back_and_says_why(result, guarded, says):
    switch, clock, events = switch_of()
    assert play(switch, clock, 200) == 1.0 and events == []
    play(switch, clock, 100, result, guarded)
    assert [event["event"] for event in events] == ["rollback"]
    assert says in events[0]["reason"] and says in switch.status()["reason"]
    assert switch.status()["state"] == "rolled back" and not switch.acts("any")
    assert events[0]["until_s"] - events[0]["at_s"] == 500.0


def test_too_few_requests_break_nothing():
    switch, clock, events = switch_of()
    play(switch, clock, 19, Result(True))
    clock.now_s += 2.0
    switch.acts("one more")
    assert events == []


def test_the_control_group_takes_the_bias_out_of_the_margin():
    """Everybody earns 0.5 less than estimated: no loss to the bundle. Where only it does, that is one."""
    canary = {"canary_share": 0.5, "canary_by": "request"}
    switch, clock, events = switch_of("canary", **canary)
    play(switch, clock, 100, Result(False, True, -0.5, 1.0), per_s=2)
    assert events == []
    play(switch, clock, 100, lambda acts: Result(False, True, -0.5 if acts else 0.0, 1.0), per_s=2)
    assert [event["event"] for event in events] == ["rollback"]


def test_noise_alone_is_no_loss():
    """A mean below its limit by less than two standard errors."""
    switch, clock, events = switch_of()
    signs = iter(range(1000))
    play(switch, clock, 90, lambda _: Result(False, True, -0.25 + (3.0 if next(signs) % 2 else -3.0), 1.0))
    assert events == []


def test_back_by_probation_and_longer_each_time():
    switch, clock, events = switch_of()
    play(switch, clock, 30, Result(True))
    assert play(switch, clock, 480) == 0.0
    assert 0.3 < play(switch, clock, 90) < 0.7  # probation: half
    assert [event["event"] for event in events] == ["rollback", "probation"]
    play(switch, clock, 60)
    assert play(switch, clock, 50) == 1.0
    assert [event["event"] for event in events] == ["rollback", "probation", "in force"]
    play(switch, clock, 40, Result(True))
    assert events[-1]["until_s"] - events[-1]["at_s"] == 1000.0  # twice as long as before


def test_probation_asks_for_more_than_the_limit():
    """Errors of 8 % are within the limit of 10 %, not within the 5 % of probation."""
    switch, clock, _ = switch_of()
    play(switch, clock, 30, Result(True))
    count = iter(range(100_000))

    def sometimes(acts):
        return Result(acts and next(count) % 12 == 11, True, 0.0, 1.0)

    play(switch, clock, 1500, sometimes, per_s=4)
    assert switch.state == "probation"
    assert play(switch, clock, 300) > 0.8 and switch.state == "in force"


def test_stale_telemetry_keeps_it_in_shadow_mode():
    switch, clock, events = switch_of()
    play(switch, clock, 60, guarded=True)
    play(switch, clock, 2000, guarded=True)
    assert [event["event"] for event in events] == ["rollback"]
    play(switch, clock, 250)
    assert events[1]["event"] == "probation"


def test_a_limit_may_be_switched_off():
    switch, clock, events = switch_of(limits=RollbackLimits(None, None, None, None, window_s=100.0))
    play(switch, clock, 200, Result(True, False, -9.0, 1.0), guarded=True)
    assert events == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mode": "dark"}, "mode = 'dark'; legal: shadow, canary, live"),
        ({"canary_share": 1.5}, "canary_share = 1.5; legal is 0 to 1"),
        ({"canary_by": "luck"}, "canary_by = 'luck'"),
    ],
)
def test_bad_settings(values, says):
    with pytest.raises(InputError, match=says):
        ModeSettings(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"error_rate": 2.0}, "rollback.error_rate = 2.0; legal is 0 to 1, or null"),
        ({"recovery": None}, "rollback.recovery = None; legal is 0 to 1$"),
        ({"window_s": 0}, "rollback.window_s = 0; legal is a number above 0"),
        ({"min_requests": 0}, "rollback.min_requests = 0"),
    ],
)
def test_bad_limits(values, says):
    with pytest.raises(InputError, match=says):
        RollbackLimits(**values)
