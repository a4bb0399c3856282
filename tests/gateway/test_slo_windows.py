"""SLO windows of a gateway: the same figures as those of a simulated world, fed with the same outcomes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from bundles import small_bundle

from envs.economics import accounts
from envs.economics.plans import TERMS
from envs.fleet.state import record_array
from marginroute import view as v
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.record_log import RecordLog
from marginroute.slo_windows import SloWindows

WINDOW = {
    "window_s": 60.0, "window_target": 0.95, "window_share": 0.1, "window_low_target": 0.9, "window_low_share": 0.3,
}  # fmt: skip


def world_side(terms):
    table = record_array(1, TERMS)
    for name in ("period_s", "quota_requests", "prepaid_usd", "rate_per_s"):
        table[name] = math.inf
    for name, value in terms.items():
        table[name] = value
    held, windows = record_array((1, 1), accounts.ACCOUNT), record_array((1, 1), accounts.WINDOW)
    none = np.zeros(0)
    accounts.open_accounts(table, held, windows, none.astype(np.int64), none, none, 0)
    return table, windows


def test_figures_are_those_of_a_world():
    rng = np.random.default_rng(3)
    table, windows = world_side(WINDOW)
    mine, now_s = SloWindows([WINDOW], 0.0), 0.0
    for _ in range(300):
        now_s += rng.exponential(1.0)
        accounts.close_window(table, windows, 0, 0, now_s)
        met, value_usd = bool(rng.random() < 0.93), float(rng.random())
        accounts.note_outcome(table, windows, 0, 0, met, value_usd, now_s)
        mine.note(0, met, value_usd, now_s)
        expected = accounts.miss_usd(table, windows, 0, 0, now_s)
        assert mine.miss_usd(0, now_s) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert SloWindows([{}], 0.0).miss_usd(0, 1.0) == 0.0


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_gateway_keeps_them_from_what_it_sees(tmp_path):
    """One in time, one late, one failed: two misses of three; a request beyond its quota is in no window."""
    base, clock = small_bundle(), Clock()
    terms = {name: row | (WINDOW if name == "standard" else {}) for name, row in base.terms.items()}
    gateway = Gateway(replace(base, terms=terms), RecordLog(tmp_path / "log.jsonl"), clock=clock)
    mirror = SloWindows([terms["standard"]], 0.0)
    value_usd = 100 * 4e-6 + 50 * 1.6e-5

    def call(id, ttft_s, status="completed", standing="within"):
        clock.now_s += 2.0
        gateway.decide(Facts(id, 100, "standard", standing=standing))
        gateway.finished(id, Outcome(status, "small/0", ttft_s, 1.5, prompt_tokens=100, output_tokens=50))

    call("a", 0.2)
    call("b", 1.4)
    call("c", None, "failed")
    call("d", 1.4, standing="best_effort")
    for at_s, met, usd in ((2.0, True, value_usd), (4.0, False, value_usd), (6.0, False, 0.0)):
        mirror.note(0, met, usd, at_s)
    clock.now_s = 10.0
    shown = gateway.state.view(100, "standard").request
    assert shown[v.MISS_USD] == pytest.approx(mirror.miss_usd(0, 10.0)) and shown[v.MISS_USD] > 0.0
    assert gateway.state.view(100, "premium").request[v.MISS_USD] == 0.0
    beyond = gateway.state.view(100, "standard", standing="best_effort").request
    assert beyond[v.MISS_USD] == beyond[v.UNSERVED_CREDIT_USD] == 0.0
    gateway.close()
