"""Trace readers: layouts, every error with file and line, windows that never leave their part."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from envs.scenario import load_scenario
from envs.workload.traces import parse_columns, read_trace
from envs.workload.traces_window import SPLIT_EDGES
from marginroute.errors import InputError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"
LATER = "2023-11-16 18:15:50.9951690,396,109\n"
COLUMNS = {"arrived_at": "t", "prompt_tokens": "p", "output_tokens": "o", "class": "c"}
COLUMNS_ONLY = {ours: theirs for ours, theirs in COLUMNS.items() if ours != "class"}
CALL = {
    "id": "a",
    "call_type": "acompletion",
    "status": "success",
    "startTime": 1725897974.5,
    "endTime": 1725897976.5,
    "completionStartTime": 1725897975.0,
    "prompt_tokens": 12,
    "completion_tokens": 37,
    "model": "gpt-4o-mini",
    "metadata": {"user_api_key_alias": "key", "user_api_key_team_alias": "team"},
    "cache_hit": None,
    "cache_key": "k1",
    "response_cost": 2.4e-5,
}


def write(tmp_path, content, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*calls):
    return "\n".join(json.dumps(call) for call in calls) + "\n"


PLAIN = HEADER + ROW + LATER


@pytest.mark.parametrize("content", [PLAIN, PLAIN.replace("\n", "\r\n"), PLAIN + "\n\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_azure_2023(tmp_path, content, packed):
    data = gzip.compress(content.encode(), mtime=0) if packed else content
    trace = read_trace(write(tmp_path, data, "trace.csv.gz" if packed else "trace.csv"), "azure-llm")
    np.testing.assert_allclose(trace.arrived_at_s, [0.0, 4.314579], atol=1e-9)
    assert trace.prompt_tokens.tolist() == [374, 396] and trace.output_tokens.tolist() == [44, 109]
    assert trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int32


def test_azure_2024_has_utc_offsets(tmp_path):
    rows = ("00:00:00.009930+00:00,2162,5", "00:00:01+00:00,2399,6", "02:00:02.5+02:00,76,15")
    content = HEADER + "".join(f"2024-05-10 {row}\n" for row in rows)
    trace = read_trace(write(tmp_path, content), "azure-llm")
    np.testing.assert_allclose(trace.arrived_at_s, [0.0, 0.99007, 2.49007], atol=1e-9)


def test_csv_with_columns_of_another_name(tmp_path):
    path = write(tmp_path, 't,p,o,c,k\n10.5,3,4,gold,x\n12,5.0,6,"a, b",\n12,7,8,gold,x\n')
    trace = read_trace(path, "csv", {**COLUMNS, "prompt_key": "k"})
    assert trace.arrived_at_s.tolist() == [0.0, 1.5, 1.5]
    assert trace.class_name.tolist() == ["gold", "a, b", "gold"]
    assert trace.prompt_key.tolist() == [0, -1, 0]
    some = read_trace(
        write(tmp_path, "t,p,o,f\n0,3,4,0.2\n1,3,4,\n2,3,4,NaN\n"), "csv", {**COLUMNS_ONLY, "ttft_s": "f"}
    )
    np.testing.assert_array_equal(some.ttft_s, [0.2, np.nan, np.nan])
    plain = read_trace(write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n2024-01-01T00:00:00Z,1,2\n"), "csv")
    assert plain.n_requests == 1 and plain.class_name is None


def test_litellm_is_ordered_by_start_and_leaves_out_failures(tmp_path):
    second = {**CALL, "startTime": "2024-09-09T16:06:13.500000", "metadata": {}, "cache_key": None, "cache_hit": True}
    failed = {**CALL, "status": "failure", "completion_tokens": 0}
    embedding = {**CALL, "call_type": "aembedding", "completion_tokens": 0}
    wrapped = {"standard_logging_object": {**CALL, "startTime": CALL["startTime"] + 2.0}}
    trace = read_trace(write(tmp_path, lines(CALL, second, failed, embedding, wrapped)), "litellm")
    np.testing.assert_allclose(trace.arrived_at_s, [0.0, 1.0, 3.0], atol=1e-6)
    assert trace.skipped_rows == 2
    assert trace.class_name.tolist() == ["", "team", "team"]
    assert trace.prompt_key.tolist() == [-1, 0, 0] and trace.cache_hit.tolist() == [True, False, False]
    assert trace.ttft_s[1] == pytest.approx(0.5) and trace.e2e_s[1] == pytest.approx(2.0)
    assert trace.cost_usd[1] == pytest.approx(2.4e-5) and trace.model[1] == "gpt-4o-mini"


def failure(path, trace_format="azure-llm", columns=None):
    with pytest.raises(InputError) as caught:
        read_trace(path, trace_format, columns)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "legal is" in text
    return text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty"]),
        (HEADER, ["no rows"]),
        (HEADER.replace("Context", "Contxt") + ROW, ["line 1", "no column 'ContextTokens'"]),
        (HEADER + LATER + ROW, ["line 3", "lies before line 2"]),
        (HEADER + ROW + "\n" + LATER, ["line 3", "TIMESTAMP is nothing"]),
        (HEADER + ROW + "yesterday,3,4\n", ["line 3", "TIMESTAMP is 'yesterday'"]),
        (HEADER + ROW + LATER.replace("396", "-3"), ["line 3", "ContextTokens is '-3'"]),
        (HEADER + ROW.replace(",44", ",0") + LATER, ["line 2", "GeneratedTokens is '0'"]),
        (HEADER + ROW.replace(",44", ",nan"), ["line 2", "GeneratedTokens is 'nan'"]),
        (HEADER + ROW.replace(",44", ",44.5"), ["line 2", "'44.5'"]),
        (HEADER + ROW.replace(",44", ",many"), ["line 2", "'many'"]),
        (HEADER + ROW.replace(",44", ",99999999999"), ["line 2", "'99999999999'"]),
        (HEADER + ROW.replace(",44", ""), ["line 2", "GeneratedTokens is nothing"]),
        (HEADER + ROW.replace(",44", ",44,9"), ["line 2", "4 fields"]),
        (gzip.compress((HEADER + ROW * 500).encode(), mtime=0)[:80], ["damaged gzip"]),
        (bytes(range(256)) * 8, ["line 1", "no column"]),
    ],
)
def test_bad_azure_file(tmp_path, content, parts):
    text = failure(write(tmp_path, content))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "columns", "parts"),
    [
        ("t,p,o,c\n1,2,3,a\nnan,2,3,a\n", COLUMNS, ["line 3", "t is 'nan'"]),
        ("t,p,o,c\ninf,2,3,a\n", COLUMNS, ["line 2", "t is 'inf'"]),
        ("t,p,o\n1,2,3\n", COLUMNS, ["line 1", "no column 'c'"]),
        ('t,p,o,"c\n1,2,3,a\n', COLUMNS, ["line 1", "double quote"]),
        ("t,p,o,c\n1,2,3,-1\n", {**COLUMNS_ONLY, "ttft_s": "c"}, ["line 2", "c is '-1'", "or nothing"]),
        ("t,p,o,c\n1,2,3,inf\n", {**COLUMNS_ONLY, "e2e_s": "c"}, ["line 2", "c is 'inf'"]),
        ("t,p,o,c\n1,2,3,soon\n", {**COLUMNS_ONLY, "e2e_s": "c"}, ["line 2", "c is 'soon'"]),
        ("t,p,o,c\n1,2000,3,4 -5\n", {**COLUMNS_ONLY, "hash_ids": "c"}, ["hash_ids"]),
        ("t,p,o\n1,2,3\n", {"arrived_at": "t"}, ["prompt_tokens is not mapped"]),
        ("t,p,o\n1,2,3\n", {"arrival": "t"}, ["unknown column 'arrival'"]),
    ],
)
def test_bad_csv(tmp_path, content, columns, parts):
    text = failure(write(tmp_path, content), "csv", columns)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lines(CALL) + '{"a":\n', ["line 2", "not JSON"]),
        ("[1]\n", ["line 1", "is list"]),
        (lines({**CALL, "completion_tokens": 0}), ["no answered call (1 skipped)"]),
        (lines({**CALL, "prompt_tokens": float("nan")}), ["line 1", "prompt_tokens is nan"]),
        (lines({**CALL, "startTime": None}), ["startTime is missing"]),
        (lines({**CALL, "startTime": "noon"}), ["startTime is 'noon'"]),
        (lines({**CALL, "endTime": 1.0}), ["line 1", "endTime is 1.0", "a time after the start"]),
        (lines({**CALL, "status": "failure"}), ["no answered call (1 skipped)"]),
        (b"\xff\xfe{}\n", ["line 1", "not JSON"]),
        (gzip.compress(lines(*[CALL] * 200).encode(), mtime=0)[:90], ["damaged gzip"]),
    ],
)
def test_bad_litellm_log(tmp_path, content, parts):
    text = failure(write(tmp_path, content, "log.jsonl"), "litellm")
    for part in parts:
        assert part in text


def test_missing_file_unknown_format_and_columns(tmp_path):
    failure(tmp_path / "none.csv")
    path = write(tmp_path, HEADER + ROW)
    assert "fixed columns" in failure(path, "azure-llm", {"arrived_at": "x"})
    with pytest.raises(InputError, match="legal is azure-llm, litellm, csv,"):
        read_trace(path, "parquet")
    assert parse_columns("arrived_at=t, prompt_tokens=p") == {"arrived_at": "t", "prompt_tokens": "p"}
    with pytest.raises(InputError, match="our_name=name_in_file"):
        parse_columns("arrived_at")


def one_to_one(overrides=None, *trace):
    """The Azure scenario at the speed of the recording."""
    return load_scenario("azure_conversation", {"load_scale": 1.0, **(overrides or {})}, *trace)


@pytest.fixture
def steady(tmp_path):
    """One request per second for 1,000 s; prompt length tells the second."""
    rows = "".join(f"{second},{second + 1},7\n" for second in range(1001))
    return write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n" + rows)


@pytest.mark.parametrize(("split", "part"), [("train", 0), ("validation", 1), ("heldout", 2)])
def test_windows_stay_in_their_part_and_never_wrap(steady, split, part):
    scenario = one_to_one({"horizon_s": 150.0}, steady, "csv")
    starts = set()
    for seed in range(60):
        workload = scenario.generate(seed, split)
        second = workload.prompt_tokens - 1
        assert workload.horizon_s == 150.0 and workload.n_requests in (149, 150, 151)
        assert (np.diff(second) == 1).all()
        assert second[0] >= SPLIT_EDGES[part] * 1000 and second[-1] <= SPLIT_EDGES[part + 1] * 1000
        np.testing.assert_allclose(np.diff(workload.arrived_at_s), 1.0)
        starts.add(int(second[0]))
    assert len(starts) > 20
    assert scenario.generate(3, split).p_good.tobytes() == scenario.generate(3, split).p_good.tobytes()


def test_a_short_part_gives_a_shorter_horizon(steady):
    scenario = one_to_one({"horizon_s": 500.0}, steady, "csv")
    assert scenario.generate(0, "train").horizon_s == 500.0
    assert scenario.generate(0, "heldout").horizon_s == pytest.approx(200.0)
    assert scenario.generate(0, "heldout").n_requests == 200


def test_load_scale_plays_the_trace_faster(steady):
    workload = one_to_one({"horizon_s": 50.0, "load_scale": 4.0}, steady, "csv").generate(0)
    assert workload.horizon_s == 50.0 and workload.n_requests in (199, 200, 201)
    np.testing.assert_allclose(np.diff(workload.arrived_at_s), 0.25)


def test_an_empty_part_is_an_error(tmp_path):
    path = write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n0,1,2\n1,1,2\n1000,1,2\n")
    scenario = one_to_one({"horizon_s": 50.0}, path, "csv")
    with pytest.raises(InputError, match="no requests between 600 s and 800 s"):
        scenario.generate(0, "validation")


@pytest.mark.parametrize(("rows", "words"), [(1, "its one request is at one moment"), (3, "all its 3 requests are at")])
def test_a_trace_that_takes_no_time(rows, words, tmp_path):
    path = write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n" + "5,1,2\n" * rows)
    scenario = one_to_one({"horizon_s": 50.0}, path, "csv")
    for ask in (scenario.generate, scenario.block):
        with pytest.raises(InputError, match=words):
            ask(0, "heldout")


def test_stretches_too_short_to_meet_a_request(tmp_path):
    path = write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{t},1,2\n" for t in range(100)))
    with pytest.raises(InputError, match=r"no requests in 64 stretches of 5e-08 s between 0 s and 59\.4 s"):
        one_to_one({"horizon_s": 50.0, "load_scale": 1e-9}, path, "csv").generate(0, "train")


def test_trace_decides_class_and_recurrence_where_it_can(tmp_path):
    names = ("enterprise", "team", "batch")
    rows = "".join(f"{second},{second + 1},7,{names[second % 3]},{second % 2}\n" for second in range(200))
    path = write(tmp_path, "t,p,o,c,k\n" + rows)
    columns = {**COLUMNS, "prompt_key": "k"}
    scenario = one_to_one({"horizon_s": 60.0}, path, "csv", columns)
    workload = scenario.generate(0)
    assert (np.diff(workload.class_index) % 3 == 1).all()
    assert set(workload.prompt_key) == {0, 1}
    assert len(np.unique(workload.output_tokens)) == 1 and len(np.unique(workload.prompt_tokens)) == 2
    bad = write(tmp_path, "t,p,o,c\n0,1,2,team\n1,1,2,gold\n", "bad.csv")
    with pytest.raises(InputError, match=r"line 3: class 'gold' is not in the plans"):
        one_to_one(None, bad, "csv", COLUMNS)


def test_unknown_team_names_of_a_gateway_log_leave_the_mix_to_the_scenario(tmp_path):
    calls = [{**CALL, "startTime": second, "cache_key": None} for second in range(100)]
    calls[5] = {**calls[5], "metadata": {"user_api_key_team_alias": "unheard"}}
    scenario = one_to_one({"horizon_s": 40.0}, write(tmp_path, lines(*calls)), "litellm")
    assert len(np.unique(scenario.generate(0).class_index)) > 1


def test_hash_follows_the_content_of_the_trace_not_its_place(tmp_path, steady):
    moved = write(tmp_path, steady.read_bytes(), "moved.csv")
    other = write(tmp_path, steady.read_bytes().replace(b"5,6,7", b"5,6,8"), "other.csv")
    hashes = [one_to_one(None, path, "csv").hash for path in (steady, moved, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert one_to_one().hash not in hashes


def test_a_request_that_no_replica_can_hold_is_an_error(tmp_path):
    path = write(tmp_path, "arrived_at,prompt_tokens,output_tokens\n0,1000000,2\n")
    with pytest.raises(InputError, match=r"fewer than the largest request \(1000002\)"):
        one_to_one(None, path, "csv")


def test_fit_command_prints_a_workload(tmp_path, steady):
    arguments = [sys.executable, "-m", "envs.workload.fit", str(steady), "--trace-format", "csv"]
    sizes = ["--prompt-components", "2", "--output-components", "1"]
    result = subprocess.run([*arguments, *sizes], capture_output=True, text=True, check=True)
    assert "rate_per_s" in result.stdout and "median_tokens: 7" in result.stdout
    result = subprocess.run([*arguments[:3], str(tmp_path / "no.csv")], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "no such file" in result.stderr and "Traceback" not in result.stderr
