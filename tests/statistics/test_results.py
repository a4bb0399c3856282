"""The table of training results, on a run that takes a second: its figures are those of the policies themselves."""

import json
import shutil

import numpy as np
import pytest

from agents.run import load_bundle
from benchmarks import result_rows, results
from evaluation.protocol import evaluate_policies

EPISODES = 3


@pytest.fixture(scope="module")
def found(tiny_plant, finished_run):
    rows = result_rows.rows(tiny_plant.scenario, [finished_run, finished_run], EPISODES, 2)
    result_rows.adjust(rows)
    return rows


def test_gains_are_differences_of_margins_on_the_same_episodes(tiny_plant, finished_run, found):
    row = found[0]
    played = evaluate_policies(tiny_plant.scenario, {"ours": load_bundle(finished_run).guarded()}, EPISODES)["ours"]
    calls = played.first_calls.sum()
    assert row["margin_usd_per_1k"] == pytest.approx(1000.0 * played.margin_usd.sum() / calls)
    assert row["gain_by_seed"][0] == row["gain_by_seed"][1] == pytest.approx(row["gain"]["usd_per_1k"])
    if row["best_heuristic"] in row["chain_usd_per_1k"]:
        best = row["chain_usd_per_1k"][row["best_heuristic"]]
        assert row["gain"]["usd_per_1k"] == pytest.approx(row["margin_usd_per_1k"] - best, abs=1e-9)
    assert all(one["gain"]["p"] <= one["gain"]["p_holm"] <= 1.0 for one in found)
    assert [one["condition"] for one in found] == ["as it is", *tiny_plant.scenario.conditions]
    assert len(row["exported"]) == 2


def test_the_page_has_a_line_per_row_with_all_its_columns(found):
    lines = result_rows.markdown([{**row, "commit": "abc"} for row in found], "a command").splitlines()
    assert any("played at commit abc." in line for line in lines)
    for first, rows in (("| scenario | episodes", 1), ("| condition | episodes", len(found) - 1)):
        head = next(i for i, line in enumerate(lines) if line.startswith(first))
        assert {line.count("|") for line in lines[head : head + 2 + rows]} == {lines[head].count("|")}
    assert any(line.startswith("- Gates exported a network in") for line in lines)
    assert any(line.startswith("| quickstart | ") for line in lines)


def test_a_policy_that_is_the_heuristic_changes_no_class(found):
    for row in found:
        if not any(row["exported"]) and row["best_heuristic"] == "bid-price-fitted":
            assert row["gain"]["usd_per_1k"] == pytest.approx(0.0, abs=1e-12)
            assert not np.any(list(row["class_change"].values()))


def test_seeds_that_are_no_numbers_are_refused(capsys):
    assert results.main(["quickstart", "--seeds", "one"]) == 2
    assert "--seeds 'one' is not legal" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--episodes", 0), ("--condition-episodes", -1), ("--workers", 0)])
def test_counts_below_what_is_legal_are_refused(flag, value, capsys):
    assert results.main(["quickstart", flag, str(value)]) == 2
    assert f"{flag} {value} is not legal; legal is" in capsys.readouterr().err


def test_rows_are_kept_until_runs_or_episodes_are_others(tiny_plant, finished_run, tmp_path, monkeypatch, found):
    """An interrupted command goes on; nothing old is shown for what has been trained anew."""
    played = []
    monkeypatch.setattr(result_rows, "rows", lambda *args: played.append(args) or found)
    again = tmp_path / "again"
    shutil.copytree(finished_run / "bundle", again / "bundle")
    for runs, episodes, times in (
        ([finished_run], (3, 2), 1),
        ([finished_run], (3, 2), 1),
        ([again], (3, 2), 1),  # the same bundle
        ([finished_run, again], (3, 2), 2),
        ([finished_run, again], (4, 2), 3),
    ):
        rows = results._rows(tiny_plant.scenario, runs, episodes, tmp_path, 1)
        assert [{k: x for k, x in row.items() if k != "commit"} for row in rows] == found
        assert len(played) == times
    (again / "bundle" / "manifest.json").write_text("{}")
    results._rows(tiny_plant.scenario, [finished_run, again], (4, 2), tmp_path, 1)
    assert len(played) == 4


def test_rows_are_plain_data(found):
    assert json.loads(json.dumps(found)) == found
