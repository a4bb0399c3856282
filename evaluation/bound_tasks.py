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

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from envs.workload.requests import Workload
from envs.worlds import Plant

if TYPE_CHECKING:
    from evaluation.bound_options import Options

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NOWHERE = -np.inf


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
        self.tasks = tasks
        rows = np.flatnonzero(tasks.task >= 0)
        rows = rows[np.argsort(tasks.task[rows], kind="stable")]
        self.starts = np.searchsorted(tasks.task[rows], np.arange(len(tasks.last)))
        self.whose, self.must = tasks.task[rows], tasks.must[rows]
        self.unserved_usd = options.unserved_usd[rows]
        self.last = np.flatnonzero(rows == tasks.last[self.whose])  # (X,) positions in `rows`
        call = np.full(len(tasks.task), -1, dtype=np.int64)
        call[rows] = np.arange(len(rows))
        self.option = np.flatnonzero(call[options.request] >= 0)
        self.option = self.option[np.argsort(call[options.request[self.option]], kind="stable")]
        self.call = call[options.request[self.option]]
        self.first = np.flatnonzero(np.diff(self.call, prepend=-1))
        self.good = np.where(tasks.final_good[self.whose[self.call]], options.good[self.option], 1.0)

    def best(self, net_usd: Floats) -> tuple[float, Ints]:
        """The maximum in USD, and the options taken, given each option's value less its work at the prices."""
        tasks, whose = self.tasks, self.whose
        if len(tasks.last) == 0:
            return 0.0, np.zeros(0, dtype=np.int64)
        net_usd = net_usd[self.option]
        plain_usd, plain = self._best_of(net_usd)
        lost_usd = self._sum(np.maximum(plain_usd, self.unserved_usd))
        closing_usd, closing = self._best_of(net_usd + tasks.whole_usd[whose][self.call] * self.good)
        last = self.last
        whole_usd = self._sum(plain_usd, without=last) + closing_usd[last]
        share_usd = plain_usd + tasks.share_usd[whose]
        ending_usd, ending = self._best_of(net_usd + tasks.part_usd[whose][self.call] * self.good)
        coming_usd = np.where(self.must, share_usd, np.maximum(share_usd, 0.0))
        gain_usd = np.full(len(whose), NOWHERE)
        can = np.isfinite(share_usd)
        gain_usd[can] = ending_usd[can] + tasks.share_usd[whose[can]] - coming_usd[can]
        extra_usd, ends, away = self._end_and_absence(gain_usd, np.where(self.must, NOWHERE, -coming_usd))
        part_usd = self._sum(coming_usd) + extra_usd
        best_usd = np.maximum(np.maximum(lost_usd, whole_usd), part_usd)

        lost, whole = best_usd == lost_usd, (best_usd == whole_usd) & (best_usd > lost_usd)
        takes = np.where(lost[whose], plain_usd > self.unserved_usd, whole[whose] | (coming_usd == share_usd))
        chosen = np.where(takes, plain, -1)
        chosen[last[whole]] = closing[last[whole]]
        part = ~(lost | whole)
        chosen[away[part]] = -1
        chosen[ends[part]] = ending[ends[part]]
        return float(best_usd.sum()), self.option[chosen[chosen >= 0]]

    def _end_and_absence(self, gain_usd: Floats, absent_usd: Floats) -> tuple[Floats, Ints, Ints]:
        """Greatest sum in each task of one call's gain and of another's absence, (X,), and which calls they are."""
        most_usd, ends = self._top(gain_usd)
        least_usd, away = self._top(absent_usd)
        next_usd, next_ends = self._top(np.where(np.isin(np.arange(len(gain_usd)), ends), NOWHERE, gain_usd))
        other_usd, other_away = self._top(np.where(np.isin(np.arange(len(gain_usd)), away), NOWHERE, absent_usd))
        same = ends == away
        other_end = same & (next_usd + least_usd >= most_usd + other_usd)
        other_one = same & ~other_end
        return (
            np.where(other_end, next_usd, most_usd) + np.where(other_one, other_usd, least_usd),
            np.where(other_end, next_ends, ends),
            np.where(other_one, other_away, away),
        )

    def _top(self, usd: Floats) -> tuple[Floats, Ints]:
        """Greatest value in each task and a call that has it, (X,)."""
        most_usd, which = np.maximum.reduceat(usd, self.starts), np.zeros(len(self.starts), dtype=np.int64)
        hits = np.flatnonzero(usd == most_usd[self.whose])
        which[self.whose[hits]] = hits
        return most_usd, which

    def _sum(self, usd: Floats, without: Ints | None = None) -> Floats:
        """(X,) sums over the calls of each task."""
        if without is not None:
            usd = usd.copy()
            usd[without] = 0.0
        return np.asarray(np.add.reduceat(usd, self.starts))

    def _best_of(self, usd: Floats) -> tuple[Floats, Ints]:
        """Greatest value of each call, -inf if it has no option, and which of `self.option` has it."""
        best_usd, which = np.full(len(self.whose), NOWHERE), np.full(len(self.whose), -1, dtype=np.int64)
        if len(self.first):
            best_usd[self.call[self.first]] = np.maximum.reduceat(usd, self.first)
            hits = np.flatnonzero(usd == best_usd[self.call])
            which[self.call[hits]] = hits
        return best_usd, which
