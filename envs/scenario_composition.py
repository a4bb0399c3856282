"""From the workload's sections to what is drawn: clients of a population, sessions, jobs, system prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from envs.scenario_sessions import ClientsSection, JobsSection, PrefixSection, SessionSection, SubAgentSection
from envs.workload.clients import Client
from envs.workload.draws import choose
from envs.workload.prefixes import PrefixSpec
from envs.workload.sessions import MAX_CALLS, SessionKind, Step, SubAgents, Tool
from envs.workload.spec import Composition, JobSpec

if TYPE_CHECKING:
    from envs.scenario import Scenario

Array = np.ndarray[Any, Any]
_CLIENT_SALT, _SYSTEM_SALT = 0xC11E, 0x5E5


def composition(scenario: Scenario, class_share: tuple[float, ...]) -> Composition | None:
    """What the workload has beyond independent requests; None where it has none of it."""
    work = scenario.workload
    if not (work.season or work.clients or work.sessions or work.jobs or work.prefixes):
        return None
    tenants = [customer.tenants for customer in scenario.plans.classes.values()]
    return Composition(
        season=work.season.build() if work.season else None,
        clients=_clients(scenario, work.clients, class_share, tenants) if work.clients else (),
        sessions=tuple(_session(scenario, name, kind) for name, kind in work.sessions.items()),
        warm_up_s=work.warm_up_s,
        jobs=_jobs(scenario, work.jobs) if work.jobs else None,
        prefixes=_prefixes(work.prefixes, sum(tenants)) if work.prefixes else None,
    )


def _clients(
    scenario: Scenario, section: ClientsSection, class_share: tuple[float, ...], tenants: list[int]
) -> tuple[Client, ...]:
    rng = np.random.default_rng([section.population_seed, _CLIENT_SALT])
    total = len(section.own) + section.count
    own = np.array([client.share for client in section.own.values()])
    drawn = np.arange(1, section.count + 1) ** -section.zipf_exponent
    own_share = section.own_share if section.count else 1.0
    share = np.concatenate([own / own.sum() * own_share if len(own) else own, drawn * _scale(drawn, own, own_share)])
    class_index = choose(rng, class_share, total)
    names = list(scenario.class_names)
    for number, client in enumerate(section.own.values()):
        if client.class_name is not None:
            class_index[number] = names.index(client.class_name)
    first = np.cumsum([0, *tenants])
    normal = rng.standard_normal((2, total))
    rho = section.length_correlation
    normal[1] = rho * normal[0] + np.sqrt(1.0 - rho * rho) * normal[1]
    factor = np.exp(np.array([[section.prompt_sigma], [section.output_sigma]]) * normal)
    figures: list[Any] = [*section.own.values(), *[None] * section.count]
    clients = []
    for number, client in enumerate(figures):
        kind = int(class_index[number])
        exponent = scenario.workload.tenant_zipf_exponent
        tenant = choose(rng, np.arange(1, tenants[kind] + 1) ** -exponent, 1)[0]
        clients.append(
            Client(
                share=float(share[number]),
                class_index=kind,
                tenant_index=int(first[kind] + tenant),
                active_share=(client and client.active_share) or section.active_share,
                active_s=(client and client.active_s) or section.active_s,
                prompt_factor=1.0 if client else float(factor[0, number]),
                output_factor=1.0 if client else float(factor[1, number]),
                arrivals=_at_rate_one(client.arrivals.build()) if client and client.arrivals else None,
                prompt_lengths=client.prompt_tokens.build() if client and client.prompt_tokens else None,
                output_lengths=client.output_tokens.build() if client and client.output_tokens else None,
            )
        )
    return tuple(clients)


def _scale(drawn: Array, own: Array, own_share: float) -> float:
    return (1.0 - own_share if len(own) else 1.0) / drawn.sum() if len(drawn) else 0.0


def _at_rate_one(arrivals: Any) -> Any:
    return arrivals.scaled(1.0 / arrivals.mean_rate_per_s())


def _session(scenario: Scenario, name: str, kind: SessionSection) -> SessionKind:
    paid = list(scenario.plans.workflows)
    first = kind.first_tokens.build()
    steps = tuple(
        Step(
            step.weight,
            step.think_s.build(),
            step.new_tokens.build(),
            step.output_tokens.build() if step.output_tokens else None,
            step.edit_share,
            step.edit_keep,
            (step.from_call, step.to_call or MAX_CALLS),
            Tool(step.tool.keys, step.tool.zipf_exponent, step.tool.usd, step.tool.shared) if step.tool else None,
        )
        for step in kind.steps.values()
    )
    return SessionKind(
        share=kind.share,
        task_index=scenario.task_names.index(kind.task) if kind.task else -1,
        first_tokens=first,
        output_lengths=kind.output_tokens.build(),
        follow_share=tuple(sorted(kind.follow_share.items())),
        steps=steps,
        reset_share=kind.reset_share,
        reset_tokens=kind.reset_tokens.build() if kind.reset_tokens else first,
        max_prompt_tokens=kind.max_prompt_tokens,
        ttft_s=kind.ttft_s,
        tpot_s=kind.tpot_s,
        sub_agents=_sub_agents(kind.sub_agents) if kind.sub_agents else None,
        answer_kept=kind.answer_kept,
        pace_sigma=kind.pace_sigma,
        workflow=paid.index(name) if name in paid else -1,
    )


def _sub_agents(fan: SubAgentSection) -> SubAgents:
    follow = tuple(sorted(fan.follow_share.items()))
    return SubAgents(fan.share, fan.agents.build(), fan.first_tokens.build(), follow)


def _jobs(scenario: Scenario, jobs: JobsSection) -> JobSpec:
    return JobSpec(
        class_index=scenario.class_names.index(jobs.class_name),
        per_s=jobs.per_hour / 3600.0 * scenario.load_scale,
        requests=jobs.requests.build(),
        spread_s=jobs.spread_s,
        deadline_s=jobs.deadline_s.build() if jobs.deadline_s else None,
    )


def _prefixes(section: PrefixSection, tenants: int) -> PrefixSpec:
    system = np.zeros(tenants, dtype=np.int64)
    if section.system_tokens is not None:
        rng = np.random.default_rng([section.population_seed, _SYSTEM_SALT])
        system = section.system_tokens.build().draw(rng.random(tenants), rng.standard_normal(tenants))
    return PrefixSpec(section.block_tokens, section.common_tokens, tuple(int(tokens) for tokens in system))
