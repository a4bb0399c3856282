"""docs/scenarios.md: what is read from the files, sums of accounts, and where a seat's margin turns."""

import pytest

from benchmarks.scenario_pages import Measured, Seat, story, write_pages
from envs.scenario import load_scenario

ACCOUNTS = {"usage_revenue": 10.0, "refunds": -2.5, "gpu_hours": -3.25, "cache": 0.0}


def measured(**more):
    return Measured("bid-price", {"bid-price": 4.25, "random": -1.0}, ACCOUNTS, {"clairvoyant": 0.871}, **more)


def test_the_page_tells_of_a_scenario_what_its_file_says():
    scenario = load_scenario("long_context")
    page = write_pages({"long_context": (scenario, measured())}, 16, 8)
    assert scenario.description in page and story(scenario)[:60] in page
    for name in (*scenario.pool_names, *scenario.provider_names, *scenario.class_names, *scenario.conditions):
        assert f"| {name} |" in page, name
    for key in scenario.ranges:
        assert f"| `{key}` |" in page, key
    assert "| usage_revenue | refunds | gpu_hours | sum |" in page and "| 10.000 | -2.500 | -3.250 | 4.250 |" in page
    assert "bid-price 4.25, random -1.00" in page and "87.1 %" in page


def test_a_scenario_without_tuned_baselines_says_so():
    scenario = load_scenario("quickstart")
    page = write_pages({"quickstart": (scenario, None)}, 16, 8)
    assert "Not measured" in page and "python train.py quickstart" in page and "--describe" in page


@pytest.mark.parametrize(
    ("usd", "turns"),
    [((3.0, 1.0, -1.0), "x2.5"), ((-1.0, -2.0, -3.0), "before x1"), ((3.0, 2.0, 1.0), "not up to x3")],
)
def test_where_the_margin_of_a_seat_turns_negative(usd, turns):
    seats = [Seat(f"agents-x{i + 1}", {"bid-price": value}) for i, value in enumerate(usd)]
    page = write_pages({"agent_ramp": (load_scenario("agent_ramp"), measured(seats=seats))}, 16, 8)
    assert f"| turns negative | {turns} |" in page and f"| x1 | {usd[0]:.2f} |" in page
