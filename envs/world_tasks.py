"""What a world does beyond single answers: verifiers that turn answers down, tasks that pay when they succeed.

*Verifier*. A finished answer of a class and task that has a verifier is looked at, which takes `verify_s` and is posted
under `verification`. If its score passes (`marginroute.verification`), or if it is the last one that is allowed (nobody
looks at that), it is delivered. Otherwise what it cost is posted, it stays *in hand*, and the user leaves with
`leave_share` or the request comes back as a new decision, whose View holds how many answers were turned down, by which
models, and the score. There the candidate *cache* means: deliver the answer in hand after all. Times count from the
arrival of the request; TTFT is that of the attempt that is delivered. What waits for that decision at the horizon is
delivered.

A model gives a request the same answer again, unless it is drawn anew (`fresh_share`).

*Task*. The calls of a session whose kind is a workflow are a task. It ends when all its calls of the episode have been
answered, or when one of them gets no answer. It succeeds if all were answered, and if, as the workflow says, the last
answer is good and a share of all answers are. A task that succeeds pays its value. An episode may see only a part of a
task: it pays that part of its calls, and a task that is under way at the horizon is judged by the calls it has had and
paid for their share (percentage of completion). What the calls of a workflow earn and cost is kept by account, in
`workflow_usd`, a part of the ledger's postings.

Shapes: N worlds, M requests, K classes, J task types, S sessions, W workflows, A accounts.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs import world_accounts as contracts
from envs import world_elastic as elastic
from envs import world_hedge as hedging
from envs import world_sessions as sessions
from envs.economics import ledger as books
from envs.fleet import engine
from envs.fleet.state import COMPLETED
from envs.kernels import kernel
from marginroute import verification
from marginroute import view as v

p_in_hand = kernel(verification.p_in_hand)
p_again = kernel(verification.p_again)
p_of_other = kernel(verification.p_of_other)
score = kernel(verification.score)

VERIFIER = np.dtype(
    [
        ("max_attempts", "i4"),  # 0: there is none
        ("distance", "f8"),
        ("passes_from", "f8"),
        ("verify_s", "f8"),
        ("verify_usd", "f8"),
        ("verify_usd_per_token", "f8"),
        ("leave_share", "f8"),
        ("fresh_share", "f8"),
    ]
)
"""Who looks at the answers of a class and task, `(K, J)`."""

TRIAL = np.dtype(
    [
        ("first_token_at_s", "f8"),
        ("at_s", "f8"),  # when the answer in hand was looked at
        ("score", "f8"),
        ("tier", "i4"),
        ("first_tier", "i4"),  # of the first answer
        ("tried", "i8"),  # bit t: tier t has answered
        ("output_tokens", "i4"),
        ("good", "u1"),
    ]
)
"""The answer in hand of a request that was turned down, `(N, M)`; no columns without verifiers."""

WORKFLOW = np.dtype(
    [
        ("value_usd", "f8"),
        ("bad_usd", "f8"),  # what the operator takes a bad answer of a call to lose of it
        ("good_share", "f8"),
        ("final_good", "u1"),
    ]
)
"""What a kind of task pays, `(W,)`."""

TASK = np.dtype(
    [
        ("sent_at_s", "f8"),  # last call of the session
        ("station", "i4"),  # where it went; -1: nowhere yet
        ("gateway", "i4"),  # instance that sent it, as in `LOAD`
        ("workflow", "i4"),  # -1: the session is no task
        ("class_index", "i4"),
        ("calls", "i4"),  # in the episode
        ("all_calls", "i4"),
        ("last_row", "i4"),  # request of the last call
        ("answered", "i4"),
        ("good", "i4"),
        ("last_good", "u1"),  # of the last answer so far; of the last call, once that is answered
        ("last_answered", "u1"),
        ("state", "u1"),
    ]
)
"""Sessions and what is known of them as tasks, `(N, S)`."""

EXPECTED, UNDER_WAY, FINISHED, FAILED = range(4)  # TASK.state

WORKFLOW_COUNTS = ("begun", "finished", "failed", "calls", "answered")
BEGUN, DONE, LOST, CALLS, ANSWERED = range(5)
"""Of the tasks of a workflow, `(N, 5, W)`: a task of which the episode sees a part counts as that part."""


class TaskArrays(NamedTuple):
    """Verifiers, tasks and second calls of all worlds."""

    verifiers: Any  # (K, J) VERIFIER
    trials: Any  # (N, M) TRIAL, or no columns
    luck: Any  # (N, M, A, 3), or no columns
    workflows: Any  # (W,) WORKFLOW
    tasks: Any  # (N, S) TASK
    usd: Any  # (N, A, W) what the calls and successes of workflows were posted with
    counts: Any  # (N, 5, W)
    before: Any  # (N, A) scratch: a class's accounts before a posting
    shared_luck: Any  # (1,) 1.0 or 0.0
    hedges: Any  # (N, M) world_hedge.HEDGE, or no columns
    timers: Any  # (N, K) world_hedge.TIMER
    results: Any  # (N, T) when the latest result of a tool's key came in, -inf: never


@kernel
def outcome(follow, loads, truth, good, w, i, tier):
    """Whether the answer of `tier` that request `i` has got now is good."""
    load = loads[w, i]
    trial = follow.trials[w, i]
    if load.turned_down > 0 and (trial.tried >> tier) & 1 == 1:
        fresh = follow.verifiers[load.class_index, load.task_index].fresh_share
        uniform = follow.luck[w, i, load.turned_down, 1]
        if uniform < fresh:
            return np.uint8(uniform < fresh * truth[w, i, tier])
    return good[w, i, tier]


@kernel
def passes(follow, requests, loads, ledger_usd, w, i, answer):
    """The verifier looks at the answer that request `i` has got; True if it is to be delivered.

    The time of the look passes in either case; the last answer that is allowed is delivered without one.
    """
    load, request = loads[w, i], requests[w, hedging.row_of(follow, w, i)]
    verifier = follow.verifiers[load.class_index, load.task_index]
    if load.turned_down + 1 >= verifier.max_attempts:
        return True
    tokens = load.prompt_tokens + load.output_tokens
    usd = verifier.verify_usd + verifier.verify_usd_per_token * tokens
    books.post(ledger_usd, w, books.VERIFICATION, load.class_index, -usd)
    request.completed_at_s += verifier.verify_s
    trial = follow.trials[w, i]
    trial.score = score(answer, follow.luck[w, i, load.turned_down, 0], verifier.distance)
    return trial.score >= verifier.passes_from


@kernel
def turn_down(follow, requests, desks, loads, ledger_usd, counts, w, i, tier, answer, account, cost_usd):
    """Posts the cost of an answer that failed, keeps it in hand, queues the next decision; False if the user leaves."""
    row = hedging.row_of(follow, w, i)
    load, request, trial = loads[w, i], requests[w, row], follow.trials[w, i]
    k = load.class_index
    counts[w, books.TURNED_DOWN, k] += 1
    leave_share = follow.verifiers[k, load.task_index].leave_share
    if follow.luck[w, i, load.turned_down, 2] < leave_share:
        return False
    books.post(ledger_usd, w, account, k, -cost_usd)
    if load.turned_down == 0:
        trial.first_tier, trial.tried = tier, 0
    trial.tier, trial.good, trial.tried = tier, answer, trial.tried | (1 << tier)
    trial.first_token_at_s, trial.at_s = request.first_token_at_s, request.completed_at_s
    load.turned_down += 1
    engine.reset_request(requests, w, row)
    elastic.queue_retry(desks, loads, w, i, trial.at_s)
    return True


@kernel
def deliver_in_hand(config, terms, follow, requests, desks, loads, ledger_usd, counts, w, i):
    """Request `i` gets the answer that it has in hand, now."""
    load, request, trial = loads[w, i], requests[w, hedging.row_of(follow, w, i)], follow.trials[w, i]
    now_s = desks[w].now_s
    request.status, request.first_token_at_s, request.completed_at_s = COMPLETED, trial.first_token_at_s, now_s
    ttft_s, gaps = trial.first_token_at_s - load.arrived_at_s, max(load.output_tokens - 1, 1)
    contracts.post_answer(
        terms, loads, ledger_usd, counts, w, i, 0, load.output_tokens, ttft_s,
        (now_s - trial.first_token_at_s) / gaps, now_s - load.arrived_at_s, trial.good == 1, books.CACHE, 0.0, now_s,
    )  # fmt: skip
    if load.first_child >= 0:
        sessions.answered(config, follow.results, desks[w], loads, ledger_usd, counts, w, i, now_s)


@kernel
def show_trial(follow, desks, loads, tiers, prior, truth, good, signals, request_view, legal, p_true, w, cache):
    """Writes into the View what is known of the current request's answer in hand; `cache` is its candidate."""
    i = desks[w].current
    load, trial = loads[w, i], follow.trials[w, i]
    fresh = follow.verifiers[load.class_index, load.task_index].fresh_share
    shared = follow.shared_luck[0]
    held, true = prior[w, i, trial.tier], truth[w, i, trial.tier]
    in_hand = p_in_hand(held, trial.score)
    known = float(trial.good)
    for c in range(cache):
        tier = tiers[c]
        signals[v.TRIED, w, c] = (trial.tried >> tier) & 1
        if tier == trial.tier:
            signals[v.P_GOOD_PRIOR, w, c] = p_again(held, in_hand, fresh)
            p_true[w, c] = p_again(true, known, fresh)
        elif (trial.tried >> tier) & 1 == 1:
            signals[v.P_GOOD_PRIOR, w, c] = p_of_other(prior[w, i, tier], held, in_hand, shared)
            p_true[w, c] = p_again(truth[w, i, tier], float(good[w, i, tier]), fresh)
        else:
            signals[v.P_GOOD_PRIOR, w, c] = p_of_other(prior[w, i, tier], held, in_hand, shared)
            p_true[w, c] = p_of_other(truth[w, i, tier], true, known, shared)
    legal[w, cache] = True
    signals[v.P_GOOD_PRIOR, w, cache], p_true[w, cache] = in_hand, known
    signals[v.SIMILARITY, w, cache], signals[v.ENTRY_AGE_S, w, cache] = 1.0, desks[w].now_s - trial.at_s
    request_view[v.TURNED_DOWN, w], request_view[v.VERIFIER_SCORE, w] = load.turned_down, trial.score
    desks[w].tried = 1


@kernel
def show_nothing(signals, request_view, w):
    """Takes what `show_trial` has written out of the View again."""
    signals[v.TRIED, w] = 0.0
    request_view[v.TURNED_DOWN, w] = request_view[v.VERIFIER_SCORE, w] = 0.0


@kernel
def show_session(follow, desks, loads, signals, request_view, w):
    """Writes into the View where the session's last call went, and what its task pays.

    A call without an answer loses the task, a bad answer some of it: both are added to what the class's contract says.
    """
    desk = desks[w]
    load = loads[w, desk.current]
    if desk.session_station >= 0:
        signals[v.SESSION_IDLE_S, w, desk.session_station] = v.UNLIMITED
        desk.session_station = -1
    request_view[v.TASK_VALUE_USD, w] = request_view[v.TASK_CALL, w] = 0.0
    if load.session < 0:
        return
    task = follow.tasks[w, load.session]
    if task.station >= 0 and task.gateway == load.gateway:
        signals[v.SESSION_IDLE_S, w, task.station] = desk.now_s - task.sent_at_s
        desk.session_station = task.station
    if load.workflow >= 0:
        workflow = follow.workflows[load.workflow]
        request_view[v.TASK_VALUE_USD, w], request_view[v.TASK_CALL, w] = workflow.value_usd, task.answered
        request_view[v.BAD_ANSWER_USD, w] += workflow.bad_usd
        request_view[v.UNSERVED_CREDIT_USD, w] += workflow.value_usd


@kernel
def note_send(follow, desks, loads, w, c):
    """The current request leaves for replica or provider `c`."""
    load = loads[w, desks[w].current]
    if load.session >= 0:
        task = follow.tasks[w, load.session]
        task.station, task.gateway, task.sent_at_s = c, load.gateway, desks[w].now_s


@kernel
def mark(follow, ledger_usd, loads, w, i):
    """Before request `i` is posted: remembers its class's accounts if it is a call of a workflow."""
    if loads[w, i].workflow >= 0:
        for account in range(ledger_usd.shape[1]):
            follow.before[w, account] = ledger_usd[w, account, loads[w, i].class_index]


@kernel
def book(follow, ledger_usd, loads, w, i):
    """After it: what was posted since `mark` belongs to its workflow; a task's value is booked where it is paid."""
    load = loads[w, i]
    if load.workflow < 0:
        return
    for account in range(ledger_usd.shape[1]):
        if account != books.TASK_REVENUE:
            follow.usd[w, account, load.workflow] += (
                ledger_usd[w, account, load.class_index] - follow.before[w, account]
            )


@kernel
def note_arrival(follow, loads, w, i):
    """A call of a workflow is there for the first time."""
    load = loads[w, i]
    if load.workflow < 0:
        return
    task = follow.tasks[w, load.session]
    follow.counts[w, CALLS, load.workflow] += 1.0
    if task.state == EXPECTED:
        task.state = UNDER_WAY
        follow.counts[w, BEGUN, load.workflow] += task.calls / task.all_calls


@kernel
def _settle(follow, ledger_usd, w, s):
    """A task is judged and paid by the calls that have been answered."""
    task = follow.tasks[w, s]
    workflow = follow.workflows[task.workflow]
    share = task.answered / task.all_calls
    good = task.good >= workflow.good_share * task.answered - 1e-9
    if good and (workflow.final_good == 0 or task.last_good == 1):
        task.state = FINISHED
        follow.counts[w, DONE, task.workflow] += share
        books.post(ledger_usd, w, books.TASK_REVENUE, task.class_index, workflow.value_usd * share)
        follow.usd[w, books.TASK_REVENUE, task.workflow] += workflow.value_usd * share
    else:
        task.state = FAILED
        follow.counts[w, LOST, task.workflow] += share


@kernel
def note_answer(follow, ledger_usd, loads, w, i, good):
    """Call `i` has been answered; the task may be done with it."""
    load = loads[w, i]
    if load.workflow < 0:
        return
    task = follow.tasks[w, load.session]
    follow.counts[w, ANSWERED, load.workflow] += 1.0
    task.answered += 1
    task.good += good
    if task.last_answered == 0:
        task.last_good = good
        task.last_answered = i == task.last_row
    if task.answered == task.calls and task.state == UNDER_WAY:
        _settle(follow, ledger_usd, w, load.session)


@kernel
def note_lost(follow, loads, w, i):
    """Call `i` gets no answer: its task has failed."""
    load = loads[w, i]
    if load.workflow < 0:
        return
    task = follow.tasks[w, load.session]
    if task.state == UNDER_WAY:
        task.state = FAILED
        follow.counts[w, LOST, load.workflow] += task.calls / task.all_calls


@kernel
def end_episode(follow, ledger_usd, w):
    """At the horizon: tasks under way are judged by the calls they have had."""
    for s in range(follow.tasks.shape[1]):
        task = follow.tasks[w, s]
        if task.state == UNDER_WAY and task.workflow >= 0 and task.answered > 0:
            _settle(follow, ledger_usd, w, s)
