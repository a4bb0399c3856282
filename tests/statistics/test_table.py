"""The terminal table: fits its width, says nothing false, and knows pipes and NO_COLOR."""

import io

import pytest
from episodes import comparison, make_results
from rich.console import Console

from evaluation.columns import make_group, pack, print_columns, stdout_console
from evaluation.report import build_report
from evaluation.table import _digits, print_report


def printed(width=100, best="bid-price", results=None, **console):
    results = results or comparison(bid_price=0.0, difficulty_threshold=-0.2, ppo=0.3)
    out = io.StringIO()
    print_report(build_report("quickstart", results, best), Console(file=out, width=width, **console))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 240])
def test_fits_the_width_and_loses_nothing(width):
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for word in ("margin", "delta", "contrib.", "SLO %", "quality %", "lost %", "actions %", "enterprise"):
        assert word in text


def test_main_figures_share_one_table_at_100_columns():
    header = next(line for line in printed(100).splitlines() if line.startswith("policy"))
    assert [word in header for word in ("margin", "delta", "%", "p", "contrib.")] == [True] * 5


def test_wider_terminals_get_fewer_tables():
    assert printed(240).count("difficulty-threshold") < printed(100).count("difficulty-threshold")


def test_policies_are_sorted_by_margin_and_the_reference_is_marked():
    lines = [line.split("  ")[0].strip() for line in printed().splitlines()]
    first = [line for line in lines if line in ("ppo", "bid-price *", "difficulty-threshold")][:3]
    assert first == ["ppo", "bid-price *", "difficulty-threshold"]


def test_delta_row_shows_sign_interval_per_cent_and_p():
    row = next(line for line in printed().splitlines() if line.startswith("ppo"))
    assert "+1.000 [+1.000, +1.000]" in row
    assert "<.001" in row


def test_no_interval_is_a_dash_and_no_reference_no_delta():
    text = printed(best=None, results={"ppo": make_results("ppo", episodes=1)})
    assert "delta" not in text.split("Accounts")[0]
    row = next(line for line in text.splitlines() if line.startswith("ppo"))
    assert " - " in row
    assert text.startswith("quickstart: 1 held-out episode, 300 requests, 0.5 h;")


def test_a_class_without_answers_is_a_dash():
    results = make_results()
    results.counts[:, :, 2] = 0
    assert "nan" not in printed(results={"bid-price": results})


def test_pipes_get_100_columns_and_no_colour(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout_console().width == 100
    monkeypatch.setenv("COLUMNS", "72")
    assert stdout_console().width == 72
    print_report(build_report("quickstart", comparison(bid_price=0.0), "bid-price"))
    assert "\x1b" not in capsys.readouterr().out


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in printed(force_terminal=True)


def test_pack_keeps_order_and_never_drops_a_group_too_wide_for_the_page():
    groups = [make_group(f"group {i}", ["a", "b"], [["1" * 10, "2" * 10]]) for i in range(5)]
    tables = pack(groups, name_width=10, width=62)
    assert [len(table) for table in tables] == [2, 2, 1]
    assert [group for table in tables for group in table] == groups
    assert [len(table) for table in pack(groups, name_width=10, width=5)] == [1] * 5


@pytest.mark.parametrize("width", [20, 80, 200])
def test_rows_of_cells_are_whole_at_any_width(width):
    heads = ["setting", "policy", "USD/h", "[95 % CI]", "SLO %"]
    rows = [["0.5", "least-in-flight", "1.00", "[0.50, 1.50]", "99.0"], ["10", "x", "-1,000.00", "-", "8.0"]]
    out = io.StringIO()
    print_columns(Console(file=out, width=width), heads, rows, (2, 2, 1))
    lines = [
        "setting  policy               USD/h    [95 % CI]  SLO %",
        "─" * 55,
        "0.5      least-in-flight       1.00 [0.50, 1.50]   99.0",
        "10       x                -1,000.00            -    8.0",
    ]
    if width == 20:  # a group each; nothing is cut, though it does not fit
        lines = [*(line[:48].rstrip() for line in lines), "", *(line[:24] + line[48:] for line in lines)]
    assert out.getvalue().splitlines() == lines


def test_digits_show_four_figures():
    assert [_digits([x]) for x in (12345.0, 1234.0, 123.0, 12.3, 1.23, 0.0123, 0.0)] == [0, 0, 1, 2, 3, 4, 2]
