"""The table of what gateways can do: the docs show it, and no policy ever chooses what its gateway cannot do."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from bundles import small_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from marginroute import capabilities
from marginroute import view as v
from marginroute.__main__ import main
from marginroute.capabilities import ABILITIES, GATEWAYS, abilities
from marginroute.errors import InputError
from marginroute.facts import Facts
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.rules import LeastInFlight, Random, RoundRobin

DOCS = Path(__file__).parents[2] / "docs" / "gateways.md"
RULES = {
    "margin": small_bundle().policy,
    "random": Random("random", use_providers=True),
    "round-robin": RoundRobin("round-robin"),
    "least-in-flight": LeastInFlight("least-in-flight", use_providers=True),
}
EVER = {"replica", "provider", "shed"}  # shedding is the last resort even of a gateway that has no way to


def test_the_docs_show_the_table(capsys):
    assert main(["capabilities"]) == 0
    printed = capsys.readouterr().out
    assert printed == capabilities.markdown() and printed in DOCS.read_text()
    assert main(["capabilities", "--json"]) == 0
    assert '"envoy-headers"' in capsys.readouterr().out


class Nowhere:
    """A log that keeps nothing."""

    def write(self, record):
        return True

    def close(self):
        pass


@st.composite
def cases(draw):
    name = draw(st.sampled_from(sorted(GATEWAYS)))
    can = draw(st.sets(st.sampled_from(GATEWAYS[name].can or ("",))))
    serving = ("small/0", "large/0", "api")
    facts = [
        Facts(
            str(i),
            draw(st.integers(1, 5000)),
            draw(st.sampled_from(("standard", "premium", "batch"))),
            draw(st.sampled_from(("chat", "code"))),
            available=draw(st.none() | st.sets(st.sampled_from(serving))),
            cached_tier=draw(st.sampled_from((None, "small"))),
            deadline_left_s=draw(st.sampled_from((np.inf, 10.0, 1e5))),
        )
        for i in range(draw(st.integers(1, 12)))
    ]
    return name, can - {""}, facts, draw(st.sampled_from(sorted(RULES))), draw(st.integers(0, 2))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_policy_chooses_what_its_gateway_cannot_do(case):
    """Whoever decides, the guard's fallback included, whatever is available and whatever is held back already."""
    name, can, asked, policy, stale = case
    bundle = dataclasses.replace(small_bundle(), policy=RULES[policy])
    gateway = Gateway(bundle, Nowhere(), ModeSettings("live"), abilities(name, can))
    for c in range(stale):
        gateway.state.scraped(c, 0.0, 0.0, 0.0, age_s=1e4)
    for facts in asked:
        decision = gateway.decide(facts).decision
        gateway.sent(facts.id, decision.name, True)
        serving = {"small/0", "large/0", "api"} if facts.available is None else facts.available
        assert decision.kind in {"replica", "provider", "shed"} | {a for a in can if a in ("cache", "defer")}
        assert decision.kind not in ("replica", "provider") or decision.name in serving
        if decision.kind == "shed" and "shed" not in can:
            assert not serving  # the last resort
    gateway.close()


def test_an_operator_cannot_ask_for_more():
    assert abilities("http", ABILITIES) == set(ABILITIES)
    for name, wanted in (("litellm", "hold"), ("litellm", "defer"), ("envoy-headers", "cache"), ("http", "fly")):
        with pytest.raises(InputError, match=f"'{wanted}'.*legal: "):
            abilities(name, (wanted,))


def test_the_mask_of_a_layout():
    layout = small_bundle().layout
    assert capabilities.able(layout, ()).tolist() == [True] * 3 + [False] * 3
    assert capabilities.able(layout, ("defer", "hold")).tolist() == [True] * 3 + [False, True, False]
    assert set(v.KINDS) == EVER | {"cache", "defer"}
