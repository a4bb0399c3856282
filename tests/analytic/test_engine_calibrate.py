"""A fit to iterations of a known engine finds that engine."""

import dataclasses

import numpy as np
import pytest

from envs.fleet.calibrate import BATCH_COLUMNS, SINGLE_COLUMNS, fit_iterations, measured_from_columns
from envs.fleet.iteration import batch_seconds
from envs.fleet.profile import compact_profile
from marginroute.errors import InputError


def _known_seconds(tokens, batch, kv, square, product):
    """Weights are read in 10 ms or 20 us per token, whichever is longer; 0.1 us per token of context."""
    return np.maximum(0.010, 2e-5 * tokens) + 1e-7 * kv + 3e-8 * (square / 2 + product)


@pytest.fixture(scope="module")
def columns():
    rng = np.random.default_rng(1)
    n = 1200
    batch = rng.integers(1, 129, n) * (rng.random(n) < 0.7)
    chunk = rng.integers(1, 2049, n) * ((rng.random(n) < 0.7) | (batch == 0))
    prefix = rng.integers(0, 4097, n) * (chunk > 0) * (rng.random(n) < 0.6)
    mean_kv = rng.integers(64, 4097, n) * (batch > 0)
    values = (chunk, prefix, batch, mean_kv, np.zeros(n))
    columns = {name: np.asarray(v, dtype=float) for name, v in zip(SINGLE_COLUMNS, values, strict=True)}
    seconds = _known_seconds(chunk + batch, batch, batch * mean_kv, chunk.astype(float) ** 2, chunk * prefix)
    columns["iter_ms"] = 1e3 * seconds
    return columns


def test_a_known_engine_is_found(columns):
    fit = fit_iterations(measured_from_columns(columns, "table"), {"title": "known"})
    assert fit["fit"]["median_error_pct"] < 0.2
    assert fit["fit"]["max_error_pct"] < 2.0
    profile = compact_profile("known", fit)
    assert profile.facts["title"] == "known"
    for decodes, chunks in (([1000] * 64, []), ([], [(1500, 2000)]), ([3000] * 100, [(512, 1024)]), ([100], [(30, 0)])):
        batch, kv = len(decodes), sum(decodes)
        tokens = batch + sum(c for c, _ in chunks)
        square, product = sum(c * c for c, _ in chunks), sum(c * x for c, x in chunks)
        known = _known_seconds(tokens, batch, kv, square, product)
        assert batch_seconds(profile, decodes, chunks) == pytest.approx(known, rel=0.01)


def test_both_layouts_say_the_same(columns):
    single = measured_from_columns(columns, "single")
    chunk, prefix = columns["prefill_tokens"], columns["prefill_prefix"]
    values = (
        (chunk > 0).astype(float),
        chunk,
        chunk**2,
        prefix,
        chunk * prefix,
        columns["decode_batch"],
        columns["decode_batch"] * columns["mean_kv"],
        columns["iter_ms"] / 1e3,
    )
    sums = measured_from_columns(dict(zip(BATCH_COLUMNS, values, strict=True)), "sums")
    for field in dataclasses.fields(single):
        np.testing.assert_array_equal(getattr(single, field.name), getattr(sums, field.name), err_msg=field.name)


def test_tables_that_cannot_be_fitted_are_refused(columns):
    with pytest.raises(InputError, match="columns"):
        measured_from_columns({"a": np.ones(50)}, "t")
    with pytest.raises(InputError, match="40 or more"):
        measured_from_columns({name: values[:10] for name, values in columns.items()}, "t")
    with pytest.raises(InputError, match=r"iter_ms = -1.0 in row 3"):
        measured_from_columns(columns | {"iter_ms": np.where(np.arange(1200) == 2, -1.0, 1.0)}, "t")
    only_decodes = {name: values[columns["prefill_tokens"] == 0] for name, values in columns.items()}
    with pytest.raises(InputError, match="rows with decodes, with prefills"):
        fit_iterations(measured_from_columns(only_decodes, "t"), {})


def test_a_step_behind_a_full_tile_is_found():
    """Tokens are computed in tiles of 256: the time is flat inside a tile and jumps behind it."""
    rng = np.random.default_rng(3)
    n = 2000
    batch, chunk = rng.integers(1, 65, n), rng.integers(1, 961, n)
    prefix = rng.integers(0, 33, n) * 64
    mean_kv = rng.integers(64, 2049, n)
    tokens = batch + chunk
    seconds = 0.005 * np.ceil(tokens / 256) + 1e-7 * batch * mean_kv + 1e-9 * chunk * prefix
    values = (chunk, prefix, batch, mean_kv, 1e3 * seconds)
    columns = {name: np.asarray(v, dtype=float) for name, v in zip(SINGLE_COLUMNS, values, strict=True)}
    fit = fit_iterations(measured_from_columns(columns, "table"), {})
    assert {256, 257, 512, 513, 768, 769} <= set(fit["token_knots"])
    assert fit["fit"]["p95_error_pct"] < 0.1
    profile = compact_profile("steps", fit)
    for size in (200, 255, 256, 257, 300, 511, 513, 700):
        known = 0.005 * np.ceil((size + 8) / 256) + 1e-7 * 8 * 500
        assert batch_seconds(profile, [500] * 8, [(size, 0)]) == pytest.approx(known, rel=0.02)
