"""evaluate.py --log LOG --policy RUN: agrees with playing the policy at low load, and refuses what it cannot use."""

import json

import pytest

import evaluate
from agents.baselines import baselines_for
from agents.export import make_bundle
from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation.off_policy import evaluate_log
from evaluation.simulated_log import write_log
from marginroute import bundle as bundles
from marginroute.exploration import ExploringPolicy

EPISODES = range(8)


@pytest.fixture(scope="module")
def rules():
    return baselines_for(load_scenario("quickstart"))


@pytest.fixture(scope="module")
def plant():
    """quickstart at a third of its load: queues hardly form."""
    return Plant(load_scenario("quickstart", {"load_scale": 0.3, "horizon_s": 120.0, "requests_per_episode": 600}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plant, rules):
    """A bundle of one rule and a log of another that explores."""
    path = tmp_path_factory.mktemp("logged")
    target = rules["bid-price-fitted"]
    bundles.save(make_bundle(plant, target, rules["least-in-flight"], {}, {}), path / "bundle")
    logger = ExploringPolicy(rules["bid-price"], rules["bid-price"], share=0.3, limit_usd=0.02)
    write_log(path / "log.jsonl", plant, logger, EPISODES, "heldout")
    write_log(path / "truth.jsonl", plant, bundles.load(path / "bundle").guarded(), EPISODES, "heldout")
    return path


def test_agrees_with_playing_the_policy_at_low_load(folder):
    bundle = bundles.load(folder / "bundle")
    found = evaluate_log(folder / "log.jsonl", bundle)
    truth = evaluate_log(folder / "truth.jsonl", bundle)["usd_per_1k_decisions"]["logged"]["mean"]
    assert found["refusal"] == "" and found["overlap"]["effective"] > 200
    for name in ("dr", "switch", "snips", "ips"):
        estimate = found["usd_per_1k_decisions"][name]
        assert estimate["low"] <= truth <= estimate["high"], name
    dm = found["usd_per_1k_decisions"]["dm"]
    assert not dm["low"] <= truth <= dm["high"]  # the rule's own expectation is pessimistic: why DR is needed


def test_table_json_and_page(folder, tmp_path, capsys):
    words = ["--log", folder / "log.jsonl", "--policy", folder / "bundle"]
    words += ["--json", tmp_path / "out.json", "--report", tmp_path / "out.html"]
    assert evaluate.main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert "doubly robust" in shown and "worth" in shown and "own margin of a decision" in shown
    document = json.loads((tmp_path / "out.json").read_text())["off_policy"]["bid-price-fitted"]
    assert {"ips", "snips", "dm", "dr", "switch", "logged", "gain"} == set(document["usd_per_1k_decisions"])
    assert document["overlap"]["decisions"] + document["skipped"] == len(
        (folder / "log.jsonl").read_text().splitlines()
    )
    page = (tmp_path / "out.html").read_text()
    assert 'id="estimates-0"' in page and "doubly robust" in page


def test_no_answer_from_a_log_that_does_not_explore(folder, plant, rules, tmp_path, capsys):
    write_log(tmp_path / "greedy.jsonl", plant, rules["bid-price"], range(2), "heldout")
    words = ["--log", tmp_path / "greedy.jsonl", "--policy", folder / "bundle", "--json", tmp_path / "out.json"]
    assert evaluate.main([str(word) for word in words]) == 0
    assert "No answer:" in capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())["off_policy"]["bid-price-fitted"]
    assert list(document["usd_per_1k_decisions"]) == ["logged"]


def changed(line, **values):
    record = json.loads(line)
    for key, value in values.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value
    return json.dumps(record)


def request(line, **values):
    record = json.loads(line)
    record["request"] |= values
    return json.dumps(record)


BAD = {
    "no probability": (lambda line: changed(line, probability=...), "line 3: has no probability"),
    "probability above one": (lambda line: changed(line, probability=1.5), "line 3: has probability 1.5"),
    "other scenario": (lambda line: changed(line, choice="tiny/0"), "line 3: names candidate 'tiny/0'"),
    "other class": (lambda line: request(line, class_index=7), "line 3: has request.class_index = 7"),
    "other feature version": (lambda line: changed(line, feature_version=1), "line 3: has feature_version 1"),
    "other schema": (lambda line: changed(line, schema=9), "line 3: has schema 9"),
    "not a number": (
        lambda line: line.replace('"waited_s": 0.0', '"waited_s": NaN'),
        "line 3: has request.waited_s = 'NaN'",
    ),
    "infinite cost": (lambda line: changed(line, cost_usd=1e999), "line 3: has cost_usd"),
    "negative cost": (lambda line: changed(line, cost_usd=-1), "line 3: has cost_usd = -1; legal is a number of 0 or"),
    "a number as text": (lambda line: changed(line, ttft_s="1"), "line 3: has ttft_s = '1'; legal is a number of 0 or"),
    "beyond any window": (
        lambda line: changed(line, prompt_tokens=10**30),
        "line 3: has prompt_tokens = 1000000000000000000000000000000; legal is a number from 0 to 10000000",
    ),
    "no truth": (lambda line: changed(line, good="yes"), "line 3: has good = 'yes'; legal is true or false"),
    "no time": (
        lambda line: changed(line, decided_at_s="noon"),
        "line 3: has decided_at_s = 'noon'; legal is",
    ),
    "no list": (lambda line: changed(line, legal="api"), "line 3: has legal = 'api'; legal is a list of names"),
    "no object": (lambda line: changed(line, request=[1]), "line 3: has request = [1]; legal is an object"),
    "unknown status": (
        lambda line: changed(line, status="done"),
        "line 3: has status 'done'; legal is completed, abandoned, failed, shed or none",
    ),
    "in the future": (
        lambda line: request(line, waited_s=-1.0),
        "line 3: has request.waited_s = -1.0; legal",
    ),
    "too deep": (lambda line: "[" * 100_000, "line 3: is not a JSON object"),
    "no signals": (lambda line: changed(line, signals="AAAA"), "line 3: has no signals of"),
    "truncated": (lambda line: line[: len(line) // 2], "line 3: is not a JSON object"),
    "an array": (lambda line: "[1]", "line 3: is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case, folder, tmp_path, capsys):
    change, sentence = BAD[case]
    lines = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"status":"completed"' in line][:5]
    lines[2] = change(json.dumps(json.loads(lines[2])))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    refuse(folder, tmp_path, sentence, capsys)


def test_the_control_group_of_a_canary_is_left_out(folder, tmp_path, capsys):
    """What the gateway chose itself has no probability; a log of nothing else is refused."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    half = len(lines) // 2
    carried_out, own = lines[:half], [changed(line, mode="shadow") for line in lines[half:]]
    for name, some in (("part", carried_out), ("canary", [*own, *carried_out]), ("log", own)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    bundle = bundles.load(folder / "bundle")
    part, canary = (evaluate_log(tmp_path / f"{name}.jsonl", bundle) for name in ("part", "canary"))
    assert canary["overlap"] == pytest.approx(part["overlap"]) and canary["skipped"] == part["skipped"] + len(own)
    refuse(folder, tmp_path, "all was decided in shadow mode", capsys)


def test_duplicated_and_unfinished_lines(folder, tmp_path, capsys):
    lines = (folder / "log.jsonl").read_text().splitlines()[:5]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[1]]) + "\n")
    refuse(folder, tmp_path, "line 6: repeats request", capsys)
    (tmp_path / "log.jsonl").write_text("\n".join(lines)[:-40])
    refuse(folder, tmp_path, "line 5: is not a JSON object, the file ends within it", capsys)
    (tmp_path / "log.jsonl").write_text("")
    refuse(folder, tmp_path, "log.jsonl: has no decision with an outcome", capsys)


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder, tmp_path):
    lines = (folder / "log.jsonl").read_bytes()
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    bundle = bundles.load(folder / "bundle")
    assert evaluate_log(tmp_path / "marked.jsonl", bundle) == evaluate_log(folder / "log.jsonl", bundle)


def refuse(folder, tmp_path, sentence, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["--log", tmp_path / "log.jsonl", "--policy", folder / "bundle", "--json", tmp_path / "out.json"]
    assert evaluate.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], captured.err
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_policy_of_another_fleet(folder, capsys):
    words = ["shaky", "--log", folder / "log.jsonl", "--policy", folder / "bundle"]
    assert evaluate.main([str(word) for word in words]) == 2
    assert "was trained for the pools and providers" in capsys.readouterr().err
