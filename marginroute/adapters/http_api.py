"""The sidecar's API: what each call takes and gives; `/openapi.json` and the checks are made of it."""

from __future__ import annotations

from typing import Any

from marginroute import __version__
from marginroute.adapters.schema import Schema, array, boolean, either, fields, integer, number, one_of, string
from marginroute.contracts import STANDINGS
from marginroute.view import Layout

MOST_TOKENS = 100_000_000
MOST_S = 1e7
MOST_WAIT_S = 600.0
MOST_CANDIDATES = 4096
MOST_EVENTS = 1000

_ID = string(200, "of the request, the same in every call about it", least=1)
_MESSAGE = fields({"role": string(100, "`user` for what is asked")}, closed=False)


def decide_schema(layout: Layout) -> Schema:
    """What `POST /v1/decide` takes, for the candidates of a bundle."""
    return fields(
        {
            "id": {**_ID, "description": "of the request; left out: one is made up"},
            "prompt_tokens": integer(0, MOST_TOKENS, "known or estimated; left out: from the prompt"),
            "prompt": string(1 << 24, "text; counted, hashed, read by the bundle's predictor, and not kept"),
            "messages": array(_MESSAGE, 10_000, "as in chat completions, in place of `prompt`"),
            "class": string(200, "customer class; unknown ones count as the default"),
            "task": string(200, "task type; unknown ones count as the default"),
            "tenant": string(200, "who pays; a canary may go by it"),
            "session": string(200, "conversation or agent run; a canary may go by it"),
            "traceparent": string(100, "W3C trace context of the caller's span"),
            "available": array(_candidate(layout), MOST_CANDIDATES, "that may serve it now; left out: all"),
            "cached_tier": one_of(layout.tier_names, "of a stored answer that the gateway has for this request"),
            "similarity": number(
                -1.0, 1.0, "of this prompt and that of the stored answer; left out: 1, the same words"
            ),
            "entry_age_s": number(0.0, MOST_S, "seconds since the stored answer was given"),
            "trial": _trial(layout),
            "difficulty_signal": number(-1e3, 1e3, "predictor of difficulty, standardised"),
            "deadline_left_s": number(0.0, MOST_S, "seconds until its deadline; left out: none"),
            "standing": one_of(STANDINGS, "with its customer's account; left out: within, refused leaves only shed"),
            "quota_left": number(0.0, 1.0, "share of its customer's allowance that is left; left out: 1"),
            "streamed": boolean("whether first token and progress will be reported"),
            "sent": boolean("whether it leaves for the candidate at once, if acted on; left out: true"),
            "wait_s": number(0.0, MOST_WAIT_S, "that the answer may be kept back while it is held; left out: 0"),
            "explain": boolean("whether to say why, in USD"),
        }
    )


def hedge_schema(layout: Layout) -> Schema:
    """What `POST /v1/hedge` takes."""
    return fields(
        {
            "id": _ID,
            "available": array(_candidate(layout), MOST_CANDIDATES, "that may serve it now; left out: as decided"),
            "explain": boolean("whether to say why, in USD"),
        },
        ("id",),
    )


def _trial(layout: Layout) -> Schema:
    return fields(
        {
            "tiers": array(one_of(layout.tier_names, "a model"), 8, "whose answers a verifier turned down, in order"),
            "score": number(0.0, 1.0, "of the last one, which is in hand: candidate `cache` delivers it"),
            "waited_s": number(0.0, MOST_S, "since the request arrived; left out: 0"),
            "age_s": number(0.0, MOST_S, "since the last one was looked at; left out: 0"),
        },
        required=("tiers", "score"),
    )


def _candidate(layout: Layout) -> Schema:
    return one_of(layout.names, "a candidate of the bundle")


def events_schema(layout: Layout) -> Schema:
    """What `POST /v1/events` takes."""
    candidate, streamed = _candidate(layout), boolean("whether first token and progress will be reported")
    ago_s = number(0.0, MOST_S, "seconds since it happened")
    served_by = one_of(("", *layout.names), "candidate that answered; empty: none of the bundle's")
    outcome = {
        "status": one_of(("completed", "failed", "abandoned", "shed"), "how it ended"),
        "served_by": served_by,
        "ttft_s": number(0.0, MOST_S, "from the request's arrival to its first token"),
        "e2e_s": number(0.0, MOST_S, "from the request's arrival to its last token"),
        "attempt_ttft_s": number(0.0, MOST_S, "the same from the start of the attempt that answered"),
        "attempt_e2e_s": number(0.0, MOST_S, "the same"),
        "prompt_tokens": integer(0, MOST_TOKENS, "as counted by who answered"),
        "output_tokens": integer(0, MOST_TOKENS, "the same"),
        "cost_usd": number(0.0, 1e6, "what the answer cost the operator; left out: by the bundle's figures"),
    }
    scrape = {
        "waiting": number(0.0, 1e6, "requests waiting in the engine"),
        "running": number(0.0, 1e6, "requests running in the engine"),
        "kv_usage": number(0.0, 1.0, "share of KV blocks in use"),
    }
    refused_s = number(0.0, MOST_S, "a provider's limit is spent (429): its Retry-After, 0 if it names none")
    rates = {
        "requests_left": number(0.0, 1e12, "of the limit on requests (x-ratelimit-remaining-requests)"),
        "tokens_left": number(0.0, 1e12, "of the limit on tokens (x-ratelimit-remaining-tokens)"),
        "retry_after_s": refused_s,
        "ago_s": ago_s,
    }
    one_of_two = one_of(layout.names, "whose, where two have it; left out: the first one's, of a failure both")
    of_request, pool = {"id": _ID}, one_of(layout.station_names, "a pool of the bundle")
    replicas = number(0.0, 1e5, "replicas")
    scaled = {"starting": replicas, "draining": replicas, "next_ready_s": number(0.0, MOST_S, "until one is ready")}
    kinds = [
        _event("sent", "it leaves for a candidate", of_request | {"candidate": candidate}, streamed=streamed),
        _event("first_token", "its first token came", of_request, ago_s=ago_s, candidate=one_of_two),
        _event("progress", "so many tokens have streamed", of_request | {"tokens": integer(0, MOST_TOKENS, "so far")}),
        _event("attempt_failed", "it may be decided again", of_request, candidate=one_of_two, retry_after_s=refused_s),
        _event("judged", "its answer turned out good or bad", of_request | {"good": boolean("whether it was good")}),
        _event("finished", "it is over", of_request | {"status": outcome.pop("status")}, **outcome),
        _event("replicas", "what an autoscaler has of a pool", {"pool": pool, "ready": replicas}, **scaled),
        _event("scraped", "an engine's metrics, of no request", {"candidate": candidate, **scrape}, ago_s=ago_s),
        _event("rate_limit", "what a provider's response says of its limits", {"candidate": candidate}, **rates),
    ]
    events = array(either("event", kinds), MOST_EVENTS, "in the order in which they happened")
    return fields({"events": events}, ("events",))


def _event(kind: str, about: str, needed: dict[str, Schema], **more: Schema) -> Schema:
    return fields({"event": one_of((kind,), about), **needed, **more}, ("event", *needed))


DECISION = fields(
    {
        "id": string(200, "of the request"),
        "candidate": string(200, "the choice"),
        "kind": one_of(("replica", "provider", "cache", "defer", "shed"), "of the choice"),
        "endpoint": string(1000, "where the candidate is reached, if the settings say; else empty"),
        "held": boolean("true: it is not its turn; ask again with the same `id` and its place is kept"),
        "acting": boolean("true: do it; false (shadow mode, or not in the canary): route as without us"),
        "attempt": integer(1, MOST_TOKENS, "1 for the first decision of a request"),
        "retry_after_s": number(0.0, MOST_S, "for *shed*: when to try again, about"),
        "policy": string(200, "that decided"),
        "guard": string(200, "why the fallback decided; empty if it did not"),
        "reason_usd": {"type": "object", "additionalProperties": {"type": "number"}, "description": "with `explain`"},
        "runner_up": string(200, "with `explain`: what came second"),
        "runner_up_usd": number(-1e9, 1e9, "with `explain`: by how many USD"),
        "probability": number(0.0, 1.0, "with `explain`: that it was chosen"),
    },
    ("id", "candidate", "kind", "endpoint", "acting", "held", "attempt", "retry_after_s", "policy", "guard"),
)
HEDGE = fields(
    {
        "id": string(200, "of the request"),
        "wait": boolean("true: nobody else gets it now, which is all that is ever said of an unknown request"),
        "candidate": string(200, "who gets the request, too; empty: nobody"),
        "endpoint": string(1000, "where that is reached, if the settings say; else empty"),
        "acting": boolean("true: do it; false (shadow mode, or not in the canary): go on as without us"),
        "reason_usd": {"type": "object", "additionalProperties": {"type": "number"}, "description": "with `explain`"},
        "runner_up": string(200, "with `explain`: what came second"),
        "runner_up_usd": number(-1e9, 1e9, "with `explain`: by how many USD"),
    },
    ("id", "wait", "candidate", "endpoint", "acting"),
)
COUNTED = fields(
    {"known": integer(0, MOST_EVENTS, "events of requests that are known (under way, lately answered), and scrapes")},
    ("known",),
)
ERROR = fields({"error": string(10_000, "one sentence")}, ("error",))


def _json(schema: Schema, about: str) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _call(summary: str, takes: Schema | None, gives: Schema, secured: bool = True) -> dict[str, Any]:
    responses = {"200": _json(gives, "done")}
    if secured:
        responses["401"] = _json(ERROR, "the token is missing or wrong")
    call: dict[str, Any] = {"summary": summary, "responses": responses}
    if takes is not None:
        call["requestBody"] = {"required": True, "content": {"application/json": {"schema": takes}}}
        for code, about in (("400", "no JSON"), ("413", "too large"), ("422", "not what the schema says")):
            responses[code] = _json(ERROR, about)
    if not secured:
        call["security"] = []
    return call


_ANYTHING: Schema = {"type": "object"}


def document(layout: Layout, token: bool) -> dict[str, Any]:
    """The OpenAPI document of a sidecar with these candidates, that asks for a token or not."""
    text = {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    metrics = _call("Counters for Prometheus.", None, _ANYTHING)
    metrics["responses"]["200"] = text
    ready = _call("Whether it takes requests.", None, _ANYTHING, secured=False)
    ready["responses"]["503"] = _json(_ANYTHING, "it is stopping")
    pools = {"type": "object", "additionalProperties": fields({"replicas": integer(0, MOST_TOKENS, "wanted")})}
    scale = _call("How many replicas the controller wants.", None, fields({"pools": pools}, ("pools",)))
    scale["responses"]["409"] = _json(ERROR, "there is no controller, or it may not act")
    secured = {
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
    }
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "marginroute sidecar",
            "version": __version__,
            "description": "Decides where a request goes, by an exported bundle.",
        },
        "paths": {
            "/v1/decide": {"post": _call("Where a request should go.", decide_schema(layout), DECISION)},
            "/v1/hedge": {"post": _call("Who else gets a call without first token.", hedge_schema(layout), HEDGE)},
            "/v1/events": {"post": _call("What became of requests.", events_schema(layout), COUNTED)},
            "/v1/scale": {"get": scale},
            "/v1/status": {"get": _call("Mode, bundle and what is under way.", None, _ANYTHING)},
            "/metrics": {"get": metrics},
            "/health": {"get": _call("Whether the process answers.", None, _ANYTHING, secured=False)},
            "/ready": {"get": ready},
            "/openapi.json": {"get": _call("This document.", None, _ANYTHING, secured=False)},
        },
        **(secured if token else {}),
    }
