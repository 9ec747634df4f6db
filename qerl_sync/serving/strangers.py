"""Who may change or control an engine behind the gate: vLLM's own routes ask nobody who he is.

    QERL_SYNC_TOKEN is set for the server: a request to one of the routes in GUARDED needs the
    header x-qerl-sync-proof, which shows that its sender knows the token, for this route:
    `wire.channel.proof(token, "http", "/pause")`. `HTTPClient` sends it. Others get 403: no
    stranger pauses, resumes, opens the gate, or has the workers run anything.

    It is not: a request with an `Origin` gets 403, which browsers send and programs do not, since
    vLLM lets pages of all origins ask. Whoever else reaches the port may do everything; the first
    trainer that asks is taken.

The token keeps out who does not know it, and no more:

- Nothing is encrypted, and a proof is the same each time: who can read the traffic can repeat it.
  The connection between trainer and workers can be read, but not repeated (`wire.channel`).
- vLLM's own backends know no token: these routes alone are protected, and not what goes between
  trainer and workers. Workers of `qerl_nccl` and `qerl_ipc` ask for it too, in the calls that
  bring them a trainer or an update; the bytes are vLLM's.
- Routes that generate, tell, or empty caches stay open, as TRL needs them. vLLM's --api-key is for
  those below /v1.
- A token that can be guessed is none: `python -c "import secrets; print(secrets.token_hex(32))"`.
"""

from __future__ import annotations

from collections.abc import Iterable

from qerl_sync.wire.channel import PROOF_HEADER, TOKEN_VARIABLE, proof, same_proof

GUARDED = frozenset(
    {
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_checker",
        "/collective_rpc",
        "/pause",
        "/resume",
        "/abort_requests",
        "/sleep",
        "/wake_up",
        "/release_kv_cache_memory",
        "/qerl_sync/refuse",
        "/qerl_sync/admit",
    }
)


def why_not(route: str, headers: Iterable[tuple[bytes, bytes]], token: str) -> str | None:
    """Why a POST with these headers is refused; None: its sender may.

    Args:
        headers: with names in lower case, as ASGI has them.
        token: the server's own; empty: it has none.
    """
    if route not in GUARDED:
        return None
    told = dict(headers)
    if token:
        return _why_unproven(route, told.get(PROOF_HEADER.encode(), b"").decode("latin-1"), token)
    if b"origin" in told:
        return (
            f"{route} is not for web pages, and this request comes from one: it has an Origin. "
            "Send it from a program"
        )
    return None


def _why_unproven(route: str, told: str, token: str) -> str | None:
    if same_proof(proof(token, "http", route), told):
        return None
    finding = "is that of another" if told else "is missing"
    return (
        f"{route} is for those who know this server's {TOKEN_VARIABLE}, and the header "
        f"{PROOF_HEADER} {finding}; set the same {TOKEN_VARIABLE} for trainer and server. "
        "qerl-sync's clients then send the header"
    )
