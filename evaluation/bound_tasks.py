"""The best that the calls of a task can do together at given prices, where it pays only if it succeeds.

A task has n calls in the episode out of N and value v: it pays v a / N for a answered calls, if no call that came was
lost, the last answer is good (where the workflow says so) and a share s of the answers are. With a_i the best of call
i, it is worth at most the greatest of

- *lost*:  sum max(unserved_i, a_i), no pay;
- *whole*: sum a_i + max over ways to answer its last call of (v n / N) good, less what that way loses against a_i;
- *part*:  a follow-up or more stay away (only the horizon can keep them), and any other call may be the last. As
  a <= n - 1, the pay is at most v a / N and at most (v (n - 1) / N) good: half of each, summed over the calls as above.

A workflow that does not ask for a good last answer pays v a / N in the last two, whatever the answers. Where outcomes
are known and even the best answers of all calls are too few good ones, *whole* is impossible; elsewhere its pay is at
most the share of P(at least s n good) that Markov's inequality leaves, unless the last answer decides already.

Calls that may share stored answers with others are left out: each is simply paid v / N if answered.
"""

# ruff: noqa: ANN001, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.kernels import kernel
from envs.plant import Plant
from envs.workload.requests import Workload

if TYPE_CHECKING:
    from evaluation.bound_options import Options

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NOWHERE, NONE = -np.inf, -1


class Pay(NamedTuple):
    """What tasks pay, (X,) each: see `Tasks`."""

    whole_usd: Any
    share_usd: Any
    part_usd: Any


@dataclass(frozen=True)
class Tasks:
    """Tasks of an episode: X of them, of M requests.

    Attributes:
        task: (M,) task of each call that is taken together with the others of it; -1: none.
        must: (M,) whether a call comes whatever else is done.
        last: (X,) request of the last call.
        whole_usd: (X,) pay if all calls of the episode are answered and the last answer is good.
        share_usd: (X,) part of the pay that comes with each answered call where follow-ups stay away.
        part_usd: (X,) part of it that comes with a good last answer there.
        final_good: (X,) whether the last answer must be good.
        alone_usd: (M,) pay for each answered call of other tasks.
    """

    task: Ints
    must: Bools
    last: Ints
    whole_usd: Floats
    share_usd: Floats
    part_usd: Floats
    final_good: Bools
    alone_usd: Floats


def tasks_of(plant: Plant, workload: Workload, group: Ints, best_good: Floats, known: Bools) -> Tasks:
    """The tasks of an episode.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        group: (M,) requests that may share stored answers; -1: none.
        best_good: (M, T) outcomes, or their probabilities, at the best turn of each request.
        known: (M,) whether they are outcomes.
    """
    m = workload.n_requests
    calls = np.flatnonzero(workload.workflow_index >= 0)
    sessions, whose = np.unique(workload.session_index[calls], return_inverse=True)
    count = np.bincount(whose, minlength=len(sessions))
    last = np.zeros(len(sessions), dtype=np.int64)
    last[whose] = calls  # the last row counts
    workflow = plant.workflows[workload.workflow_index[last]]
    each_usd = workflow["value_usd"] / workload.task_calls[last]
    best = best_good[calls].max(axis=1)
    reach = np.bincount(whose, weights=best, minlength=len(sessions))
    sure = np.bincount(whose, weights=~known[calls], minlength=len(sessions)) == 0
    needed = workflow["good_share"] * count
    final = workflow["final_good"] == 1
    markov = np.where(final, 1.0, np.minimum(reach / np.maximum(needed, 1e-300), 1.0))
    chance = np.where(sure, reach >= needed - 1e-9, markov)
    alone = np.bincount(whose, weights=group[calls] >= 0, minlength=len(sessions)) > 0
    task, alone_usd = np.full(m, -1, dtype=np.int64), np.zeros(m)
    together = np.cumsum(~alone) - 1
    task[calls] = np.where(alone[whose], -1, together[whose])
    alone_usd[calls] = np.where(alone[whose], each_usd[whose], 0.0)
    kept = ~alone
    return Tasks(
        task=task,
        must=(workload.parent_index < 0) & (workload.arrived_at_s < workload.horizon_s),
        last=last[kept],
        whole_usd=(each_usd * count * chance)[kept],
        share_usd=(each_usd * np.where(final, 0.5, 1.0))[kept],
        part_usd=(0.5 * each_usd * (count - 1) * final)[kept],
        final_good=final[kept],
        alone_usd=alone_usd,
    )


class TaskAnswers:
    """Maximises the sum over the calls of tasks.

    Args:
        options: ordered by request and tier.
    """

    def __init__(self, options: Options) -> None:
        tasks = options.tasks
        rows = np.flatnonzero(tasks.task >= 0)
        self.rows = rows[np.argsort(tasks.task[rows], kind="stable")]
        self.starts = np.searchsorted(tasks.task[self.rows], np.arange(len(tasks.last) + 1))
        self.begins = np.searchsorted(options.request, np.arange(len(tasks.task) + 1))
        self.good = (
            np.where(tasks.final_good[tasks.task[options.request]], options.good, 1.0) if len(rows) else np.ones(0)
        )
        self.unserved_usd, self.must, self.last = options.unserved_usd, tasks.must, tasks.last
        self.pay = Pay(tasks.whole_usd, tasks.share_usd, tasks.part_usd)
        self._usd, self._way = np.empty((3, len(rows))), np.empty((3, len(rows)), dtype=np.int64)

    def best(self, net_usd: Floats, taken: Ints) -> float:
        """The maximum in USD, given each option's value less its work at the prices.

        Writes the option that each of these calls takes, -1 for none, into `taken` (M,).
        """
        if len(self.rows) == 0:
            return 0.0
        calls = self.rows, self.starts, self.begins, self.must, self.last
        return float(_best(*calls, self.pay, net_usd, self.good, self.unserved_usd, self._usd, self._way, taken))


@kernel
def _best(rows, starts, begins, must, last, pay, net_usd, good, unserved_usd, usd, way, taken):
    """Sum over tasks x of calls `rows` starts[x] to starts[x + 1] - 1; scratch: usd and way (3, R)."""
    total_usd = 0.0
    plain_usd, ending_usd, coming_usd = usd[0], usd[1], usd[2]
    plain, ending, takes = way[0], way[1], way[2]
    for x in range(len(starts) - 1):
        lost_usd, whole_usd, part_usd, closing = 0.0, 0.0, 0.0, NONE
        for r in range(starts[x], starts[x + 1]):
            i = rows[r]
            plain_usd[r], plain[r] = _best_of(begins[i], begins[i + 1], net_usd, good, 0.0)
            ending_usd[r], ending[r] = _best_of(begins[i], begins[i + 1], net_usd, good, pay.part_usd[x])
            lost_usd += max(plain_usd[r], unserved_usd[i])
            if i == last[x]:
                closing_usd, closing = _best_of(begins[i], begins[i + 1], net_usd, good, pay.whole_usd[x])
                whole_usd += closing_usd
            else:
                whole_usd += plain_usd[r]
            coming_usd[r] = plain_usd[r] + pay.share_usd[x]
            takes[r] = must[i] or coming_usd[r] >= 0.0
            if not takes[r]:
                coming_usd[r] = 0.0
            part_usd += coming_usd[r]
        extra_usd, end, away = _end_and_absence(
            starts[x], starts[x + 1], rows, must, plain_usd, ending_usd, coming_usd, pay.share_usd[x]
        )
        part_usd += extra_usd
        best_usd = max(lost_usd, whole_usd, part_usd)
        total_usd += best_usd
        for r in range(starts[x], starts[x + 1]):
            i = rows[r]
            if best_usd == lost_usd:
                taken[i] = plain[r] if plain_usd[r] > unserved_usd[i] else NONE
            elif best_usd == whole_usd:
                taken[i] = closing if i == last[x] else plain[r]
            elif r == end:
                taken[i] = ending[r]
            else:
                taken[i] = plain[r] if takes[r] and r != away else NONE
    return total_usd


@kernel
def _best_of(begin, end, net_usd, good, pay_usd):
    """Greatest value with pay for a good answer, -inf without an option, and which option has it."""
    best_usd, best = NOWHERE, NONE
    for k in range(begin, end):
        value_usd = net_usd[k] + pay_usd * good[k]
        if value_usd > best_usd:
            best_usd, best = value_usd, k
    return best_usd, best


@kernel
def _end_and_absence(start, stop, rows, must, plain_usd, ending_usd, coming_usd, share_usd):
    """Greatest sum of what one call gains as the last and what another one's absence brings, and which they are."""
    most_usd, next_usd, least_usd, other_usd = NOWHERE, NOWHERE, NOWHERE, NOWHERE
    ends, next_ends, away, other_away = NONE, NONE, NONE, NONE
    for r in range(start, stop):
        gain_usd = ending_usd[r] + share_usd - coming_usd[r] if np.isfinite(plain_usd[r]) else NOWHERE
        absent_usd = NOWHERE if must[rows[r]] else -coming_usd[r]
        if gain_usd > most_usd:
            next_usd, next_ends, most_usd, ends = most_usd, ends, gain_usd, r
        elif gain_usd > next_usd:
            next_usd, next_ends = gain_usd, r
        if absent_usd > least_usd:
            other_usd, other_away, least_usd, away = least_usd, away, absent_usd, r
        elif absent_usd > other_usd:
            other_usd, other_away = absent_usd, r
    if ends != away:
        return most_usd + least_usd, ends, away
    if next_usd + least_usd >= most_usd + other_usd:
        return next_usd + least_usd, next_ends, away
    return most_usd + other_usd, ends, other_away
