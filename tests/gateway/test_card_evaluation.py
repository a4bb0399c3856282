"""`marginroute inspect` prints the evaluation of a bundle as a table that a person can read."""

from dataclasses import replace

from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute.__main__ import main


def policy(mean, ci95, slo):
    return {
        "margin_usd_per_1k_requests": {"mean": mean, "ci95": ci95},
        "contribution_margin_usd_per_1k_requests": {"mean": mean + 1.0, "ci95": None},
        "slo_attainment": {"premium": slo, "batch": 1.0, "nobody": None},
        "quality": {"premium": 0.9, "batch": 0.8},
        "shed": {"premium": 0.0, "batch": 0.015},
    }


EVALUATION = {
    "scenario": "quickstart",
    "episodes": 32,
    "best_heuristic": "bid-price",
    "policies": {"marginroute": policy(10.5, [10.25, 10.75], 0.975), "bid-price": policy(10.0, None, 0.9)},
    "paired": {
        "marginroute": {"vs": "bid-price", "delta_usd_per_1k_requests": 0.5, "ci95": [0.25, 0.75], "p_holm": 0.004}
    },
    "bounds": {"clairvoyant": 12.25, "same_information": 11.5},
    "calibration": {"calibrated": False, "log": "my.jsonl", "requests": 100, "outside": ["small: off"]},
    "assumptions": [
        {"name": "prices of api", "value": "1 / 5", "kind": "public default", "source": "x"},
        {"name": "contract of premium", "value": "usage plan", "kind": "assumed", "source": ""},
    ],
    "gate": {"learned": True, "episodes": 64},
}


def test_the_table(tmp_path, capsys):
    bundles.save(replace(small_bundle(), evaluation=EVALUATION), tmp_path / "bundle")
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    card = capsys.readouterr().out
    lines = [line.split() for line in card.splitlines()]
    ours = next(line for line in lines if line[:2] == ["marginroute", "10.50"])
    assert ours[2:8] == ["[10.25,", "10.75]", "+0.50", "[+0.25,", "+0.75]", "0.004"]
    assert ["bid-price", "*", "10.00", "11.00", "90.0", "80.0", "1.5"] in lines
    for words in ("NOT CALIBRATED against my.jsonl", "12.25", "1 public default, 1 assumed", "contract of premium"):
        assert words in card
    assert "Gate, on validation episodes\n  episodes: 64\n  learned: True" in card
    widths = {len(line.rstrip()) for line in card.splitlines() if "+0.50" in line or "p Holm" in line}
    assert len(widths) == 1  # aligned
