"""`marginroute replay LOG BUNDLE`."""

import dataclasses
import json

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute.__main__ import main
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.record_log import RecordLog
from marginroute.replay import replay
from marginroute.rules import FixedTier

REQUESTS = 300


@pytest.fixture(scope="module")
def logged(tmp_path_factory, bundle_folder):
    """A log of three classes under load, and the margin that its choices were expected to earn."""
    path, rng = tmp_path_factory.mktemp("replay") / "log.jsonl", np.random.default_rng(3)
    gateway, margins_usd, under_way = Gateway(bundles.load(bundle_folder), RecordLog(path)), [], []
    for i in range(REQUESTS):
        name = ("standard", "premium", "batch")[i % 3]
        verdict = gateway.decide(Facts(f"r{i}", int(rng.integers(20, 3000)), name, "code"))
        margins_usd.append(verdict.decision.reason_usd["margin"])
        gateway.sent(f"r{i}", verdict.decision.name, True)
        under_way.append(f"r{i}")
        if len(under_way) > 30:
            gateway.finished(under_way.pop(0), Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 120))
    gateway.close()
    return path, margins_usd


def saved(bundle, folder):
    bundles.save(bundle, folder)
    return str(folder)


def test_the_same_bundle_decides_the_same(logged, bundle_folder):
    path, margins_usd = logged
    result = replay(path, bundles.load(bundle_folder)).to_dict()
    assert result["decisions"] == result["same"] == REQUESTS and result["changes"] == []
    assert result["logged"] == result["replayed"] and sum(result["logged"].values()) == pytest.approx(1.0)
    assert len(result["logged"]) > 1
    # records hold signals as float32
    assert result["logged_usd_per_1k"] == pytest.approx(1e3 * np.mean(margins_usd), rel=1e-5)
    assert result["gain_usd_per_1k"] == 0.0


def test_another_bundle_shows_what_changes(logged, tmp_path, capsys):
    path, margins_usd = logged
    rule = MarginRule("expected-margin", MarginParameters((0.0, 0.0, 0.0)))
    other = saved(dataclasses.replace(small_bundle(), policy=rule), tmp_path / "other")
    assert main(["replay", str(path), other, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["same"] < REQUESTS
    assert sum(count for _, _, count in result["changes"]) == REQUESTS - result["same"]
    # margins do not depend on congestion prices, so the logged ones are the same, and the greedy rule earns no less
    assert result["logged_usd_per_1k"] == pytest.approx(1e3 * np.mean(margins_usd), rel=1e-5)
    assert result["gain_usd_per_1k"] > 0.0
    by_class = [of["decisions"] * of["gain_usd_per_1k"] for of in result["classes"].values()]
    assert sum(by_class) == pytest.approx(REQUESTS * result["gain_usd_per_1k"])
    assert main(["replay", str(path), other]) == 0
    text = capsys.readouterr().out
    assert f"{REQUESTS} decisions by expected-margin" in text and "->" in text and "difference +" in text


def test_a_rule_without_usd_shows_shares_alone(logged, tmp_path, capsys):
    other = dataclasses.replace(small_bundle(), policy=FixedTier("fixed-large", 1))
    assert main(["replay", str(logged[0]), saved(other, tmp_path / "other")]) == 0
    assert "no expected margin" in capsys.readouterr().out


def test_the_guards_share_is_counted(logged, tmp_path):
    """Telemetry that was 100 s old: the fallback decides."""
    lines = [json.loads(line) for line in logged[0].read_text().splitlines()]
    from marginroute import view as v
    from marginroute.record import packed, unpacked

    for record in lines[:50]:
        signals = unpacked(record["signals"], 6).copy()
        signals[v.TELEMETRY_AGE_S - v.N_STATIC_SIGNALS, :2] = 100.0
        record["signals"] = packed(signals)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    bundles.save(small_bundle(), tmp_path / "bundle")
    assert replay(tmp_path / "log.jsonl", bundles.load(tmp_path / "bundle")).handed_over == 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choice": "huge/0"}, "line 1: no record of this bundle's candidates; legal are, in this order, small/0"),
        ({"signals": "AAAA"}, "no record of this bundle"),
        ({"feature_version": 1}, "feature version 1; legal is"),
        ({"request": {}}, "no record"),
    ],
)
def test_other_records_are_refused(logged, bundle_folder, tmp_path, capsys, change, says):
    record = json.loads(logged[0].read_text().splitlines()[0]) | change
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["replay", str(tmp_path / "log.jsonl"), str(bundle_folder)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signal", "value", "says"),
    [
        ("class_index", 99.0, "line 1: class_index 99 is none of this bundle's; legal are 0 to 2: standard"),
        ("class_index", -1.0, "class_index -1"),
        ("task_index", 0.5, "task_index 0.5"),
        ("prompt_tokens", "many", "no record"),
    ],
)
def test_records_of_other_classes_and_tasks_are_refused(logged, bundle_folder, tmp_path, capsys, signal, value, says):
    record = json.loads(logged[0].read_text().splitlines()[0])
    record["request"][signal] = value
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["replay", str(tmp_path / "log.jsonl"), str(bundle_folder)]) == 2
    assert says in capsys.readouterr().err


def test_nothing_to_replay(bundle_folder, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"id": "a"}\n')
    assert main(["replay", str(tmp_path / "log.jsonl"), str(bundle_folder)]) == 0
    assert "no decision to replay (1 records without signals)" in capsys.readouterr().out
