"""The report's figures on hand-made episodes, and its JSON against a schema of its own."""

import json
import os
from typing import Annotated, Literal

import numpy as np
import pytest
from episodes import CLASSES, EPISODES, comparison, make_results
from pydantic import BaseModel, ConfigDict, Field

from envs.economics.ledger import ACCOUNTS
from evaluation.bounds import Bounds
from evaluation.document import to_document, write_json
from evaluation.report import build_report
from evaluation.results import concatenate
from marginroute.errors import InputError
from marginroute.view import KINDS
from marginroute.whole_file import check_target

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class EstimateModel(Strict):
    mean: float
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None


class Percentiles(Strict):
    p50: float | None
    p95: float | None
    p99: float | None


class ClassModel(Strict):
    requests_share: Share
    contribution_margin_usd_per_1k_requests: float
    revenue_usd_per_1k_requests: float
    accounts: dict[Literal[ACCOUNTS], float]
    slo_attainment: Share | None
    ttft_attainment: Share | None
    tpot_attainment: Share | None
    e2e_attainment: Share | None
    quality: Share | None
    shed: Share | None
    shed_by_decision: Share | None
    abandoned: Share | None
    failed: Share | None
    refused: Share | None
    deferred: float | None
    hedged: float | None
    hedges_won: Share | None
    ttft_s: Percentiles
    tpot_s: Percentiles
    e2e_s: Percentiles


class WorkflowModel(Strict):
    cost_per_finished_task_usd: float
    revenue_per_finished_task_usd: float


class FairnessModel(Strict):
    customers: Annotated[int, Field(ge=2)]
    jain: Share
    worst_slo_attainment: Share
    best_slo_attainment: Share
    worst_served: Share


class PolicyModel(Strict):
    margin_usd_per_1k_requests: EstimateModel
    margin_usd_per_hour: EstimateModel
    contribution_margin_usd_per_1k_requests: EstimateModel
    cash_margin_usd_per_1k_requests: float
    lifetime_usd_per_1k_requests: float
    interquartile_mean_usd_per_1k_requests: float
    untuned_usd_per_1k_requests: float | None
    router_usd_per_1k_requests: float
    revenue_usd_per_1k_requests: float
    gross_margin_pct: float | None
    slo_attainment: dict[str, Share | None]
    quality: dict[str, Share | None]
    shed: dict[str, Share | None]
    refused: dict[str, Share | None]
    actions: dict[Literal[KINDS], Share]
    utilisation: float
    utilisation_by_pool: dict[str, float]
    accounts: dict[Literal[ACCOUNTS], float]
    by_class: dict[str, ClassModel]
    by_workflow: dict[str, WorkflowModel]
    fairness: dict[str, FairnessModel]


class PairedModel(Strict):
    vs: str
    delta_usd_per_1k_requests: float
    delta_pct: float | None
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    p_value: Share
    p_holm: Share
    net_of_router_usd_per_1k_requests: float


class RouterModel(Strict):
    cpu_s_per_decision: float
    usd_per_core_hour: float


class BoundsModel(Strict):
    clairvoyant: float | None
    same_information: float | None


class DocumentModel(Strict):
    version: Literal[1] = Field(alias="schema")
    scenario: str
    calibration: dict | None
    assumptions: list[dict[str, str]]
    episodes: Annotated[int, Field(ge=1)]
    policies: dict[str, PolicyModel]
    best_heuristic: str | None
    tuned: bool
    paired: dict[str, PairedModel]
    router: RouterModel
    bounds: BoundsModel
    share_of_bound: dict[str, EstimateModel | None]
    gap_closed: dict[str, float | None]


def document_of(results, best="bid-price", **kwargs):
    return to_document(build_report("quickstart", results, best, **kwargs))


def test_document_follows_the_schema():
    document = document_of(comparison(bid_price=0.0, ppo=0.3, random=-1.0))
    DocumentModel.model_validate(document)
    assert list(document["policies"]) == ["ppo", "bid-price", "random"]
    assert set(document["paired"]) == {"ppo", "random"}
    assert document["bounds"] == {"clairvoyant": None, "same_information": None}
    assert set(document["gap_closed"].values()) == {None}


def test_document_without_heuristics_intervals_or_a_class_without_requests():
    results = make_results("ppo", episodes=1)
    results.counts[:, :, 2] = 0
    results.latency_histogram[:, :, 2] = 0
    document = document_of({"ppo": results}, best=None)
    DocumentModel.model_validate(document)
    policy = document["policies"]["ppo"]
    assert policy["margin_usd_per_1k_requests"]["ci95"] is None
    assert policy["quality"]["enterprise"] is None
    assert policy["by_class"]["enterprise"]["ttft_s"] == {"p50": None, "p95": None, "p99": None}
    assert document["paired"] == {}


def test_figures_against_sums_by_hand():
    results = make_results()
    policy = document_of({"bid-price": results})["policies"]["bid-price"]
    calls, hours = EPISODES * 300, EPISODES * 0.5
    revenue = results.ledger_usd[:, :2].sum()
    margin = results.ledger_usd.sum()
    assert policy["revenue_usd_per_1k_requests"] == pytest.approx(1000 * revenue / calls)
    assert policy["margin_usd_per_1k_requests"]["mean"] == pytest.approx(1000 * margin / calls)
    assert policy["margin_usd_per_hour"]["mean"] == pytest.approx(margin / hours)
    assert policy["gross_margin_pct"] == pytest.approx(100 * margin / revenue)
    contribution = policy["contribution_margin_usd_per_1k_requests"]["mean"]
    assert contribution == pytest.approx(1000 * (margin + 5 * EPISODES) / calls)
    assert policy["slo_attainment"]["pro"] == pytest.approx(0.85)
    assert policy["quality"]["pro"] == pytest.approx(0.8)
    assert policy["shed"]["pro"] == pytest.approx(0.1)
    assert policy["actions"] == pytest.approx(
        {"replica": 0.7, "provider": 0.1, "cache": 0.05, "defer": 0.1, "shed": 0.05}
    )
    assert policy["utilisation"] == pytest.approx(0.5)
    assert policy["utilisation_by_pool"] == pytest.approx({"small": 0.4, "large": 0.8})


def test_accounts_and_classes_add_up():
    policy = document_of({"bid-price": make_results()})["policies"]["bid-price"]
    margin = policy["margin_usd_per_1k_requests"]["mean"]
    assert sum(policy["accounts"].values()) == pytest.approx(margin)
    assert policy["accounts"]["gpu_hours"] < 0 < policy["accounts"]["usage_revenue"]
    by_class = policy["by_class"].values()
    contribution = policy["contribution_margin_usd_per_1k_requests"]["mean"]
    assert sum(c["contribution_margin_usd_per_1k_requests"] for c in by_class) == pytest.approx(contribution)
    assert sum(c["revenue_usd_per_1k_requests"] for c in by_class) == pytest.approx(
        policy["revenue_usd_per_1k_requests"]
    )
    assert tuple(policy["by_class"]) == CLASSES


def test_delta_is_paired_and_its_per_cent_is_of_contribution_margin():
    document = document_of(comparison(bid_price=0.0, ppo=0.3))
    paired = document["paired"]["ppo"]
    expected = 1000 * 0.3 / 300
    contribution = document["policies"]["bid-price"]["contribution_margin_usd_per_1k_requests"]["mean"]
    assert paired["delta_usd_per_1k_requests"] == pytest.approx(expected)
    assert paired["ci95"] == pytest.approx([expected, expected])
    assert paired["delta_pct"] == pytest.approx(100 * expected / contribution)
    assert paired["p_value"] == pytest.approx(2 / 2**EPISODES)
    low, high = document["policies"]["ppo"]["margin_usd_per_1k_requests"]["ci95"]
    assert high - low > 1.0


def test_gap_closed_needs_room():
    results = comparison(bid_price=0.0, ppo=0.3)
    heuristic = document_of(results)["policies"]["bid-price"]["margin_usd_per_1k_requests"]["mean"]
    assert document_of(results, bounds=bounds_at(heuristic + 4.0))["gap_closed"]["ppo"] == pytest.approx(0.25)
    assert document_of(results, bounds=bounds_at(heuristic + 0.001))["gap_closed"]["ppo"] is None


def bounds_at(usd_per_1k, episodes=EPISODES):
    """Bounds of equal episodes of 300 requests, 5 USD of GPUs each."""
    usd = np.full(episodes, usd_per_1k * 0.3)
    return Bounds(np.arange(episodes), usd + 1.0, usd, np.full(episodes, -5.0))


def test_share_of_bound_is_of_contribution_margin():
    results = comparison(bid_price=0.0)
    document = document_of(results, bounds=bounds_at(100.0))
    contribution = results["bid-price"].contribution_usd.sum()
    share = document["share_of_bound"]["bid-price"]
    assert share["mean"] == pytest.approx(contribution / (EPISODES * (30.0 + 1.0 + 5.0)))
    assert document["bounds"] == pytest.approx({"clairvoyant": 100.0 + 1000 / 300, "same_information": 100.0})
    with pytest.raises(InputError, match="other episodes"):
        document_of(results, bounds=bounds_at(100.0, EPISODES - 1))


def test_delta_pct_is_null_where_the_reference_loses_money():
    results = comparison(bid_price=-20.0, ppo=0.0)
    assert document_of(results)["paired"]["ppo"]["delta_pct"] is None


def test_policies_that_met_other_requests_are_refused():
    results = comparison(bid_price=0.0, ppo=0.0)
    results["ppo"].counts[3, 0, 1] += 1
    with pytest.raises(InputError, match="not run on the same requests"):
        document_of(results)
    with pytest.raises(InputError, match="not run on the same requests"):
        document_of({"bid-price": make_results(), "ppo": make_results("ppo", episodes=5)})


def test_an_episode_without_requests_is_refused():
    results = make_results()
    results.counts[7] = 0
    with pytest.raises(InputError, match="episode 7 has no requests"):
        document_of({"bid-price": results})


def test_parts_are_joined_in_order_of_seed():
    whole = make_results(seed=3)
    rows = [np.arange(8, 12), np.arange(0, 8)]
    parts = [type(whole)(**{f: v[i] if isinstance(v, np.ndarray) else v for f, v in vars(whole).items()}) for i in rows]
    joined = concatenate(parts)
    np.testing.assert_array_equal(joined.seeds, whole.seeds)
    np.testing.assert_array_equal(joined.ledger_usd, whole.ledger_usd)


def test_tier_shares_sum_to_one():
    assert make_results().tier_shares == (0.75, 0.25)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "report.json"
    document = document_of(comparison(bid_price=0.0, ppo=0.3))
    write_json(target, document)
    assert json.loads(target.read_text()) == document
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"margin": float("nan")})
    assert json.loads(target.read_text()) == document
    assert os.listdir(tmp_path) == ["report.json"]


def test_json_target_is_checked_before_the_work(tmp_path):
    check_target(tmp_path / "report.json")
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        check_target(tmp_path / "missing" / "report.json")
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "missing" / "report.json", {})
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path, {})
    assert os.listdir(tmp_path) == []
