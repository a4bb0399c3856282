"""GatewayState: counters that cannot leak, and a View whose signals mean what the world's mean."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from bundles import small_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from marginroute import latency
from marginroute import view as v
from marginroute.counters import COUNTERS
from marginroute.errors import InputError
from marginroute.response_cache import Hit, p_reuse
from marginroute.session_map import SessionMap
from marginroute.telemetry import GatewayState

IDS = st.sampled_from([f"r{i}" for i in range(6)])
STALE_S = 50.0


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def state_at(clock=None, **options):
    return GatewayState(small_bundle(), clock=clock or Clock(), **options)


class Life(RuleBasedStateMachine):
    """Any interleaving of events, duplicates and strangers included, against a plain model of what is in flight."""

    @initialize()
    def start(self):
        self.clock = Clock()
        self.state = state_at(self.clock, stale_after_s=STALE_S)
        self.model = {}  # id -> [candidate, prompt tokens, streamed tokens (None: no first token), last sign of life]

    @rule(id=IDS, candidate=st.integers(0, 2), prompt_tokens=st.integers(1, 5000), streamed=st.booleans())
    def begin(self, id, candidate, prompt_tokens, streamed):
        estimate_s = None if streamed else (4.0, 0.05)
        self.state.begin(id, candidate, prompt_tokens, "premium", "code", estimate_s)
        first_s = None if streamed else self.clock.now_s + 4.0
        self.model[id] = [candidate, prompt_tokens, None, self.clock.now_s, first_s]

    @rule(id=IDS, ago_s=st.floats(0.0, 3.0))
    def first_token(self, id, ago_s):
        self.state.first_token(id, ago_s)
        if id in self.model and self.model[id][2] is None:
            self.model[id][2:4] = 1, self.clock.now_s

    @rule(id=IDS, tokens=st.integers(1, 300))
    def progress(self, id, tokens):
        self.state.progress(id, tokens)
        if id in self.model:
            self.model[id][2:4] = tokens, self.clock.now_s

    @rule(id=IDS, status=st.sampled_from(["completed", "failed", "shed"]), tokens=st.none() | st.integers(0, 300))
    def end(self, id, status, tokens):
        assert self.state.end(id, status, tokens) == (self.model.pop(id, None) is not None)
        assert not self.state.end(id, status, tokens)

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds):
        self.clock.now_s += seconds
        view = self.state.view(100)
        for id, (_, _, tokens, alive_s, first_s) in list(self.model.items()):
            if self.clock.now_s - alive_s > STALE_S:
                del self.model[id]
            elif tokens is None and first_s is not None and first_s <= self.clock.now_s:
                self.model[id][2] = 1
        assert np.isfinite(view.signals).all()
        assert (view.signals >= 0.0).all()
        reported = self.state.counters()["decoding_tokens"]
        assert (view.signals[v.DECODING_TOKENS] >= reported).all()

    @invariant()
    def counters_are_the_models(self):
        expected = {name: np.zeros(6) for name in COUNTERS}
        for candidate, prompt_tokens, tokens, _, _ in self.model.values():
            expected["in_flight"][candidate] += 1
            if candidate == 2:  # the world shows no more of a provider
                continue
            expected["pending_prefill_tokens"][candidate] += prompt_tokens * (tokens is None)
            expected["decoding"][candidate] += tokens is not None
            expected["decoding_tokens"][candidate] += 0 if tokens is None else prompt_tokens + tokens
        counters = self.state.counters()
        for name, count in expected.items():
            assert counters[name].tolist() == count.tolist(), name
        assert self.state.in_flight == len(self.model)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_threads_leave_nothing_behind():
    state = GatewayState(small_bundle())

    def work(worker):
        rng = np.random.default_rng(worker)
        for i in range(150):
            id = f"{worker}-{i}"
            state.begin(id, int(rng.integers(3)), int(rng.integers(1, 900)))
            state.view(50)
            if rng.random() < 0.8:
                state.first_token(id)
            state.end(id, "completed", 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.in_flight == 0
    assert all((count == 0.0).all() for count in state.counters().values())
    assert state.view(50).request[v.SEQUENCE] == 600


def test_view_of_an_idle_gateway():
    bundle, clock = small_bundle(), Clock()
    state = GatewayState(bundle, clock)
    clock.now_s += 4.0
    view = state.view(300, "premium", "code", 0.5, waited_s=1.0, deadline_left_s=60.0)
    assert view.request[v.PROMPT_TOKENS] == 300
    assert view.request[[v.CLASS_INDEX, v.TASK_INDEX]].tolist() == [1, 1]
    assert view.request[v.EXPECTED_OUTPUT_TOKENS] == 300.0
    assert view.request[v.INPUT_PRICE_USD] == 1e-5
    assert view.request[v.SLO_TTFT_S] == 0.4
    assert view.request[v.SLO_E2E_S] == math.inf
    assert view.request[v.ARRIVAL_RATE_PER_S] == pytest.approx(1.0 / 4.0)
    assert view.request[[v.WAITED_S, v.DEADLINE_LEFT_S]].tolist() == [1.0, 60.0]
    assert (view.signals[: v.N_STATIC_SIGNALS] == bundle.static_signals).all()
    small, large = bundle.prior.p_good(0.5)
    assert view.signals[v.P_GOOD_PRIOR].tolist() == [small, large, large, 0.0, 0.0, 0.0]
    assert view.signals[v.RECENT_TTFT_S].tolist() == [0.0, 0.0, 0.6, 0.0, 0.0, 0.0]
    assert view.signals[v.RECENT_TPOT_S].tolist() == [0.006, 0.02, 0.012, 0.0, 0.0, 0.0]
    assert (view.signals[v.TELEMETRY_AGE_S] == 0.0).all()
    assert view.legal.tolist() == [True, True, True, False, False, False]


def test_what_a_gateway_can_do_is_what_is_legal():
    state = state_at(can={"shed", "defer", "cache"}, hold_s=10.0)
    assert state.view(9).legal.tolist() == [True, True, True, False, False, True]
    assert state.view(9, "batch", deadline_left_s=60.0).legal.tolist() == [True, True, True, False, True, True]
    assert not state.view(9, "batch", deadline_left_s=15.0).legal[4]
    assert not state.view(9, "premium", deadline_left_s=60.0).legal[4]
    cached = state.view(9, cached=Hit("key", 1.0, 3.0, 1), available=[1])
    assert cached.legal.tolist() == [False, True, False, True, False, True]
    assert cached.signals[v.P_GOOD_PRIOR, 3] == cached.signals[v.P_GOOD_PRIOR, 1]
    assert cached.signals[[v.SIMILARITY, v.ENTRY_AGE_S], 3].tolist() == [1.0, 3.0]
    near = state.view(9, cached=Hit("key", 0.8, 3.0, 1)).signals[v.P_GOOD_PRIOR]
    assert near[3] == pytest.approx(near[1] * p_reuse(0.8)) and 0.8 < near[3] / near[1] < 0.9
    assert state_at().view(9, available=[]).legal.tolist() == [False] * 5 + [True]


def test_caps_and_held_requests_only_where_the_gateway_holds():
    holds, does_not = state_at(can={"hold"}), state_at()
    for i in range(20):
        holds.begin(f"{i}", 0, 10)
        does_not.begin(f"{i}", 0, 10)
    assert holds.view(9).signals[[v.IN_FLIGHT_CAP, v.HELD], 0].tolist() == [16.0, 4.0]
    assert does_not.view(9).signals[v.HELD, 0] == 0.0
    assert does_not.view(9).signals[v.IN_FLIGHT_CAP, 0] > 1e6


def test_streams_that_nobody_reports_grow_by_recent_tpot():
    clock = Clock()
    state = state_at(clock)
    state.begin("a", 0, 100)
    state.first_token("a", ago_s=0.0)
    clock.now_s += 0.6
    assert state.view(9).signals[v.DECODING_TOKENS, 0] == pytest.approx(101 + 0.6 / 0.006)
    state.progress("a", 7)
    clock.now_s += 5.0
    assert state.view(9).signals[v.DECODING_TOKENS, 0] == 107


def test_measured_latencies_and_lengths_are_learnt_with_the_worlds_formula():
    clock = Clock()
    state = state_at(clock)
    ttft_s, weight, length, length_weight = 0.0, 0.0, 120.0, latency.PRIOR_LENGTHS
    for seen_s, tokens in ((0.2, 11), (0.4, 21), (0.9, 31)):
        state.begin("a", 0, 100)
        clock.now_s += seen_s
        state.first_token("a")
        clock.now_s += 1.0
        state.end("a", "completed", tokens)
        ttft_s, weight = latency.running_mean(ttft_s, weight, seen_s, latency.RECENT_ANSWERS)
        length, length_weight = latency.running_mean(length, length_weight, tokens, latency.RECENT_LENGTHS)
    view = state.view(9)
    assert view.signals[v.RECENT_TTFT_S, 0] == pytest.approx(ttft_s)
    assert view.signals[v.RECENT_TPOT_S, 0] == pytest.approx((1 / 10 + 1 / 20 + 1 / 30) / 3)
    assert view.request[v.EXPECTED_OUTPUT_TOKENS] == pytest.approx(length)
    state.begin("b", 0, 100)
    state.end("b", "failed", 500, 9.0, 9.0)
    assert state.view(9).signals[v.RECENT_TTFT_S, 0] == view.signals[v.RECENT_TTFT_S, 0]


def test_answer_that_is_not_streamed_is_split_as_estimated():
    clock = Clock()
    state = state_at(clock)
    state.begin("a", 1, 100, estimate_s=(1.0, 0.1))
    clock.now_s += 2.0
    view = state.view(9)
    assert view.signals[[v.PENDING_PREFILL_TOKENS, v.DECODING], 1].tolist() == [0.0, 1.0]
    state.end("a", "completed", 11, e2e_s=4.0)  # twice the estimate of 1 + 10 x 0.1
    view = state.view(9)
    assert view.signals[v.RECENT_TTFT_S, 1] == pytest.approx(2.0)
    assert view.signals[v.RECENT_TPOT_S, 1] == pytest.approx(0.2)


def test_retry_ends_the_first_attempt_and_is_no_arrival():
    clock = Clock()
    state = state_at(clock)
    clock.now_s += 2.0
    state.view(9)
    state.begin("a", 0, 100)
    clock.now_s += 2.0
    again = state.view(9, attempt=2, waited_s=2.0)
    assert again.request[v.ARRIVAL_RATE_PER_S] == pytest.approx(0.5)
    assert again.request[v.SEQUENCE] == 1
    state.begin("a", 1, 100)
    assert state.counters()["in_flight"].tolist() == [0, 1, 0, 0, 0, 0]


def test_scraped_signals_age():
    clock = Clock()
    state = state_at(clock)
    state.scraped(1, waiting=3, running=8, kv_usage=0.7, age_s=0.5)
    clock.now_s += 2.0
    view = state.view(9)
    assert view.signals[[v.WAITING, v.RUNNING, v.KV_USAGE, v.TELEMETRY_AGE_S], 1].tolist() == [3, 8, 0.7, 2.5]
    assert view.signals[v.TELEMETRY_AGE_S, 0] == 0.0


def test_what_an_engine_has_beyond_our_own_is_shown_until_its_next_page():
    """Two of ours decode, one waits; the page tells of five that run and two that wait, in 600 tokens of its cache."""
    clock = Clock()
    state = state_at(clock)
    capacity_tokens = state.view(100).signals[v.KV_CAPACITY_TOKENS, 1]
    for i in range(3):
        state.begin(f"r{i}", 1, 100)
    for i in range(2):
        state.first_token(f"r{i}")
        state.progress(f"r{i}", 20)
    shown = [v.IN_FLIGHT, v.DECODING, v.DECODING_TOKENS, v.PENDING_PREFILL_TOKENS]
    assert state.view(100).signals[shown, 1].tolist() == [3, 2, 240, 100]
    state.scraped(1, waiting=2, running=5, kv_usage=600 / capacity_tokens)
    assert state.view(100).signals[shown, 1] == pytest.approx([7, 5, 600, 200])
    state.end("r0")
    assert state.view(100).signals[shown, 1] == pytest.approx([6, 4, 480, 200])
    state.scraped(1, waiting=9, running=9, kv_usage=0.9, age_s=5.0)  # too old to be set beside what is there now
    assert state.view(100).signals[shown, 1] == pytest.approx([6, 4, 480, 200])
    state.scraped(1, waiting=0, running=2, kv_usage=220 / capacity_tokens)
    assert state.view(100).signals[shown, 1].tolist() == [2, 1, 120, 100]
    assert state.in_flight_at(1) == 2  # caps and limits count what this gateway sent


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=80))
@settings(max_examples=40, deadline=None)
def test_arrival_rate_is_the_worlds_running_mean(gaps_s):
    clock = Clock()
    state, mean_s = state_at(clock), 0.0
    for count, gap_s in enumerate(gaps_s, start=1):
        clock.now_s += gap_s
        rate = state.view(9).request[v.ARRIVAL_RATE_PER_S]
        mean_s, _ = latency.running_mean(mean_s, count - 1, gap_s, latency.RECENT_ARRIVALS)
        assert rate == pytest.approx(1.0 / mean_s, rel=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"gold.*standard, premium, batch"):
        state_at().view(9, "gold")
    with pytest.raises(InputError, match=r"poetry.*chat, code"):
        state_at().begin("a", 0, 9, "standard", "poetry")


def caching_bundle():
    """`small/0` with a prefix cache of 64 tokens, the API with one that forgets after 10 s."""
    bundle = small_bundle()
    bundle.static_signals[v.PREFIX_CAPACITY_TOKENS, [0, 2]] = 64.0, 1000.0
    bundle.static_signals[v.PREFIX_TTL_S, [0, 2]] = v.UNLIMITED, 10.0
    return bundle


def test_cached_tokens_are_those_of_prompts_that_were_sent():
    clock = Clock()
    state = GatewayState(caching_bundle(), clock, prefix_block_tokens=16)
    hashes = [11, 12, 13, 14, 15]
    assert not state.view(90, hashes=hashes).signals[v.CACHED_TOKENS].any()
    for id, candidate in (("a", 0), ("b", 1), ("c", 2)):
        state.begin(id, candidate, 90, hashes=hashes)
    signals = state.view(81, hashes=hashes[:4]).signals
    assert signals[v.CACHED_TOKENS].tolist() == [64.0, 0.0, 64.0, 0.0, 0.0, 0.0]
    assert state.view(90, hashes=hashes).signals[v.CACHED_TOKENS, :3].tolist() == [64.0, 0.0, 80.0]
    assert state.view(40, hashes=hashes).signals[v.CACHED_TOKENS, 2] == 39.0  # the last token is always computed
    assert state.view(90, hashes=hashes, block_tokens=10.5).signals[v.CACHED_TOKENS, 2] == 52.0
    state.begin("d", 0, 90, hashes=hashes)
    assert state.counters()["pending_prefill_tokens"][0] == 90 + 90 - 64
    state.end("d")
    assert state.counters()["pending_prefill_tokens"][0] == 90
    clock.now_s += 10.1
    assert state.view(90, hashes=hashes).signals[v.CACHED_TOKENS, :3].tolist() == [64.0, 0.0, 0.0]


def test_without_caches_or_hashes_nothing_is_remembered():
    assert not GatewayState(small_bundle(), Clock(), prefix_block_tokens=16).hashes_prompts
    assert not GatewayState(caching_bundle(), Clock()).hashes_prompts
    with pytest.raises(InputError, match="prefix_block_tokens = -1; legal is 0"):
        GatewayState(caching_bundle(), Clock(), prefix_block_tokens=-1)


def test_a_session_is_remembered_where_it_was_sent():
    """Its last call, by candidate and age; the least recently used session goes first."""
    now = [0.0]
    state = GatewayState(small_bundle(), clock=lambda: now[0])
    state.begin("a", 1, 100, session="talk")
    now[0] = 7.0
    idle = state.view(100, session="talk").signals[v.SESSION_IDLE_S]
    assert idle[1] == 7.0 and (np.delete(idle, 1) == v.UNLIMITED).all()
    assert (state.view(100, session="other").signals[v.SESSION_IDLE_S] == v.UNLIMITED).all()
    assert (state.view(100).signals[v.SESSION_IDLE_S] == v.UNLIMITED).all()
    other = GatewayState(small_bundle(), clock=lambda: now[0])
    other.take_over(state)
    assert other.view(100, session="talk").signals[v.SESSION_IDLE_S, 1] == 7.0
    known = SessionMap(most=2)
    for i, name in enumerate(("a", "b", "a", "c")):
        known.note(name, i, float(i))
    assert (known.find("a"), known.find("b"), known.find("c"), len(known)) == ((2, 2.0), None, (3, 3.0), 2)
    known.note("d", 0, 1e6)
    assert known.find("a") is None and len(known) == 1


def test_a_request_is_shown_as_it_stands():
    """List prices within; nothing beyond a quota; the overage price; all value and no revenue under a commitment."""
    base = small_bundle()
    more = {"overage_usd": 0.02, "committed_usd": 5.0, "beyond_factor": 2.0, "context_tokens": 500.0}
    terms = base.terms | {"premium": base.terms["premium"] | more}
    state = GatewayState(replace(base, terms=terms), can=("shed", "defer"))

    def prices(view):
        return view.request[[v.INPUT_PRICE_USD, v.REQUEST_USD, v.REQUEST_VALUE_USD]].tolist()

    assert prices(state.view(100, "standard")) == [4e-6, 0.0, 0.0]
    beyond = state.view(100, "standard", standing="best_effort", quota_left=0.0)
    assert prices(beyond) == [0.0, 0.0, 0.0] and beyond.request[v.BAD_ANSWER_USD] == 0.0
    assert beyond.request[[v.STANDING, v.QUOTA_LEFT]].tolist() == [1.0, 0.0]
    assert prices(state.view(100, "premium", standing="overage")) == [0.0, 0.02, 0.0]
    listed_usd = 100 * 1e-5 + 150.0 * 4e-5
    assert prices(state.view(100, "premium")) == pytest.approx([0.0, 0.0, listed_usd])
    assert prices(state.view(100, "premium", quota_left=0.0)) == pytest.approx([2e-5, 0.0, 0.0])


@pytest.mark.parametrize(("tokens", "standing"), [(501, "within"), (100, "refused")])
def test_a_request_that_its_contract_refuses_can_only_be_shed(tokens, standing):
    base = small_bundle()
    terms = {name: row | {"context_tokens": 500.0} for name, row in base.terms.items()}
    state = GatewayState(replace(base, terms=terms), can=("shed", "defer"))
    view = state.view(tokens, "batch", standing=standing)
    assert view.legal.tolist() == [False] * 5 + [True]
    assert state.view(500, "batch").legal[:3].all()
