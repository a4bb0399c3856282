"""Formats with sessions, hashes or a description: what comes out, what is told from the content, what is refused."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from envs.scenario import load_scenario
from envs.workload.traces import FORMATS, read_trace
from envs.workload.traces_files import line_chunks
from marginroute.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_SESSIONS = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path, content, name="trace"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def failure(path, trace_format="", **options):
    with pytest.raises(InputError) as caught:
        read_trace(path, trace_format, **options)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "legal is" in text
    return text


def test_burstgpt_leaves_out_failures_and_orders_by_time(tmp_path):
    rows = "45,ChatGPT,1087,230,1317,Conversation log\n5,ChatGPT,472,18,490,Conversation log\n"
    path = write(tmp_path, BURST + rows + "50,GPT-4,20,0,20,API log\n118,GPT-4,417,276,693,API log\n")
    trace = read_trace(path)
    assert trace.arrived_at_s.tolist() == [0.0, 40.0, 113.0] and trace.skipped_rows == 1
    assert trace.prompt_tokens.tolist() == [472, 1087, 417] and trace.output_tokens.tolist() == [18, 230, 276]
    assert trace.task_name.tolist() == ["Conversation log", "Conversation log", "API log"]
    assert trace.model.tolist() == ["ChatGPT", "ChatGPT", "GPT-4"] and trace.session_index is None
    assert "line 2: Request tokens is 'x'" in failure(write(tmp_path, BURST + "5,ChatGPT,x,1,1,API log\n"))
    assert "1 skipped" in failure(write(tmp_path, BURST + "5,ChatGPT,3,0,3,API log\n"))


def test_burstgpt_sessions_give_parents_and_think_times(tmp_path):
    chat = "Conversation log\n"
    rows = f"0,7,2.5,ChatGPT,10,5,15,{chat}4,,,ChatGPT,10,5,15,API log\n10,7,,ChatGPT,20,5,25,{chat}"
    trace = read_trace(write(tmp_path, BURST_SESSIONS + rows))
    assert trace.session_index.tolist() == [0, -1, 0] and trace.parent_index.tolist() == [-1, -1, 0]
    assert trace.think_s[2] == 7.5 and np.isnan(trace.think_s[:2]).all() and np.isnan(trace.e2e_s[1:]).all()
    assert trace.turn().tolist() == [0, 0, 1]


def mooncake(*rows):
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return lines(*(dict(zip(names, row, strict=False)) for row in rows))


def test_mooncake_keeps_hashes_of_full_blocks(tmp_path):
    trace = read_trace(
        write(tmp_path, mooncake((3000, 1100, 5, [0, 1, 2]), (6000, 1024, 7, [0, 1]), (6500, 9, 1, [3])))
    )
    assert trace.arrived_at_s.tolist() == [0.0, 3.0, 3.5] and trace.prefix_block_tokens == 512
    assert trace.prefix_count.tolist() == [2, 2, 0] and trace.prefix_hash.tolist() == [0, 1, 0, 1]
    part = trace.between(2.0, 9.0)
    assert part.prefix_hash.tolist() == [0, 1] and part.arrived_at_s.tolist() == [1.0, 1.5]
    assert read_trace(write(tmp_path, mooncake((0, 3, 4))), "mooncake").prefix_hash is None


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (("x", 3, 4, []), "timestamp is 'x'"),
        ((9, 3.5, 4, []), "input_length is 3.5"),
        ((9, 3, 0, []), "output_length is 0"),
        ((9, 3, 4, [1, -2]), "hash_ids is [1, -2]"),
        ((9, 3, 4, [1, True]), "hash_ids is [1, True]"),
        ((9, 3, 4, 7), "hash_ids is 7"),
        ((9, 3, 4, [2**63]), "hash_ids is"),
        ((-1, 3, 4, []), "lies before"),
    ],
)
def test_a_bad_mooncake_row_is_named(tmp_path, row, part):
    good = (5, 600, 4, [1])
    text = failure(write(tmp_path, mooncake(good, good, row, good)), "mooncake")
    assert "line 3" in text and part in text


def test_pieces_of_a_long_file_join_without_a_seam(tmp_path, monkeypatch):
    rows = [(second * 1000, 600 + second, 4, [0, second]) for second in range(300)]
    table = "arrived_at,prompt_tokens,output_tokens,class\n" + "".join(
        f'{second},{second + 1},7,"a\nb,{second}"\n' for second in range(300)
    )
    monkeypatch.setattr("envs.workload.traces_files.CHUNK_BYTES", 701)
    trace = read_trace(write(tmp_path, mooncake(*rows)))
    assert trace.n_requests == 300 and (np.diff(trace.prompt_tokens) == 1).all()
    trace = read_trace(write(tmp_path, table), "csv", {name: name for name in table.split("\n")[0].split(",")})
    assert trace.n_requests == 300 and trace.class_name[299] == "a\nb,299"
    assert sum(len(chunk) for _, chunk in line_chunks(write(tmp_path, table), quoted=True)) == len(table)
    assert "line 250" in failure(write(tmp_path, mooncake(*rows[:249], (0, 0, 0, []))))
    plain = "arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{second},1,7\n" for second in range(300))
    assert "line 291: arrived_at 1 lies before line 290" in failure(write(tmp_path, plain.replace("\n289,", "\n1,")))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_what_packs_a_file_is_seen_from_its_content(tmp_path, pack):
    packed = pack(mooncake(*[(0, 600 + row, 4, [row]) for row in range(500)]).encode())
    assert read_trace(write(tmp_path, packed)).n_requests == 500
    assert "damaged" in failure(write(tmp_path, packed[: len(packed) // 2]), "mooncake")


def span(start_s, end_s, session, tokens=(10, 5), **attributes):
    given = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.conversation.id": session}
    given |= {"gen_ai.usage.input_tokens": tokens[0], "gen_ai.usage.output_tokens": tokens[1], **attributes}
    kinds = {int: "intValue", str: "stringValue", float: "doubleValue"}
    return {
        "traceId": f"t{start_s}",
        "startTimeUnixNano": str(1_700_000_000_000_000_000 + int(start_s * 1e9)),
        "endTimeUnixNano": str(1_700_000_000_000_000_000 + int(end_s * 1e9)),
        "attributes": [
            {"key": key, "value": {kinds[type(value)]: str(value) if isinstance(value, int) else value}}
            for key, value in given.items()
            if value is not None
        ],
    }


def export(*spans):
    service = {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]}
    return {"resourceSpans": [{"resource": service, "scopeSpans": [{"spans": list(spans)}]}]}


def test_otel_spans_link_calls_to_what_they_waited_for(tmp_path):
    first, second, late = span(0, 2, "a"), span(1, 3, "a"), span(5, 6, "a", **{"gen_ai.agent.name": "planner"})
    tool = span(3, 4, "a", **{"gen_ai.operation.name": "execute_tool"})
    failed = {**span(4, 5, "a"), "status": {"code": 2}}
    alone = span(7, 8, None, **{"gen_ai.response.time_to_first_chunk": 0.25})
    other = {"traceId": "x", "attributes": [{"key": "http.method", "value": {"stringValue": "GET"}}]}
    for text in (lines(export(late, tool, failed), export(first, second, alone, other)),):
        trace = read_trace(write(tmp_path, text))
        assert trace.arrived_at_s.tolist() == [0.0, 1.0, 5.0, 7.0] and trace.skipped_rows == 2
        assert trace.session_index.tolist() == [0, 0, 0, -1] and trace.parent_index.tolist() == [-1, -1, 1, -1]
        assert trace.think_s[2] == 2.0 and trace.e2e_s.tolist() == [2.0, 2.0, 1.0, 1.0] and trace.ttft_s[3] == 0.25
        assert trace.tenant_name[0] == "shop" and trace.task_name.tolist() == ["", "", "planner", ""]
    whole = json.dumps(export(first, second), indent=1)
    assert read_trace(write(tmp_path, whole), "otel-genai").n_requests == 2


USED = "gen_ai.usage.input_tokens"


def counted(key, figure):
    return {"key": key, "value": {"intValue": figure}}


def timed(seconds):
    return {"key": "gen_ai.response.time_to_first_chunk", "value": {"doubleValue": seconds}}


def test_what_otel_may_leave_out_may_be_null(tmp_path):
    bare = {"resourceSpans": [{"resource": None, "scopeSpans": [{"spans": [{**span(0, 1, "a"), "status": None}]}]}]}
    assert read_trace(write(tmp_path, lines(bare))).n_requests == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (lines({"resourceSpans": 3}), "resourceSpans is 3"),
        (lines(export({**span(0, 1, "a"), "startTimeUnixNano": "12"})), "startTimeUnixNano is '12'"),
        (lines(export(span(2, 1, "a"))), "endTimeUnixNano is"),
        (lines(export(span(0, 1, "a", (0, 5)))), "gen_ai.usage.input_tokens is 0"),
        (lines(export(span(0, 1, "a", (5, 0)))), "no answered GenAI call (1 skipped)"),
        ("[\n1]\n", "is list"),
        (lines({"resourceSpans": [3]}), "resourceSpans is [3]"),
        (lines({"resourceSpans": [{"resource": 3}]}), "resource is 3"),
        (lines({"resourceSpans": [{"scopeSpans": [{"spans": [None]}]}]}), "spans is [None]"),
        (lines(export({**span(0, 1, "a"), "status": 2})), "status is 2"),
        (lines(export({**span(0, 1, "a"), "attributes": [counted(USED, "many")]})), f"{USED} is 'many'"),
        (lines(export({**span(0, 1, "a"), "attributes": [*span(0, 1, "a")["attributes"], timed(-1)]})), "chunk is -1"),
    ],
)
def test_bad_otel_files(tmp_path, text, part):
    assert part in failure(write(tmp_path, text), "otel-genai")


def record(second, **changes):
    signals = {"prompt_tokens": 99.0, "class_index": 1.0, "task_index": 2.0, "waited_s": 0.5}
    known = {"decided_at_s": 1.7e9 + second, "choice": "large", "probability": 1.0, "status": "completed"}
    known |= {"served_by": "small", "ttft_s": 0.2, "e2e_s": 1.5, "prompt_tokens": None, "output_tokens": 7}
    return {**known, "cost_usd": None, "request": signals, **changes}


def test_a_decision_that_does_not_say_how_long_it_waited_arrived_when_it_was_decided(tmp_path):
    path = write(tmp_path, lines(record(0), record(2, request={"prompt_tokens": 9}), record(4, ttft_s=None)))
    trace = read_trace(path)
    np.testing.assert_allclose(trace.arrived_at_s, [0.0, 2.5, 4.0], atol=1e-6)
    assert np.isnan(trace.ttft_s[2])
    assert "ttft_s is -1" in failure(write(tmp_path, lines(record(0, ttft_s=-1))))


@pytest.mark.parametrize("text", [lines(record(0), record(2)), mooncake((0, 600, 5, [1]), (9, 600, 5, [1]))])
def test_a_byte_order_mark_is_passed_over(tmp_path, text):
    marked = read_trace(write(tmp_path, gzip.compress(b"\xef\xbb\xbf" + text.encode())))
    assert marked.arrived_at_s.tobytes() == read_trace(write(tmp_path, text)).arrived_at_s.tobytes()


def test_own_decision_records_come_back_as_a_trace(tmp_path):
    rows = [record(second) for second in range(1, 200)]
    path = write(tmp_path, lines(*rows, record(0, prompt_tokens=12), record(3, status="shed"), record(4, status="")))
    trace = read_trace(path)
    assert trace.n_requests == 200 and trace.skipped_rows == 2
    assert trace.prompt_tokens[:2].tolist() == [12, 99] and trace.model[0] == "small"
    assert trace.class_name[0] == "1" and trace.task_name[0] == "2" and np.isnan(trace.cost_usd).all()
    scenario = load_scenario("azure_conversation", {"load_scale": 1.0, "horizon_s": 30.0}, path)
    assert (scenario.generate(0).class_index == 1).all()
    assert "output_tokens is 0" in failure(write(tmp_path, lines(record(0, output_tokens=0))))


def call(t, tokens_in, out, hashes, **changes):
    return {
        "t": t,
        "type": "n",
        "model": "m",
        "in": tokens_in,
        "out": out,
        "hash_ids": hashes,
        "api_time": 2.0,
        **changes,
    }


def sessions():
    first = call(0.0, 1030, 5, list(range(1, 17)))
    sub = {
        "t": 4.0,
        "type": "subagent",
        "subagent_type": "Explore",
        "requests": [call(1.0, 520, 3, list(range(50, 58)))],
    }
    second = call(9.0, 1600, 6, list(range(1, 26)), think_time=7.0)
    empty = call(10.0, 0, 0, [])
    return {"block_size": 64, "requests": [first, sub, second, empty]}, {"block_size": 64, "requests": [first]}


def test_agent_sessions_nest_and_coarsen(tmp_path):
    trace = read_trace(write(tmp_path, lzma.compress(lines(*sessions()).encode())))
    assert trace.arrived_at_s.tolist() == [0.0, 5.0, 9.0, 60.0] and trace.skipped_rows == 1
    assert trace.session_index.tolist() == [0, 0, 0, 1] and trace.parent_index.tolist() == [-1, 0, 0, -1]
    assert trace.think_s[1:3].tolist() == [3.0, 7.0] and trace.task_name[1] == "Explore"
    assert trace.prefix_block_tokens == 512 and trace.prefix_count.tolist() == [2, 1, 3, 2]
    hashes = np.split(trace.prefix_hash, np.cumsum(trace.prefix_count)[:-1])
    assert hashes[2][:2].tolist() == hashes[0].tolist() and not set(hashes[3]) & set(hashes[0])
    assert "60 s apart" in trace.note
    close = read_trace(write(tmp_path, lines(*sessions())), session_gap_s=6.0)
    assert close.arrived_at_s.tolist() == [0.0, 5.0, 6.0, 9.0] and close.parent_index.tolist() == [-1, 0, -1, 0]
    assert "block_size is 60" in failure(write(tmp_path, lines({"block_size": 60, "requests": []})))
    back = {"block_size": 64, "requests": [call(5.0, 5, 5, []), call(4.0, 5, 5, [])]}
    assert "t is 4.0" in failure(write(tmp_path, lines(back)))
    assert "requests is [1]" in failure(write(tmp_path, lines({"block_size": 64, "requests": [1]})))
    bad = {"block_size": 64, "requests": [call(None, 5, 5, [])]}
    assert "t is missing" in failure(write(tmp_path, lines(bad)))


def test_agent_sessions_as_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [("s", "main", 0.0, 1030, 16, 0), ("s", "main", 9.0, 1600, 25, 16), ("t", "main", 3.0, 1030, 16, 0)]
    names = ("id", "agent", "t", "in", "n_blocks", "prev_prefix_blocks")
    table = pyarrow.table({name: [row[at] for row in rows] for at, name in enumerate(names)})
    for name, value in (("model", "m"), ("out", 5), ("api_time", 2.0)):
        table = table.append_column(name, [[value] * 3])
    path = tmp_path / "requests.parquet"
    pyarrow.parquet.write_table(table, path)
    trace = read_trace(path, session_gap_s=100.0)
    assert trace.arrived_at_s.tolist() == [0.0, 9.0, 103.0] and trace.think_s[1] == 7.0
    assert trace.prefix_hash[:2].tolist() == trace.prefix_hash[2:4].tolist() and len(set(trace.prefix_hash)) == 5
    for name, value in (("t", None), ("t", 99.0), ("in", -4), ("out", 1 << 40), ("n_blocks", 99), ("api_time", -1.0)):
        column = [value, *table[name].to_pylist()[1:]]
        at = table.column_names.index(name)
        pyarrow.parquet.write_table(table.set_column(at, name, [column]), path)
        failure(path)
    pyarrow.parquet.write_table(table.drop_columns(["out"]), path)
    assert "no column 'out'" in failure(path)
    assert "damaged Parquet" in failure(write(tmp_path, b"PAR1" + b"x" * 30), "agent-sessions")


def archive(tmp_path, packed=True, **files):
    path = tmp_path / "clients.tar.xz"
    with tarfile.open(path, "w:xz" if packed else "w") as bundle:
        for name, text in files.items():
            info = tarfile.TarInfo(f"language/m/chunk-{name.replace('_', '-').replace('X', '.')}")
            info.size = len(text)
            bundle.addfile(info, io.BytesIO(text.encode()))
    return path


LENGTHS = json.dumps({"0": {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{7: 1.0}"}})


def test_servegen_is_sampled_at_the_stated_rate(tmp_path):
    steady = "0,4,1,Gamma,1,0.25\n600,0,0,,0,0\n1200,2,0.5,Weibull,2.1,0.5\n"
    bursty = "0,1,3,Gamma,0.111,9\n600,1,3,Gamma,0.111,9\n1200,1,3,Gamma,0.111,9\n"
    path = archive(tmp_path, **{"0_traceXcsv": steady, "0_datasetXjson": LENGTHS, "1_traceXcsv": bursty})
    trace = read_trace(path)
    counts = np.histogram(trace.arrived_at_s[trace.tenant_name == "0"], [0, 600, 1200, 1800])[0]
    assert abs(counts[0] - 2400) < 200 and counts[1] == 0 and abs(counts[2] - 1200) < 100
    gaps = np.diff(trace.arrived_at_s[(trace.tenant_name == "0") & (trace.arrived_at_s > 1200)])
    assert gaps.std() / gaps.mean() == pytest.approx(0.5, abs=0.05)
    assert set(trace.prompt_tokens) == {100, 300} and set(trace.output_tokens) == {7}
    assert "1 of 2 clients draw lengths from others" in trace.note
    again, other = read_trace(path), read_trace(path, seed=1)
    assert again.arrived_at_s.tobytes() == trace.arrived_at_s.tobytes() != other.arrived_at_s.tobytes()
    cut = read_trace(path, start_s=300.0, end_s=400.0)
    assert cut.arrived_at_s[0] >= 0.0 and cut.span_s < 100.0
    assert "start_s 9999" in failure(path, start_s=9999.0)


def test_bad_servegen_archives(tmp_path):
    assert "has no client" in failure(archive(tmp_path, readme="hello"))
    assert "line 1: '0,1,1,Gamma'" in failure(archive(tmp_path, **{"0_traceXcsv": "0,1,1,Gamma\n"}))
    assert "no client has lengths" in failure(archive(tmp_path, **{"0_traceXcsv": "0,1,1,Gamma,1,1\n"}))
    text = failure(archive(tmp_path, **{"0_traceXcsv": "0,1,1,Gamma,1,1\n", "0_datasetXjson": "[1]"}))
    assert "chunk-0-dataset.json" in text
    for text in ("0,inf,1,Gamma,1,1\n", "0,1e9,1,Gamma,1,1\n", "nan,1,1,Gamma,1,1\n"):
        assert "line 1" in failure(archive(tmp_path, **{"0_traceXcsv": text, "0_datasetXjson": LENGTHS}))
    lengths = LENGTHS.replace("100: 0.5", "nan: 0.5")
    text = failure(archive(tmp_path, **{"0_traceXcsv": "0,1,1,Gamma,1,1\n", "0_datasetXjson": lengths}))
    assert "chunk-0-dataset.json" in text
    (tmp_path / "folder" / "chunk-0-trace.csv").mkdir(parents=True)
    assert "has no client" in failure(tmp_path / "folder")
    broken = archive(tmp_path, **{"0_traceXcsv": "0,1,1,Gamma,1,1\n" * 999})
    broken.write_bytes(broken.read_bytes()[:150])
    failure(broken, "servegen")


def test_csv_with_sessions_and_hashes(tmp_path):
    text = "arrived_at,prompt_tokens,output_tokens,session,hash_ids,tenant\n0,600,4,a,1 2,x\n5,700,4,a,1 2 3,x\n"
    trace = read_trace(write(tmp_path, text), block_tokens=256)
    assert trace.prefix_block_tokens == 256 and trace.prefix_count.tolist() == [2, 2]
    assert trace.parent_index.tolist() == [-1, 0] and np.isnan(trace.think_s).all()
    assert trace.tenant_name.tolist() == ["x", "x"]
    assert "hash_ids" in failure(write(tmp_path, text.replace("1 2 3", "1 b")))


def test_a_trace_brings_its_sessions_and_hashes_into_the_episode(tmp_path):
    rows = [call(3.0 * row, 1000 + 70 * row, 5, list(range(1, (1000 + 70 * row) // 64 + 1))) for row in range(400)]
    path = write(tmp_path, lines({"block_size": 64, "requests": rows}))
    workload = load_scenario("azure_conversation", {"load_scale": 2.0, "horizon_s": 60.0}, path).generate(0)
    assert workload.prefix_block_tokens == 512 and workload.prefix_count.sum() == len(workload.prefix_hash) > 0
    assert workload.parent_index.tolist() == list(range(-1, workload.n_requests - 1))
    np.testing.assert_allclose(workload.think_s[1:], 0.5)


def test_what_cannot_be_told_is_an_error_that_lists_the_formats(tmp_path):
    for text in ("a,b\n1,2\n", '{"a": 1}\n', "\x00\x01"):
        message = failure(write(tmp_path, text))
        assert all(name in message for name in FORMATS)
    assert "is a folder" in failure(tmp_path, "csv")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data beside the checkout")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("traces/AzureLLMInferenceTrace_code.csv.gz", 7724),
        ("traces/mooncake_synthetic_trace.jsonl.gz", 2946),
        ("agents_claude_code/requests.parquet", 39559),
        ("servegen/mm-image.tar.xz", None),
    ],
)
def test_the_published_files_are_told_and_read(name, rows):
    trace = read_trace(SHARED / name)
    assert rows in (None, trace.n_requests) and (np.diff(trace.arrived_at_s) >= 0.0).all()
