"""Customers' accounts and SLO windows in the world: who is turned away, what an answer brings, when windows close.

A request is looked at once, when it first arrives: its customer's rate limit, longest prompt, quota and credits decide
how it stands (`marginroute.contracts`). One that is refused gets 429: there is no decision about it, nobody is owed
anything, and what would have followed it in its session never comes. The others keep their standing until they are
answered, and use up the quota or the credits then. SLO windows close at their instant, with the requests whose outcome
is known; the last ones close when the episode is settled, its backlog included. Requests beyond a fair-use quota have
been promised nothing and count in no window.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.economics import accounts as books_of
from envs.economics import ledger as books
from envs.economics.accounts import ACCOUNT, WINDOW, open_accounts
from envs.fleet.state import record_array
from envs.kernels import kernel
from envs.workload.requests import Workload
from envs.world_state import MET, MISSED, UNSERVED
from marginroute import contracts
from marginroute import view as v


class CustomerAccounts:
    """The accounts and windows of N worlds.

    Args:
        terms: (K,) contracts of each member of a family of scenarios.
        n_worlds: N.

    Attributes:
        kept: whether any class has an allowance, a rate limit or a longest prompt.
        windowed: whether any class has SLO windows.
        accounts: (N, G) `ACCOUNT`.
        windows: (N, K) `WINDOW`.
    """

    def __init__(self, terms: Sequence[Any], n_worlds: int) -> None:
        k, terms = len(terms[0]), np.concatenate([np.asarray(member) for member in terms])
        limits = ("quota_requests", "prepaid_usd", "rate_per_s", "context_tokens")
        self.kept = any((terms[name] < np.inf).any() for name in limits) or bool((terms["committed_usd"] > 0.0).any())
        self.windowed = bool((terms["window_s"] < np.inf).any())
        self.accounts = record_array((n_worlds, 1), ACCOUNT)
        self.windows = record_array((n_worlds, k), WINDOW)

    def make_room(self, workload: Workload) -> bool:
        """Grows the accounts for an episode; running ones survive. True if anything changed."""
        customers = len(_customers(workload)[0]) if self.kept else 1
        old = self.accounts
        if customers <= old.shape[1]:
            return False
        self.accounts = record_array((len(old), customers), ACCOUNT)
        self.accounts[:, : old.shape[1]] = old
        return True

    def load(self, w: int, workload: Workload, load: Any, terms: Any) -> float:
        """Opens the accounts of world `w`.

        Args:
            w: world.
            workload: of the episode.
            load: (M,) its `LOAD` records; they get their accounts.
            terms: (K,) contracts of its member, as the kernels take them.

        Returns:
            When the first SLO window closes; inf: there is none.
        """
        load["account"], load["standing"] = 0, contracts.WITHIN
        if not (self.kept or self.windowed):
            return math.inf
        customers, load["account"] = _customers(workload)
        phase, used = np.zeros(len(customers)), np.zeros(len(customers))
        if len(workload.billing):
            phase, used = workload.billing[customers[:, 1] % len(workload.billing)].T
        if not self.kept:
            customers, load["account"] = customers[:0], 0
        arrays = (np.ascontiguousarray(x) for x in (customers[:, 0], phase[: len(customers)], used[: len(customers)]))
        open_accounts(terms, self.accounts, self.windows, *arrays, w)
        return float(self.windows["closes_at_s"][w].min())


def _customers(workload: Workload) -> tuple[Any, Any]:
    """(G, 2) class and tenant of every customer of an episode, and (M,) whose each request is."""
    pairs = np.stack([workload.class_index, workload.tenant_index], axis=1).astype(np.int64)
    customers, whose = np.unique(pairs, axis=0, return_inverse=True)
    return customers, whose.reshape(-1)


@kernel
def arrive(terms, loads, counts, w, i, now_s):
    """Request `i` comes in for the first time; False if its contract turns it away."""
    load = loads[w, i]
    k = load.class_index
    load.standing = books_of.arrive(terms.by_class, terms.accounts, w, k, load.account, load.prompt_tokens, now_s)
    if load.standing == contracts.REFUSED:
        counts[w, books.REFUSED, k] += 1
        return False
    return True


@kernel
def show(config, terms, loads, request_view, w, i, now_s):
    """Writes what the answer to request `i` brings, and what missing its SLOs costs."""
    load = loads[w, i]
    k = load.class_index
    term = terms.by_class[k]
    request_view[v.CACHED_INPUT_PRICE_USD, w] = term.cached_input_usd_per_token
    request_view[v.REQUEST_USD, w] = term.request_usd
    request_view[v.MISS_USD, w] = term.missed_lifetime_usd
    request_view[v.STANDING, w] = load.standing
    request_view[v.QUOTA_LEFT, w] = 1.0
    if config[0].keeps_accounts == 1:
        books_of.show(terms.by_class, terms.accounts, request_view, w, k, load.account, load.standing)
    if term.window_s < math.inf and load.standing != contracts.BEST_EFFORT:
        usd = books_of.miss_usd(terms.by_class, terms.windows, w, k, now_s)
        request_view[v.MISS_USD, w] += usd
        request_view[v.UNSERVED_CREDIT_USD, w] += usd


@kernel
def post_answer(
    terms, loads, ledger_usd, counts, w, i, cached_tokens, output_tokens, ttft_s, tpot_s, e2e_s, good, account,
    cost_usd, now_s,
):  # fmt: skip
    """Posts the answer to request `i`, of whose prompt `cached_tokens` were cached, and charges its customer."""
    load = loads[w, i]
    k = load.class_index
    revenue_usd, value_usd = books_of.bill(
        terms.by_class, terms.accounts, w, k, load.account, load.standing, load.prompt_tokens,
        min(cached_tokens, load.prompt_tokens), output_tokens,
    )  # fmt: skip
    beyond = load.standing == contracts.OVERAGE or terms.by_class[k].committed_usd > 0.0
    owed = load.standing != contracts.BEST_EFFORT
    met = books.post_served(
        ledger_usd, counts, terms.by_class, w, k, books.OVERAGE_REVENUE if beyond else books.USAGE_REVENUE,
        revenue_usd, value_usd, owed, load.prompt_tokens, output_tokens, ttft_s, tpot_s, e2e_s, good, account, cost_usd,
    )  # fmt: skip
    load.outcome = MET if met else MISSED
    if owed:
        books_of.note_outcome(terms.by_class, terms.windows, w, k, met, value_usd, now_s)


@kernel
def post_no_answer(terms, lengths, loads, ledger_usd, counts, w, i, count, account, cost_usd, now_s):
    """Posts that request `i` gets no answer; `count` is SHED, ABANDONED or FAILED."""
    load = loads[w, i]
    k = load.class_index
    load.outcome = UNSERVED
    expected = lengths[load.gateway, k, load.task_index].value
    value_usd = books_of.expected_value_usd(terms.by_class, k, load.standing, load.prompt_tokens, expected)
    owed = load.standing != contracts.BEST_EFFORT
    books.post_unserved(ledger_usd, counts, terms.by_class, w, k, count, value_usd, owed, account, cost_usd)
    if owed:
        books_of.note_outcome(terms.by_class, terms.windows, w, k, False, 0.0, now_s)


@kernel
def close_windows(terms, desk, ledger_usd, w, now_s):
    """Closes the windows whose end has come (all of them at inf), and credits what they owe."""
    desk.window_closes_s = math.inf
    for k in range(terms.by_class.shape[0]):
        credit_usd = books_of.close_window(terms.by_class, terms.windows, w, k, now_s)
        books.post(ledger_usd, w, books.SLO_CREDITS, k, -credit_usd)
        desk.window_closes_s = min(desk.window_closes_s, terms.windows[w, k].closes_at_s)
