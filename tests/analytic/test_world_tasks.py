"""Verifiers and tasks on paper: who is asked again, when, what it costs, and what a task pays.

A request of 11 tokens alone on a replica is answered after 0.11 s, by the API after 0.5 + 10 * 0.02 = 0.7 s. The luck
of a verifier is given: +6 passes whatever the answer, -6 fails it.
"""

import dataclasses

import numpy as np
import pytest
from by_hand import API, CACHE, DEFER, METERED, NIGHT, ONE, SHED, TWO_A, play_timed, scenario, workload

from envs.economics.ledger import ACCOUNTS
from envs.plant import Plant
from envs.world_tasks import BEGUN, DONE, FINISHED, LOST
from envs.world_tasks import FAILED as TASK_FAILED
from envs.worlds import FleetWorlds
from evaluation import protocol
from evaluation.workflows import workflow_documents
from marginroute import verification
from marginroute import view as v
from marginroute.rules import FixedTier

PASS, FAIL = 6.0, -6.0
LOOK_S = 0.05
VERIFIER = {"sensitivity": 0.9, "specificity": 0.8, "max_attempts": 3, "verify_s": LOOK_S, "verify_usd": 0.002}
STEP = {"weight": 1.0, "think_s": {"components": [{"weight": 1.0, "median_s": 1.0, "sigma": 0.01}]}}
LENGTHS = {"components": [{"weight": 1.0, "median_tokens": 20, "sigma": 0.1}], "max_tokens": 100}
SESSION = {
    "share": 0.0,
    "first_tokens": LENGTHS,
    "output_tokens": LENGTHS,
    "follow_share": {1: 0.5},
    "steps": {"next": STEP | {"new_tokens": LENGTHS}},
    "max_prompt_tokens": 500,
}


def with_verifier(folder, **keys):
    return scenario(folder, {"fleet.verifiers": {"tests": VERIFIER | keys}})


def with_tasks(folder, **keys):
    overrides = {"workload.sessions": {"fix": SESSION}, "plans.workflows": {"fix": {"value_usd": 0.6} | keys}}
    return scenario(folder, overrides | {"requests_per_episode": None})


def luck(*raw, fresh=1.0, leave=1.0):
    """Of one request: the normal number behind each score; uniform numbers of answers drawn anew, and of leaving."""
    return [[x, fresh, leave] for x in raw]


def episode(world, rows, lucks=None, **options):
    """A workload of rows whose verifiers have the given luck."""
    made = workload(world, *rows, **options)
    return made if lucks is None else dataclasses.replace(made, attempt_luck=np.array(lucks))


def test_an_answer_that_passes_is_delivered_after_the_look(tmp_path):
    world = with_verifier(tmp_path)
    played, times = play_timed(world, episode(world, [{}], [luck(PASS, PASS, PASS)]), [ONE])
    assert times == [0.0]
    assert played.env.worlds.fleet.requests["completed_at_s"][0, 0] == pytest.approx(0.11 + LOOK_S)
    assert played.usd("verification") == pytest.approx(-0.002)
    assert (played.count("served"), played.count("turned_down")) == (1, 0)


def test_what_fails_is_asked_again_and_both_answers_cost(tmp_path):
    """Weak model, then the API; the second answer passes. E2E counts from the arrival, TTFT is the API's."""
    world = with_verifier(tmp_path)
    rows = [{"good": [0, 1, 1]}]
    played, times = play_timed(world, episode(world, rows, [luck(FAIL, PASS, PASS)]), [ONE, API])
    again_s = 0.11 + LOOK_S
    assert times == pytest.approx([0.0, again_s])
    request = played.env.worlds.fleet.requests[0, 0]
    assert request["first_token_at_s"] == pytest.approx(again_s + 0.5)
    assert request["completed_at_s"] == pytest.approx(again_s + 0.7 + LOOK_S)
    assert played.usd("energy") == pytest.approx(-(100 * 10e-6 + 11 * 20e-6))
    assert played.usd("api_spend") < 0.0 and played.usd("verification") == pytest.approx(-0.004)
    assert played.usd("refunds") == 0.0
    counted = {name: played.count(name) for name in ("served", "good", "turned_down", "calls", "first_calls")}
    assert counted == {"served": 1, "good": 1, "turned_down": 1, "calls": 1, "first_calls": 1}


def test_the_view_says_what_was_tried(tmp_path):
    world = with_verifier(tmp_path)
    prior = [0.6, 0.8, 0.9]
    rows = [{"good": [0, 0, 1], "p_good_prior": prior, "p_good": [0.3, 0.5, 0.7]}]
    played, _ = play_timed(world, episode(world, rows, [luck(-1.0, FAIL, FAIL)]), [ONE, TWO_A, API])
    first, second, third = played.views
    assert first.request[v.TURNED_DOWN] == 0.0 and not first.signals[v.TRIED].any() and not first.legal[CACHE]
    distance, _ = verification.separation(0.9, 0.8)
    seen = 1.0 / (1.0 + np.exp(-distance * (-1.0 - distance / 2.0)))
    in_hand = 0.6 * seen / (0.6 * seen + 0.4 * (1.0 - seen))
    assert (second.request[v.TURNED_DOWN], second.request[v.VERIFIER_SCORE]) == (1.0, pytest.approx(seen))
    assert second.signals[v.TRIED].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    stronger = in_hand + (1.0 - in_hand) * (0.8 - 0.6) / (1.0 - 0.6)
    assert second.signals[v.P_GOOD_PRIOR, [ONE, TWO_A, CACHE]] == pytest.approx([in_hand, stronger, in_hand])
    assert second.legal[CACHE]
    assert second.signals[[v.SIMILARITY, v.ENTRY_AGE_S], CACHE].tolist() == [1.0, 0.0]
    assert third.request[v.TURNED_DOWN] == 2.0 and third.signals[v.TRIED].tolist()[:4] == [1.0, 1.0, 1.0, 0.0]
    assert played.count("served") == 1  # the last answer that is allowed is delivered without a look
    assert played.usd("verification") == pytest.approx(-0.004)


def test_views_of_other_requests_know_nothing_of_it(tmp_path):
    world = with_verifier(tmp_path)
    rows = [{}, {"arrived_at_s": 20.0}]
    played, _ = play_timed(
        world, episode(world, rows, [luck(FAIL, PASS, PASS), luck(PASS, PASS, PASS)]), [ONE, API, ONE]
    )
    last = played.views[2]
    assert not last.request[[v.TURNED_DOWN, v.VERIFIER_SCORE]].any() and not last.signals[v.TRIED].any()
    assert not last.legal[CACHE]


def test_the_answer_in_hand_can_be_delivered(tmp_path):
    """No further cost; it is as good as it is."""
    world = with_verifier(tmp_path)
    rows = [{"good": [0, 1, 1]}]
    played, times = play_timed(world, episode(world, rows, [luck(FAIL, PASS, PASS)]), [ONE, CACHE])
    request = played.env.worlds.fleet.requests[0, 0]
    assert request["first_token_at_s"] == pytest.approx(0.01) and request["completed_at_s"] == pytest.approx(times[1])
    assert played.count("served") == 1 and played.count("good") == 0 and played.usd("refunds") < 0.0
    assert played.usd("energy") == pytest.approx(-(100 * 10e-6 + 11 * 20e-6))


def test_giving_up_is_no_answer(tmp_path):
    world = with_verifier(tmp_path)
    played, _ = play_timed(world, episode(world, [{}], [luck(FAIL, PASS, PASS)]), [ONE, SHED])
    assert played.count("shed") == 1 and played.count("served") == 0 and played.usd("energy") < 0.0


def test_some_users_leave(tmp_path):
    world = with_verifier(tmp_path, leave_share=0.25)
    for uniform, left in ((0.24, 1), (0.26, 0)):
        made = episode(world, [{}], [luck(FAIL, PASS, PASS, leave=uniform)])
        played, _ = play_timed(world, made, [ONE] if left else [ONE, ONE])
        assert (played.count("abandoned"), played.count("served")) == (left, 1 - left)
        assert played.usd("energy") < 0.0


@pytest.mark.parametrize(("fresh", "good"), [(0.9, 0), (0.49, 0), (0.29, 1)])
def test_a_model_asked_again_gives_the_same_answer_unless_it_is_drawn_anew(tmp_path, fresh, good):
    """fresh_share 0.5, P(good) 0.6: good if the uniform number is below 0.3."""
    world = with_verifier(tmp_path, fresh_share=0.5)
    rows = [{"good": [0, 1, 1], "p_good": [0.6, 0.7, 0.8]}]
    played, _ = play_timed(world, episode(world, rows, [luck(FAIL, PASS, PASS, fresh=fresh)]), [ONE, ONE])
    assert played.count("good") == good


def test_a_follow_up_waits_for_the_answer_that_is_delivered(tmp_path):
    world = with_verifier(tmp_path)
    rows = [{"session_index": 0}, {"session_index": 0, "parent_index": 0, "think_s": 1.0}]
    made = episode(world, rows, [luck(FAIL, PASS, PASS), luck(PASS, PASS, PASS)])
    _, times = play_timed(world, made, [ONE, ONE, ONE])
    assert times == pytest.approx([0.0, 0.11 + LOOK_S, 2 * (0.11 + LOOK_S) + 1.0])


def test_at_the_horizon_the_answer_in_hand_is_delivered(tmp_path):
    """One request is in flight there, one is held with an answer in hand."""
    world = with_verifier(tmp_path)
    rows = [{"class_index": NIGHT, "deadline_s": 20.0, "arrived_at_s": 50.0}, {"arrived_at_s": 59.95}]
    made = episode(world, rows, [luck(FAIL, FAIL, FAIL), luck(FAIL, FAIL, FAIL)])
    played, _ = play_timed(world, made, [ONE, DEFER, DEFER, DEFER, ONE])
    assert played.count("served") == 2 and played.usd("api_spend") == 0.0


def test_nothing_shows_before_the_verifier_spoke(tmp_path):
    """Other truths and other luck: Views up to 0.16 s are the same to the bit, and differ from then on."""
    world = with_verifier(tmp_path)
    clock = [{"arrived_at_s": 0.02 * step} for step in range(1, 12)]
    seen = []
    for good, raw in (([0, 0, 0], FAIL), ([1, 1, 1], PASS)):
        made = episode(world, [{"good": good, "p_good": [0.2 + 0.6 * good[0]] * 3}, *clock], [luck(raw, raw, raw)] * 12)
        worlds = FleetWorlds(world, 1)
        worlds.load(0, made)
        views = []
        while not worlds.done[0]:
            view = worlds.view()
            bits = b"".join(np.ascontiguousarray(x).tobytes() for x in (view.signals, view.request, view.legal))
            views.append((float(worlds.desks["now_s"][0]), bits))
            worlds.step(np.array([ONE if len(views) == 1 else SHED]))
        seen.append(views)
    before = [[view for view in views if view[0] < 0.11 + LOOK_S - 1e-9] for views in seen]
    assert len(before[0]) == 8 and before[0] == before[1]
    assert len(seen[0]) == len(seen[1]) + 1


def test_shares_are_those_of_the_keys(tmp_path):
    """Over many requests: sensitivity, specificity, and a score that is calibrated."""
    world = with_verifier(tmp_path)
    rng = np.random.default_rng(0)
    distance, raw = verification.separation(0.9, 0.8)
    good = rng.integers(0, 2, 200_000)
    score = verification.score(good, rng.standard_normal(len(good)), distance)
    passed = score >= verification.passes_from(distance, raw)
    assert passed[good == 1].mean() == pytest.approx(0.9, abs=0.003)
    assert (~passed)[good == 0].mean() == pytest.approx(0.8, abs=0.003)
    for low in (0.1, 0.5, 0.8):
        near = (score > low) & (score < low + 0.1)
        assert good[near].mean() == pytest.approx(score[near].mean(), abs=0.01)
    assert world.workload_spec.attempts == 3


def test_beliefs_of_other_models_are_those_of_one_luck():
    """P(other good | score) by counting: one uniform number decides for both models."""
    rng = np.random.default_rng(1)
    uniform, distance = rng.random(400_000), 2.0
    for prior, other in ((0.5, 0.8), (0.7, 0.4)):
        answer = (uniform < prior).astype(np.float64)
        score = verification.score(answer, rng.standard_normal(len(uniform)), distance)
        near = (score > 0.25) & (score < 0.3)
        in_hand = verification.p_in_hand(prior, score[near])
        assert answer[near].mean() == pytest.approx(in_hand.mean(), abs=0.01)
        said = verification.p_of_other(other, prior, in_hand, 1.0)
        assert (uniform[near] < other).mean() == pytest.approx(said.mean(), abs=0.01)
    assert verification.p_of_other(0.8, 0.5, 0.1, 0.0) == 0.8


def calls(n, **fields):
    """One session of n calls in a row, of workflow 0."""
    row = {"session_index": 0} | fields
    return [row | ({"parent_index": i - 1, "think_s": 1.0} if i else {}) for i in range(n)]


def as_task(made, all_calls=None):
    n = made.n_requests
    return dataclasses.replace(made, workflow_index=np.zeros(n), task_calls=np.full(n, all_calls or n))


BAD = [0, 1, 1]


@pytest.mark.parametrize(
    ("rule", "bad", "paid"),
    [
        ({}, [], True),
        ({}, [0, 1], True),  # only the last answer counts
        ({}, [3], False),
        ({"final_good": False}, [0, 1, 2, 3], True),
        ({"final_good": False, "good_share": 0.75}, [3], True),
        ({"final_good": False, "good_share": 0.75}, [2, 3], False),
        ({"good_share": 0.5}, [0, 1, 2], False),
    ],
)
def test_a_task_pays_when_it_succeeds(tmp_path, rule, bad, paid):
    world = with_tasks(tmp_path, **rule)
    rows = [row | ({"good": BAD} if i in bad else {}) for i, row in enumerate(calls(4))]
    played, _ = play_timed(world, as_task(episode(world, rows)), [ONE] * 4)
    assert played.usd("task_revenue", METERED) == pytest.approx(0.6 if paid else 0.0)
    books = played.env.worlds.books.arrays
    assert books.counts[0, [BEGUN, DONE, LOST], 0].tolist() == [1.0, float(paid), 1.0 - paid]
    assert books.tasks["state"][0, 0] == (FINISHED if paid else TASK_FAILED)
    # every cent of its calls, by account, and the reward of the step that ended it
    np.testing.assert_allclose(books.usd[0, :, 0], played.ledger_usd[:, METERED])
    assert sum(played.rewards) == pytest.approx(played.ledger_usd.sum())


def test_the_report_says_what_a_task_costs(tmp_path):
    """One task of two calls finished, one failed: the cost of both falls on the finished one."""
    world = with_tasks(tmp_path)
    rows = [*calls(2), {"session_index": 1, "arrived_at_s": 30.0, "good": BAD}]
    made = episode(world, rows)
    made = dataclasses.replace(made, workflow_index=np.zeros(3), task_calls=[2, 2, 1])
    results = protocol.play(Plant(world), FixedTier("fixed-weak", 0), "fixed-weak", [made], [0])
    call_usd = 100 * 10e-6 + 11 * 20e-6
    assert workflow_documents(results) == {
        "fix": {
            "tasks": 2.0,
            "finished_share": 0.5,
            "failed_share": 0.5,
            "calls": 3.0,
            "answered_calls": 3.0,
            "revenue_per_finished_task_usd": pytest.approx(0.6 + results.accounts_usd(["usage_revenue"]).sum()),
            "cost_per_finished_task_usd": pytest.approx(3 * call_usd),
            "remedies_per_finished_task_usd": pytest.approx(-results.accounts_usd(["refunds"]).sum()),
        }
    }
    by_time = results.accounts_usd(["seat_revenue"]).sum()
    assert results.revenue_usd.sum() == pytest.approx(by_time + 0.6 + results.accounts_usd(["usage_revenue"]).sum())


def test_a_call_without_an_answer_ends_its_task(tmp_path):
    world = with_tasks(tmp_path)
    played, _ = play_timed(world, as_task(episode(world, calls(4))), [ONE, ONE, SHED])
    assert played.usd("task_revenue") == 0.0 and played.usd("energy") < 0.0
    assert played.env.worlds.books.arrays.counts[0, [BEGUN, DONE, LOST], 0].tolist() == [1.0, 0.0, 1.0]


def test_an_episode_pays_its_part_of_a_task(tmp_path):
    """Two of eight calls are in it; both are answered."""
    world = with_tasks(tmp_path)
    played, _ = play_timed(world, as_task(episode(world, calls(2)), 8), [ONE, ONE])
    assert played.usd("task_revenue") == pytest.approx(0.6 * 2 / 8)
    assert played.env.worlds.books.arrays.counts[0, [BEGUN, DONE], 0].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(("good", "paid"), [(1, 0.6 * 3 / 4), (0, 0.0)])
def test_a_task_under_way_at_the_horizon_is_paid_for_its_share(tmp_path, good, paid):
    """The fourth call would come after it; the third answer is the last so far."""
    world = with_tasks(tmp_path)
    rows = calls(4)
    rows[2] = rows[2] | {"good": [good, 1, 1]}
    rows[3] = rows[3] | {"think_s": 100.0}
    played, _ = play_timed(world, as_task(episode(world, rows)), [ONE] * 3)
    assert played.usd("task_revenue") == pytest.approx(paid)
    assert played.usd("task_revenue") == pytest.approx(sum(played.rewards) - (played.ledger_usd.sum() - paid), abs=1e-9)


def test_the_view_says_what_the_task_pays_and_where_it_went(tmp_path):
    world = with_tasks(tmp_path)
    rows = [*calls(3), {"arrived_at_s": 30.0}]
    made = episode(world, rows)
    made = dataclasses.replace(made, workflow_index=[0, 0, 0, -1], task_calls=[3, 3, 3, 1])
    played, _ = play_timed(world, made, [ONE, TWO_A, ONE, ONE])
    seen = [view.request[[v.TASK_VALUE_USD, v.TASK_CALL]].tolist() for view in played.views]
    assert seen == [[0.6, 0.0], [0.6, 1.0], [0.6, 2.0], [0.0, 0.0]]
    idle = [view.signals[v.SESSION_IDLE_S] for view in played.views]
    assert (idle[0] == v.UNLIMITED).all() and (idle[3] == v.UNLIMITED).all()
    assert idle[1][ONE] == pytest.approx(1.11) and (np.delete(idle[1], ONE) == v.UNLIMITED).all()
    assert idle[2][TWO_A] == pytest.approx(1.11) and idle[2][ONE] == v.UNLIMITED


def test_generated_sessions_are_tasks(tmp_path):
    """Values of the parts add up; a call belongs to one task; calls of a task are those of its whole session."""
    overrides = {"workload.sessions": {"fix": SESSION | {"share": 0.5, "follow_share": {1: 0.7}}}}
    overrides |= {
        "plans.workflows": {"fix": {"value_usd": 0.6}},
        "requests_per_episode": None,
        "workload.warm_up_s": 20.0,
    }
    made = scenario(tmp_path, overrides).generate(0)
    calls_here = np.bincount(made.session_index[made.workflow_index == 0])
    known = np.zeros(len(calls_here))
    rows = made.session_index >= 0
    known[made.session_index[rows]] = made.task_calls[rows]
    assert (calls_here <= known).all() and (calls_here < known).any() and (calls_here == known).any()
    assert (made.workflow_index[~rows] == -1).all() and (made.workflow_index[rows] == 0).all()


def test_everything_adds_up_at_random(tmp_path):
    """Verifiers, tasks, single requests: each call ends once, books of the workflow are part of the ledger."""
    overrides = {
        "workload.sessions": {"fix": SESSION | {"share": 0.6, "follow_share": {1: 0.8}}},
        "plans.workflows": {"fix": {"value_usd": 0.6, "good_share": 0.3}},
        "requests_per_episode": None,
        "fleet.verifiers": {"tests": VERIFIER | {"leave_share": 0.1, "fresh_share": 0.3}},
    }
    world = scenario(tmp_path, overrides)
    worlds = FleetWorlds(world, 4)
    worlds.load_all([world.generate(seed) for seed in range(4)])
    rng, reward = np.random.default_rng(3), 0.0
    while not worlds.done.all():
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
        reward += worlds.reward_usd.sum()
    ended = sum(worlds.counts[:, i] for i in (1, 2, 3, 4))
    np.testing.assert_array_equal(ended, worlds.counts[:, 15])
    assert worlds.counts[:, 19].sum() > 20
    assert reward == pytest.approx(worlds.ledger_usd.sum())
    books = worlds.books.arrays
    tasks = ACCOUNTS.index("task_revenue")
    np.testing.assert_allclose(books.usd[:, tasks, 0], worlds.ledger_usd[:, tasks].sum(axis=-1))
    assert (np.abs(books.usd[:, :, 0]) <= np.abs(worlds.ledger_usd[:, :, :-1]).sum(axis=-1) + 1e-9).all()
    assert (books.counts[:, DONE] > 0).all()
    assert (books.counts[:, DONE] + books.counts[:, LOST] <= books.counts[:, BEGUN] + 1e-9).all()
    assert (worlds.desks["leading"] == 0).all() and (worlds.own["leading"] == 0).all()


TOOLS = [{}, {"think_s": 2.0}, {"think_s": 3.0}, {"think_s": 3.0}]


@pytest.mark.parametrize(
    ("ttl_s", "keys", "waits_s", "hits"),
    [
        (None, [0, 0, 0], [2.0, 3.0, 3.0], 0),  # nobody keeps results
        (10.0, [0, 0, 0], [2.0, 0.05, 0.05], 2),
        (10.0, [0, 1, 0], [2.0, 3.0, 0.05], 1),
        (0.1, [0, 0, 0], [2.0, 3.0, 3.0], 0),  # 0.11 s old by the next answer
        (0.2, [0, 0, 0], [2.0, 0.05, 3.0], 1),  # 0.11 s, then 0.27 s old
    ],
)
def test_a_result_that_is_kept_skips_the_tool(tmp_path, ttl_s, keys, waits_s, hits):
    """The wait and the cost of a call; a result is there once the tool has come back with it."""
    kept = {} if ttl_s is None else {"fleet.result_cache": {"ttl_s": ttl_s, "lookup_s": 0.05}}
    world = scenario(tmp_path, kept)
    rows = [row | {"session_index": 0} | ({"parent_index": i - 1} if i else {}) for i, row in enumerate(TOOLS)]
    made = dataclasses.replace(episode(world, rows), tool_key=[-1, *keys], tool_usd=[0.0, 0.003, 0.003, 0.003])
    played, times = play_timed(world, made, [ONE] * 4)
    assert np.diff(times) == pytest.approx(0.11 + np.array(waits_s))
    assert (played.count("tool_hits"), played.count("tool_calls")) == (hits, 3 - hits)
    assert played.usd("tools") == pytest.approx(-0.003 * (3 - hits))


def test_results_that_are_on_their_way_are_not_there(tmp_path):
    """Two sessions ask for the same result a second apart; the tool takes five seconds."""
    world = scenario(tmp_path, {"fleet.result_cache": {"ttl_s": 100.0, "lookup_s": 0.05}})
    rows = [{"session_index": 0}, {"session_index": 1, "arrived_at_s": 1.0}]
    rows += [{"session_index": i, "parent_index": i, "think_s": 5.0} for i in range(2)]
    made = dataclasses.replace(episode(world, rows), tool_key=[-1, -1, 0, 0], tool_usd=np.full(4, 0.003))
    played, times = play_timed(world, made, [ONE] * 4)
    assert times == pytest.approx([0.0, 1.0, 5.11, 6.11])
    assert played.count("tool_calls") == 2


def test_generated_steps_ask_for_results_of_their_tenant(tmp_path):
    tool = {"keys": 3, "zipf_exponent": 1.0, "usd": 0.002}
    made = {}
    for shared in (False, True):
        kind = SESSION | {"share": 0.8, "follow_share": {1: 0.8}}
        kind["steps"] = {"next": SESSION["steps"]["next"] | {"tool": tool | {"shared": shared}}}
        overrides = {"workload.sessions": {"fix": kind}, "requests_per_episode": None, "load_scale": 5.0}
        made[shared] = scenario(tmp_path, overrides).generate(0)
    for shared, workload_ in made.items():
        asked = workload_.tool_key >= 0
        np.testing.assert_array_equal(asked, workload_.parent_index >= 0)
        assert asked.sum() > 50 and (workload_.tool_usd[asked] == 0.002).all() and not workload_.tool_usd[~asked].any()
        pairs = set(zip(workload_.tool_key[asked].tolist(), workload_.tenant_index[asked].tolist(), strict=True))
        tenants_of_a_key = np.bincount([key for key, _ in pairs])
        assert tenants_of_a_key.max() == 1 if not shared else len(tenants_of_a_key) == 3
    np.testing.assert_array_equal(made[False].prompt_tokens, made[True].prompt_tokens)
