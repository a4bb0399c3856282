"""What a gain hangs on: inputs move it the way they must, break-even points, and where inputs come from."""

import pytest

from envs.scenario import load_scenario
from envs.scenario_family import changed
from evaluation.assumptions import ASSUMED, MEASURED, PUBLIC, assumptions
from evaluation.page_data import LOADS, other_worlds
from evaluation.sensitivity import break_even, inputs, tornado
from evaluation.statistics import Estimate
from marginroute.rules import FixedTier, LeastInFlight


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluation.cache.CACHE", tmp_path)


@pytest.fixture(scope="module")
def scenario():
    return load_scenario("quickstart", {"horizon_s": 20.0, "requests_per_episode": 60})


def test_bars_move_as_they_must(scenario):
    """All to the API against all to the own fleet: its price and the load decide, and doubling it shows in USD."""
    policies = {"hosted": FixedTier("hosted", 3), "own": LeastInFlight("own")}
    bars = {bar.name: bar for bar in tornado(scenario, policies, "hosted", "own", episodes=4, workers=1)}
    assert set(bars) == {"cost of a bad answer", "prices to customers", "prices of APIs", "load"}
    assert [bar.swing_usd for bar in bars.values()] == sorted((x.swing_usd for x in bars.values()), reverse=True)
    api = bars["prices of APIs"].gains
    spent = (api[1.0].mean - api[2.0].mean) / 1.0
    assert spent > 0.0 and api[4.0].mean == pytest.approx(
        api[1.0].mean - 3.0 * spent, rel=1e-6
    )  # linear: no policy cares
    worth = bars["cost of a bad answer"].gains
    assert worth[4.0].mean > worth[1.0].mean > worth[0.0].mean  # the API answers better


RANGED = {"horizon_s": 20.0, "requests_per_episode": 60, "ranges": {"load_scale": {"low": 0.5, "high": 2.0}}}


def test_ranges_do_not_enter_what_one_input_does(scenario):
    """Bars of a family are those of the scenario itself, the value of today among them."""
    policies = {"hosted": FixedTier("hosted", 3), "own": LeastInFlight("own")}
    of_family, of_one = (
        tornado(world, policies, "hosted", "own", episodes=2, workers=1)
        for world in (load_scenario("quickstart", RANGED), scenario)
    )
    assert [bar.gains for bar in of_family] == [bar.gains for bar in of_one]


def test_other_loads_are_other_loads_in_a_family_too():
    worlds = other_worlds(load_scenario("quickstart", RANGED))
    counts = {name: worlds[name].generate(0, "heldout").n_requests for name in LOADS}
    assert counts == {"load x0.7": 42, "load x1.3": 78, "load x1.6": 96}


def test_every_input_is_legal_at_every_factor_that_is_tried():
    for name in ("quickstart", "shaky", "azure_conversation"):
        scenario = load_scenario(name)
        assert {"quality signal", "prices to customers", "load"} <= {item.name for item in inputs(scenario)}
        for item in inputs(scenario):
            assert list(item.factors) == sorted(item.factors) and item.factors[2] == 1.0
            for factor in item.factors:
                assert changed(scenario, item.changes(factor), "test").hash != scenario.hash or factor == 1.0


def test_an_auc_moves_between_knowing_nothing_and_nearly_all():
    scenario = load_scenario("quickstart", {"workload.difficulty": {"nobody_can_share": 0.04, "signal_auc": 0.75}})
    signal = next(item for item in inputs(scenario) if item.name.startswith("AUC"))
    ends = [signal.changes(factor)["workload.difficulty.signal_auc"] for factor in signal.factors]
    assert ends[0] == 0.5 and ends[2] == 0.75 and ends[4] == pytest.approx(0.99)


def test_break_even():
    gains = {f: Estimate(usd, usd - 1.0, usd + 1.0) for f, usd in {0.5: -2.0, 1.0: 2.0, 2.0: 1.0, 4.0: -3.0}.items()}
    assert break_even(gains) == pytest.approx(0.75)
    assert break_even({1.0: gains[1.0], 2.0: gains[2.0]}) is None


def test_where_inputs_come_from(scenario, tmp_path):
    kinds = {item.name: item.kind for item in assumptions(scenario)}
    assert kinds["arrivals and lengths"] == ASSUMED and kinds["contract of enterprise"] == ASSUMED
    assert kinds["prices of api"] == PUBLIC and kinds["speed of pool small"] == PUBLIC
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{i},100,10\n" for i in range(300)))
    recorded = load_scenario("quickstart", trace=trace, trace_format="csv")
    verdict = {"calibrated": True, "log": "my.jsonl", "requests": 1000, "outside": []}
    kinds = {item.name: item.kind for item in assumptions(recorded, verdict)}
    assert kinds["arrivals and lengths"] == MEASURED and kinds["speed of pools and providers"] == MEASURED
