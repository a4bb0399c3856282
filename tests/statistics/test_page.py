"""The report page: a whole figure for every place, in a real browser where there is one, and words that are true."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from episodes import comparison, make_results

from envs.scenario import load_scenario
from evaluation.assumptions import assumptions
from evaluation.bounds import Bounds
from evaluation.page import comparison_section, headline, markdown, page
from evaluation.page_data import PageData, collect
from evaluation.page_figures import figures
from evaluation.protocol import evaluate_policies
from evaluation.report import build_report
from marginroute.rules import FixedTier, LeastInFlight

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.cache.CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("evaluation.page_data.SWAPPED", 16)
        yield simulated()


def simulated():
    scenario = load_scenario("quickstart", {"horizon_s": 20.0, "requests_per_episode": 60})
    policies = {
        "least-in-flight": LeastInFlight("least-in-flight", use_providers=True),
        "hosted": FixedTier("hosted", 3),
    }
    results = evaluate_policies(scenario, policies, 4, workers=1)
    bounds = Bounds(np.arange(4), *(np.full(4, usd) for usd in (3.0, 2.0, -1.0)))
    report = build_report("quickstart", results, "hosted", bounds, None, assumptions(scenario))
    return report, collect(scenario, policies, "least-in-flight", "hosted", episodes=4, workers=1)


def test_every_figure_holds_data(played):
    made = figures(*played, "least-in-flight")
    assert list(made) == [
        "margins",
        "waterfall",
        "classes",
        "slo",
        "latency",
        "timeline",
        "actions",
        "swaps",
        "robustness",
        "tornado",
    ]
    for key, (title, words, figure) in made.items():
        assert title and words
        assert figure.data, key
        for trace in figure.data:
            numbers = [x for x in (*np.ravel(trace.x), *np.ravel(trace.y)) if isinstance(x, float | np.floating)]
            assert numbers and np.isfinite(numbers).all(), key


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_figure(played, tmp_path):
    report, data = played
    text = page(report, data, "least-in-flight", "python evaluate.py")
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", outside_scripts) and "<script src" not in text
    (tmp_path / "page.html").write_text(text)
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env={**os.environ}).stdout
    for key in figures(report, data, "least-in-flight"):
        part = dom[dom.index(f'id="{key}"') :].partition("</section>")[0]
        assert 'class="main-svg"' in part, key
        assert len(re.findall(r"<(?:path|rect)[ >]", part)) > 5, key


def test_margin_over_time_adds_up_to_what_was_earned_before_the_horizon(played):
    report, data = played
    for name, line in data.timelines.items():
        results = report.results[name]
        part_s = results.horizon_s[0] / len(line.time_s)
        earned = line.margin_usd_per_hour.sum() * part_s / 3600.0 * len(results.seeds)
        assert earned < results.margin_usd.sum()  # the backlog is settled later
        assert line.arrivals_per_s.sum() * part_s * len(results.seeds) == pytest.approx(results.first_calls.sum())
        assert (line.waiting >= 0).all() and line.in_flight.max() > 0


def test_words_where_nothing_is_earned_or_one_episode_is_played():
    """No contribution margin to be a share of, a bound below zero, no interval: all of it said without NaN."""
    for episodes in (1, 12):
        results = {name: make_results(name, edge, episodes) for name, edge in (("ppo", -9.0), ("bid-price", -9.5))}
        bounds = Bounds(np.arange(episodes), *(np.full(episodes, usd) for usd in (-4.0, -4.5, -1.0)))
        report = build_report("quickstart", results, "bid-price", bounds)
        words = headline(report, "ppo")
        assert "of contribution margin" not in words and "reaches" not in words
        assert "No policy can earn more than -13.33, and none that" in words
        assert f"that is USD +1.67{'' if episodes == 1 else ' [+1.67, +1.67]'} per 1,000 requests, +1.67 net" in words
        assert not re.search(r"\bnan\b", words + markdown(report, "ppo") + comparison_section(report, "ppo"))
    assert "| ppo | -17.15 | - |" in markdown(build_report("x", {"ppo": make_results("ppo", -9.0, 1)}, None), "ppo")


def test_headline_and_card_say_what_the_report_says():
    report = build_report("quickstart", comparison(bid_price=0.0, ppo=0.3), "bid-price")
    words = headline(report, "ppo")
    assert (
        "ppo earns USD" in words and "Against bid-price" in words and "+1.00" in words and "more than chance" in words
    )
    card = markdown(report, "ppo")
    assert "| bid-price * |" in card and "| usage revenue |" in card
    margin = report.margin_usd_per_1k["ppo"].mean
    assert f"| **margin** | {margin:,.3f} |" in card


def test_names_cannot_break_the_page():
    results = comparison(bid_price=0.0)
    results = {"<b>x</b>": next(iter(results.values()))}
    text = page(build_report("a & b", results, None), PageData("<b>x</b>", {}, None, {}), "<b>x</b>", "<script>")
    body = text.partition("<body>")[2]
    assert "&lt;b&gt;x&lt;/b&gt;" in body and "a &amp; b" in body and "<code>&lt;script&gt;" in body
