"""Authentication in front of vLLM's routes, which ask for none.

OPEN lists the requests that anybody may send: they generate, or read. Every other one changes or
controls the engine, or may do so in a later vLLM, and is refused with 403 unless

    QERL_SYNC_TOKEN is set for the server, and the header x-qerl-sync-proof shows that the sender
    knows the token, for this route: `wire.tokens.proof(token, "http", "/pause")`. `HTTPClient`
    sends it.

    QERL_SYNC_TOKEN is not set, and the request comes from no web page: browsers send an `Origin`
    or a `Sec-Fetch-Site`, programs do not, and vLLM lets pages of all origins ask. Any program
    that reaches the port may do everything; the first trainer that asks is taken.

The paths are compared character by character. Starlette's router takes some other paths for the
same route (`/pause` and a line feed); those are refused, not resolved, so that no difference
between its rules and ours opens a route.

The token keeps out clients that do not know it, and no more:

- Nothing is encrypted, and a proof is the same each time: a client that reads the traffic can
  repeat it.
  The connection between trainer and workers can be read, but not repeated (`wire.connection`).
- vLLM's own backends know no token: these routes alone are protected, and not what goes between
  trainer and workers. Workers of `qerl_nccl` and `qerl_ipc` ask for it too, in the calls that
  bring them a trainer or an update; the bytes are vLLM's.
- vLLM's --api-key is for the routes below /v1 that generate.
- A token that can be guessed is none: `python -c "import secrets; print(secrets.token_hex(32))"`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qerl_sync.wire.tokens import PROOF_HEADER, TOKEN_VARIABLE, proof, same_proof

# vLLM's routes that run the model, by POST or as websockets.
GENERATING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/systemone",  # decisions within a schema, since vLLM 0.32
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
        "/generative_scoring",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/realtime",
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    }
)
# Routes that compute without the model, and `cancel`, which needs the request's secret id.
PREPARING = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/responses/{}/cancel",
        "/ping",
        "/is_scaling_elastic_ep",
    }
)
READING = frozenset(
    {
        "/health",
        "/ping",
        "/load",
        "/version",
        "/metrics",
        "/metrics/",
        "/v1/models",
        "/v1/responses/{}",
        "/tokenizer_info",
        "/server_info",
        "/get_world_size",
        "/weight_info",
        "/is_paused",
        "/is_sleeping",
        "/kv_event_sources",
        "/fault_tolerance/status",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/static/{}",
        "/qerl_sync/ready",
    }
)


def _any_of(paths: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches these paths; {} stands for a name or an id."""
    named = (re.escape(path).replace(r"\{\}", r"[\w.-]+") for path in paths)
    return re.compile("|".join(named), re.ASCII)


OPEN = {
    "POST": _any_of(GENERATING | PREPARING),
    "GET": _any_of(READING),
    "HEAD": _any_of(READING),
    # Browsers ask with it before they POST; no route of vLLM answers it.
    "OPTIONS": re.compile(".*"),
}


def is_open(method: str, route: str) -> bool:
    """Return whether anybody may send this request."""
    return method in OPEN and OPEN[method].fullmatch(route) is not None


def authorize(
    method: str, route: str, headers: Iterable[tuple[bytes, bytes]], token: str
) -> str | None:
    """Return the reason for refusing a request with these headers; None if it is allowed.

    Args:
        headers: with names in lower case, as ASGI has them.
        token: the server's own; empty: it has none.
    """
    if is_open(method, route):
        return None
    reported = dict(headers)
    if token:
        shown = reported.get(PROOF_HEADER.encode(), b"").decode("latin-1")
        if same_proof(proof(token, "http", route), shown):
            return None
        finding = "is that of another" if shown else "is missing"
        return (
            f"{route} is for those who know this server's {TOKEN_VARIABLE}: without it only the "
            f"routes that generate and read are open. The header {PROOF_HEADER} {finding}; set "
            f"the same {TOKEN_VARIABLE} for trainer and server. qerl-sync's clients then send the "
            "header"
        )
    if b"origin" in reported or b"sec-fetch-site" in reported:
        return (
            f"{route} is not for web pages, which may only generate and read, and this request "
            "comes from one: it has an Origin or a Sec-Fetch-Site. Send it from a program"
        )
    return None
