"""A fitted generator as the sections of a workload file."""

from __future__ import annotations

from envs.workload.arrivals import Arrivals, GammaArrivals, MmppArrivals
from envs.workload.arrivals_bursts import BurstArrivals
from envs.workload.durations import SecondsMixture
from envs.workload.fit_model import Model
from envs.workload.lengths import LengthMixture
from envs.workload.sessions import MAX_CALLS, SessionKind, SubAgents

_TASKS = """class_share: {enterprise: 0.45, team: 0.40, batch: 0.15}
tasks:
  chat: {share: 0.65}
  extraction: {share: 0.10}
  code: {share: 0.15}
  reasoning: {share: 0.10}
difficulty: {nobody_can_share: 0.04, signal_correlation: 0.6}
"""


def text_of(model: Model, notes: list[str], title: str = "", source: str = "") -> str:
    """YAML of a workload file; classes, tasks and difficulty are those of the starter plans, to be replaced."""
    lines = [f"# {note}" for note in notes]
    lines += ["# The trace tells neither class, task nor quality: those below are assumptions."]
    lines += [f"{name}: {_quoted(value)}" for name, value in (("title", title), ("source", source)) if value]
    lines += ["arrivals:", *_indented(_arrivals(model.arrivals), 2)]
    lines += ["prompt_tokens:", *_indented(_lengths(model.prompt_lengths), 2)]
    lines += ["output_tokens:", *_indented(_lengths(model.output_lengths), 2)]
    if model.clients:
        lines += ["clients:", "  own:"]
        for number, client in enumerate(model.clients):
            lines += [f"    client-{number + 1}:", f"      share: {client.share:.5g}"]
            for name, mixture in (("prompt_tokens", client.prompt_lengths), ("output_tokens", client.output_lengths)):
                if mixture is not None:
                    lines += [f"      {name}:", *_indented(_lengths(mixture), 8)]
            if client.arrivals is not None:
                lines += ["      arrivals:", *_indented(_arrivals(client.arrivals), 8)]
    if model.sessions:
        lines.append("sessions:")
        for number, kind in enumerate(model.sessions):
            lines += [f"  kind-{number + 1}:", *_indented(_session(kind), 4)]
        lines += [f"warm_up_s: {model.warm_up_s:.0f}"] if model.warm_up_s else []
    if model.prefixes is not None:
        lines.append(
            f"prefixes: {{block_tokens: {model.prefixes.block_tokens}, common_tokens: {model.prefixes.common_tokens}}}"
        )
    return "\n".join(lines) + "\n" + _TASKS


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _indented(lines: list[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


def _arrivals(arrivals: Arrivals) -> list[str]:
    rate = f"rate_per_s: {arrivals.mean_rate_per_s():.5g}"
    if isinstance(arrivals, GammaArrivals):
        return ["kind: gamma", rate, f"gap_cv: {arrivals.gap_cv:.4g}"]
    if isinstance(arrivals, BurstArrivals):
        if not arrivals.share:
            return ["kind: bursts", rate, "streams: []"]
        rows = zip(_cut(arrivals.share), arrivals.dwell_s, arrivals.cv, strict=True)
        streams = [f"  - {{share: {share:.4f}, dwell_s: {dwell:g}, cv: {cv:.4g}}}" for share, dwell, cv in rows]
        return ["kind: bursts", rate, "streams:", *streams]
    assert isinstance(arrivals, MmppArrivals)
    lines = ["kind: mmpp", "states:"]
    size = len(arrivals.rate_per_s)
    for index in range(size):
        follow = ", ".join(f"s{other}: {arrivals.jump[index][other]:.3f}" for other in range(size) if other != index)
        extra = f", next_weight: {{{follow}}}" if size > 2 else ""
        state = f"rate_per_s: {arrivals.rate_per_s[index]:.3f}, dwell_s: {arrivals.dwell_s[index]:.1f}"
        lines.append(f"  s{index}: {{{state}{extra}}}")
    return lines


def _cut(share: tuple[float, ...]) -> list[float]:
    """Shares rounded down, so that they never add up to more than 1."""
    return [int(x * 1e4) / 1e4 or 1e-4 for x in share]


def _lengths(mixture: LengthMixture) -> list[str]:
    columns = zip(mixture.weight, mixture.median_tokens, mixture.sigma, strict=True)
    rows = [f"  - {{weight: {max(w, 1e-4):.4f}, median_tokens: {m:.5g}, sigma: {s:.4f}}}" for w, m, s in columns]
    return ["components:", *rows, f"min_tokens: {mixture.min_tokens}", f"max_tokens: {mixture.max_tokens}"]


def _seconds(mixture: SecondsMixture) -> list[str]:
    columns = zip(mixture.weight, mixture.median_s, mixture.sigma, strict=True)
    rows = [f"  - {{weight: {max(w, 1e-4):.4f}, median_s: {m:.5g}, sigma: {s:.4f}}}" for w, m, s in columns]
    return ["components:", *rows, f"max_s: {mixture.max_s:.6g}"]


def _follow(follow: tuple[tuple[int, float], ...]) -> str:
    return "follow_share: {" + ", ".join(f"{call}: {share:.4f}" for call, share in follow) + "}"


def _session(kind: SessionKind) -> list[str]:
    lines = [f"share: {int(kind.share * 1e4) / 1e4:.4f}", "first_tokens:", *_indented(_lengths(kind.first_tokens), 2)]
    lines += ["output_tokens:", *_indented(_lengths(kind.output_lengths), 2), _follow(kind.follow_share), "steps:"]
    for step in kind.steps:
        name = ("edit" if step.edit_share else "next") + ("" if step.calls[0] == 1 else f"-from-{step.calls[0]}")
        lines += [f"  {name}:", f"    weight: {step.weight:.4g}", f"    from_call: {step.calls[0]}"]
        lines += [f"    to_call: {step.calls[1]}"] if step.calls[1] < MAX_CALLS else []
        lines += ["    think_s:", *_indented(_seconds(step.think_s), 6)]
        lines += ["    new_tokens:", *_indented(_lengths(step.new_tokens), 6)]
        if step.edit_share:
            lines += [f"    edit_share: {step.edit_share:g}", f"    edit_keep: {step.edit_keep:.4f}"]
    if kind.reset_share:
        lines += [f"reset_share: {kind.reset_share:.4f}", "reset_tokens:", *_indented(_lengths(kind.reset_tokens), 2)]
    lines += [f"max_prompt_tokens: {kind.max_prompt_tokens}", f"answer_kept: {kind.answer_kept:g}"]
    lines += [f"pace_sigma: {kind.pace_sigma:.4f}"] if kind.pace_sigma else []
    lines += [f"ttft_s: {kind.ttft_s:.4g}", f"tpot_s: {kind.tpot_s:.4g}"]
    return lines + (_sub_agents(kind.sub_agents) if kind.sub_agents else [])


def _sub_agents(fan: SubAgents) -> list[str]:
    lines = ["sub_agents:", f"  share: {fan.share:.5f}", "  agents:", *_indented(_lengths(fan.agents), 4)]
    return [*lines, "  first_tokens:", *_indented(_lengths(fan.first_tokens), 4), f"  {_follow(fan.follow_share)}"]
