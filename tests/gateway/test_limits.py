"""Limits on spend, rate and retries: counted by whom and period, refused or handed over beyond, not overrun at once."""

import calendar
from dataclasses import replace

import pytest
from bundles import Records, small_bundle

from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.limits import MOST_KEYS, Limit, LimitBook, limits_from
from marginroute.modes import ModeSettings

NOON_S = float(calendar.timegm((2026, 11, 30, 12, 0, 0)))


class Wall:
    now_s = NOON_S

    def __call__(self):
        return self.now_s


@pytest.fixture
def make():
    made = []

    def gateway(*rows, mode="live"):
        made.append(Gateway(small_bundle(), Records(), ModeSettings(mode), limits=limits_from(list(rows))))
        made[-1].limits._wall_s = wall = Wall()
        return made[-1], wall

    yield gateway
    for one in made:
        one.close()


def ask(gateway, id, **more):
    return gateway.decide(Facts(id, 100, **more))


def answer(gateway, id, cost_usd):
    gateway.finished(id, Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 120, cost_usd))


def test_a_rate_by_tenant(make):
    """Three a minute each; the rest is told when the minute is over."""
    gateway, wall = make({"of": "tenant", "requests": 3, "per": "minute"})
    wall.now_s += 20.0
    verdicts = [ask(gateway, f"a{i}", tenant="a") for i in range(5)]
    assert [v.decision.kind == "shed" for v in verdicts] == [False] * 3 + [True] * 2
    assert verdicts[3].decision.guard == "rate-tenant" and verdicts[3].retry_after_s == 40.0
    assert ask(gateway, "b", tenant="b").decision.kind != "shed"
    assert ask(gateway, "nobody").decision.kind != "shed"
    wall.now_s += 40.0
    assert ask(gateway, "a9", tenant="a").decision.kind != "shed"
    refused = {key: n for key, n in gateway.decided.items() if key[2]}
    assert refused == {("shed", "shed", "rate-tenant", True): 2}
    gateway.finished("a3", Outcome("shed"))
    assert gateway._records[-1].guard == "rate-tenant"
    assert gateway.status()["acted"]["guard_share"] == 0.0  # not the policy's fault


def test_a_budget_is_settled_by_what_answers_cost_and_not_overrun_by_many_at_once(make):
    gateway, _ = make({"of": "all", "usd": 1e-3, "per": "day"})
    decided = 0
    while ask(gateway, f"r{decided}").decision.kind != "shed":
        decided += 1
    (used,) = gateway.limits.used.values()
    reserved = gateway._pending["r0"].reserved_usd
    assert 1e-3 <= used <= 1e-3 + 2e-3 / decided and decided == pytest.approx(1e-3 / reserved, rel=0.5)
    for i in range(decided):
        answer(gateway, f"r{i}", 1e-6)
    assert gateway.limits.amount(next(iter(gateway.limits.used))) == pytest.approx(decided * 1e-6)
    assert ask(gateway, "later").decision.kind != "shed"


def test_what_is_written_off_or_shed_gives_its_reserve_back(make):
    gateway, _ = make({"of": "tenant", "usd": 1.0, "per": "month"})
    for id in ("a", "b"):
        ask(gateway, id, tenant="t")
    (name,) = gateway.limits.used
    assert name == "0:2026-11:t" and gateway.limits.amount(name) > 0.0
    gateway.finished("a", Outcome("shed"))
    gateway._setup = replace(gateway._setup, stale_after_s=-1.0)
    ask(gateway, "c", tenant="other")
    assert gateway.limits.amount(name) == pytest.approx(0.0, abs=1e-15)


def test_a_runaway_session_is_stopped(make):
    gateway, _ = make({"of": "session", "requests": 50, "per": "hour"})
    kinds = [ask(gateway, f"s{i}", session="agent").decision.kind for i in range(60)]
    assert kinds.count("shed") == 10 and "shed" not in kinds[:50]
    assert ask(gateway, "other", session="calm").decision.kind != "shed"


def test_a_retry_storm_is_handed_to_the_fallback(make):
    gateway, _ = make({"of": "all", "retries": 2, "per": 60, "then": "fallback"})

    def again(id):
        verdict = ask(gateway, id)
        gateway.sent(id, verdict.decision.name, True)
        gateway.attempt_failed(id)
        return ask(gateway, id).decision

    decisions = [again(str(i)) for i in range(4)]
    assert [d.guard for d in decisions] == ["", "", "retries-all", "retries-all"]
    assert decisions[-1].policy == "least-in-flight" and ask(gateway, "first").decision.guard == ""


def test_shadow_mode_refuses_nothing(make):
    gateway, _ = make({"of": "all", "requests": 0, "per": "hour"}, mode="shadow")
    verdict = ask(gateway, "a")
    assert verdict.decision.guard == "rate-all" and not verdict.acting


def test_periods():
    month = Limit("all", "usd", 1.0, "month")
    assert month.period(NOON_S) == ("2026-11", 12 * 3600.0)
    december = float(calendar.timegm((2026, 12, 1, 0, 0, 0)))
    assert month.period(december) == ("2026-12", 31 * 86400.0)
    assert Limit("all", "usd", 1.0, 90).period(180.0) == ("2", 90.0)


def test_one_class_alone_and_refusing_wins():
    book = LimitBook(
        [
            Limit("all", "requests", 0.0, "day", then="fallback"),
            Limit("class", "requests", 0.0, "day", "batch"),
        ],
        Wall(),
    )
    assert book.ask(Facts("a", 1), "batch", 1).reason == "rate-class"
    assert not book.ask(Facts("b", 1), "team", 1).refuse


def test_keys_are_not_kept_for_ever():
    book = LimitBook([Limit("tenant", "requests", 5.0, "day")], Wall())
    book.sharing = True
    for i in range(MOST_KEYS + 10):
        book.ask(Facts("x", 1, tenant=str(i)), "team", 1)
    assert len(book.used) == MOST_KEYS and len(book.fresh) == MOST_KEYS


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"of": "all"}, "must be a list"),
        ([3], r"limits\[0\] must map"),
        ([{"of": "planet", "usd": 1, "per": "day"}], r"limits\[0\].of = 'planet'; legal: all, class, tenant, session"),
        ([{"usd": 1, "requests": 2, "per": "day"}], "must name one of usd, requests, retries"),
        ([{"usd": -1, "per": "day"}], r"usd = -1; legal is a number from 0"),
        ([{"usd": 1, "per": "fortnight"}], "legal: minute, hour, day, month, or seconds"),
        ([{"usd": 1, "per": "day", "then": "pray"}], "legal: refuse, fallback"),
        ([{"usd": 1, "per": "day", "x": 1}], r"limits\[0\].x is unknown"),
    ],
)
def test_bad_limits(rows, words):
    with pytest.raises(InputError, match=words):
        limits_from(rows)
