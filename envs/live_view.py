"""The fleet as a picture: queues, batches, KV use and money of one world at one moment.

Colours are Okabe and Ito's. Pillow draws; it comes with the trainer's installation and is imported when the first
picture is made.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.whole_file import write_whole

Array = np.ndarray[Any, Any]

WIDTH, ROW, HEAD, CHART = 720, 34, 58, 150
INK, GREY, PALE = "#1a1a1a", "#777777", "#e8e8e8"
DECODING, PREFILLING, HELD, KV, MARGIN = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00"
BATCH_AT, KV_AT, TEXT_AT = 110, 430, 590  # left edges of the columns
BATCH_WIDE, KV_WIDE = 300, 140


class LiveView:
    """Draws the same world again and again; remembers the margin for its curve.

    Args:
        plant: of the world.
        title: shown on top.
    """

    def __init__(self, plant: Plant, title: str = "") -> None:
        self.plant, self.title = plant, title or plant.scenario.name
        self.rows = int((plant.layout.kind <= v.PROVIDER).sum())
        self.size = (WIDTH, HEAD + ROW * self.rows + CHART)
        self._history: list[tuple[float, float]] = []

    def forget(self) -> None:
        """Starts the curve anew."""
        self._history.clear()

    def frame(self, worlds: FleetWorlds, w: int = 0, last: str = "") -> Array:
        """The world `w` as an image, (height, width, 3) uint8; `last` names the last choice."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size, "white")
        draw = ImageDraw.Draw(image)
        desk = worlds.desks[w]
        now_s, margin_usd = float(desk["now_s"]), float(worlds.ledger_usd[w].sum())
        self._history.append((now_s, margin_usd))
        horizon_s = float(desk["horizon_s"])
        self._head(draw, f"{now_s:7.1f} of {horizon_s:.0f} s", f"margin {margin_usd:9.3f} USD", last)
        for c in range(self.rows):
            self._row(draw, worlds.signals[:, w, c], c)
        self._chart(draw, horizon_s)
        return np.asarray(image).copy()

    def _head(self, draw: Any, time: str, margin: str, last: str) -> None:
        draw.text((12, 8), self.title, INK, _font(16))
        draw.text((BATCH_AT + 170, 10), time, INK, _font(13))
        draw.text((KV_AT, 10), margin, INK, _font(13))
        draw.text((TEXT_AT + 20, 10), f"-> {last}" if last else "", INK, _font(13))
        for x, words, colour in (
            (BATCH_AT, "decoding", DECODING),
            (BATCH_AT + 75, "in prefill", PREFILLING),
            (BATCH_AT + 150, "held by the gateway", HELD),
            (KV_AT, "KV cache in use", KV),
        ):
            draw.rectangle((x, 40, x + 9, 49), fill=colour)
            draw.text((x + 14, 37), words, GREY, _font(11))

    def _row(self, draw: Any, signals: Array, c: int) -> None:
        """One candidate: its batch by the gateway's own counters, its KV cache by the last scrape."""
        y = HEAD + ROW * c
        replica = self.plant.layout.kind[c] == v.REPLICA
        draw.text((12, y + 6), self.plant.layout.names[c], INK, _font(13))
        slots = float(signals[v.SLOTS]) if replica else 64.0
        scale = BATCH_WIDE / max(slots, float(signals[v.IN_FLIGHT]), 1.0)
        held = float(signals[v.HELD])
        decoding = float(signals[v.DECODING])
        prefill = max(float(signals[v.IN_FLIGHT]) - decoding - held, 0.0)
        draw.rectangle((BATCH_AT, y + 4, BATCH_AT + BATCH_WIDE, y + 24), fill=PALE)
        left = float(BATCH_AT)
        for count, colour in ((decoding, DECODING), (prefill, PREFILLING), (held, HELD)):
            if count > 0.0:
                draw.rectangle((left, y + 4, left + count * scale, y + 24), fill=colour)
                left += count * scale
        if replica:
            used = min(max(float(signals[v.KV_USAGE]), 0.0), 1.0)
            draw.rectangle((KV_AT, y + 4, KV_AT + KV_WIDE, y + 24), fill=PALE)
            if used > 0.0:
                draw.rectangle((KV_AT, y + 4, KV_AT + KV_WIDE * used, y + 24), fill=KV)
        waiting = f", {signals[v.WAITING]:.0f} wait" if replica else ""
        draw.text((TEXT_AT, y + 6), f"{signals[v.IN_FLIGHT]:.0f} in flight{waiting}", INK, _font(12))

    def _chart(self, draw: Any, horizon_s: float) -> None:
        """Margin over the episode so far."""
        top, bottom = HEAD + ROW * self.rows + 26, self.size[1] - 22
        left, right = 70, WIDTH - 20
        usd = np.array([point[1] for point in self._history] + [0.0])
        low, high = float(usd.min()), float(max(usd.max(), usd.min() + 0.01))

        def place(now_s: float, value: float) -> tuple[float, float]:
            x = left + (right - left) * min(now_s / horizon_s, 1.0)
            return x, bottom - (bottom - top) * (value - low) / (high - low)

        draw.text((12, top - 18), "margin so far, USD (GPU-hours included)", GREY, _font(11))
        draw.rectangle((left, top, right, bottom), outline=PALE)
        zero = place(0.0, 0.0)[1]
        draw.line((left, zero, right, zero), fill=GREY)
        for value in (low, high):
            draw.text((12, place(0.0, value)[1] - 7), f"{value:8.2f}", GREY, _font(11))
        points = [place(*point) for point in self._history]
        if len(points) > 1:
            draw.line(points, fill=MARGIN, width=2)
        draw.text((right - 60, bottom + 4), f"{horizon_s:.0f} s", GREY, _font(11))


def save_clip(path: Path, frames: Sequence[Array], frames_per_s: float) -> None:
    """Writes pictures as an animated GIF, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    from PIL import Image

    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    clip = io.BytesIO()
    images[0].save(
        clip,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000.0 / frames_per_s),
        loop=0,
    )
    write_whole(path, clip.getvalue())


_fonts: dict[int, Any] = {}


def _font(size: int) -> Any:
    from PIL import ImageFont

    if size not in _fonts:
        _fonts[size] = ImageFont.load_default(size)
    return _fonts[size]
