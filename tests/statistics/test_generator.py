"""The generator: what no key asks for stays as it was, and every section does what its figures say."""

import time

import numpy as np
import pytest
import yaml

from envs.describe import as_trace
from envs.scenario import load_scenario
from envs.workload.arrivals_bursts import BurstArrivals, WeibullArrivals, fit_bursts, weibull_shape
from envs.workload.prefix_hits import hit_curve
from envs.workload.season import Season
from envs.workload.statistics import fano, summary
from marginroute.errors import InputError

# First 16 hex digits of the SHA-256 of the arrays below, as drawn before any of the new sections existed
GOLDEN = {  # requests, then weighted means of the arrays in `DRAWN`
    ("quickstart", "train", 7): (
        1200,
        165.146427207,
        4357.08286706,
        376.144113239,
        0.70549403275,
        1.13611851235,
        6.98115598113,
        14.2717612642,
        7.62647099639,
        -0.0207556055378,
        3.23391405955,
        3.26686871048,
        3.14184845962,
        0.016563670247,
    ),
    ("quickstart", "heldout", 7): (
        1200,
        165.943700713,
        4127.68580905,
        341.821087982,
        0.688684429642,
        1.15239800167,
        6.79488759367,
        13.9624644705,
        7.02561892867,
        -0.0816789042629,
        3.24556572358,
        3.23275950093,
        3.14689286706,
        -0.0361408693755,
    ),
    ("azure_conversation", "train", 7): (
        2044,
        74.8246025164,
        1162.16139216,
        200.673216618,
        0.685457346686,
        0.735630792492,
        6.80671486466,
        13.5492078675,
        3.38594395188,
        0.000343877304329,
        3.23231838628,
        3.23506777218,
        3.18413150302,
        0.025566777081,
    ),
    ("azure_conversation", "heldout", 7): (
        1865,
        79.9681112721,
        1191.56413828,
        193.821533926,
        0.673159027496,
        0.674760135514,
        6.71003968288,
        13.3754785459,
        2.88668396507,
        0.0241007336627,
        3.22281755439,
        3.24709186738,
        3.22548439839,
        -0.0341249766848,
    ),
}
DRAWN = (
    *("arrived_at_s", "prompt_tokens", "output_tokens", "class_index", "task_index", "tenant_index", "patience_s"),
    *("prompt_key", "difficulty_signal", "p_good_prior", "p_good", "good", "provider_noise"),
)
ARRAYS = (
    "arrived_at_s",
    "class_index",
    "task_index",
    "tenant_index",
    "prompt_tokens",
    "output_tokens",
    "patience_s",
    "deadline_s",
    "prompt_key",
    "difficulty_signal",
    "p_good_prior",
    "p_good",
    "good",
    "provider_noise",
    "prefix_count",
    "prefix_hash",
    "session_index",
    "parent_index",
    "think_s",
)


def one(median, sigma=0.3, most=100_000, least=1):
    part = {"weight": 1.0, "median_tokens": float(median), "sigma": sigma}
    return {"components": [part], "min_tokens": least, "max_tokens": most}


def fixed(tokens):
    return one(tokens, 0.001, tokens, tokens)


def seconds(median, sigma=0.5):
    return {"components": [{"median_s": float(median), "sigma": sigma}]}


def chat(**changes):
    kind = {
        "share": 1.0,
        "first_tokens": fixed(1000),
        "output_tokens": fixed(100),
        "follow_share": {1: 0.6},
        "steps": {"user": {"think_s": seconds(20), "new_tokens": fixed(50)}},
        "ttft_s": 1.0,
        "tpot_s": 0.01,
    }
    return {**kind, **changes}


def scenario(horizon_s=2000.0, rate=2.0, **sections):
    """A scenario with given workload sections, in a fleet that can hold any of it."""
    changes = {"horizon_s": horizon_s, "workload.arrivals": {"kind": "gamma", "rate_per_s": rate, "gap_cv": 1.0}}
    changes |= {f"workload.{name}": value for name, value in sections.items()}
    changes |= {f"fleet.pools.{pool}.kv_blocks": 100_000 for pool in ("small", "medium", "large")}
    changes["load_scale"] = 1.0
    return load_scenario("azure_conversation", {key: yaml.safe_dump(value) for key, value in changes.items()})


@pytest.mark.parametrize(("name", "split", "seed"), GOLDEN)
def test_shipped_scenarios_draw_what_they_always_drew(name, split, seed):
    """Before anything drifts, which has streams of its own."""
    workload = load_scenario(name).model_copy(update={"drift": {}}).generate(seed, split)
    requests, *wanted = GOLDEN[name, split, seed]
    assert workload.n_requests == requests
    weight = np.arange(1, requests + 1) / (requests * (requests + 1) / 2.0)  # whoever swaps two requests changes it
    for array, value in zip(DRAWN, wanted, strict=True):  # not their bytes: exp differs in the last bit between CPUs
        column = getattr(workload, array).reshape(requests, -1)
        found = np.where(np.isfinite(column), column, 0.0).sum(axis=1) @ weight
        assert found == pytest.approx(value, rel=1e-9, abs=1e-10), array


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_weibull_gaps_have_their_rate_and_variation(cv):
    times = WeibullArrivals(5.0, cv).draw(np.random.default_rng(0), 40_000.0)
    gaps = np.diff(times)
    assert len(times) / 40_000.0 == pytest.approx(5.0, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert len(WeibullArrivals(5.0, cv).draw(np.random.default_rng(0), 100.0, 321)) == 321
    assert weibull_shape(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("window_s", [1.0, 10.0, 60.0])
def test_bursts_have_the_dispersion_of_the_closed_form(window_s):
    process = BurstArrivals(8.0, (0.3, 0.4), (2.0, 40.0), (1.5, 0.7))
    measured = [fano(process.draw(np.random.default_rng(seed), 40_000.0), window_s) for seed in range(4)]
    assert np.mean(measured) == pytest.approx(process.fano(window_s), rel=0.08)
    times = process.draw(np.random.default_rng(0), 100.0, 777)
    assert len(times) == 777 and (np.diff(times) >= 0.0).all() and times[-1] < 100.0


def test_fitted_bursts_have_the_dispersion_asked_for():
    windows_s = np.array([1.0, 3.0, 10.0, 30.0, 60.0])
    truth = BurstArrivals(3.0, (0.5, 0.5), (1.0, 30.0), (2.0, 1.0))
    wanted = np.array([truth.fano(window) for window in windows_s])
    found = fit_bursts(3.0, windows_s, wanted, np.array([0.3, 1.0, 3.0, 10.0, 30.0, 100.0]))
    np.testing.assert_allclose([found.fano(window) for window in windows_s], wanted, rtol=0.02)
    assert sum(found.share) <= 1.0 + 1e-9
    assert fit_bursts(3.0, windows_s, np.full(5, 0.8), np.array([1.0, 10.0])).fano(60.0) == pytest.approx(1.0)


def test_a_season_moves_arrivals_and_keeps_their_mean():
    daily = [1.0, 3.0]  # midnight and noon
    plan = {"daily": daily, "start_h": 0.0}
    workload = scenario(86_400.0, 0.5, season=plan).generate(0)
    night = np.count_nonzero((workload.arrived_at_s < 7200.0) | (workload.arrived_at_s > 79_200.0))
    noon = np.count_nonzero(np.abs(workload.arrived_at_s - 43_200.0) < 7200.0)
    assert workload.n_requests == pytest.approx(43_200, rel=0.03) and 2.0 < noon / night < 3.0
    grown = Season(growth_per_day=1.0, start_h=0.0).clock(np.random.default_rng(0), 0.0, 2 * 86_400.0)[1]
    assert (grown[-1] - np.interp(0.5, [0, 1], grown[[0, -1]])) > 0.0
    assert grown[-1] / 86_400.0 == pytest.approx((2.0**2 - 1) / np.log(2.0), rel=0.01)
    weekly = Season(weekly=(1.0,) * 5 + (0.3, 0.3), start_h=0.0)
    assert weekly.factor(np.array([0.0])) > 3.0 * weekly.factor(np.array([5.5 * 86_400.0]))


def test_a_mix_of_clients():
    clients = {"count": 30, "zipf_exponent": 1.5, "active_share": 0.3, "active_s": 1200.0, "prompt_sigma": 0.8}
    clients |= {"output_sigma": 0.8, "length_correlation": 0.9}
    drawn = scenario(200_000.0, 1.0, clients=clients, recurring={"share": 0.0})
    assert [c.tenant_index for c in drawn.workload_spec.composition.clients] == [
        c.tenant_index for c in scenario(clients=clients).workload_spec.composition.clients
    ]
    workload = drawn.generate(0)
    assert workload.n_requests == pytest.approx(200_000, rel=0.1)
    figures = summary(as_trace(workload, "drawn"))
    assert figures.client_correlation > 0.5 and figures.top_client_share > 0.3
    assert fano(workload.arrived_at_s, 60.0) > 5.0


def test_own_clients_keep_their_figures():
    own = {
        "bulk": {"share": 3.0, "class": "batch", "prompt_tokens": fixed(77), "output_tokens": fixed(5)},
        "chat": {"share": 1.0, "class": "team", "arrivals": {"kind": "weibull", "rate_per_s": 9.0, "gap_cv": 0.2}},
    }
    workload = scenario(4000.0, 4.0, clients={"own": own}, recurring={"share": 0.0}).generate(0)
    bulk = workload.class_index == 2
    assert bulk.mean() == pytest.approx(0.75, abs=0.02) and set(workload.prompt_tokens[bulk]) == {77}
    gaps = np.diff(workload.arrived_at_s[~bulk])
    assert gaps.std() / gaps.mean() == pytest.approx(0.2, abs=0.02)


def test_chats_grow_by_answer_and_question():
    workload = scenario(20_000.0, 0.5, sessions={"chat": chat()}, prefixes={"block_tokens": 100}).generate(0)
    parent = workload.parent_index
    follow = np.flatnonzero(parent >= 0)
    assert (workload.prompt_tokens[follow] == workload.prompt_tokens[parent[follow]] + 150).all()
    gap_s = workload.arrived_at_s[follow] - workload.arrived_at_s[parent[follow]]
    np.testing.assert_allclose(gap_s, 2.0 + workload.think_s[follow])
    inside = workload.arrived_at_s < 19_000.0
    assert (parent[inside] < 0).mean() == pytest.approx(0.4, abs=0.02)  # 1 / mean calls, a geometric number of them
    hits = hit_curve(workload.prefix_hash, workload.prefix_count, 100, workload.prompt_tokens, np.array([np.inf]))[0]
    expected = (workload.prompt_tokens[parent[follow]] // 100 * 100).sum() / workload.prompt_tokens.sum()
    assert hits == pytest.approx(expected, abs=1e-9)


def test_follow_shares_hold_from_their_call_on():
    kind = chat(follow_share={1: 1.0, 3: 0.0})
    workload = scenario(5000.0, 0.5, sessions={"chat": kind}).generate(0)
    sizes = np.bincount(workload.session_index[workload.arrived_at_s < 4000.0])
    assert set(np.bincount(workload.session_index)[: len(sizes) // 2]) == {3}


def test_a_warm_start_has_chats_under_way():
    kind = chat(follow_share={1: 0.9}, steps={"user": {"think_s": seconds(100), "new_tokens": fixed(50)}})
    cold = scenario(300.0, 1.0, sessions={"chat": kind}).generate(0)
    warm = scenario(300.0, 1.0, sessions={"chat": kind}, warm_up_s=5000.0).generate(0)
    assert warm.n_requests > 3 * cold.n_requests and warm.prompt_tokens[:20].max() > cold.prompt_tokens[:20].max()
    assert warm.arrived_at_s.min() >= 0.0 and warm.arrived_at_s.max() < 300.0


def test_edits_keep_a_part_and_compaction_nothing():
    step = {"think_s": seconds(5), "new_tokens": fixed(500), "edit_share": 1.0, "edit_keep": 0.4}
    drawn = scenario(4000.0, 0.5, sessions={"chat": chat(steps={"user": step})}, prefixes={"block_tokens": 1})
    workload = drawn.generate(0)
    second = np.flatnonzero(workload.prompt_tokens[workload.parent_index] == 1000)
    second = second[workload.parent_index[second] >= 0]
    first = np.cumsum(workload.prefix_count) - workload.prefix_count
    kept = []
    for row in second:
        mine, before = first[row], first[workload.parent_index[row]]
        both = workload.prefix_hash[mine : mine + 1000] == workload.prefix_hash[before : before + 1000]
        kept.append(int(both.sum()))
        assert both[: kept[-1]].all() and workload.prompt_tokens[row] == kept[-1] + 500
    assert min(kept) >= 200 and max(kept) <= 600 and np.mean(kept) == pytest.approx(400, abs=15)
    for kind in (chat(reset_share=1.0), chat(max_prompt_tokens=1100)):
        workload = scenario(4000.0, 0.5, sessions={"chat": kind}, prefixes={"block_tokens": 100}).generate(0)
        assert len(np.unique(workload.prefix_hash)) == len(workload.prefix_hash)


def test_agents_fan_out_and_the_run_waits_for_the_slowest():
    fan = {"share": 0.5, "agents": fixed(3), "first_tokens": fixed(400), "follow_share": {1: 1.0, 4: 0.0}}
    tool = {"think_s": seconds(3), "new_tokens": fixed(200)}
    kind = chat(follow_share={1: 1.0, 5: 0.0}, steps={"tool": tool}, sub_agents=fan, task="code")
    workload = scenario(3000.0, 0.2, sessions={"agent": kind}, prefixes={"block_tokens": 64}).generate(0)
    parent, start_s = workload.parent_index, workload.arrived_at_s
    assert set(workload.task_index) == {2}
    children = np.bincount(parent[parent >= 0], minlength=workload.n_requests)
    assert set(children[start_s < 2500.0]) == {0, 1, 3}
    for caller in np.flatnonzero((children == 3) & (start_s < 2500.0))[:50]:
        session = np.flatnonzero(workload.session_index == workload.session_index[caller])
        main = session[(workload.prompt_tokens[session] == workload.prompt_tokens[caller] + 300)]
        nexts = [row for row in main if parent[row] != caller and start_s[row] > start_s[caller]]
        if nexts:
            waited = parent[nexts[0]]
            assert start_s[nexts[0]] == pytest.approx(start_s[waited] + 2.0 + workload.think_s[nexts[0]])


def test_system_prompts_are_shared_by_a_tenant_and_by_nobody_else():
    sections = {"prefixes": {"block_tokens": 50, "common_tokens": 100, "system_tokens": one(500, 0.4, 2000)}}
    workload = scenario(400.0, 5.0, prompt_tokens=fixed(3000), recurring={"share": 0.0}, **sections).generate(0)
    blocks = workload.prefix_hash.reshape(workload.n_requests, 60)
    assert (blocks[:, :2] == blocks[0, :2]).all()
    for tenant in np.unique(workload.tenant_index):
        mine, others = blocks[workload.tenant_index == tenant], blocks[workload.tenant_index != tenant]
        assert (mine[:, 2] == mine[0, 2]).all() and not np.isin(mine[:, 2:], others[:, 2:]).any()
    assert len(np.unique(blocks[:, -1])) == len(blocks)


def test_a_recurring_prompt_repeats_its_blocks():
    workload = scenario(2000.0, 2.0, recurring={"share": 0.5}, prefixes={"block_tokens": 64}).generate(0)
    ends = np.cumsum(workload.prefix_count)
    hashes = np.split(workload.prefix_hash, ends[:-1])
    for key in range(5):
        rows = np.flatnonzero(workload.prompt_key == key)
        assert len({tuple(hashes[row]) for row in rows}) == 1 and len(set(workload.output_tokens[rows])) == 1


def test_batch_jobs_are_due_together():
    jobs = {
        "class": "batch",
        "per_hour": 60.0,
        "requests": fixed(40),
        "spread_s": 20.0,
        "deadline_s": seconds(900, 0.2),
    }
    workload = scenario(20_000.0, 0.01, jobs=jobs).generate(0)
    due = workload.arrived_at_s + workload.deadline_s
    rows = np.flatnonzero(
        np.isin(np.round(due, 6), np.round(due[np.unique(np.round(due, 6), return_index=True)[1]], 6))
    )
    sizes = np.unique(np.round(due[rows], 6), return_counts=True)[1]
    assert np.count_nonzero(sizes == 40) == pytest.approx(333, abs=60)
    assert (workload.class_index[np.isfinite(due)] == 2).all()


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"sessions": {"a": chat(share=0.7), "b": chat(share=0.7)}}, "add up to 1.4"),
        ({"sessions": {"a": chat(task="poetry")}}, "unknown name 'poetry'"),
        ({"sessions": {"a": chat(follow_share={2: 0.5})}}, "call 1"),
        ({"sessions": {"a": chat(follow_share={1: 1.5})}}, "follow_share"),
        ({"clients": {"own": {"x": {"share": 1.0, "class": "gold"}}}}, "unknown name 'gold'"),
        ({"clients": {}}, "has nobody"),
        ({"jobs": {"class": "gold", "per_hour": 1.0, "requests": fixed(3)}}, "unknown name 'gold'"),
        (
            {
                "arrivals": {
                    "kind": "bursts",
                    "rate_per_s": 1.0,
                    "streams": [{"share": 0.8, "dwell_s": 1.0, "cv": 1.0}] * 2,
                }
            },
            "1.6",
        ),
        ({"season": {"weekly": [1.0, 1.0]}}, "weekly"),
    ],
)
def test_contradictions_are_named(sections, text):
    with pytest.raises(InputError) as caught:
        scenario(**sections)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_fixed_number_of_requests_does_not_go_with_sessions():
    with pytest.raises(InputError, match="requests_per_episode"):
        load_scenario("quickstart", {"workload.sessions": yaml.safe_dump({"chat": chat()})})


def test_the_same_seed_draws_the_same_bytes():
    made = scenario(600.0, 2.0, sessions={"chat": chat(share=0.5)}, prefixes={"block_tokens": 64}, season={})
    first, again, other = made.generate(3), made.generate(3), made.generate(4)
    for name in ARRAYS:
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.arrived_at_s.tobytes() != other.arrived_at_s.tobytes()


def test_a_hundred_thousand_requests_of_chats_take_well_under_a_second():
    made = scenario(50_000.0, 0.8, sessions={"chat": chat()}, prefixes={"block_tokens": 512})
    begin = time.process_time()
    assert made.generate(0).n_requests > 90_000
    assert time.process_time() - begin < 2.0
