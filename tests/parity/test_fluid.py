"""The fluid surrogate against the engine on the same arrivals; the whole table: `python -m benchmarks.fluid`."""

import numpy as np
import pytest

from benchmarks import fluid_cases
from benchmarks.fluid_cases import CAP, Case, errors, near_knee, run_engine, run_fluid

STEPS = (0.5, 1.2, 0.7)
CASES = (
    Case(0.3),
    Case(0.7),
    Case(0.9),
    Case(1.2),
    Case(0.5, cap=CAP),
    Case(0.8, cap=CAP),
    Case(1.2, cap=CAP),
    Case(0.5, STEPS),
    Case(0.7, STEPS),
    Case(1.0, STEPS, cap=CAP),
    Case(0.7, new_replicas=6),
    Case(0.9, cap=CAP, new_cap=96),
)
LIMITS = {  # away from the knee, and near it
    "throughput_pct": (2.0, 2.0),
    "utilisation_points": (3.0, 3.0),
    "slo_attainment_points": (6.0, 10.0),
    "margin_pct": (7.0, 7.0),
}


@pytest.fixture(scope="module", params=list(fluid_cases.SLO_S))
def found(request):
    plant = fluid_cases.plant_of(request.param)
    return {case: errors(run_engine(plant, case), run_fluid(plant, case)) for case in CASES}


@pytest.mark.parametrize("quantity", list(LIMITS))
def test_errors_are_within_their_limits(found, quantity):
    off = {
        case.name: off[quantity]
        for case, off in found.items()
        if abs(off[quantity]) > LIMITS[quantity][near_knee(case)]
    }
    assert not off


def test_most_cases_are_far_better(found):
    for quantity, limit in {"throughput_pct": 0.5, "slo_attainment_points": 2.0, "margin_pct": 1.5}.items():
        assert np.median([abs(off[quantity]) for off in found.values()]) < limit, quantity


def test_the_comparison_can_fail(found):
    """Another replica count is another result: the limits above tell them apart."""
    plant = fluid_cases.plant_of(next(iter(fluid_cases.SLO_S)))
    more = errors(run_engine(plant, Case(1.2)), run_fluid(plant, Case(1.2, new_replicas=6)))
    assert more["throughput_pct"] > 5.0


def test_latency_means_follow_the_engine():
    """TTFT of a steady load, from the surrogate's sums; the engine's from its requests."""
    plant = fluid_cases.plant_of("llama-3.1-8b-h100")
    for load in (0.3, 0.8):
        case = Case(load)
        engine, fluid = run_engine(plant, case), run_fluid(plant, case)
        for name, limit in (("ttft_s", 0.15), ("tpot_s", 0.05), ("e2e_s", 0.05)):
            assert fluid[name] == pytest.approx(engine[name], rel=limit), (load, name)
