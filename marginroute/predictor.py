"""P(good answer) of every model from the text of a prompt: numpy inference of what `agents.prompt_quality` fits.

    z_m  = bias_m + surface_m . s(text) + m^(-1/2) sum_{n-grams g} weight[bucket(g), m]
    logit P_m = scale_m z_m + shared_m mean(z) + offset_m

The second line is the calibration, fitted on predictions of rows that z was not fitted on; its shared term lends every
model the mean verdict of all, which is how hard the prompt is. Everything is one linear map of the text's n-grams, so a
prompt costs one gather of a few thousand rows.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from marginroute import prompt
from marginroute.errors import InputError
from marginroute.view import Array

FORMAT = 1
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class QualityPredictor:
    """A fitted predictor for T models.

    Attributes:
        models: (T,) names; those of tiers where a gateway is to use it.
        weight: (2^bits, T) f8, one row per bucket of n-grams.
        surface: (S, T) of `prompt.SURFACE_NAMES`.
        bias: (T,).
        scale, shared, offset: (T,) calibration.
        difficulty: (2,) mean and standard deviation, over the table's prompts, of the mean logit of all models.
        auc: (T,) area under the ROC curve on rows held out; NaN where they had one outcome only.
        source: table and command in words.
    """

    models: tuple[str, ...]
    weight: Array
    surface: Array
    bias: Array
    scale: Array
    shared: Array
    offset: Array
    difficulty: Array
    auc: Array
    source: str = ""

    def raw(self, text: str) -> Array:
        """(T,) z, before calibration."""
        data, size = prompt.read(text)
        index = prompt.buckets(data, self.weight.shape[0].bit_length() - 1)
        grams = np.ones(len(index)) @ self.weight.take(index, axis=0) / max(len(index), 1) ** 0.5
        z: Array = self.bias + prompt.surface(data, size) @ self.surface + grams
        return z

    def logit(self, text: str) -> Array:
        """(T,) calibrated log-odds of a good answer."""
        z = self.raw(text)
        logit: Array = self.scale * z + self.shared * (np.add.reduce(z) / len(z)) + self.offset
        return logit

    def p_good(self, text: str) -> Array:
        """(T,) probabilities of a good answer."""
        return self.predict(text)[0]

    def predict(self, text: str) -> tuple[Array, float]:
        """(T,) probabilities, and the difficulty signal: minus the mean logit, standardised over its table."""
        logit = np.minimum(np.maximum(self.logit(text), -30.0), 30.0)
        mean, deviation = self.difficulty
        signal = (mean - float(np.add.reduce(logit)) / len(logit)) / max(deviation, 1e-9)
        return 1.0 / (1.0 + np.exp(-logit)), float(signal)

    def to_bytes(self) -> bytes:
        """An npz archive of plain arrays; words travel as JSON in bytes."""
        words = {"format": FORMAT, "models": list(self.models), "source": self.source}
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("models", "source")}
        arrays["words"] = np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes, name: str) -> QualityPredictor:
        """The inverse of `to_bytes`.

        Raises:
            InputError: not a predictor of this format, `name` says which file.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            words = json.loads(arrays.pop("words").tobytes())
            if words["format"] != FORMAT:
                raise InputError(f"{name} has predictor format {words['format']}; legal is {FORMAT}: fit it again")
            predictor = QualityPredictor(models=tuple(words["models"]), source=words["source"], **arrays)
            _check(predictor)
        except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, EOFError):
            raise InputError(
                f"{name} is not a quality predictor; legal is a file of python -m agents quality"
            ) from None
        return predictor


def _check(predictor: QualityPredictor) -> None:
    """Raises ValueError unless shapes fit together and every weight is finite."""
    t, rows = len(predictor.models), predictor.weight.shape[0]
    if t == 0 or len(set(predictor.models)) != t or rows & (rows - 1) or not 1 < rows <= 1 << 22:
        raise ValueError("models or buckets")
    vectors = (predictor.bias, predictor.scale, predictor.shared, predictor.offset, predictor.auc)
    shapes = [(rows, t), (len(prompt.SURFACE_NAMES), t), (2,), *[(t,)] * len(vectors)]
    arrays = [predictor.weight, predictor.surface, predictor.difficulty, *vectors]
    if [a.shape for a in arrays] != shapes or not all(np.isfinite(a).all() for a in arrays[:-1]):
        raise ValueError("shapes")


def load(path: str | Path) -> QualityPredictor:
    """Reads a predictor.

    Raises:
        InputError: missing, too large, or not a predictor.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; legal is a predictor below that")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); legal is a file of python -m agents quality"
        ) from None
    return QualityPredictor.from_bytes(data, str(path))
