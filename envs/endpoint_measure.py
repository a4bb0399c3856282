"""Iterations of a running engine, measured from outside.

A stream that decodes is a clock: it has one token per iteration, so the time between two of its tokens is that of an
iteration, and no network or tokeniser is in it. Two kinds of experiment:

* decode (n, m): n answers at once; while all decode, seconds per token, by least squares over the tokens' times, are
  those of an iteration with n decodes of mean length m.
* prefill (n, c): next to n streams, a prompt of c tokens that asks for one token. Its token comes at the end of the
  iteration that completes the prefill, at the same instant as a token of the streams; with k = ceil(c / (budget - n))
  chunks the last k gaps are those of the chunks. Several short prompts at once tell the number of tokens in the batch
  from the sum of their squares. Found for all repeats at once, from the times of all tokens.

Prompts are random words and never repeat, so that no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.endpoint_client import Answer, Client, HttpError, Running
from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]

WORDS = ("able", "acid", "aged", "also", "area", "army", "away", "baby", "back", "ball", "band", "bank", "base", "bath")
WINDOW = 64  # decode iterations of one measurement
STREAM_PROMPT_TOKENS = 24
FEWEST = 16  # iterations with which a measurement is good enough
BUDGETS = tuple(2**k for k in range(8, 16))  # max_num_batched_tokens that are told apart
FEWEST_SHOTS = 3
TOGETHER = 0.4  # of an iteration: tokens that come closer to each other are of one
BUDGET_SHOTS = 7
HUBER_ROUNDS = 10
SPREAD = 1.25  # between the streams of one batch: above, some did not decode all the time


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured iteration: n decodes over `kv` tokens together, `prefills` equal chunks behind a prefix, seconds."""

    batch: int
    kv: float
    chunk: int
    prefix: int
    seconds: float
    prefills: int = 1


class Bench:
    """Experiments on one endpoint.

    Args:
        client: The endpoint.
        model: Name to ask for.
        speed: Seconds are multiplied by it.
        most_requests: After that many no further experiment starts.
        most_s: The same, seconds on the wall.
    """

    def __init__(self, client: Client, model: str, speed: float, most_requests: int, most_s: float) -> None:
        self.client, self.model, self.speed = client, model, speed
        self._most_requests, self._ends_at_s = most_requests, time.perf_counter() + most_s
        self._rng, self._extras = random.Random(), {"ignore_eos": True}
        self._characters = (0.0, 4.0)  # tokens of an empty prompt, characters per token
        self.budget_tokens = BUDGETS[-1]
        self.base_s = self.round_trip_s = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the requests or the time are used up."""
        return self.client.requests >= self._most_requests or time.perf_counter() > self._ends_at_s

    async def probe(self) -> None:
        """Finds out how long a token's text is, and how long the shortest iteration takes.

        Raises:
            InputError: The endpoint cannot be measured.
        """
        short = await self._first_answer()
        long = await (await self.ask(1000, 1)).whole()
        per_token = 4.0 * (1000 - 50) / max(long.prompt_tokens - short.prompt_tokens, 1)
        self._characters = (short.prompt_tokens - 4.0 * 50 / per_token, per_token)
        answer = await (await self.ask(STREAM_PROMPT_TOKENS, WINDOW)).whole()
        self.base_s = float(np.median(np.diff(answer.token_s))) * self.speed
        before_s = time.perf_counter()
        for _ in range(3):
            await self.client.get("/v1/models")
        self.round_trip_s = (time.perf_counter() - before_s) / 3.0 * self.speed

    async def _first_answer(self) -> Answer:
        """Tries vLLM's `ignore_eos`, and does without where the endpoint does not know it."""
        try:
            answer = await (await self.ask(50, 8)).whole()
        except HttpError as error:
            if error.status not in (400, 422):
                raise
            self._extras = {}
            answer = await (await self.ask(50, 8)).whole()
        if len(answer.token_s) != 8:
            got = f"{len(answer.token_s)} tokens where 8 were asked for"
            raise InputError(f"{self.client.url}: {got}; legal is an endpoint that honours ignore_eos and max_tokens")
        return answer

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Running:
        """Sends a prompt of about so many tokens."""
        empty, characters = self._characters
        length = max(int((prompt_tokens - empty) * characters), 4)
        words = " ".join(self._rng.choices(WORDS, k=length // 5 + 1))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": words[:length]}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extras,
        }
        return await self.client.start(body)

    def chunks(self, prompt_tokens: int, batch: int) -> list[tuple[int, int]]:
        """(chunk, prefix) of a prompt's prefill next to a decode batch."""
        room = self.budget_tokens - batch
        starts = range(0, prompt_tokens, room)
        return [(min(room, prompt_tokens - start), start) for start in starts]

    async def decode(self, batch: int, prompt_tokens: int) -> list[Row]:
        """Iterations of `batch` decodes; none where they did not all decode at once."""
        ramp = batch * prompt_tokens / max(self.budget_tokens - batch, 1)
        late = self.round_trip_s * (1.0 + 0.1 * batch) / self.base_s
        output_tokens = WINDOW + math.ceil(1.1 * ramp + late) + 4
        running = await asyncio.gather(*(self.ask(prompt_tokens, output_tokens) for _ in range(batch)))
        answers = await asyncio.gather(*(one.whole() for one in running))
        begin_s = max(float(answer.token_s[0]) for answer in answers)
        end_s = min(float(answer.token_s[-1]) for answer in answers)
        slopes, kv = [], 0.0
        for answer in answers:
            inside = np.flatnonzero((answer.token_s >= begin_s) & (answer.token_s <= end_s))
            if len(inside) < FEWEST:
                return []
            slopes.append(_seconds_per_token(answer.token_s[inside]))
            kv += answer.prompt_tokens + 0.5 * float(inside[0] + inside[-1] + 1)
        if max(slopes) > SPREAD * min(slopes):
            return []
        return [Row(batch, kv, 0, 0, float(np.median(slopes)) * self.speed)]

    async def prefill(self, prompt_tokens: int, batch: int, repeats: int, prefills: int = 1) -> list[Row]:
        """Iterations that prefill a prompt next to `batch` streams: one row per chunk.

        With several `prefills` at once, which must fit into one iteration, those count whose tokens came together.
        """
        k = len(self.chunks(prompt_tokens, batch))
        between = 4 + math.ceil(2.0 * self.round_trip_s / self.base_s)
        output_tokens = (repeats + 1) * (k + between) + 2 * between
        streams = await asyncio.gather(*(self.ask(STREAM_PROMPT_TOKENS, output_tokens) for _ in range(batch)))
        for stream in streams:
            await stream.first_token()
        shots, apart = [], []
        for _ in range(repeats):
            sent = await asyncio.gather(*(self.ask(prompt_tokens, 1) for _ in range(prefills)))
            together = [await one.whole() for one in sent]
            near = np.ptp([shot.token_s[0] for shot in together]) * self.speed < TOGETHER * self.base_s
            shots += together[:1] if near else []
            apart += [] if near else together
        clocks = await asyncio.gather(*(stream.whole() for stream in streams))
        token_s = clocks[0].token_s
        at, others = ([int(np.argmin(np.abs(token_s - shot.token_s[0]))) for shot in some] for some in (shots, apart))
        chunks = self.chunks(shots[-1].prompt_tokens, batch) if shots else []
        at = [j for j in at if len(chunks) < j < len(token_s) - 1]
        if len(at) < FEWEST_SHOTS:
            return []
        seconds = _seconds_of_chunks(token_s, at, len(chunks), others) * self.speed
        kv = sum(clock.prompt_tokens for clock in clocks) + batch * float(np.mean(at))
        return [Row(batch, kv, c, x, float(s), prefills) for (c, x), s in zip(chunks, seconds, strict=True)]

    async def find_budget(self, prompt_tokens: int) -> bool:
        """Counts the chunks of a long prompt; False if it was prefilled in one."""
        between, most = 8 + math.ceil(2.0 * self.round_trip_s / self.base_s), prompt_tokens // BUDGETS[0] + 1
        stream = await self.ask(STREAM_PROMPT_TOKENS, (BUDGET_SHOTS + 2) * (most + between))
        await stream.first_token()
        shots = [await (await self.ask(prompt_tokens, 1)).whole() for _ in range(BUDGET_SHOTS)]
        clock = await stream.whole()
        gaps, width = np.diff(clock.token_s) * self.speed, most + 4
        at = [int(np.argmin(np.abs(clock.token_s - shot.token_s[0]))) for shot in shots]
        since = [clock.token_s[1:] > shot.sent_s for shot in shots]
        before = [np.where(new, gaps, 0.0)[j - width : j] for j, new in zip(at, since, strict=True) if j >= width]
        if not before:
            return False
        usual = np.median(before, axis=0)
        long = int(np.sum(usual > max(0.5 * usual.max(), 1.5 * self.base_s)))
        if long < 2:
            return False
        self.budget_tokens = min(BUDGETS, key=lambda budget: abs(math.log(budget * long / shots[0].prompt_tokens)))
        return True

    async def overhead_s(self, prompt_tokens: int, repeats: int) -> tuple[int, float]:
        """(prompt tokens, median TTFT) of an idle endpoint."""
        answers = [await (await self.ask(prompt_tokens, 1)).whole() for _ in range(repeats)]
        return answers[-1].prompt_tokens, float(np.median([answer.ttft_s for answer in answers])) * self.speed


def _seconds_of_chunks(token_s: FloatArray, at: list[int], chunks: int, others: Sequence[int] = ()) -> FloatArray:
    """Seconds of an iteration with the first, second, ... chunk of a prompt, (chunks,).

    Token k comes at a + b k + sum_i d_i times the number of i-th chunks computed by then; b + d_i is what is wanted.
    Processes that have slept long wake up late, so a token behind a chunk has a delay of its own.

    Args:
        token_s: When the tokens of a stream beside came.
        at: Tokens that came together with the end of a prefill.
        chunks: Of every prompt.
        others: Tokens that came together with the end of a prefill whose duration does not matter.
    """
    k = np.arange(len(token_s))
    ends = [np.sort(at) - (chunks - 1 - i) for i in range(chunks)]
    steps = [np.searchsorted(end, k, side="right") for end in ends]
    steps += [k >= j for j in sorted(set(others))]
    late = np.isin(k, np.concatenate(ends)).astype(np.float64)
    solution = _robust(np.column_stack([np.ones(len(k)), k, *steps, late]), token_s)
    return solution[1] + solution[2 : 2 + chunks]


def _seconds_per_token(token_s: FloatArray) -> float:
    """Slope of the tokens' times."""
    return float(_robust(np.column_stack([np.ones(len(token_s)), np.arange(len(token_s))]), token_s)[1])


def _robust(design: FloatArray, token_s: FloatArray) -> FloatArray:
    """Least squares over the last token of every packet, in which late ones count less (Huber)."""
    last = np.append(np.diff(token_s) > 0.0, True)
    design, target = design[last], token_s[last] - token_s[0]
    weight = np.ones(len(target))
    for _ in range(HUBER_ROUNDS):
        root = np.sqrt(weight)
        solution = np.linalg.lstsq(design * root[:, None], target * root, rcond=None)[0]
        off = np.abs(target - design @ solution)
        scale = 1.5 * max(float(np.median(off)), 1e-6)
        weight = scale / np.maximum(off, scale)
    return solution


async def first_model(client: Client) -> tuple[str, int | None]:
    """Name and context length of the first model that the endpoint lists."""
    page = await client.get("/v1/models")
    try:
        listed = json.loads(page)["data"][0]
        return str(listed["id"]), listed.get("max_model_len")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{client.url}: /v1/models lists no model; legal is --model NAME") from None
