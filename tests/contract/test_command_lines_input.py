"""Bad input: exit code 2 and one sentence that names the value, its place and what is legal; nothing half-written."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import by_hand
import pytest
import yaml

import evaluate
import export
import train
from envs import scenario_files
from envs.__main__ import main as envs_main
from marginroute.__main__ import main as marginroute_main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a command that must be refused, in an empty folder; returns its one sentence."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(main, *words, leaves=()):
        assert main([str(word) for word in words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        assert sorted(path.name for path in work.iterdir()) == sorted(leaves)
        return shown.err

    return run


def a_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


SCENARIO_TROUBLE = [
    (["no_such_scenario"], ["no_such_scenario", "legal is"]),
    (["configs/nowhere.yaml"], ["configs/nowhere.yaml", "no such file"]),
    (["quickstart", "--set", "fleet.pools.small.replicas=0"], ["fleet.pools.small.replicas", "0 is not legal"]),
    (["quickstart", "--set", "plans.plans.enterprise.input_usd_per_mtok=-1"], ["input_usd_per_mtok", "at least 0"]),
    (["quickstart", "--set", "fleet.pools.small.replica=2"], ["unknown key 'replica'", "did you mean replicas"]),
    (["quickstart", "--set", "horizon_s"], ["'horizon_s'", "KEY=VALUE"]),
    (["quickstart", "--set", "horizon_s=[1"], ["--set horizon_s=[1", "well-formed YAML"]),
    (["quickstart", "--set", "horizon_s=-5"], ["--set horizon_s", "-5", "greater than 0"]),
]


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
@pytest.mark.parametrize(("words", "parts"), SCENARIO_TROUBLE)
def test_scenario(refused, main, words, parts):
    sentence = refused(main, *words)
    assert all(part in sentence for part in parts), sentence


def spoiled(change):
    data = yaml.safe_load(yaml.safe_dump(by_hand.SCENARIO))
    change(data)
    return yaml.safe_dump(data, sort_keys=False)


FILES = {
    "malformed": ("horizon_s: [60\nfleet:", ["line", "well-formed YAML"]),
    "twice": ("horizon_s: 60.0\nhorizon_s: 61.0\n", ["line 2", "'horizon_s' twice"]),
    "a list": ("- 1\n- 2\n", ["mapping"]),
    "empty": ("", ["mapping"]),
    "unknown key": (spoiled(lambda d: d.update(horizon=60.0)), ["horizon", "unknown key", "did you mean horizon_s"]),
    "no replicas": (spoiled(lambda d: d["fleet"]["pools"]["one"].update(replicas=0)), ["fleet.pools.one.replicas"]),
    "negative price": (spoiled(lambda d: d["fleet"]["pools"]["one"].update(gpu_usd_per_hour=-3.0)), ["-3.0"]),
    "class without a plan": (spoiled(lambda d: d["plans"]["plans"].pop("night")), ["night", "legal is"]),
    "pool without a profile": (spoiled(lambda d: d["fleet"].pop("profiles")), ["profile", "'flat'"]),
    "tiny cache": (spoiled(lambda d: d["fleet"]["pools"]["one"].update(kv_blocks=10)), ["kv_blocks", "10 blocks"]),
}


@pytest.mark.parametrize("name", FILES)
def test_scenario_file(refused, tmp_path, name):
    text, parts = FILES[name]
    sentence = refused(train.main, a_file(tmp_path, "mine.yaml", text))
    assert "mine.yaml" in sentence and all(part in sentence for part in parts), sentence


def test_scenario_file_that_is_no_text(refused, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "mine.yaml" in refused(train.main, path)


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LINES = [f"2023-11-16 18:1{i // 60}:{i % 60:02d}.0000000,{100 + i},{10 + i}\n" for i in range(120)]
TRACES = {
    "empty": ("", ["trace.csv"]),
    "header alone": (HEAD, ["trace.csv"]),
    "unsorted": (HEAD + "".join([*LINES[:5], LINES[90], *LINES[5:20]]), ["trace.csv", "line"]),
    "cut off": (HEAD + "".join(LINES[:20]) + "2023-11-16 18:1", ["trace.csv", "line 22"]),
    "no number": (HEAD + LINES[0] + LINES[1].replace("101", "many"), ["trace.csv", "line 3", "many"]),
    "no tokens": (HEAD + LINES[0] + "2023-11-16 18:10:01.0000000,-5,3\n", ["trace.csv", "line 3", "-5"]),
    "other columns": ("a,b\n1,2\n", ["trace.csv", "legal is"]),
}


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
@pytest.mark.parametrize("name", TRACES)
def test_trace(refused, tmp_path, main, name):
    text, parts = TRACES[name]
    path = a_file(tmp_path, "trace.csv", text)
    sentence = refused(main, "azure_conversation", "--trace", path, "--trace-format", "azure-llm")
    assert all(part in sentence for part in parts), sentence


def test_trace_that_is_not_there_or_cut_off_inside_gzip(refused, tmp_path):
    words = ("azure_conversation", "--trace-format", "azure-llm", "--trace")
    assert "nowhere.csv" in refused(train.main, *words, tmp_path / "nowhere.csv")
    data = gzip.compress((HEAD + "".join(LINES)).encode())
    (tmp_path / "cut.csv.gz").write_bytes(data[: len(data) // 2])
    assert "cut.csv.gz" in refused(train.main, *words, tmp_path / "cut.csv.gz")
    (tmp_path / "plain.csv.gz").write_text(HEAD)
    assert "plain.csv.gz" in refused(train.main, *words, tmp_path / "plain.csv.gz")


def test_trace_format(refused, tmp_path):
    path = a_file(tmp_path, "trace.csv", HEAD + "".join(LINES))
    assert "'azure' is not legal" in refused(train.main, "--trace", path, "--trace-format", "azure")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-n", "0"], ["-n 0", "1 or more"]),
        (["--seed", "-1"], ["--seed -1", "0 or more"]),
        (["--n-envs", "0"], ["--n-envs 0"]),
        (
            ["--set", "training.learning_rat=1"],
            ["--set training.learning_rat: unknown key", "did you mean learning_rate"],
        ),
        (["--set", "training.learning_rate=-1"], ["--set training.learning_rate: -1", "greater than 0"]),
        (["--set", "training.gae_lambda=1.5"], ["gae_lambda", "1.5", "at most 1"]),
        (
            ["--set", "training.minibatch=1000000"],
            ["--set training.minibatch, training: has minibatch 1000000", "at most that"],
        ),
        (
            ["--n-envs", "1", "--set", "training.rollout_steps=2", "training.minibatch=4"],
            ["--set training.", "minibatch 4", "= 2"],
        ),
    ],
)
def test_training_settings(refused, words, parts):
    sentence = refused(train.main, *words)
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize("target", ["full", "file", "file/below"])
def test_out_that_is_not_an_empty_folder(refused, tmp_path, target):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose")
    (tmp_path / "file").write_text("neither")
    sentence = refused(train.main, "quickstart", "--out", tmp_path / target)
    assert target in sentence
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not lose"


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of a finished run, to spoil."""
    return shutil.copytree(finished_run, tmp_path / "run")


def set_status(run, **values):
    path = run / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def newest(run):
    return max((run / "checkpoints").glob("step_*.zip"))


@pytest.mark.parametrize("name", ["nowhere", "empty"])
@pytest.mark.parametrize("main", [train.main, evaluate.main, export.main], ids=["train", "evaluate", "export"])
def test_no_run_folder(refused, tmp_path, main, name):
    (tmp_path / "empty").mkdir()
    run = tmp_path / name
    words = {train.main: ["--resume", run], evaluate.main: ["--policy", run], export.main: [run, "--out", "bundle"]}
    assert str(run) in refused(main, *words[main])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "other zip"])
def test_corrupt_checkpoint(refused, run_copy, damage):
    path = newest(run_copy)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    elif damage == "text":
        data = b"not a zip"
    elif damage == "empty":
        data = b""
    path.write_bytes(data)
    if damage == "other zip":
        path.unlink()
        shutil.make_archive(str(path.with_suffix("")), "zip", run_copy / "bundle")
    before = json.loads((run_copy / "run.json").read_text())
    sentence = refused(train.main, "--resume", run_copy)
    assert path.name in sentence and "corrupt" in sentence
    assert json.loads((run_copy / "run.json").read_text())["history"] == before["history"]


@pytest.mark.parametrize("name", ["scenario.json", "training.json", "run.json", "baselines.yaml"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "baselines": {}}'])
def test_broken_file_of_a_run(refused, run_copy, name, text):
    (run_copy / name).write_text(text)
    assert str(run_copy) in refused(train.main, "--resume", run_copy)


@pytest.mark.parametrize("name", ["scenario.json", "training.json"])
def test_missing_file_of_a_run(refused, run_copy, name):
    (run_copy / name).unlink()
    assert name in refused(train.main, "--resume", run_copy)


@pytest.mark.parametrize("status", ["started", "interrupted"])
def test_export_of_an_unfinished_run(refused, run_copy, status):
    set_status(run_copy, status=status)
    sentence = refused(export.main, run_copy, "--out", "bundle")
    assert f"status: {status}" in sentence and f"train.py --resume {run_copy}" in sentence


def test_evaluation_of_an_unfinished_run(refused, run_copy):
    shutil.rmtree(run_copy / "bundle")
    set_status(run_copy, status="interrupted")
    sentence = refused(evaluate.main, "--policy", run_copy)
    assert "interrupted" in sentence and f"train.py --resume {run_copy}" in sentence


@pytest.mark.parametrize("name", ["policy.zip", "baselines.yaml", "scenario.json"])
def test_export_of_a_run_with_a_broken_file(refused, run_copy, name):
    (run_copy / name).write_text("{")
    if name == "policy.zip":  # whatever the gate said of so short a training: the network is asked for
        info = json.loads((run_copy / "run.json").read_text())
        set_status(run_copy, gate=info["gate"] | {"learned": True})
    assert name in refused(export.main, run_copy, "--out", "bundle")


@pytest.mark.parametrize("target", ["full", "file", "file/below"])
def test_export_to_something_that_is_there(refused, finished_run, tmp_path, target):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose")
    (tmp_path / "file").write_text("neither")
    assert str(tmp_path / target.partition("/")[0]) in refused(export.main, finished_run, "--out", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "work"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scenario": 1}'])
def test_export_with_something_that_is_no_evaluation(refused, finished_run, tmp_path, text):
    path = a_file(tmp_path, "report.json", text)
    sentence = refused(export.main, finished_run, "--out", "bundle", "--evaluation", path)
    assert "report.json" in sentence and "evaluate.py --json" in sentence


def edited(bundle, **values):
    from marginroute.bundle_files import digest_of

    path = bundle / "manifest.json"
    manifest = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


@pytest.mark.parametrize("main", [evaluate.main, marginroute_main], ids=["evaluate", "inspect"])
def test_bundle_of_another_feature_version(refused, run_copy, main):
    edited(run_copy / "bundle", feature_version=999)
    words = ["--policy", run_copy] if main is evaluate.main else ["inspect", run_copy / "bundle"]
    sentence = refused(main, *words)
    assert "feature version 999" in sentence and "train and export" in sentence


@pytest.mark.parametrize("main", [evaluate.main, marginroute_main], ids=["evaluate", "inspect"])
def test_tampered_bundle(refused, run_copy, main):
    path = run_copy / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"telemetry_age_s": ', '"telemetry_age_s": 9'))
    words = ["--policy", run_copy] if main is evaluate.main else ["inspect", run_copy / "bundle"]
    assert "does not match its digest" in refused(main, *words)


def test_policy_of_another_fleet(refused, finished_run, tmp_path):
    """Trained for three pools and an API: it cannot route on the two pools of `by_hand`."""
    scenario = a_file(tmp_path, "other.yaml", yaml.safe_dump(by_hand.SCENARIO, sort_keys=False))
    words = ["--baselines", "none", "--episodes", "2", "--workers", "1"]
    sentence = refused(evaluate.main, scenario, "--policy", finished_run, *words)
    assert str(finished_run) in sentence and "other" in sentence


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["simulate", "no_such_fleet", "--requests", "r.csv", "--out", "o.csv"], "no_such_fleet"),
        (["simulate", "starter", "--requests", "r.csv", "--out", "o.csv"], "r.csv"),
        (["calibrate", "iterations", "t.csv", "--out", "p.yaml"], "t.csv"),
    ],
)
def test_tools_of_the_world(refused, words, part):
    assert part in refused(envs_main, *words)


def test_a_real_process_says_the_same():
    """Through the interpreter's own exit: code 2, one line on stderr, nothing on stdout."""
    words = [sys.executable, str(ROOT / "train.py"), "no_such_scenario"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: scenario 'no_such_scenario'.*legal is.*\n", done.stderr)


def test_yaml_keys_that_are_no_names(refused, tmp_path):
    message = refused(train.main, a_file(tmp_path, "s.yaml", "{a: 1}: 2\n"))
    assert "s.yaml" in message and "is no name" in message


def test_yaml_anchors_may_be_merged(tmp_path):
    plain = (ROOT / "configs" / "plans" / "starter.yaml").read_text()
    merged = plain.replace("  batch:\n    plan: batch", "  batch:\n    <<: {tenants: 7}\n    plan: batch")
    assert merged != plain
    path = a_file(tmp_path, "plans.yaml", merged)
    assert (
        scenario_files.read_yaml(path)["classes"]["batch"]
        == scenario_files.read_yaml(a_file(tmp_path, "plain.yaml", plain))["classes"]["batch"]
    )  # its own keys win


@pytest.mark.parametrize("redirection, code", [("> /dev/full", 1), ("| true", 0)])
def test_output_that_nobody_takes(redirection, code):
    command = f"set -o pipefail; {sys.executable} train.py --list {redirection}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr


def test_a_folder_that_is_no_bundle_is_refused_before_anything_is_read(refused):
    Path("docs").mkdir()
    Path("docs/page.md").touch()
    assert "docs exists and is not a bundle" in refused(export.main, "nowhere", "--out", "docs", leaves=["docs"])


def test_a_port_is_refused_before_a_fleet_is_compiled(refused):
    assert "--port 99999" in refused(envs_main, "emulate", "nowhere", "--port", "99999")


def test_a_log_is_named_as_it_was_given(refused):
    Path("log.jsonl").touch()
    said = refused(train.main, "--log", "log.jsonl", leaves=["log.jsonl"])
    assert said.startswith("error: log.jsonl: has no request")


def test_the_practice_log_is_not_added_to_another(refused, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import practice_log

    Path("log.jsonl").write_text("{}\n")
    assert "log.jsonl exists" in refused(practice_log.main, "--out", "log.jsonl", leaves=["log.jsonl"])
    assert Path("log.jsonl").read_text() == "{}\n"
