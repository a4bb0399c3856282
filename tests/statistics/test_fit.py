"""The fit: figures that were put in come out, what it prints can be loaded, and the shipped files can be drawn."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from envs.scenario import load_scenario
from envs.scenario_files import CONFIGS, read_yaml
from envs.scenario_workload import WorkloadSection
from envs.workload.arrivals import GammaArrivals, MmppArrivals
from envs.workload.arrivals_bursts import BurstArrivals
from envs.workload.clients import Client
from envs.workload.durations import SecondsMixture
from envs.workload.fit import main
from envs.workload.fit_arrivals import as_dispersed, fit_arrivals
from envs.workload.fit_check import compare
from envs.workload.fit_model import Model, Sizes, fit, parts
from envs.workload.fit_sessions import fit_session, link_calls
from envs.workload.fit_text import text_of
from envs.workload.lengths import LengthMixture
from envs.workload.prefixes import PrefixSpec
from envs.workload.sessions import SessionKind, Step, draw_sessions
from envs.workload.statistics import fano
from envs.workload.traces import Trace
from marginroute.errors import InputError

SHORT = LengthMixture((1.0,), (300.0,), (0.5,), 1, 5000)
WAIT = SecondsMixture((1.0,), (60.0,), (0.7,), 2000.0)


def chats(edit_share=0.0):
    step = Step(1.0, WAIT, LengthMixture((1.0,), (200.0,), (0.8,), 1, 5000), None, edit_share)
    first = LengthMixture((1.0,), (3000.0,), (0.6,), 1, 40_000)
    return SessionKind(1.0, -1, first, SHORT, ((1, 0.4), (2, 0.7)), (step,), 0.0, first, 100_000, 0.0, 0.0)


TRUTH = Model(
    GammaArrivals(1.0, 1.0), SHORT, SHORT, (), (chats(),), PrefixSpec(128, 128, (0,)), warm_up_s=3000.0, complete=False
)


@pytest.fixture(scope="module")
def recorded():
    """An hour of chats of which only hashes tell what belongs together."""
    return TRUTH.draw(4000.0, 0)


def test_chats_are_found_again_from_hashes_alone(recorded):
    links = link_calls(recorded)
    assert links.common_tokens == 128 and not links.complete
    kind = fit_session(recorded, links, 3)
    follow = dict(kind.follow_share)
    assert follow[1] == pytest.approx(0.4, abs=0.04) and follow[3] == pytest.approx(0.7, abs=0.05)
    gaps = kind.steps[0].think_s.draw(np.random.default_rng(0), 20_000)
    assert np.median(gaps) == pytest.approx(60.0, rel=0.1) and kind.answer_kept == 1.0
    new = kind.steps[-1].new_tokens
    assert new.mean_tokens() == pytest.approx(chats().steps[0].new_tokens.mean_tokens(), rel=0.15)


def test_a_fitted_stream_is_like_rows_that_were_not_fitted(recorded):
    first, later = parts(recorded, 0.6)
    lines = compare(fit(first, Sizes(4, 4)), first, later, 4)
    text = "\n".join(lines)
    distance = [float(line.split(": ")[1].split(" ")[0]) for line in lines if "KS of" in line]
    points = float(next(line for line in lines if "points" in line).split("sizes ")[1].split(" points")[0])
    assert max(distance) < 0.07, text
    assert points < 4.0, text


def test_clients_are_fitted_one_by_one():
    own = [
        Client(
            0.7, 0, 0, arrivals=BurstArrivals(1.0, (0.9,), (5.0,), (1.5,)), prompt_lengths=SHORT, output_lengths=SHORT
        ),
        Client(0.2, 0, 0, arrivals=GammaArrivals(1.0, 1.0), prompt_lengths=SHORT, output_lengths=SHORT),
        Client(0.1, 0, 0, arrivals=GammaArrivals(1.0, 1.0), prompt_lengths=SHORT, output_lengths=SHORT),
    ]
    rng = np.random.default_rng(0)
    times = [client.arrivals.scaled(8.0 * client.share).draw(rng, 6000.0) for client in own]
    at_s = np.concatenate(times)
    order = np.argsort(at_s)
    tokens = np.concatenate([np.full(len(t), 10 ** (number + 1)) for number, t in enumerate(times)])[order]
    tenant = np.repeat(["a", "b", "c"], [len(t) for t in times])[order]
    trace = Trace(
        "", at_s[order] - at_s[order][0], tokens.astype(np.int32), tokens.astype(np.int32), tenant_name=tenant
    )
    model = fit(trace)
    assert [round(client.share, 1) for client in model.clients] == [0.7, 0.2, 0.1]
    assert [round(client.prompt_lengths.median_tokens[0]) for client in model.clients] == [10, 100, 1000]
    drawn = np.mean([fano(model.draw(6000.0, seed).arrived_at_s, 10.0) for seed in range(6)])
    assert drawn == pytest.approx(fano(trace.arrived_at_s, 10.0), rel=0.3)


def test_clients_that_are_busy_at_the_same_times_are_as_dispersed_as_all_requests():
    """Two streams whose slow bursts are one: together they vary more in long windows than independent ones would."""
    slow = BurstArrivals(4.0, (1.0,), (30.0,), (0.6,))
    fast = BurstArrivals(4.0, (1.0,), (1.0,), (1.2,))
    rng = np.random.default_rng(3)
    shared = slow.scaled(2.0).draw(rng, 20_000.0)
    mine = rng.random(len(shared)) < 0.5
    times = [np.sort(np.append(shared[side], fast.draw(rng, 20_000.0))) for side in (mine, ~mine)]
    together = np.sort(np.concatenate(times))
    alone = [fit_arrivals(one, 20_000.0) for one in times]
    scaled = as_dispersed(alone, together, 20_000.0)
    for window_s in (1.0, 10.0, 60.0):
        drawn = sum(part.rate_per_s * part.fano(window_s) for part in scaled) / sum(part.rate_per_s for part in scaled)
        assert drawn == pytest.approx(fano(together, window_s), rel=0.1)
    assert alone[0].fano(60.0) < 0.75 * fano(together, 60.0)


def test_a_stream_that_falls_silent_is_fitted_by_states():
    on_off = MmppArrivals((0.0, 9.0), (30.0, 10.0), ((0.0, 1.0), (1.0, 0.0)))
    tokens = np.arange(40_000, dtype=np.int32) % 97 + 1
    for process, kind in ((on_off, MmppArrivals), (GammaArrivals(3.0, 1.0), BurstArrivals)):
        at_s = process.draw(np.random.default_rng(0), 4000.0)
        trace = Trace("", at_s - at_s[0], tokens[: len(at_s)], tokens[: len(at_s)])
        fitted = fit(trace, Sizes(2, 2, states=2)).arrivals
        assert isinstance(fitted, kind)
        assert fitted.mean_rate_per_s() == pytest.approx(len(at_s) / trace.span_s, rel=0.01)
    assert isinstance(fit(trace, Sizes(2, 2, arrivals="mmpp")).arrivals, MmppArrivals)


def test_chats_that_begin_with_a_long_prompt_may_go_on_more_rarely():
    short, long = (
        replace(
            chats(),
            share=0.5,
            follow_share=((1, share),),
            first_tokens=LengthMixture((1.0,), (tokens,), (0.3,), 1, 99_000),
        )
        for tokens, share in ((2000.0, 0.7), (12_000.0, 0.2))
    )
    model = replace(TRUTH, sessions=(short, long), prefixes=PrefixSpec(128, 128, (0,)))
    kinds = fit(model.draw(4000.0, 0), Sizes(3, 3, kinds=2)).sessions
    assert [dict(kind.follow_share)[1] for kind in kinds] == pytest.approx([0.7, 0.2], abs=0.06)
    assert sum(kind.share for kind in kinds) == pytest.approx(1.0)


def full_contexts():
    """Sessions of 40 calls that grow by 1,000 tokens a call, and begin anew at 5,000 once they would pass 20,000."""
    at, prompt, session, parent = [], [], [], []
    for number in range(60):
        tokens = 5000
        for call in range(40):
            at.append(100.0 * number + 2.0 * call)
            prompt.append(tokens)
            session.append(number)
            parent.append(len(at) - 2 if call else -1)
            tokens = tokens + 1000 if tokens < 20_000 else 5000
    rows = len(at)
    block = np.array(prompt) // 500
    hashes, fresh = [], iter(range(10**9))
    for row in range(rows):
        kept = hashes[-1] if parent[row] >= 0 and prompt[row] > prompt[row - 1] else []
        hashes.append([*kept, *(next(fresh) for _ in range(block[row] - len(kept)))])
    return Trace(
        "",
        np.array(at),
        np.array(prompt, dtype=np.int32),
        np.full(rows, 50, dtype=np.int32),
        session_index=np.array(session, dtype=np.int32),
        parent_index=np.array(parent, dtype=np.int32),
        think_s=np.where(np.array(parent) < 0, np.nan, 1.0),
        e2e_s=np.ones(rows),
        prefix_block_tokens=500,
        prefix_count=block.astype(np.int32),
        prefix_hash=np.concatenate(hashes),
    )


def test_contexts_that_were_full_are_compacted_there_and_nowhere_else():
    trace = full_contexts()
    kind = fit_session(trace, link_calls(trace), 2, 90_000)
    assert (kind.reset_share, kind.max_prompt_tokens) == (0.0, 20_000)
    assert kind.reset_tokens.mean_tokens() == pytest.approx(5000.0)
    calls = draw_sessions(kind, np.random.default_rng(0), np.arange(200))
    assert np.abs(np.quantile(calls.prompt_tokens, 0.5) - np.quantile(trace.prompt_tokens, 0.5)) <= 1000


def test_prompts_grow_by_call_number():
    trace = whole_sessions(first=2000, later=100)
    steps = fit_session(trace, link_calls(trace), 2).steps
    assert [step.calls for step in steps] == [(1, 1), (2, 4), (5, 100_000)]
    assert [round(step.new_tokens.mean_tokens()) for step in steps] == [1950, 50, 50]


def whole_sessions(first=250, later=250):
    """Sessions recorded to their end, one a minute."""
    rng = np.random.default_rng(1)
    rows = []
    for session in range(120):
        at, prompt, parent = 60.0 * session, 1000, -1
        for _ in range(int(rng.integers(2, 9))):
            rows.append((at, prompt, 50, session, parent, 0.0 if parent == -1 else 20.0))
            parent = (session, at)
            at, prompt = at + 1.0 + 20.0, prompt + (first if prompt == 1000 else later)
    rows.sort(key=lambda row: row[0])
    place = {(row[3], row[0]): number for number, row in enumerate(rows)}
    at, prompt, output, session, parent, think = zip(*rows, strict=True)
    return Trace(
        "",
        np.array(at),
        np.array(prompt, dtype=np.int32),
        np.array(output, dtype=np.int32),
        session_index=np.array(session, dtype=np.int32),
        parent_index=np.array([place.get(key, -1) for key in parent], dtype=np.int32),
        think_s=np.array([np.nan if key == -1 else wait for key, wait in zip(parent, think, strict=True)]),
        e2e_s=np.ones(len(at)),
    )


def test_whole_sessions_are_split_by_session():
    trace = whole_sessions()
    first, later = parts(trace, 0.5)
    assert first.session_index.max() == later.session_index.max() == 59
    even, odd = parts(trace, 0.5, 1.0)
    assert even.n_requests + odd.n_requests == trace.n_requests
    model = fit(first, Sizes(2, 2, kinds=1))
    assert model.complete and model.arrivals.mean_rate_per_s() == pytest.approx(1 / 60.0, rel=0.01)
    (kind,) = model.sessions
    assert kind.ttft_s + 50 * kind.tpot_s == pytest.approx(1.0, abs=0.01)
    assert np.median(kind.steps[0].think_s.draw(np.random.default_rng(0), 999)) == pytest.approx(20.0, rel=0.02)
    assert kind.steps[0].new_tokens.median_tokens[-1] == pytest.approx(200.0, rel=0.01)


def test_what_is_printed_is_a_workload(recorded):
    for model in (fit(recorded, Sizes(3, 3)), fit(whole_sessions(), Sizes(2, 2))):
        section = WorkloadSection.model_validate(yaml.safe_load(text_of(model, ["a note"], 'a "title"', "a source")))
        assert section.arrivals.build().mean_rate_per_s() == pytest.approx(model.arrivals.mean_rate_per_s(), rel=1e-3)
        assert len(section.sessions) == len(model.sessions)


@pytest.mark.parametrize("path", sorted((CONFIGS / "workloads").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_workloads_can_be_drawn(path):
    section = WorkloadSection.model_validate(read_yaml(path))
    assert section.title
    rate = {"horizon_s": 600.0, "load_scale": 1.0}
    changes = {f"fleet.pools.{pool}.kv_blocks": 200_000 for pool in ("small", "medium", "large")}
    workload = load_scenario("azure_conversation", {"workload": path.stem, **rate, **changes}).generate(0)
    assert workload.n_requests >= 1 and (workload.prefix_block_tokens > 0) == (section.prefixes is not None)


def test_errors_of_the_command(tmp_path, capsys):
    few = tmp_path / "few.csv"
    few.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{s},5,5\n" for s in range(20)))
    assert main([str(few)]) == 2
    assert "to fit; legal is 50 or more" in capsys.readouterr().err
    assert main([str(few), "--fit-share", "0"]) == 2
    assert "legal is 0.1 to 1" in capsys.readouterr().err
    assert main([str(few), "--states", "1"]) == 2
    assert "legal is 2 or more" in capsys.readouterr().err
    trace = whole_sessions()
    with pytest.raises(InputError, match="has one session; legal is two or more"):
        parts(trace.pick(np.flatnonzero(trace.session_index == 3)), 0.6)
    with pytest.raises(InputError, match="keep chats together"):
        parts(TRUTH.draw(200.0, 1), 0.6, 60.0)
