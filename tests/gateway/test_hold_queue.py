"""The two lines of the hold queue, against arithmetic on paper and against a naive one."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from marginroute.hold_queue import HELD, RELEASED, HoldQueue


class Caller:
    def __init__(self):
        self.woken = 0

    def __call__(self):
        self.woken += 1


def called(queue, in_flight, now_s):
    wakes, lost = queue.pump(in_flight, now_s)
    for wake in wakes:
        wake()
    return lost


def test_held_work_leaves_at_the_rate_and_when_due():
    """Rate 0.5/s from now: at 0, 2, 4 ...; the one whose deadline is 30 s away is due at 30 - 2 x 10 = 10 s."""
    queue = HoldQueue(hold_s=10.0)
    queue.release_per_s = 0.0
    callers = {name: Caller() for name in "abcd"}
    for name, left_s in zip("abcd", (400.0, 300.0, 30.0, 200.0), strict=True):
        queue.hold(name, "batch", left_s, 0.0, 0.0)
        assert queue.on_line(name, callers[name], 0.0)
    assert queue.next_s(0.0) <= 10.0
    called(queue, {}, 9.9)
    assert sum(c.woken for c in callers.values()) == 0
    called(queue, {}, 10.0)
    assert callers["c"].woken == 1 and queue.place("c").line == RELEASED
    queue.release_per_s = 0.5
    woken = []
    for tenth in range(100, 160):
        called(queue, {}, tenth / 10.0)
        woken += [(tenth / 10.0, n) for n in "dba" if callers[n].woken and n not in [x for _, x in woken]]
    assert woken == [(10.0, "d"), (12.0, "b"), (14.0, "a")]  # earliest deadline first


def test_without_a_controller_held_work_comes_back_after_hold_s():
    queue, caller = HoldQueue(hold_s=10.0), Caller()
    queue.hold("a", "batch", math.inf, 0.0, 0.0)
    queue.on_line("a", caller, 0.0)
    called(queue, {}, 9.0)
    assert caller.woken == 0
    called(queue, {}, 10.0)
    assert caller.woken == 1


def test_a_full_candidate_lets_in_by_priority_then_in_order():
    queue = HoldQueue()
    queue.caps = {"x": 2.0}
    assert not queue.full("x", 1.0) and queue.full("x", 2.0) and not queue.full("y", 99.0)
    callers = {name: Caller() for name in "abc"}
    for name, priority in zip("abc", (2, 1, 2), strict=True):
        queue.queue(name, "x", priority, 0.0)
        assert queue.on_line(name, callers[name], 0.0)
    order = []
    for engine in (2, 2, 2):  # two at the engine; one leaves
        called(queue, {"x": engine + queue.queued("x")}, 1.0)
        called(queue, {"x": engine - 1 + queue.queued("x")}, 1.0)
        order += [n for n in "abc" if callers[n].woken and n not in order]
    assert order == ["b", "a", "c"] and len(queue) == 0


def test_only_who_is_on_the_line_is_let_through_and_a_place_is_kept_for_a_while():
    queue = HoldQueue(lease_s=30.0)
    queue.caps = {"x": 1.0}
    first, second = Caller(), Caller()
    queue.queue("a", "x", 1, 0.0)
    queue.on_line("a", first, 0.0)
    queue.queue("b", "x", 1, 0.0)
    queue.on_line("b", second, 0.0)
    assert queue.on_line("a", None, 1.0)  # hangs up
    called(queue, {"x": 2.0}, 2.0)
    assert (first.woken, second.woken) == (0, 1)
    assert queue.on_line("a", first, 20.0)
    called(queue, {"x": 1.0}, 20.0)
    assert first.woken == 1
    queue.queue("c", "x", 1, 20.0)
    assert called(queue, {"x": 2.0}, 49.0) == []
    assert called(queue, {"x": 2.0}, 60.0) == ["c"] and len(queue) == 0


def test_ages_of_held_work():
    queue = HoldQueue(hold_s=1.0)
    queue.release_per_s = 0.0
    queue.hold("new", "batch", 100.0, 0.0, 0.0)
    queue.hold("old", "batch", 30.0, 0.0, 0.0)
    queue.hold("other", "team", 100.0, 0.0, 0.0)
    held = queue.held_by_age(("team", "batch"), 4, 26.0)
    assert held.tolist() == [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(("hold", "queue", "leave", "pump", "hangup")), st.integers(0, 7)), max_size=60)
)
def test_nobody_is_lost_or_let_through_twice(steps):
    """Whatever happens: a caller is woken once at most per place, and never more are let in than there is room."""
    queue = HoldQueue(hold_s=5.0, lease_s=10.0)
    queue.caps, queue.release_per_s = {"x": 2.0}, 1.0
    callers, engine, now_s = {}, set(), 0.0
    for what, n in steps:
        id, now_s = str(n), now_s + 0.7
        if what in ("hold", "queue") and queue.place(id) is None and id not in engine:
            if what == "hold":
                queue.hold(id, "batch", 50.0, now_s, now_s)
            else:
                queue.queue(id, "x", n % 3, now_s)
            callers[id] = Caller()
            assert queue.on_line(id, callers[id], now_s)
        elif what == "leave":
            engine.discard(id)
            queue.leave(id)
        elif what == "hangup":
            queue.on_line(id, None, now_s)
        else:
            before = {i for i in map(str, range(8)) if (p := queue.place(i)) is not None and p.line != RELEASED}
            held = {i for i in before if queue.place(i).line == HELD}
            lost = called(queue, {"x": float(len(engine) + queue.queued("x"))}, now_s)
            gone = {i for i in before - held if queue.place(i) is None} - set(lost)
            engine |= gone
            assert len(engine) <= max(2, len(engine - gone))
        assert all(c.woken <= 1 for c in callers.values())
        assert queue.counts()[0] + queue.counts()[1] == len(queue) and queue.queued("x") >= 0
