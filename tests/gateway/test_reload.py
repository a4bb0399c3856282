"""A new bundle while the gateway runs."""

import dataclasses
import json
import logging
import shutil
import time

import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute.errors import InputError
from marginroute.facts import Facts
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.operation import OperationSettings, event_path, open_gateway


def other_bundle():
    rule = MarginRule("expected-margin", MarginParameters((0.0, 0.0, 0.0)))
    return dataclasses.replace(small_bundle(), policy=rule)


@pytest.fixture
def running(tmp_path):
    bundles.save(small_bundle(), tmp_path / "bundle")
    settings = OperationSettings(str(tmp_path / "bundle"), str(tmp_path / "log.jsonl"), mode="live", reload_s=1000.0)
    gateway = open_gateway(settings)
    yield gateway, gateway._companions[0], settings
    gateway.close()


def events(settings):
    return [json.loads(line) for line in event_path(settings.log).read_text().splitlines()]


def test_a_new_bundle_takes_over_once_it_looks_the_same_twice(running):
    gateway, watch, settings = running
    before = gateway.bundle.digest
    assert not watch.look()
    gateway.decide(Facts("a", 10))
    bundles.save(other_bundle(), settings.watched()[0].parent)
    assert not watch.look() and gateway.bundle.digest == before
    assert watch.look() and gateway.bundle.digest != before
    assert gateway.decide(Facts("b", 10)).decision.policy == "expected-margin"
    assert not watch.look()
    assert [(e["event"], e["before"]) for e in events(settings)] == [("bundle", before[:12])]
    assert gateway.pending == 2


@pytest.mark.parametrize("broken", ["half", "gone", "other format"])
def test_a_bad_bundle_keeps_the_old_one_and_says_why_once(running, broken, caplog):
    gateway, watch, settings = running
    before, manifest = gateway.bundle.digest, settings.watched()[0]
    if broken == "half":
        manifest.write_text(manifest.read_text()[:500])
    elif broken == "gone":
        shutil.rmtree(manifest.parent)
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert not watch.look()
    assert [record.message.count("is refused") for record in caplog.records] == [1]
    assert gateway.bundle.digest == before and not gateway.decide(Facts("a", 10)).decision.guard
    assert [e["event"] for e in events(settings)] == ["refused"]
    bundles.save(other_bundle(), settings.watched()[0].parent)
    assert not watch.look() and watch.look()


def test_feedback_of_other_tiers_is_refused_with_its_bundle(tmp_path):
    bundles.save(small_bundle(), tmp_path / "bundle")
    from marginroute.feedback import QualityPosterior

    path = tmp_path / "feedback.json"
    path.write_text(json.dumps(QualityPosterior(("small", "large"), ("chat", "code")).to_dict()))
    settings = OperationSettings(
        str(tmp_path / "bundle"), str(tmp_path / "log.jsonl"), feedback=str(path), reload_s=1000.0
    )
    gateway = open_gateway(settings)
    path.write_text(json.dumps(QualityPosterior(("other",), ("chat",)).to_dict()))
    watch = gateway._companions[0]
    assert not watch.look() and not watch.look()
    assert "other tiers or tasks" in events(settings)[0]["reason"]
    gateway.close()


def test_the_thread_looks_by_itself_and_ends(tmp_path):
    bundles.save(small_bundle(), tmp_path / "bundle")
    gateway = open_gateway(OperationSettings(str(tmp_path / "bundle"), str(tmp_path / "log.jsonl"), reload_s=0.02))
    bundles.save(other_bundle(), tmp_path / "bundle")
    until = time.monotonic() + 10.0
    while gateway.bundle.policy.name != "expected-margin" and time.monotonic() < until:
        time.sleep(0.02)
    assert gateway.bundle.policy.name == "expected-margin"
    (thread,) = (companion._thread for companion in gateway._companions)
    gateway.close()
    assert not thread.is_alive()


def test_reload_s_must_be_positive(tmp_path):
    bundles.save(small_bundle(), tmp_path / "bundle")
    with pytest.raises(InputError, match="reload_s 0"):
        open_gateway(OperationSettings(str(tmp_path / "bundle"), str(tmp_path / "log.jsonl"), reload_s=0.0))
