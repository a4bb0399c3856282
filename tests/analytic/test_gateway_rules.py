"""The rules that gateways ship, against their formulas on small fleets written out by hand."""

import numpy as np
import pytest

from marginroute import heuristics
from marginroute import view as v
from marginroute.gateway_rules import (
    SHIPPED_RULES,
    CacheAware,
    CheapestAble,
    Composite,
    DynamoKv,
    LeastLoaded,
    LiteLlmCost,
    LiteLlmLatency,
    LiteLlmShuffle,
    LlmD,
    MultiFactor,
    PowerOfTwo,
    PrefixAware,
    SessionAffinity,
)
from marginroute.margin_rule import MarginParameters
from marginroute.rules import Cascade, FixedTier
from marginroute.view import Layout, View


def make_view(worlds=None, replicas=3, pools=(0, 0, 1), **signals):
    """Three replicas in two pools, one provider; rows of signals by name, zeros elsewhere."""
    c = replicas + 4
    layout = Layout(
        names=("small/0", "small/1", "large/0", "api", "cache", "defer", "shed"),
        kind=np.array([v.REPLICA] * 3 + [v.PROVIDER, v.CACHE, v.DEFER, v.SHED]),
        station=np.array([*pools, 2, 3, 3, 3]),
        tier=np.array([*pools, 2, -1, -1, -1]),
        station_names=("small", "large", "api"),
        tier_names=("a", "b", "hosted"),
        class_names=("all",),
        task_names=("chat",),
    )
    lead = () if worlds is None else (worlds,)
    rows = np.zeros((len(v.SIGNALS), *lead, c))
    rows[v.SLOTS] = 10.0
    request = np.ones((len(v.REQUEST), *lead))
    request[v.PROMPT_TOKENS] = 1000.0
    request[v.SLO_TTFT_S] = 2.0
    request[[v.TURNED_DOWN, v.VERIFIER_SCORE]] = 0.0
    request[v.SEQUENCE] = np.arange(worlds) if worlds else 7.0
    for name, values in signals.items():
        rows[v.SIGNAL_NAMES.index(name), ..., :4] = values
    legal = np.zeros((*lead, c), dtype=bool)
    legal[..., :4] = True
    legal[..., 6] = True
    return View(layout, rows, request, legal)


def chosen(rule, **signals):
    return rule.decide_batch(make_view(**signals))


def test_least_request_keeps_off_providers_unless_told():
    load = {"in_flight": [3, 2, 5, 0]}
    assert chosen(LeastLoaded("x"), **load) == 1
    assert chosen(LeastLoaded("x", use_providers=True), **load) == 3


def test_power_of_two_draws_two_distinct_and_takes_the_lower():
    view = make_view(worlds=3000, in_flight=[1, 2, 3, 9])
    counts = np.bincount(PowerOfTwo("x").decide_batch(view), minlength=4)
    # Pairs of three replicas are equally likely: the least loaded wins two of them, the next one, the last none.
    assert counts[2] == counts[3] == 0
    assert counts[0] / 3000 == pytest.approx(2 / 3, abs=0.03)


def test_cache_aware_branches():
    rule = CacheAware("x")
    match = {"cached_tokens": [0, 400, 0, 0]}
    assert chosen(rule, in_flight=[10, 20, 30, 0], **match) == 1  # balanced, 0.4 > 0.3
    assert chosen(rule, in_flight=[10, 20, 30, 0], cached_tokens=[0, 300, 0, 0]) == 0  # 0.3 is not above 0.3
    assert chosen(rule, in_flight=[10, 90, 30, 0], **match) == 0  # 80 > 64 and 90 > 1.5 x 10
    assert chosen(rule, in_flight=[200, 270, 210, 0], **match) == 1  # 70 > 64 but 270 <= 1.5 x 200


def test_prefix_aware_has_no_load_term():
    assert chosen(PrefixAware("x"), cached_tokens=[16, 32, 0, 0], in_flight=[0, 99, 0, 0]) == 1


def test_llm_d_score_by_hand():
    signals = {"waiting": [4, 0, 2, 0], "kv_usage": [0.1, 0.9, 0.5, 0], "cached_tokens": [500, 0, 250, 0]}
    view = make_view(**signals)
    among = np.array([True, True, True, False, False, False, False])
    score = LlmD("x").rank(view, among)[:3]
    by_hand = [2 * 0 + 2 * 0.9 + 3 * 0.5, 2 * 1 + 2 * 0.1 + 0, 2 * 0.5 + 2 * 0.5 + 3 * 0.25]
    assert score == pytest.approx(by_hand, abs=1e-6)
    even = make_view(waiting=[3, 3, 3, 0])
    assert LlmD("x").rank(even, among)[:3] == pytest.approx([4.0] * 3, abs=1e-6)  # all equal: 1


def test_dynamo_cost_by_hand():
    signals = {"pending_prefill_tokens": [160, 0, 0, 0], "cached_tokens": [800, 0, 160, 0]}
    signals |= {"decoding_tokens": [320, 640, 1600, 0], "in_flight": [2, 1, 4, 0]}
    view = make_view(**signals)
    cost = -DynamoKv("x", active_weight=3.0).rank(view, view.legal)[:3]
    by_hand = [(160 + 200) / 16 + 20 + 6, 1000 / 16 + 40 + 3, 840 / 16 + 100 + 12]
    assert cost == pytest.approx(by_hand, abs=1e-6)
    assert DynamoKv("x").decide_batch(view) == 0


def test_litellm_shuffle_draws_by_weight():
    counts = np.bincount(LiteLlmShuffle("x", api_weight=3.0).decide_batch(make_view(worlds=6000)), minlength=4)
    assert counts[:4] / 6000 == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.03)


def test_litellm_latency_and_cost():
    latency = {"recent_ttft_s": [0.5, 0.4, 0.9, 0.41]}
    assert chosen(LiteLlmLatency("x"), **latency) == 1
    picks = LiteLlmLatency("x", buffer=0.1).decide_batch(make_view(worlds=200, **latency))
    assert set(picks) == {1, 3}
    price = {"input_usd": [2e-6, 1e-6, 5e-6, 1e-6], "output_usd": [1e-6, 3e-6, 5e-6, 1.5e-6]}
    assert chosen(LiteLlmCost("x"), **price) == 3


def test_multi_factor_filters_by_the_ceiling_and_falls_back_to_the_cheapest():
    signals = {"p_good_prior": [0.6, 0.6, 0.9, 0.95], "recent_ttft_s": [0.2, 0.3, 0.6, 0.9], "in_flight": [5, 5, 1, 0]}
    signals |= {"input_usd": [1e-6, 1e-6, 2e-6, 3e-6]}
    view = make_view(**signals)
    able = view.legal & (view.layout.kind <= v.PROVIDER)
    score = MultiFactor("x").rank(view, able)[:4]
    # 3 x 0.9 > 2: the provider is out; the others scale latency over 0.2-0.6, cost over 1-2, load over 0.1-0.5.
    by_hand = [0.25 * (0.6 + 1 + 1 + 0), 0.25 * (0.6 + 0.75 + 1 + 0), 0.25 * (0.9 + 0 + 0 + 1)]
    assert score[:3] - score[0] == pytest.approx(np.array(by_hand) - by_hand[0], abs=1e-6)
    assert score[3] < score[:3].min() - 1000
    assert chosen(MultiFactor("x"), **{**signals, "recent_ttft_s": [9, 9, 9, 9], "input_usd": [3, 4, 2, 5]}) == 2


def test_cheapest_able():
    signals = {"p_good_prior": [0.5, 0.75, 0.8, 0.9], "input_usd": [1e-6, 3e-6, 2e-6, 9e-6]}
    assert chosen(CheapestAble("x", threshold=0.7), **signals) == 2
    assert chosen(CheapestAble("x", threshold=0.95), **signals) == 3  # nobody passes: the best


def test_composite_takes_the_replica_rule_inside_the_chosen_model():
    composite = Composite("x", CheapestAble("t", threshold=0.7), PrefixAware("r"))
    signals = {"p_good_prior": [0.8, 0.8, 0.9, 0.9], "input_usd": [1e-6, 1e-6, 2e-6, 3e-6]}
    assert chosen(composite, **signals, cached_tokens=[0, 64, 900, 0]) == 1
    view = make_view(**signals, cached_tokens=[0, 64, 900, 0])
    view.legal[:2] = False
    assert composite.decide_batch(view) == 2


def test_rules_among_a_pool_see_only_that_pool():
    view = make_view(waiting=[2, 4, 100, 0])
    among = np.array([True, True, False, False, False, False, False])
    assert LlmD("x", kv_weight=0.0).rank(view, among)[:2] == pytest.approx([2.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", heuristics.RULES)
def test_files_give_back_the_same_rule(name):
    rule = heuristics.RULES[name]
    arguments = {"name": "x"}
    if name == "composite":
        arguments |= {"tier_rule": MultiFactor("multi-factor"), "replica_rule": LlmD("llm-d", kv_weight=0.5)}
    if name == "margin":
        arguments["parameters"] = MarginParameters((0.0, 1.0))
    if rule is FixedTier:
        arguments["tier"] = 1
    policy = rule(**arguments)
    assert heuristics.from_dict(heuristics.to_dict(policy)) == policy


def test_one_view_and_many_decide_alike():
    rng = np.random.default_rng(0)
    names = ("in_flight", "waiting", "kv_usage", "cached_tokens", "recent_ttft_s", "p_good_prior", "input_usd")
    views = make_view(worlds=50, **{name: rng.random((50, 4)) for name in names})
    composite = Composite("x", MultiFactor("t"), CacheAware("r", cache_threshold=0.0))
    for rule in (*(cls(name) for name, cls in SHIPPED_RULES.items()), composite):
        together = rule.decide_batch(views)
        assert [rule.decide(views[w]).candidate for w in range(50)] == together.tolist(), rule.name


def test_session_affinity_is_a_map_with_a_time_to_live():
    rule, never = SessionAffinity("x", use_providers=True), v.UNLIMITED
    load = {"in_flight": [50, 2, 5, 9]}
    assert chosen(rule, session_idle_s=[3600.0, never, never, never], **load) == 0
    assert chosen(rule, session_idle_s=[3600.1, never, never, never], **load) == 1  # forgotten: fewest in flight
    assert chosen(rule, session_idle_s=never, **load) == 1  # no session
    gone = make_view(session_idle_s=[1.0, never, never, never], **load)
    gone.legal[0] = False
    assert rule.decide_batch(gone) == 1
    assert chosen(SessionAffinity("x", ttl_s=60.0), session_idle_s=[61.0, never, never, never], **load) == 1


def asked(turned_down, score, cascade, **legal):
    """What a cascade does with a view in which so many answers were turned down, the last with this score."""
    view = make_view(in_flight=[3, 2, 5, 0], **legal)
    view.request[[v.TURNED_DOWN, v.VERIFIER_SCORE]] = turned_down, score
    view.legal[4] = turned_down > 0
    view.signals[v.SIMILARITY, 4] = 1.0
    return int(cascade.decide_batch(view))


def test_a_cascade_asks_in_turn_until_an_answer_scores_high_enough():
    """Models a (replicas 0 and 1), b (2) and hosted (3); 4 delivers the answer in hand."""
    cascade = Cascade("cascade", (0, 1, 2), (0.6, 0.3))
    assert asked(0, 0.0, cascade) == 1  # least in flight of the first model
    assert [asked(1, score, cascade) for score in (0.59, 0.6)] == [2, 4]
    assert [asked(2, score, cascade) for score in (0.29, 0.31)] == [3, 4]
    assert asked(3, 0.01, cascade) == 4  # the last model's answer is accepted in any case
    assert asked(1, 0.5, Cascade("cascade", (0, 2), (0.6,))) == 3
    assert asked(1, 0.0, Cascade("cascade", (2,), ())) == 4 and asked(0, 0.0, Cascade("cascade", (2,), ())) == 3


def test_a_cascade_goes_on_where_a_model_is_not_there():
    view = make_view(in_flight=[3, 2, 5, 0])
    view.request[[v.TURNED_DOWN, v.VERIFIER_SCORE]] = 1.0, 0.2
    view.legal[[2, 4]] = False, True
    assert Cascade("cascade", (0, 1, 2), (0.6, 0.3)).decide_batch(view) in (1, 3)


def test_cascades_of_many_worlds_have_thresholds_of_their_own():
    view = make_view(worlds=3, in_flight=[3, 2, 5, 0])
    view.request[[v.TURNED_DOWN, v.VERIFIER_SCORE]] = np.array([[1.0, 1.0, 2.0], [0.5, 0.5, 0.5]])
    view.legal[:, 4] = True
    cascade = Cascade("cascade", (0, 1, 2), np.array([[0.4, 0.9], [0.6, 0.9], [0.4, 0.9]]))
    assert cascade.decide_batch(view).tolist() == [4, 2, 3]


def test_other_rules_of_thumb_ask_again():
    assert asked(1, 0.9, FixedTier("fixed-a", 0)) == 1
    view = make_view(in_flight=[3, 2, 5, 0])
    view.request[v.TURNED_DOWN], view.signals[v.SIMILARITY, 4] = 1.0, 1.0
    view.legal[:] = [False] * 4 + [True, False, True]
    assert FixedTier("fixed-a", 0).decide_batch(view) == 4  # nobody is there: better than nothing


def test_both_go_through_files():
    for rule in (Cascade("cascade", (0, 2), (0.4,)), SessionAffinity("session-affinity", ttl_s=60.0)):
        assert heuristics.from_dict(heuristics.to_dict(rule)) == rule
