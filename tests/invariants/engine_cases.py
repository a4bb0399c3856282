"""Random fleets and loads for the engine's invariants."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from envs.fleet.profile import Profile, compact_profile
from envs.fleet.spec import PoolSpec
from envs.fleet.speculation import Speculation
from envs.fleet.state import NO_CAP


def small_profile() -> Profile:
    """Every term of an iteration is there, with several bins and a prefix axis."""
    return compact_profile(
        "small",
        {
            "token_knots": [1, 8, 32, 128],
            "token_s": [0.010, 0.011, 0.015, 0.040],
            "decode_batch_knots": [1, 4, 16],
            "decode_mean_kv_knots": [1, 64, 128, 256],
            "decode_s": [[0.0, 0.001, 0.002, 0.005], [0.001, 0.003, 0.006, 0.013], [0.003, 0.010, 0.021, 0.047]],
            "prefill_root_knots": [0, 64, 256],
            "prefill_prefix_knots": [0, 64, 256],
            "prefill_s": [[0.0, 0.001, 0.004], [0.001, 0.002, 0.006], [0.002, 0.004, 0.009]],
            "prefill_square_s": 1e-7,
            "prefill_product_s": 2e-7,
            "prefill_prefix_s": 1e-6,
            "multi_prefill_share": 0.1,
        },
    )


@st.composite
def pools(
    draw: st.DrawFn,
    scheduler: str | None = None,
    quirks: bool = False,
    prefix_caching: bool = False,
    scheduling_policy: str = "fcfs",
    speculation: bool = False,
) -> PoolSpec:
    """Small engines: few blocks, so that preemption happens, few slots, so that queues form."""
    max_num_seqs = draw(st.integers(1, 12))
    speculates, most = None, max_num_seqs
    if speculation:
        speculates = Speculation(
            draft_tokens=draw(st.integers(1, 5)),
            acceptance=draw(st.sampled_from([0.0, 0.3, 0.62, 0.9, 1.0])),
            draft_cost=draw(st.sampled_from([0.0, 0.05])),
            max_batch=draw(st.sampled_from([1, 3, 100])),
        )
        most *= 1 + speculates.draft_tokens
    return PoolSpec(
        "pool",
        small_profile(),
        replicas=draw(st.integers(1, 3)),
        kv_blocks=draw(st.integers(12, 80)),
        block_size_tokens=draw(st.sampled_from([1, 3, 4, 16])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(most, 80 if speculation else 64)),
        scheduler=scheduler or draw(st.sampled_from(["vllm-v1", "prefill-first", "sarathi"])),
        scheduling_policy=scheduling_policy,
        in_flight_cap=draw(st.sampled_from([1, 3, 8, NO_CAP])),
        watermark_share=draw(st.sampled_from([0.0, 0.05])),
        vidur_quirks=quirks,
        prefix_caching=prefix_caching,
        speculation=speculates,
    )


def load(
    seed: int, n: int, requests_per_s: float, most_prompt: int = 60, most_output: int = 40
) -> dict[str, np.ndarray]:
    """n requests; some arrive together, some have no patience."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0 / requests_per_s, n) * (rng.random(n) < 0.8)
    arrived_at_s = np.cumsum(gaps) + 0.25
    patience_s = np.where(rng.random(n) < 0.3, rng.exponential(0.4, n), np.inf)
    return {
        "arrived_at_s": arrived_at_s,
        "prompt_tokens": rng.integers(1, most_prompt + 1, n),
        "output_tokens": rng.integers(1, most_output + 1, n),
        "patience_s": patience_s,
    }


def priorities(seed: int, n: int, levels: int = 8) -> np.ndarray:
    """A priority for every request of `load`."""
    return np.random.default_rng([seed, 2]).integers(0, levels, n)


def hashes(
    seed: int, data: dict[str, np.ndarray], block_size_tokens: int, share_generated: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ragged block hashes for `load`: many requests begin like one before, some have no hashes at their end."""
    rng = np.random.default_rng([seed, 1])
    lists: list[list[int]] = []
    fresh = 0
    for prompt, output in zip(data["prompt_tokens"], data["output_tokens"], strict=True):
        prompt_blocks, blocks = prompt // block_size_tokens, (prompt + output - 1) // block_size_tokens
        own: list[int] = []
        if lists and rng.random() < 0.7:
            parent, parent_prompt = lists[rng.integers(0, len(lists))], 10**9
            if not share_generated:
                parent_prompt = int(data["prompt_tokens"][lists.index(parent)]) // block_size_tokens
            own = parent[: min(int(rng.integers(0, prompt_blocks + 1)), parent_prompt)]
        while len(own) < blocks:
            own = [*own, fresh]
            fresh += int(rng.choice([1, 16, 2**40]))
        lists.append(own if rng.random() < 0.7 else own[: int(rng.integers(0, blocks + 1))])
    return np.array([len(own) for own in lists]), np.array([h for own in lists for h in own], dtype=np.int64)
