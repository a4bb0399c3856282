"""Fits the generator's figures to a trace: `python -m envs.workload.fit FILE --trace-format NAME`.

Prints the `arrivals`, `prompt_tokens` and `output_tokens` sections of a workload file, with the Kolmogorov-Smirnov
distance of each fit. Lengths: expectation-maximisation for mixtures of lognormals. Arrivals: Baum-Welch for a hidden
Markov chain with Poisson counts per second, read as a Markov-modulated Poisson process.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from envs.workload.lengths import LengthMixture
from envs.workload.traces import READERS, Trace, parse_columns, read_trace
from marginroute.cli import main_guard

Array = np.ndarray[Any, Any]

_MIN_SIGMA = 0.002  # keeps a component from collapsing onto one token count


def fit_lengths(tokens: Array, components: int, steps: int = 400, restarts: int = 6, seed: int = 0) -> LengthMixture:
    """The lognormal mixture of highest likelihood found by expectation-maximisation.

    Args:
        tokens: (M,) token counts.
        components: B.
        steps: iterations per restart.
        restarts: starts at random quantiles; the best is kept.
        seed: of the starts.
    """
    values, counts = np.unique(np.log(tokens), return_counts=True)
    share = counts / counts.sum()
    rng = np.random.default_rng(seed)
    fits = [_expectation_maximisation(values, share, components, steps, rng) for _ in range(restarts)]
    _, weight, mu, sigma = max(fits, key=lambda fit: fit[0])
    order = np.argsort(mu)
    return LengthMixture(
        tuple(float(x) for x in weight[order]),
        tuple(float(x) for x in np.exp(mu[order])),
        tuple(float(x) for x in sigma[order]),
        int(np.min(tokens)),
        int(np.max(tokens)),
    )


def _expectation_maximisation(
    values: Array, share: Array, components: int, steps: int, rng: np.random.Generator
) -> tuple[float, Array, Array, Array]:
    """Log-likelihood per request, weights, means and deviations (B,) of ln tokens."""
    starts = np.sort(rng.random(components))
    mu = values[np.searchsorted(np.cumsum(share), starts).clip(max=len(values) - 1)]
    sigma = np.full(components, max((values[-1] - values[0]) / (2.0 * components), _MIN_SIGMA))
    weight = np.full(components, 1.0 / components)
    likelihood = -np.inf
    for _ in range(steps):
        density = weight / sigma * np.exp(-0.5 * np.square((values[:, None] - mu) / sigma)) / np.sqrt(2.0 * np.pi)
        total = density.sum(axis=1) + 1e-300
        likelihood = float(share @ np.log(total))
        owned = density / total[:, None] * share[:, None]
        weight = owned.sum(axis=0) + 1e-12
        mu = owned.T @ values / weight
        sigma = np.sqrt((owned * np.square(values[:, None] - mu)).sum(axis=0) / weight).clip(min=_MIN_SIGMA)
        weight = weight / weight.sum()
    return likelihood, weight, mu, sigma


def ks_distance(tokens: Array, mixture: LengthMixture) -> float:
    """Kolmogorov-Smirnov distance of integer counts from a mixture, largest gap just at or just below a count."""
    values, counts = np.unique(tokens, return_counts=True)
    empirical = np.cumsum(counts) / counts.sum()
    before = np.append(0.0, empirical[:-1])
    return float(max(np.abs(mixture.cdf(values) - empirical).max(), np.abs(mixture.cdf(values - 1) - before).max()))


def fit_mmpp(arrived_at_s: Array, states: int = 2, steps: int = 200) -> tuple[Array, Array, Array]:
    """Rates per second (S,), mean dwell times in seconds (S,) and jump probabilities (S, S), from counts per second."""
    counts = np.bincount(arrived_at_s.astype(np.int64)).astype(np.float64)
    rate = np.quantile(counts, (np.arange(states) + 0.5) / states) + 0.1
    chain = np.full((states, states), 0.02 / max(states - 1, 1))
    np.fill_diagonal(chain, 0.98)
    initial = np.full(states, 1.0 / states)
    for _ in range(steps):
        emission = np.exp(counts[:, None] * np.log(rate) - rate)
        emission /= emission.max(axis=1, keepdims=True)
        forward, backward = _forward_backward(emission, chain, initial)
        posterior = forward * backward
        posterior /= posterior.sum(axis=1, keepdims=True)
        pairs = chain * (forward[:-1].T @ (_scaled(emission[1:] * backward[1:], forward[:-1] @ chain)))
        chain = pairs / pairs.sum(axis=1, keepdims=True)
        rate = np.maximum((posterior * counts[:, None]).sum(axis=0) / posterior.sum(axis=0), 1e-6)
        initial = posterior[0]
    order = np.argsort(rate)
    rate, chain = rate[order], chain[np.ix_(order, order)]
    leave = 1.0 - np.diag(chain)
    jump = np.where(np.eye(states, dtype=bool), 0.0, chain) / leave[:, None]
    return rate, -1.0 / np.log(np.diag(chain)), jump


def _forward_backward(emission: Array, chain: Array, initial: Array) -> tuple[Array, Array]:
    """(D, S) filtered probabilities and (D, S) backward factors, scaled so that their product is the posterior."""
    forward, backward = np.empty_like(emission), np.ones_like(emission)
    state = initial
    for index, likelihood in enumerate(emission):
        state = (state @ chain if index else state) * likelihood
        state = state / state.sum()
        forward[index] = state
    for index in range(len(emission) - 2, -1, -1):
        factor = chain @ (emission[index + 1] * backward[index + 1])
        backward[index] = factor / (forward[index] @ factor)
    return forward, backward


def _scaled(weighted: Array, predicted: Array) -> Array:
    """Divides each step's factors by the step's total probability."""
    return weighted / (predicted * weighted).sum(axis=1, keepdims=True)


def report(trace: Trace, prompt_components: int, output_components: int, states: int) -> str:
    """The fitted sections as YAML."""
    rate, dwell_s, jump = fit_mmpp(trace.arrived_at_s, states)
    lines = ["arrivals:", "  kind: mmpp", "  states:"]
    for index in range(states):
        follow = ", ".join(f"s{other}: {jump[index, other]:.3f}" for other in range(states) if other != index)
        extra = f", next_weight: {{{follow}}}" if states > 2 else ""
        lines.append(f"    s{index}: {{rate_per_s: {rate[index]:.3f}, dwell_s: {dwell_s[index]:.1f}{extra}}}")
    for name, tokens, components in (
        ("prompt_tokens", trace.prompt_tokens, prompt_components),
        ("output_tokens", trace.output_tokens, output_components),
    ):
        mixture = fit_lengths(tokens, components)
        lines += [f"{name}:  # KS {ks_distance(tokens, mixture):.3f}", "  components:"]
        for weight, median, sigma in zip(mixture.weight, mixture.median_tokens, mixture.sigma, strict=True):
            lines.append(f"    - {{weight: {weight:.4f}, median_tokens: {median:.5g}, sigma: {sigma:.4f}}}")
        lines += [f"  min_tokens: {mixture.min_tokens}", f"  max_tokens: {mixture.max_tokens}"]
    return "\n".join(lines)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m envs.workload.fit", description="Fit workload figures to a trace.")
    parser.add_argument("trace", help="file of recorded requests")
    parser.add_argument("--trace-format", default="azure-llm", choices=READERS, help="layout of the file")
    parser.add_argument("--columns", help="csv: our_name=name_in_file,...")
    parser.add_argument("--prompt-components", type=int, default=8, help="lognormal components of prompt lengths")
    parser.add_argument("--output-components", type=int, default=6, help="lognormal components of output lengths")
    parser.add_argument("--states", type=int, default=2, help="states of the arrival process")
    options = parser.parse_args(argv)
    columns = parse_columns(options.columns) if options.columns else None
    trace = read_trace(options.trace, options.trace_format, columns)
    print(report(trace, options.prompt_components, options.output_components, options.states))
    return 0


if __name__ == "__main__":
    sys.exit(main())
