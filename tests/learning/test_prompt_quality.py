"""The prompt predictor learns a table whose truth is known, and the gateway computes what scikit-learn fitted."""

import json
import warnings

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression

from agents import prompt_quality
from agents.__main__ import main
from agents.prompt_quality import auc_of, design_of, fit_linear, fit_predictor
from agents.quality_command import judge, mean_auc, text_table
from envs.workload.traces_outcomes import Columns, read_outcomes
from marginroute import predictor as predictors
from marginroute.errors import InputError

WORDS = [
    f"{a}{b}" for a in ("lo", "mi", "ka", "re", "tu", "so", "vi", "pa") for b in ("ran", "del", "nop", "fis", "gum")
]


def synthetic(n, seed, models=("small", "large")):
    """(texts, good, true logits): every word of a prompt moves the odds of each model by its own weight."""
    rng = np.random.default_rng(seed)
    effect = np.random.default_rng(99).normal(0.0, 1.2, (len(WORDS), len(models)))
    chosen = rng.random((n, len(WORDS))) < 8 / len(WORDS)
    serial = rng.permutation(n)  # a word of its own, so that no two prompts are alike
    texts = [
        f"{' '.join(w for w, on in zip(WORDS, row, strict=True) if on)} {chr(97 + k % 26)}{chr(97 + k // 26 % 26)}"
        for row, k in zip(chosen, serial, strict=True)
    ]
    logit = chosen @ effect - 8 / len(WORDS) * effect.sum(axis=0) + 0.5
    return texts, (rng.random(logit.shape) < 1.0 / (1.0 + np.exp(-logit))).astype(float), logit


@pytest.fixture(scope="module")
def fitted():
    texts, good, _ = synthetic(1500, 0)
    good[np.random.default_rng(5).random(good.shape) < 0.2] = np.nan
    return fit_predictor(texts, ("small", "large"), good)


def test_it_comes_close_to_the_auc_of_the_truth(fitted):
    texts, good, logit = synthetic(4000, 1)
    best, ours = auc_of(logit, good), auc_of(np.array([fitted.logit(text) for text in texts]), good)
    assert (best > 0.78).all()
    assert (ours > best - 0.04).all() and (ours <= best + 0.01).all()


def test_its_probabilities_are_calibrated(fitted):
    texts, good, _ = synthetic(4000, 2)
    p = np.array([fitted.p_good(text) for text in texts])
    for t in range(2):
        for part in np.array_split(np.argsort(p[:, t]), 5):
            assert good[part, t].mean() == pytest.approx(p[part, t].mean(), abs=0.06)


def test_the_difficulty_signal_is_standard_and_points_the_right_way(fitted):
    texts, good, _ = synthetic(4000, 3)
    signal = np.array([fitted.predict(text)[1] for text in texts])
    assert signal.mean() == pytest.approx(0.0, abs=0.15) and signal.std() == pytest.approx(1.0, abs=0.25)
    assert np.corrcoef(signal, good.mean(axis=1))[0, 1] < -0.3


def test_outcomes_without_a_pattern_teach_nothing():
    texts, good, _ = synthetic(1200, 4)
    good = np.random.default_rng(0).permutation(good)
    predictor = fit_predictor(texts[:800], ("small", "large"), good[:800])
    logit = np.array([predictor.logit(text) for text in texts[800:]])
    assert np.abs(auc_of(logit, good[800:]) - 0.5).max() < 0.09
    assert logit.std(axis=0).max() < 0.35  # and it says so: the same for all prompts


def test_numpy_computes_what_scikit_learn_fitted():
    texts, good, _ = synthetic(300, 6)
    design = design_of(texts)
    linear = fit_linear(design, good, 0.03)
    idf = np.log(301 / (1.0 + design.grams.getnnz(axis=0))) + 1.0
    scale = prompt_quality.SURFACE_SCALE / np.maximum(design.surface.std(axis=0), 1e-9)
    scale[design.surface.std(axis=0) <= 1e-9] = 0.0
    rows = np.hstack([design.grams.multiply(idf).toarray(), (design.surface - design.surface.mean(axis=0)) * scale])
    runtime = predictors.QualityPredictor(
        ("a", "b"), linear.weight, linear.surface, linear.bias, *np.eye(3)[:, :1] * np.ones(2), np.ones(2), np.ones(2)
    )
    ours = np.array([runtime.raw(text) for text in texts])
    for t in range(2):
        theirs = LogisticRegression(C=0.03, max_iter=1000).fit(design_rows(design, idf, scale), good[:, t])
        np.testing.assert_allclose(ours[:, t], theirs.decision_function(rows), rtol=0.0, atol=1e-9)


def design_rows(design, idf, scale):
    """The sparse matrix that scikit-learn is given."""
    import scipy.sparse as sp

    centred = (design.surface - design.surface.mean(axis=0)) * scale
    return sp.hstack([design.grams.multiply(idf), centred], format="csr")


def test_a_file_holds_all_of_it(fitted, tmp_path):
    path = tmp_path / "quality.npz"
    path.write_bytes(fitted.to_bytes())
    again = predictors.load(path)
    assert again.models == fitted.models and again.source == fitted.source
    assert (again.p_good("lorandel midel") == fitted.p_good("lorandel midel")).all()
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04nonsense", b"\x93NUMPY"])
def test_a_spoiled_file_is_refused(data, tmp_path):
    path = tmp_path / "quality.npz"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not a quality predictor"):
        predictors.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        predictors.load(tmp_path / "nowhere.npz")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same outcomes as a wide CSV, a long JSONL and a wide Parquet file."""
    folder = tmp_path_factory.mktemp("tables")
    texts, good, _ = synthetic(400, 7)
    wide = pl.DataFrame({"prompt": texts, "id": range(400), "small": good[:, 0], "large": good[:, 1] > 0})
    wide.write_csv(folder / "wide.csv")
    wide.write_parquet(folder / "wide.parquet")
    with open(folder / "long.jsonl", "w") as file:
        for text, row in zip(texts, good, strict=True):
            for name, outcome in zip(("small", "large"), row, strict=True):
                file.write(json.dumps({"question": text, "model": name, "correct": bool(outcome)}) + "\n")
    return folder


def test_every_layout_reads_the_same(tables):
    read = [read_outcomes(tables / name) for name in ("wide.csv", "wide.parquet", "long.jsonl")]
    for table in read:
        assert table.models == ("small", "large")
        assert table.prompts == read[0].prompts
        np.testing.assert_array_equal(table.score, read[0].score)
    one = read_outcomes(tables / "long.jsonl", Columns(models=("large",)))
    np.testing.assert_array_equal(one.score, read[0].score[:, 1:])


def test_the_command_fits_judges_and_writes(tables, tmp_path, capsys):
    out, figures = tmp_path / "q.npz", tmp_path / "q.json"
    words = ["quality", str(tables / "wide.csv"), "--out", str(out), "--json", str(figures), "--tier", "big=large"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "AUC of length" in printed and "Calibration" in printed
    document = json.loads(figures.read_text())
    assert set(document["models"]) == {"small", "big"} and document["models"]["big"]["n"] == 80
    predictor = predictors.load(out)
    assert predictor.models == ("small", "big")
    np.testing.assert_allclose(predictor.auc, [document["models"][m]["auc"] for m in predictor.models], atol=1e-6)
    assert predictor.auc.mean() > 0.6


def constant(folder):
    pl.DataFrame({"prompt": [f"p{i}" for i in range(90)], "small": [1] * 90}).write_csv(folder / "t.csv")


def words_as_outcomes(folder):
    pl.DataFrame({"prompt": ["a", "b"], "model": ["m", "m"], "correct": ["yes", "no"]}).write_csv(folder / "t.csv")


def out_of_range(folder):
    pl.DataFrame({"prompt": ["a", "b"], "model": ["m", "m"], "score": [0.5, 7.0]}).write_csv(folder / "t.csv")


def no_prompt(folder):
    pl.DataFrame({"words": ["a", "b"], "small": [1, 0]}).write_csv(folder / "t.csv")


def no_outcomes(folder):
    pl.DataFrame({"prompt": ["a", "b"], "tokens": [17, 12]}).write_csv(folder / "t.csv")


def nested(folder):
    messages = [[{"role": "user", "content": "hello"}]] * 2
    pl.DataFrame({"prompt": messages, "small": [1, 0]}).write_ndjson(folder / "t.ndjson")


def twice(folder):
    (folder / "t.csv").write_text("prompt,small,small\na,1,0\n")


def semicolons(folder):
    (folder / "t.csv").write_text("prompt;small\n" + '"a";1\n')


def few(folder):
    pl.DataFrame({"prompt": ["a", "b"], "small": [1, 0]}).write_csv(folder / "t.csv")


def empty(folder):
    (folder / "t.csv").write_text("prompt,small\n")


def binary(folder):
    (folder / "t.csv").write_bytes(bytes(range(256)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (constant, ["90 good and 0 bad", "legal"]),
        (words_as_outcomes, ["row 1", "correct = 'yes'", "legal is true, false, 0 to 1"]),
        (out_of_range, ["row 2", "score = 7.0"]),
        (no_prompt, ["no prompt column", "legal is one of words, small"]),
        (no_outcomes, ["no column of outcomes"]),
        (few, ["2 prompts", "at least 50"]),
        (empty, ["no rows"]),
        (binary, ["t.csv"]),
        (twice, ["two columns are called 'small'"]),
        (semicolons, ["CSV with commas"]),
        (lambda folder: (folder / "t.csv").mkdir(), ["is a folder"]),
        (lambda folder: None, ["t.csv", "cannot be read"]),
    ],
)
def test_bad_tables_give_one_sentence(spoil, words, tmp_path, capsys):
    spoil(tmp_path)
    assert main(["quality", str(tmp_path / "t.csv"), "--out", str(tmp_path / "q.npz")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "\n".join(lines)
    for word in words:
        assert word in lines[-1]
    assert not (tmp_path / "q.npz").exists()


def test_a_prompt_that_is_no_text(tmp_path, capsys):
    nested(tmp_path)
    assert main(["quality", str(tmp_path / "t.ndjson"), "--out", str(tmp_path / "q.npz")]) == 2
    assert "column 'prompt' holds lists or objects; legal is text" in capsys.readouterr().err


def test_a_column_without_outcomes_is_named(tmp_path, capsys):
    """One word among the outcomes would cost a model, a column of models under another name would mix them all."""
    path = tmp_path / "t.csv"
    columns = {"prompt": ["a", "b"], "llm": ["x", "y"], "small": ["1", "good"], "large": ["TRUE", "false"]}
    pl.DataFrame(columns).write_csv(path)
    table = read_outcomes(path)
    assert table.models == ("large",)
    np.testing.assert_array_equal(table.score, [[1.0], [0.0]])
    said = capsys.readouterr().err
    assert "table of the models large; no outcomes are in llm (row 1: 'x'), small (row 2: 'good')" in said
    assert "--model COLUMN" in said


def test_few_outcomes_held_out_are_said_without_nan(fitted):
    """Of the second model two are held out, both good: no AUC, and three of five parts are empty."""
    good = np.column_stack([np.tile([1.0, 0.0], 5), [1.0, 1.0, *[np.nan] * 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = judge(fitted, [f"prompt {i}" for i in range(10)], good, good)
        shown = text_table(("small", "large"), judged)
    assert mean_auc(judged) == judged.auc[0] and np.isnan(judged.auc[1]) and np.isnan(judged.curve[1, 2:]).all()
    assert "nan" not in shown and "-: answers of one kind alone were held out" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tier", "big=nobody"], ["--tier big=nobody", "legal"]),
        (["--tier", "big=larg"], ["--tier big=larg: did you mean large? legal"]),
        (["--tier", "small=large"], ["share a name"]),
        (["--tier", "a=large", "--tier", "b=large"], ["--tier b=large: large is called a already"]),
        (["--models", "large,large"], ["--models 'large,large'", "each once"]),
        (["--models", ""], ["--models ''", "each once"]),
        (["--models", "large,medium"], ["'medium'", "legal is one of"]),
        (["--prompt", "text"], ["'text' is missing"]),
        (["--held-out", "0.9"], ["--held-out 0.9"]),
        (["--good-from", "nan"], ["--good-from nan", "legal"]),
        (["--seed", "-1"], ["--seed -1", "legal"]),
        (["--json", "/nonexistent/figures.json"], ["is not a folder that can be written to"]),
    ],
)
def test_bad_flags_give_one_sentence(more, words, tables, tmp_path, capsys):
    assert main(["quality", str(tables / "wide.csv"), "--out", str(tmp_path / "q.npz"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words)


def test_export_puts_it_into_the_bundle(finished_run, tables, tmp_path, capsys):
    import export
    from marginroute import bundle

    out = tmp_path / "q.npz"
    assert main(["quality", str(tables / "wide.csv"), "--out", str(out)]) == 0
    assert export.main([str(finished_run), "--out", str(tmp_path / "bundle"), "--quality", str(out)]) == 0
    assert "signal_auc" in capsys.readouterr().err
    loaded = bundle.load(tmp_path / "bundle").predictor
    assert loaded.models == ("small", "large")
    assert (
        export.main([str(finished_run), "--out", str(tmp_path / "other"), "--quality", str(tables / "wide.csv")]) == 2
    )
    assert "is not a quality predictor" in capsys.readouterr().err and not (tmp_path / "other").exists()
