"""A provider's token buckets at a gateway, on paper; and beside those of the simulated world."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet import engine
from envs.fleet.allocation import allocate
from envs.fleet.profile import constant_profile
from envs.fleet.provider import limit_spent, provider_available, submit_provider
from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
from marginroute import view as v
from marginroute.adapters.rate_headers import told_by
from marginroute.errors import InputError
from marginroute.rate_limits import RateBook, RateLimit, check_providers, rate_limits_from
from marginroute.view import Layout

API, OTHER = 1, 2


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def layout():
    return Layout(
        ("own/0", "api", "other", "cache", "defer", "shed"),
        np.array([v.REPLICA, v.PROVIDER, v.PROVIDER, v.CACHE, v.DEFER, v.SHED]),
        np.array([0, 1, 2, 3, 3, 3]),
        np.array([0, 0, 0, -1, -1, -1]),
        ("own", "api", "other"),
        ("m",),
        ("all",),
        ("any",),
    )


def book(clock, **limit):
    return RateBook(layout(), {"api": RateLimit(**limit)}, clock)


def test_sizes_are_ten_seconds_of_the_limit():
    limit = RateLimit(requests_per_minute=90.0, tokens_per_minute=6000.0)
    assert (limit.size_requests, limit.size_tokens) == (15.0, 1000.0)
    assert (limit.requests_per_s, limit.tokens_per_s) == (1.5, 100.0)
    assert RateLimit(requests_per_minute=3.0).size_requests == 1.0
    given = RateLimit(3.0, 7.0, 60.0, 500.0)
    assert (given.size_requests, given.size_tokens) == (7.0, 500.0)
    assert rate_limits_from({"api": given.to_dict()}) == {"api": given} and RateLimit().to_dict() == {}


def test_requests_come_back_at_the_limit():
    clock = Clock()
    rates = book(clock, requests_per_minute=30.0, burst_requests=3.0)
    for _ in range(3):
        assert rates.spent(1) == []
        rates.sent(API, 100)
    assert rates.spent(1) == [API]
    clock.now_s += 1.75  # half a request a second
    assert rates.spent(1) == [API]
    clock.now_s += 0.25
    assert rates.spent(1) == []
    rates.sent(API, 100)
    clock.now_s += 1000.0
    for _ in range(3):
        rates.sent(API, 100)
    assert rates.spent(1) == [API]


def test_a_prompt_needs_room_and_an_answer_leaves_a_debt():
    clock = Clock()
    rates = book(clock, tokens_per_minute=600.0, burst_tokens=100.0)  # 10 tokens a second
    rates.sent(API, 80)
    assert rates.spent(20) == [] and rates.spent(21) == [API]
    rates.answered(API, 50)  # 30 of debt
    clock.now_s += 3.0
    assert rates.spent(1) == [API]
    clock.now_s += 0.25
    assert rates.spent(2) == [] and rates.spent(3) == [API]
    clock.now_s += 9.5
    assert rates.spent(500) == [API]
    clock.now_s += 0.25
    assert rates.spent(500) == []  # full: a prompt that could never fit goes
    rates.sent(API, 60)
    rates.answered(API, -60)  # refused: nothing was used
    assert rates.spent(100) == []


def test_who_has_no_limit_is_never_spent():
    rates = book(Clock(), requests_per_minute=1.0)
    for c in (0, OTHER):
        for _ in range(1000):
            rates.sent(c, 10_000)
            rates.answered(c, 10_000)
    assert rates.spent(1_000_000) == []
    assert rates.told(OTHER, requests_left=0.0, tokens_left=0.0) and rates.spent(1) == []  # at no known rate
    assert not rates.told(0, retry_after_s=5.0) and not rates.told(-1, retry_after_s=5.0)


@pytest.mark.parametrize(("ago_s", "after_s"), [(0.0, 2.0), (1.5, 0.5), (3.0, 0.0)])
def test_what_a_response_says_is_left_lowers_the_bucket(ago_s, after_s):
    clock = Clock()
    rates = book(clock, requests_per_minute=30.0, burst_requests=10.0)
    assert rates.told(API, requests_left=0.0, ago_s=ago_s)
    clock.now_s += after_s / 2.0
    assert rates.spent(1) == ([API] if after_s else [])
    clock.now_s += after_s / 2.0
    assert rates.spent(1) == []
    rates.told(API, requests_left=1e6)  # more than is counted raises nothing
    for _ in range(int(1.0 + max(ago_s - 2.0, 0.0))):
        rates.sent(API, 1)
    assert rates.spent(1) == [API]


def test_tokens_that_are_left_by_a_response():
    clock = Clock()
    rates = book(clock, tokens_per_minute=600.0, burst_tokens=100.0)
    rates.told(API, tokens_left=30.0, ago_s=2.0)  # 50 now
    assert rates.spent(50) == [] and rates.spent(51) == [API]


@pytest.mark.parametrize("candidate", [API, OTHER])
def test_a_refusal_holds_calls_back_until_the_time_it_names(candidate):
    clock = Clock()
    rates = book(clock, requests_per_minute=600.0)
    rates.told(candidate, retry_after_s=20.0, ago_s=1.0)
    clock.now_s += 18.9
    assert rates.spent(1) == [candidate]
    clock.now_s += 0.2
    assert rates.spent(1) == []
    rates.told(candidate, retry_after_s=1e9)
    clock.now_s += 3601.0
    assert rates.spent(1) == []  # nobody's word closes a provider for ever


def test_a_refusal_without_a_time_empties_the_bucket():
    clock = Clock()
    rates = book(clock, requests_per_minute=30.0, burst_requests=10.0)
    rates.told(API, retry_after_s=0.0)
    clock.now_s += 1.75
    assert rates.spent(1) == [API]
    clock.now_s += 0.25
    assert rates.spent(1) == []


def test_another_bundle_goes_on():
    clock = Clock()
    old = book(clock, requests_per_minute=30.0, burst_requests=3.0)
    old.told(OTHER, retry_after_s=10.0)
    for _ in range(3):
        old.sent(API, 1)
    old.note_left_out([API])
    new = RateBook(layout(), {"api": RateLimit(30.0, 5.0)}, clock)
    new.take_over(old, {1: 1, 2: 2})
    assert new.spent(1) == [API, OTHER] and new.left_out == {API: 1}
    clock.now_s += 4.0
    assert new.spent(1) == [OTHER]
    clock.now_s += 6.0
    assert new.spent(1) == []


def exchange(books, total, fails=()):
    """What Redis does for each worker in turn."""
    for i, rates in enumerate(books):
        fresh, asked = rates.to_share()
        if i in fails:
            rates.not_shared(fresh)
            continue
        for name, amount in fresh.items():
            total[name] = total.get(name, 0.0) + amount
        rates.shared({name: total.get(name, 0.0) for name in asked})


def test_workers_take_from_one_bucket():
    clock, total = Clock(), {"rate:api:requests": 40.0, "rate:api:tokens": 9000.0}  # of workers that are gone
    books = [book(clock, requests_per_minute=60.0, burst_requests=10.0, tokens_per_minute=600.0) for _ in range(3)]
    exchange(books, total)
    assert [rates.spent(1) for rates in books] == [[], [], []]
    for rates, calls in zip(books, (4, 3, 2), strict=True):
        for _ in range(calls):
            rates.sent(API, 5)
    exchange(books, total, fails=(1,))
    exchange(books, total)
    exchange(books, total)
    assert total == {"rate:api:requests": 49.0, "rate:api:tokens": 9045.0}
    for rates in books:
        assert rates.spent(55) == [] and rates.spent(56) == [API]
        rates.sent(API, 0)  # the tenth, as far as this one knows
        assert rates.spent(1) == [API]


def test_a_worker_that_lost_the_others_starts_anew():
    clock, total = Clock(), {}
    books = [book(clock, requests_per_minute=60.0, burst_requests=10.0) for _ in range(2)]
    exchange(books, total)
    books[0].shared({})
    for _ in range(10):
        books[1].sent(API, 1)
    exchange(books[1:], total)
    exchange(books[:1], total)
    assert books[0].spent(1) == []  # how long ago that was, nobody knows


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (200, {"x-ratelimit-remaining-requests": "12", "x-ratelimit-remaining-tokens": 3400}, (12.0, 3400.0, None)),
        (200, {"anthropic-ratelimit-requests-remaining": "7"}, (7.0, None, None)),
        (429, {"retry-after": "30"}, (None, None, 30.0)),
        (429, {"retry-after": "30", "retry-after-ms": "1500"}, (None, None, 1.5)),
        (429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, (None, None, 0.0)),
        (429, {"retry-after": "soon", "x-ratelimit-remaining-requests": "-1"}, (None, None, 0.0)),
        (429, {}, (None, None, 0.0)),
        (503, {"retry-after": "2"}, (None, None, 2.0)),
        (503, {}, (None, None, None)),
        (200, {"retry-after": "2", "x-ratelimit-remaining-tokens": "nan"}, (None, None, None)),
    ],
)
def test_headers(status, headers, says):
    names = ("requests_left", "tokens_left", "retry_after_s")
    assert told_by(status, headers) == {name: x for name, x in zip(names, says, strict=True) if x is not None}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "rate_limits must map providers to limits"),
        ({"api": 90}, "rate_limits.api must map names to values"),
        ({"api": {"rpm": 90}}, "rate_limits.api.rpm is unknown; legal: requests_per_minute, burst_requests"),
        ({"api": {"requests_per_minute": 0}}, "requests_per_minute = 0; legal is a number above 0"),
        ({"api": {"burst_tokens": True}}, "burst_tokens = True"),
    ],
)
def test_settings_that_are_not_legal(rows, says):
    with pytest.raises(InputError, match=says):
        rate_limits_from(rows)


@pytest.mark.parametrize(
    ("after", "tokens", "share"),
    [((), 0, 0.0), ((1,), 0, 0.5), ((1, 1), 0, 1.0), ((30,), 0, 0.5), ((60,), 0, 0.6), ((90,), 40, 1.3)],
)
def test_the_share_that_is_spent_is_that_of_the_emptier_bucket(after, tokens, share):
    # Two calls and 100 tokens at once; the clock stands still, so that nothing is regained.
    rates = RateBook(layout(), {"api": RateLimit(60.0, 2.0, 600.0, 100.0)}, Clock())
    for prompt in after:
        rates.sent(API, prompt)
    rates.answered(API, tokens)
    rates.spent(1, shares := np.zeros(len(layout().names)))
    assert shares.tolist() == pytest.approx([share if c == API else 0.0 for c in range(len(shares))])


def test_only_providers_have_limits():
    check_providers({"api": RateLimit()}, layout())
    with pytest.raises(InputError, match=r"'own/0' is no provider of the bundle; legal: api, other"):
        check_providers({"own/0": RateLimit()}, layout())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    requests=st.sampled_from([math.inf, 20.0, 300.0]),
    tokens=st.sampled_from([math.inf, 6e3, 6e4]),
    burst=st.sampled_from([0.0, 2.0, 800.0]),
)
def test_the_worlds_provider_says_the_same(seed, requests, tokens, burst):
    rng, clock = np.random.default_rng(seed), Clock()
    spec = ProviderSpec("api", 0, 0.3, 0.0, 0.01, 0.0, requests, burst, tokens, burst)
    fleet = allocate(FleetSpec((PoolSpec("p", constant_profile(1.0)),), (spec,)), 1, 300)
    engine.reset_world(*fleet.arrays, 0)
    clock.now_s = 0.0
    rates, ends = RateBook(layout(), {"api": spec.rate_limit}, clock), []
    for i in range(200):
        now_s = clock.now_s + float(rng.exponential(0.3))
        engine.advance(*fleet.arrays, 0, now_s)
        for end_s, output in sorted(x for x in ends if x[0] <= now_s):
            clock.now_s = end_s
            rates.answered(API, output)
        ends, clock.now_s = [x for x in ends if x[0] > now_s], now_s
        prompt, output = int(rng.integers(1, 500)), int(rng.integers(1, 200))
        legal = provider_available(fleet.providers, 0, 0, now_s, prompt)
        assert legal == (API not in rates.spent(prompt, shares := np.zeros(len(layout().names))))
        assert shares[API] == pytest.approx(limit_spent(fleet.providers, 0, 0, now_s), abs=1e-9)
        if legal:
            fleet.requests[0, i]["prompt_tokens"], fleet.requests[0, i]["output_tokens"] = prompt, output
            fleet.requests[0, i]["patience_until_s"] = math.inf
            submit_provider(*fleet.arrays, 0, 0, i, now_s, 0.3, 0.01)
            rates.sent(API, prompt)
            ends.append((float(fleet.requests[0, i]["completed_at_s"]), output))
