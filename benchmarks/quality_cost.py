"""The measurement of the quality predictor in benchmarks/decision.py."""

from __future__ import annotations

import time

import numpy as np

from agents.prompt_quality import BITS
from marginroute import prompt
from marginroute.predictor import QualityPredictor

MODELS = 9
PROMPT_BYTES = (100, 320, 2000)  # 320: the median of MMLU's questions


def predictor_of(models: int) -> QualityPredictor:
    """A quality predictor with random weights."""
    rng, rows = np.random.default_rng(0), len(prompt.SURFACE_NAMES)
    vectors = [np.zeros(models), np.ones(models), np.zeros(models), np.zeros(models), np.array([0.0, 1.0])]
    names = tuple(f"model-{t}" for t in range(models))
    weight, surface = rng.normal(size=(1 << BITS, models)), rng.normal(size=(rows, models))
    return QualityPredictor(names, weight, surface, *vectors, np.full(models, 0.7))


def prompts_of(n_bytes: int, n: int) -> list[str]:
    """Random letters in words of about six."""
    rng = np.random.default_rng(n_bytes)
    return ["".join(rng.choice(list("abcdefghijklmnopqrst    "), n_bytes)) for _ in range(n)]


def figures(quick: bool) -> dict[str, dict[str, float]]:
    """Microseconds of P(good) of all models, median and p99, by bytes of the prompt."""
    predictor, calls = predictor_of(MODELS), 500 if quick else 5000
    found = {}
    for n_bytes in PROMPT_BYTES:
        times, prompts = np.empty(calls), prompts_of(n_bytes, 50)
        for i in range(calls):
            start = time.perf_counter_ns()
            predictor.predict(prompts[i % 50])
            times[i] = time.perf_counter_ns() - start
        median, p99 = (round(float(np.quantile(times, q)) / 1e3, 1) for q in (0.5, 0.99))
        found[str(n_bytes)] = {"median": median, "p99": p99}
    return found
