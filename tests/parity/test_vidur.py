"""The engine against recorded runs of Vidur, saturation and preemption included (skipped without the recordings)."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.vidur_parity import find_cases, parity_spec, run_cases
from envs.fleet.profile import constant_profile
from marginroute.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "peers" / "vidur"
needs_recordings = pytest.mark.skipif(not SHARED.is_dir(), reason="recorded runs of Vidur are not beside the checkout")


@pytest.fixture(scope="module")
def figures():
    return run_cases(SHARED, SHARED, SHARED)


@needs_recordings
def test_every_request_of_every_case_is_exact(figures):
    assert len(figures["cases"]) >= 10
    for name, case in figures["cases"].items():
        assert case["completed"] == case["requests"], name
        assert case["max_abs_dttft_s"] <= 1e-6, name
        assert case["max_rel_de2e"] <= 1e-8, name
        assert case["restarts_equal"], name
    assert sum(case["restarts"] for case in figures["cases"].values()) > 100


@needs_recordings
def test_profiles_fitted_to_a_grid_describe_whole_runs(figures):
    assert figures["fitted_median_error_pct"] <= 1.0
    assert figures["fitted_largest_error_pct"] <= 3.0


@needs_recordings
def test_the_quirks_matter_only_where_memory_is_short():
    """Without them the engine is still Vidur's, request by request, unless a run preempts."""
    from benchmarks.vidur_parity import _recorded, compare
    from envs.fleet.profile import tables_profile

    cases = find_cases(SHARED)
    name = next(name for name in cases if "sarathi" in name and "_kv" not in name)
    hardware = name.partition("_sarathi")[0]
    with np.load(SHARED / f"{hardware}_tables.npz") as arrays:
        profile = tables_profile(hardware, dict(arrays))
    plain = compare(_recorded(cases[name][1]), parity_spec(cases[name][0], profile, quirks=False))
    assert plain["max_abs_dttft_s"] <= 1e-6


def test_an_unknown_scheduler_is_refused(tmp_path):
    path = tmp_path / "case.json"
    scheduler = '{"name": "orca"}'
    path.write_text(
        '{"result": {}, "config": {"cluster_config": {"num_replicas": 1, "replica_config": {"num_pipeline_stages": 1},'
        f'"replica_scheduler_config": {scheduler}}}}}}}'
    )
    with pytest.raises(InputError, match="orca"):
        parity_spec(path, constant_profile(1.0))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no case"):
        find_cases(tmp_path)
