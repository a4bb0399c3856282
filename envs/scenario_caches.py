"""The caches that a gateway keeps: answers, for the same prompt or one that means the same, and results of tools."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from envs.scenario_section import NonNegative, Positive, Section, Share
from marginroute.response_cache import PUBLIC_HALF, PUBLIC_WIDTH


class ResultCache(Section):
    """Cache of results of tools and retrieval, by key: a hit skips the wait and the cost of a call."""

    ttl_s: Positive = Field(description="Seconds after which a result is stale.")
    lookup_s: Annotated[float, Field(ge=0.001)] = Field(0.001, description="Seconds that a result from it takes.")


class SemanticSearch(Section):
    """Look-ups by nearness of meaning: every prompt is embedded before it is decided on."""

    min_similarity: Share = Field(0.5, description="Cosine similarity below which nothing is found.")
    embed_s: NonNegative = Field(description="Seconds that embedding and search add to every request looked up.")
    embed_usd_per_mtok: NonNegative = Field(0.0, description="USD of embedding a million prompt tokens.")
    lookup_usd: NonNegative = Field(0.0, description="USD of a search.")
    half_similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        PUBLIC_HALF, description="What the operator assumes: similarity at which an answer is as likely right as wrong."
    )
    width: Positive = Field(PUBLIC_WIDTH, description="What the operator assumes: width of the curve around it.")


class ResponseCache(Section):
    """Cache of answers, kept by the gateway: for the same prompt, or also for prompts that mean the same."""

    capacity_entries: Annotated[int, Field(ge=1)] = Field(description="Answers kept; the oldest use leaves first.")
    ttl_s: Positive = Field(description="Seconds after which a stored answer is stale.")
    lookup_s: NonNegative = Field(description="Seconds that an answer from the cache takes.")
    entry_usd: NonNegative = Field(0.0, description="USD per answer stored.")
    shared: bool = Field(False, description="Whether tenants may get each other's answers.")
    semantic: SemanticSearch | None = Field(
        None, description="Look-ups by nearness of meaning; left out: the same prompt only."
    )
