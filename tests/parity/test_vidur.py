"""The engine against recorded runs of Vidur, saturation and preemption included (skipped without the recordings)."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.vidur_parity import find_cases, main, parity_spec, run_cases
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
    assert figures["fitted_median_error_pct"] <= 0.6
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


CONFIGURATION = {
    "result": {"num_blocks": 100},
    "config": {
        "cluster_config": {
            "num_replicas": 1,
            "replica_config": {"num_pipeline_stages": 1},
            "replica_scheduler_config": {
                "name": "sarathi",
                "block_size": 16,
                "batch_size_cap": 64,
                "chunk_size": 32,
                "watermark_blocks_fraction": 0.01,
            },
        }
    },
}
HEADER = "arrived_at,prompt_tokens,output_tokens,ttft,e2e,restarts\n"


def written(folder, rows="0,20,3,1,2,0\n", **changes):
    """A truth folder with one case and its tables; `changes` go into the scheduler's configuration."""
    data = json.loads(json.dumps(CONFIGURATION))
    data["config"]["cluster_config"]["replica_scheduler_config"] |= changes
    (folder / "hw_case.json").write_text(json.dumps(data))
    (folder / "hw_case.csv").write_text(HEADER + rows)
    ones = np.ones((4, 4))
    np.savez(folder / "hw_tables.npz", tok=ones[0], kvs=ones[0], dec=ones, pre=ones, gqa=0.1, pfo=0.1)
    return ["--truth", str(folder), "--tables", str(folder)]


def test_a_token_budget_below_the_cap_is_legal_in_vidur(tmp_path, capsys):
    assert main(written(tmp_path)) == 0
    case = json.loads(capsys.readouterr().out)["figures"]["cases"]["hw_case"]
    assert case["completed"] == 1


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ("-1,20,3,1,2,0\n", {}, "arrived_at"),
        ("0,0,3,1,2,0\n", {}, "prompt_tokens"),
        ("0,2.5,3,1,2,0\n", {}, "prompt_tokens"),
        ("0,9999999999,3,1,2,0\n", {}, "prompt_tokens"),
        ("0,20,3,1,0,0\n", {}, "e2e"),
        ("0,5000,3,1,2,0\n", {}, "longer than the KV cache"),
        ("0,20,3,1,2,0\n", {"chunk_size": None}, "chunk_size"),
        ("0,20,3,1,2,0\n", {"block_size": "x"}, "block_size"),
        ("0,20,3,1,2,0\n", {"batch_size_cap": 0}, "max_num_seqs"),
    ],
)
def test_truth_that_cannot_be_run_is_one_sentence(tmp_path, capsys, rows, changes, words):
    assert main(written(tmp_path, rows, **changes)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize("wrong", [{"dec": np.ones(5)}, {"tok": np.array(["a"])}, {"kvs": np.full(4, np.nan)}])
def test_tables_that_cannot_be_read_are_one_sentence(tmp_path, capsys, wrong):
    arguments = written(tmp_path)
    with np.load(tmp_path / "hw_tables.npz") as arrays:
        tables = dict(arrays)
    np.savez(tmp_path / "hw_tables.npz", **tables | wrong)
    assert main(arguments) == 2
    assert next(iter(wrong)) in capsys.readouterr().err
    (tmp_path / "hw_tables.npz").write_text("no zip file")
    assert main(arguments) == 2


def test_rows_in_another_order_are_the_same_run(tmp_path, capsys):
    rows = ["0,20,3,1,2,0", "1,30,4,1,2,0", "1.5,10,2,1,2,0"]
    assert main(written(tmp_path, "\n".join(rows))) == 0
    ascending = json.loads(capsys.readouterr().out)["figures"]["cases"]
    assert main(written(tmp_path, "\n".join(rows[::-1]))) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["cases"] == ascending
