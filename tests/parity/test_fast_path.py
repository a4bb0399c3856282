"""The prepared decision of one fleet is the general one: same candidate, same reason in USD, on whatever view."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marginroute import features, latency
from marginroute import view as v
from marginroute.guard import GuardedPolicy, GuardLimits
from marginroute.margin_rule import CACHE_COLUMN, DEFER_COLUMN, MarginParameters, MarginRule
from marginroute.policy import Network, ResidualPolicy
from marginroute.quality import FittedQuality
from marginroute.rules import LeastInFlight
from marginroute.view import Layout, View

WIDTH = 8
TOLERANCE = 1e-6  # of USD per USD of the request's value


def fleet(rng):
    """A layout with random pools and providers, and their constants."""
    replicas, providers = int(rng.integers(1, 12)), int(rng.integers(0, 4))
    n, pools = replicas + providers + 3, min(replicas, 3)
    station = np.concatenate(
        [np.sort(rng.integers(0, pools, replicas)), pools + np.arange(providers), [pools + providers] * 3]
    )
    layout = Layout(
        names=tuple(f"c{i}" for i in range(n)),
        kind=np.array([v.REPLICA] * replicas + [v.PROVIDER] * providers + [v.CACHE, v.DEFER, v.SHED]),
        station=station,
        tier=np.concatenate([rng.integers(0, 3, replicas + providers), [-1, -1, -1]]),
        station_names=tuple(f"s{i}" for i in range(pools + providers)),
        tier_names=("small", "medium", "large"),
        class_names=("standard", "premium", "batch"),
        task_names=("chat", "code"),
    )
    static = np.zeros((v.N_STATIC_SIGNALS, n))
    static[[v.TOKEN_BUDGET, v.SLOTS, v.KV_CAPACITY_TOKENS]] = v.UNLIMITED
    own, bought, cache = slice(0, replicas), slice(replicas, replicas + providers), replicas + providers
    for row, low, high in (
        (v.BASE_S, 0.005, 0.03), (v.PREFILL_TOKEN_S, 1e-5, 1e-4), (v.DECODE_SEQ_S, 0.0, 5e-4),
        (v.KV_TOKEN_S, 0.0, 1e-7), (v.TOKEN_BUDGET, 4, 4096), (v.SLOTS, 1, 64), (v.KV_CAPACITY_TOKENS, 4096, 1e6),
    ):  # fmt: skip
        static[row, own] = rng.uniform(low, high, replicas)
    static[[v.TOKEN_BUDGET, v.SLOTS], own] = np.round(static[[v.TOKEN_BUDGET, v.SLOTS], own])
    static[v.FIXED_TTFT_S, bought], static[v.FIXED_TPOT_S, bought] = rng.uniform(0.2, 2.0, (2, providers)) * [
        [1.0],
        [0.02],
    ]
    if rng.random() < 0.7:
        static[[v.LIMIT_CALL_S, v.LIMIT_TOKEN_S], bought] = rng.uniform(0.0, 1.0, (2, providers)) * [[1.0], [1e-3]]
    static[v.FIXED_TTFT_S, cache] = 0.01
    static[[v.INPUT_USD, v.OUTPUT_USD], :cache] = rng.uniform(0.0, 1e-5, (2, cache))
    static[v.CACHED_INPUT_USD, :cache] = static[v.INPUT_USD, :cache] * rng.random(cache)
    static[v.CALL_USD, :cache] = rng.choice([0.0, 1e-4], cache)
    return layout, static


def rule_of(rng, layout):
    """A margin rule with random parameters, floors and fitted quality or not."""
    classes = len(layout.class_names)
    floors = {f"{name}_usd": tuple(rng.uniform(0.0, 0.01, classes)) for name in ("slo", "good", "served")}
    parameters = MarginParameters(
        station_usd_per_s=tuple(rng.uniform(0.0, 0.01, len(layout.station_names))),
        fill_power=float(rng.choice([1.0, 1.7])),
        ttft_scale=float(rng.uniform(0.5, 2.0)),
        tpot_scale=float(rng.uniform(0.5, 2.0)),
        sharpness=float(rng.choice([4.0, 2.5])),
        defer_share=float(rng.uniform(0.5, 1.0)),
        cache_similarity=float(rng.choice([0.0, 0.9])),
        **(floors if rng.random() < 0.4 else {}),
    )
    quality = None
    if rng.random() < 0.3:
        worth = float(rng.choice([10.0, np.inf]))
        numbers = rng.normal(0, 1, (3, 2)), rng.uniform(0.5, 1.5, (3, 2)), rng.normal(0, 1, 3)
        quality = FittedQuality(*numbers, fit_worth=worth)
    return MarginRule("bid-price", parameters, quality)


def network_of(rng, layout, rule):
    """A random network with a random normaliser."""
    spec = features.feature_spec(layout)
    f, g = spec.n_candidate, spec.n_context
    spec = replace(
        spec,
        candidate_mean=rng.normal(0, 1, f),
        candidate_std=rng.uniform(0.3, 3, f),
        context_mean=rng.normal(0, 1, g),
        context_std=rng.uniform(0.3, 3, g),
    )
    sizes = (f, WIDTH), (g, WIDTH), WIDTH, (WIDTH, WIDTH), WIDTH, WIDTH
    weights = (rng.normal(0.0, 0.4, size).astype(np.float32) for size in sizes)
    kappa, trust = rng.uniform(0.2, 1.5, 1).astype(np.float32), rng.uniform(0.0, 1.0, 2).astype(np.float32)
    trust[0] *= rng.random() < 0.5
    return ResidualPolicy("residual", rule, spec, Network(*weights, kappa, trust))


def view_of(rng, layout, static):
    """A view that a busy gateway might have, or an idle one."""
    n, replicas = layout.n_candidates, layout.n_replicas
    serving, busy = int((layout.kind <= v.PROVIDER).sum()), rng.choice([0.0, 1.0, 20.0])
    s = np.zeros((len(v.SIGNALS), n))
    s[: v.N_STATIC_SIGNALS] = static
    s[v.P_GOOD_PRIOR, : serving + 1] = rng.uniform(0.05, 0.99, serving + 1)
    s[[v.IN_FLIGHT, v.DECODING, v.WAITING, v.RUNNING, v.HELD], :replicas] = np.round(
        rng.exponential(busy, (5, replicas))
    )
    s[v.IN_FLIGHT, replicas:serving] = np.round(rng.exponential(busy, serving - replicas))
    s[v.LIMIT_SPENT] = np.where(static[v.LIMIT_CALL_S] > 0.0, rng.uniform(0.0, 2.5, n), 0.0)
    s[v.IN_FLIGHT_CAP] = v.UNLIMITED
    if rng.random() < 0.5:
        s[v.IN_FLIGHT_CAP, :replicas] = np.round(rng.uniform(1, 40, replicas))
    s[[v.DECODING_TOKENS, v.PENDING_PREFILL_TOKENS], :replicas] = np.round(
        rng.exponential(3000.0 * busy, (2, replicas))
    )
    s[[v.RECENT_TTFT_S, v.RECENT_TPOT_S], :serving] = rng.exponential(1.0, (2, serving)) * [[1.0], [0.03]]
    s[v.SURPRISE : v.TIER_CONFIDENCE + 1, :serving] = rng.normal(0.0, 3.0, (4, serving))
    s[v.CONFIDENCE : v.TIER_CONFIDENCE + 1 : 2, :serving] = rng.uniform(0.0, 0.9, (2, serving))
    s[v.SURPRISE : v.TIER_CONFIDENCE + 1] *= rng.random() < 0.7
    s[v.KV_USAGE, :replicas] = rng.random(replicas)
    s[v.RECENT_ERRORS, :serving] = rng.random(serving) * rng.choice([0.0, 1.0])
    s[v.TELEMETRY_AGE_S, :replicas] = rng.uniform(0.0, 5.0, replicas)
    cached = rng.random() < 0.3
    if cached:
        s[v.SIMILARITY, serving], s[v.ENTRY_AGE_S, serving] = rng.uniform(0.7, 1.0), rng.exponential(1e4)
    q = np.zeros(len(v.REQUEST))
    q[v.PROMPT_TOKENS], q[v.EXPECTED_OUTPUT_TOKENS] = np.round(rng.lognormal(6, 1.5)) + 1, rng.uniform(1.0, 900.0)
    s[v.CACHED_TOKENS, :serving] = np.floor(rng.random(serving) * rng.choice([0.0, 1.0]) * (q[v.PROMPT_TOKENS] - 1))
    q[v.CLASS_INDEX], q[v.TASK_INDEX] = rng.integers(0, 3), rng.integers(0, 2)
    q[v.DIFFICULTY_SIGNAL], q[v.WAITED_S] = rng.normal(), rng.choice([0.0, rng.exponential(2.0)])
    if rng.random() < 0.3:
        s[v.TRIED, :serving] = rng.random(serving) < 0.5
        q[v.TURNED_DOWN], q[v.VERIFIER_SCORE] = rng.integers(1, 3), rng.random()
    q[v.TASK_VALUE_USD], q[v.TASK_CALL] = rng.choice([0.0, 2.5]), rng.integers(0, 9)
    q[v.DEADLINE_LEFT_S] = rng.choice([np.inf, rng.uniform(1.0, 1e5)])
    q[v.ARRIVAL_RATE_PER_S], q[v.SEQUENCE] = rng.exponential(10.0), rng.integers(0, 1000)
    q[v.INPUT_PRICE_USD : v.OUTPUT_PRICE_USD + 1] = rng.uniform(0.0, 4e-5, 2)
    q[v.CACHED_INPUT_PRICE_USD], q[v.REQUEST_USD] = q[v.INPUT_PRICE_USD], rng.choice([0.0, 0.003])
    if rng.random() < 0.5:  # contracts with a price of cached input, and windows that a miss may lose
        q[v.CACHED_INPUT_PRICE_USD] *= rng.random()
        q[v.MISS_USD] = rng.choice([0.0, rng.exponential(0.01)])
    q[v.REQUEST_VALUE_USD] = rng.choice([0.0, 0.01])
    q[v.REFUND_SHARE], q[v.BAD_ANSWER_USD] = rng.random(), rng.choice([0.0, 0.002])
    q[v.SLO_TTFT_S : v.PATIENCE_S + 1] = rng.uniform([0.1, 0.005, 1.0, 1.0], [2.0, 0.1, 60.0, 30.0])
    q[v.SLO_TTFT_S : v.PATIENCE_S + 1][rng.random(4) < 0.3] = np.inf
    q[v.TTFT_CREDIT_SHARE : v.UNSERVED_CREDIT_SHARE + 1] = rng.random(4) * rng.choice([0.0, 0.3, 1.0])
    q[v.UNSERVED_CREDIT_USD] = rng.choice([0.0, 0.01])
    legal = rng.random(n) < 0.8
    legal[CACHE_COLUMN], legal[DEFER_COLUMN], legal[-1] = cached, rng.random() < 0.3, True
    return View(layout, s, q, legal)


def agree(general, fast, view, policy):
    """Whether two decisions say the same, up to ties."""
    rule = policy.advice if isinstance(policy, ResidualPolicy) else policy
    unit_usd = max(float(rule.assess(view).value_usd), 1e-9)
    if fast.candidate != general.candidate:
        assert {fast.name, fast.runner_up} == {general.name, general.runner_up}
        assert abs(general.runner_up_usd) <= TOLERANCE * unit_usd
        return
    assert (fast.name, fast.kind, fast.policy, fast.guard) == (general.name, general.kind, general.policy, "")
    assert fast.reason_usd.keys() == general.reason_usd.keys() and vars(fast).keys() == vars(general).keys()
    for part, usd in general.reason_usd.items():
        assert fast.reason_usd[part] == pytest.approx(usd, rel=TOLERANCE, abs=TOLERANCE * unit_usd), part
    assert fast.runner_up_usd == pytest.approx(general.runner_up_usd, rel=TOLERANCE, abs=TOLERANCE * unit_usd)
    assert (fast.runner_up == "") == (general.runner_up == "")
    np.testing.assert_allclose(fast.estimate_s, latency.estimate(view)[0][:, fast.candidate], rtol=1e-9)


def drawn(seed, learned):
    """A generator, a layout, its constants, a rule for it, and a policy: the rule, or a network that corrects it."""
    rng = np.random.default_rng(seed)
    layout, static = fleet(rng)
    rule = rule_of(rng, layout)
    return rng, layout, static, rule, network_of(rng, layout, rule) if learned else rule


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), learned=st.booleans())
def test_the_general_path_says_the_same(seed, learned):
    rng, layout, static, rule, policy = drawn(seed, learned)
    general = GuardedPolicy(policy, rule, GuardLimits(drift_features=99))
    fast = general.prepared(layout, static).fast
    for _ in range(4):
        view = view_of(rng, layout, static)
        found = fast.decide(view)
        assert found is not None
        agree(general.decide(view), found, view, policy)


@pytest.fixture(scope="module")
def ready():
    rng = np.random.default_rng(5)
    layout, static = fleet(rng)
    rule = rule_of(rng, layout)
    policy = network_of(rng, layout, rule)
    g = policy.spec.n_context
    policy = replace(policy, spec=replace(policy.spec, context_mean=np.zeros(g), context_std=np.full(g, 0.95)))
    general = GuardedPolicy(policy, rule, GuardLimits(drift_features=1))
    return rng, general, general.prepared(layout, static), layout, static


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), learned=st.booleans())
def test_replicas_that_are_too_old_are_left_out_by_both(seed, learned):
    rng, layout, static, _, policy = drawn(seed, learned)
    general = GuardedPolicy(policy, LeastInFlight("least-in-flight"), GuardLimits(20.0, drift_features=99))
    guarded = general.prepared(layout, static)
    for _ in range(4):
        view = view_of(rng, layout, static)
        old = rng.random(layout.n_replicas) < rng.choice([0.2, 0.6, 1.0])
        view.signals[v.TELEMETRY_AGE_S, : layout.n_replicas] += np.where(old, 21.0, 0.0)
        slow, both = general.decide(view), guarded.decide(view)
        assert (both.guard, both.left_out) == (slow.guard, slow.left_out)
        assert not set(slow.left_out) & {slow.name, slow.runner_up, both.name, both.runner_up}
        many = View(layout, view.signals[:, None], view.request[:, None], view.legal[None])
        assert general.objects(many)[0] == (slow.guard == "stale") and general.decide_batch(many)[0] == slow.candidate
        if slow.guard:
            assert both == slow
        else:
            narrowed = view.copy()
            narrowed.legal[[layout.names.index(name) for name in slow.left_out]] = False
            agree(replace(general.decide(narrowed), left_out=slow.left_out), both, narrowed, policy)


def spoilt(ready, change):
    """What both say of a view that `change` has changed."""
    rng, general, guarded, layout, static = ready
    view = view_of(rng, layout, static)
    change(view)
    with np.errstate(all="ignore"):
        fast, slow, both = guarded.fast.decide(view), general.decide(view), guarded.decide(view)
    assert both == slow or both.reason_usd == pytest.approx(slow.reason_usd, abs=1e-9, nan_ok=True)
    assert both.guard == slow.guard
    return fast, slow


def put(row, value, rows="signals"):
    def change(view):
        getattr(view, rows)[row] = value

    return change


@pytest.mark.parametrize(
    ("change", "guard"),
    [
        (put(v.TELEMETRY_AGE_S, 61.0), "stale"),
        (put((v.TELEMETRY_AGE_S, -1), np.nan), "stale"),
        (put([v.DIFFICULTY_SIGNAL, v.ARRIVAL_RATE_PER_S], [90.0, 1e40], "request"), "drift"),
        (put(v.KV_USAGE, np.nan), "not-finite"),
        (put(v.PROMPT_TOKENS, np.nan, "request"), "not-finite"),
    ],
)
def test_what_the_guard_objects_to_goes_the_general_way(ready, change, guard):
    fast, slow = spoilt(ready, change)
    assert fast is None and slow.guard == guard


def test_a_network_that_was_told_nothing_still_looks_for_what_is_not_finite(ready):
    rng, general, _, layout, static = ready
    policy = replace(general.policy, network=replace(general.policy.network, trust=np.array([0.0, 1.0], np.float32)))
    general = replace(general, policy=policy, limits=GuardLimits(drift_features=99))
    untold = rng, general, general.prepared(layout, static), layout, static
    fast, slow = spoilt(untold, put(v.TIER_CONFIDENCE, 0.0))
    assert fast is not None and fast.reason_usd["learned"] == pytest.approx(slow.reason_usd["learned"], abs=1e-9)
    fast, slow = spoilt(untold, put([v.TIER_CONFIDENCE, v.KV_USAGE], [[0.0], [np.nan]]))
    assert fast is None and slow.guard == "not-finite"


def test_other_constants_go_the_general_way(ready):
    fast, slow = spoilt(ready, put((v.BASE_S, 0), 0.5))
    assert fast is None and slow.guard == ""


def test_what_it_does_not_cover_has_none(ready, monkeypatch):
    _, general, _, layout, static = ready
    many = replace(general.policy.advice.parameters, sharpness=np.array([[4.0], [2.0]]))
    several = replace(general.policy, advice=replace(general.policy.advice, parameters=many))
    for policy in (LeastInFlight("least-in-flight"), several):
        assert GuardedPolicy(policy, general.fallback, GuardLimits()).prepared(layout, static).fast is None
    monkeypatch.setattr(features, "FEATURE_VERSION", features.FEATURE_VERSION + 1)
    assert general.prepared(layout, static).fast is None


def test_it_goes_to_another_process_with_its_policy(ready):
    """evaluate.py pickles policies for its workers."""
    rng, _, guarded, layout, static = ready
    view = view_of(rng, layout, static)
    guarded.decide(view)
    copy, copied_view = pickle.loads(pickle.dumps((guarded, view)))
    assert copy.fast is not None and guarded.decide(view) == copy.decide(copied_view)
    assert copy.decide(view).reason_usd == pytest.approx(
        guarded.decide(view).reason_usd
    )  # not its layout: general path


def test_threads_and_reloads_do_not_disturb_each_other(ready):
    rng, general, guarded, layout, static = ready
    views = [view_of(rng, layout, static) for _ in range(40)]
    alone = [guarded.decide(view) for view in views]
    in_force, found = [guarded], {}

    def decide(thread):
        found[thread] = [in_force[0].decide(view) for _ in range(10) for view in views]

    threads = [threading.Thread(target=decide, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    reloads = 0
    while any(thread.is_alive() for thread in threads):
        in_force[0] = general.prepared(layout, static)  # as the gateway does with a new bundle
        reloads += 1
    assert reloads > 1 and len(found) == 8 and all(decisions == alone * 10 for decisions in found.values())


@pytest.mark.parametrize(("row", "usd"), [(v.MISS_USD, 0.01), (v.CACHED_INPUT_PRICE_USD, 0.0)])
def test_windows_and_prices_of_cached_input_are_covered(ready, row, usd):
    said = (spoilt(ready, put(row, usd, "request")) for _ in range(20))
    fast, slow = next((fast, slow) for fast, slow in said if slow.guard != "drift")
    assert fast is not None and slow.guard == "" and fast.candidate == slow.candidate
    assert fast.reason_usd == pytest.approx(slow.reason_usd, rel=1e-6, abs=1e-9)
