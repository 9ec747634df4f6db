"""ASGI middleware: 503 while the weights are invalid, 403 for unauthenticated control calls.

    vllm serve MODEL --middleware qerl_sync.serving.middleware.ServingGuardMiddleware

An engine with invalid weights is paused, so its requests wait. The middleware answers new requests
with 503 and the reason. Requests that are already in the engine stay there, and continue after the
next successful sync. Health, status and the RL routes pass.

Three events close the middleware; each has its own way to open it:

               POST /qerl_sync/refuse {"reason": ...}
        open ───────────────────────────────────────▶ told      the trainer knows that a sync failed
             ◀─ POST /qerl_sync/admit; commit ───────

               paused, an update begun, no control
               call for QUIET_SECONDS
        open ───────────────────────────────────────▶ abandoned    the trainer is gone
             ◀─ resume; POST /qerl_sync/admit; commit

               /scale_elastic_ep, after a commit
        open ───────────────────────────────────────▶ told      replicas joined, without that sync
             ◀─ POST /qerl_sync/admit; commit ───────

A commit is a `finish_weight_update` with a weight version that vLLM has answered with 200: our
trainers give one only when every worker has loaded all weights. A finish without a version opens
nothing: a failed sync ends with it, and a new trainer closes a dead trainer's update with it.
`resume` does not open the state `told` either: code that resumes in a `finally` would end the
engine, since its poisoned model does not run. If a failed sync left the engine untouched, or the
old weights were restored, the trainer resumes and admits.

During a pause without an update requests wait, as in vLLM alone. They also wait during a control
call: its trainer is alive, or the worker gives up on it. `/pause?mode=wait` may take minutes and
involves no worker. If its caller disconnects before the response, the middleware resumes the
engine, unless it was paused before or a newer control call owns it.

Without VLLM_SERVER_DEV_MODE=1 vLLM has no RL routes, so nothing closes the middleware.

Before all that `serving.auth` decides which requests get 403, commits included.

    GET /qerl_sync/ready    200 or 503, for the readiness probe of a load balancer: as /health,
                            and 503 while the middleware is closed

    GET /metrics            vLLM's own, and `qerl_sync_server_*` (docs/metrics)

The state belongs to one process: with several API servers for one engine, only the server that
received the call refuses.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qerl_sync.engines.base import why_refused
from qerl_sync.serving import metrics
from qerl_sync.serving.auth import GENERATING, authorize
from qerl_sync.wire.tokens import TOKEN_VARIABLE
from qerl_sync.worker.compat.caches import ask_every_replica

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# `--middleware` of vLLM takes it.
NAME = "qerl_sync.serving.middleware.ServingGuardMiddleware"

# An update without a control call for so long means that its trainer is dead.
QUIET_SECONDS = 5.0
RETRY_SECONDS = 5
MAX_REASON_CHARACTERS = 500
MAX_BODY_BYTES = 16 * 1024
# RFC 6455's "policy violation" and "try again later".
CLOSE_CODES = {400: 1008, 403: 1008, 503: 1013}
KINDS = {400: "BadRequestError", 403: "PermissionDeniedError", 503: "ServiceUnavailableError"}

UPDATING = frozenset(
    {
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
    }
)
CONTROL = UPDATING | {"/pause", "/resume"}


class ServingState:
    """The states above, as they follow from the requests that have passed.

    Attributes:
        paused: the engine is, by a pause that was answered.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reported: str | None = None
        self._updating = self._abandoned = False
        self._committed = False
        self._open_calls, self._last_end = 0, 0.0
        self._num_calls = self._resumed_at = 0
        self._paused_since = 0.0
        self.paused = False

    def refuse(self, reason: str) -> None:
        self._reported = reason

    def admit(self) -> None:
        self._reported, self._abandoned = None, False

    def scaled(self) -> None:
        """Record that replicas may have joined.

        Before the first commit this needs nothing: all replicas have the checkpoint's weights.
        """
        if self._committed:
            self._reported = (
                "it was scaled since its last sync, and replicas that have joined have not had one"
            )

    def call_begins(self) -> int:
        """Record that a control call begins. Return its number."""
        self.reason()  # before this call ends the quiet
        self._open_calls += 1
        self._num_calls += 1
        return self._num_calls

    def is_last(self, call: int) -> bool:
        return call == self._num_calls

    def call_ends(self, call: int, route: str, *, ok: bool, version: object) -> None:
        """Record that a control call ends. `version`: that it has given; None: none."""
        self._open_calls -= 1
        self._last_end = self._clock()
        if route in UPDATING:
            self._updating |= self.paused
        if ok and version is not None:
            self._committed = True
            self.admit()
            metrics.committed(version)
        if ok and route == "/pause" and call > self._resumed_at:
            if not self.paused:
                self._paused_since = self._clock()
            self.paused = True
        if ok and route == "/resume":
            if self.paused:
                metrics.resumed(self._clock() - self._paused_since)
            self.paused = self._updating = self._abandoned = False
            self._resumed_at = call

    def reason(self) -> str | None:
        """Return why requests are refused; None if they are accepted."""
        quiet_seconds = 0.0 if self._open_calls else self._clock() - self._last_end
        if self.paused and self._updating and quiet_seconds > QUIET_SECONDS:
            self._abandoned = True
        if self._reported is None and self._abandoned:
            return "a weight update was begun, and its trainer has not gone on with it"
        return self._reported


class ServingGuardMiddleware:
    """The middleware around `app`. `clock` returns seconds."""

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._watch = ServingState(clock)
        self._is_driven = bool(int(os.environ.get("VLLM_SERVER_DEV_MODE") or 0))
        self._token = os.environ.get(TOKEN_VARIABLE, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        # The path below the server's root, by the rules of Starlette, which routes the request: any
        # difference to its rules would be a bypass.
        route, root = str(scope["path"]), str(scope.get("root_path", ""))
        if root and route.startswith(f"{root}/"):
            route = route[len(root) :]
        method = scope.get("method", "POST")  # a websocket has none
        # Starlette's patterns end in `$`, which lets a line feed follow: it would take `/pause\n`
        # for `/pause`, and the comparisons below would not.
        if not route.isprintable():
            return await _deny(scope, receive, send, 400, "the path holds control characters")
        why = authorize(method, route, scope.get("headers", ()), self._token)
        if why is not None:
            return await _deny(scope, receive, send, 403, why)
        if method == "POST" and route in GENERATING:
            reason = self._watch.reason()
            if reason is not None:
                return await _deny(scope, receive, send, 503, why_refused(reason))
            return await self._app(scope, receive, send)
        if method == "GET" and route == "/qerl_sync/ready":
            return await self._ready(scope, receive, send)
        if method == "GET" and route in ("/metrics", "/metrics/"):
            refusing = self._watch.reason() is not None
            metrics.set_states(refusing=refusing, paused=self._watch.paused)
        if method == "POST" and self._is_driven and scope["type"] == "http":
            if route == "/pause":
                return await self._pause(scope, receive, send)
            if route in CONTROL:
                await self._control(route, scope, receive, send)
                return
            if route == "/scale_elastic_ep":

                async def answer(message: Message) -> None:
                    # Before it is sent: from then on vLLM hands requests to the new replicas.
                    if message.get("status") == 200:
                        self._watch.scaled()
                    await send(message)

                return await self._app(scope, receive, answer)
            if route == "/reset_prefix_cache":
                state = getattr(scope.get("app"), "state", None)
                ask_every_replica(getattr(state, "engine_client", None))
            if route == "/qerl_sync/refuse":
                return await self._refuse(receive, send)
            if route == "/qerl_sync/admit":
                self._watch.admit()
                return await _answer(send, 200, {})
        return await self._app(scope, receive, send)

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._watch.reason()
        if reason is not None:
            return await _answer(send, 503, _error(503, why_refused(reason)))
        await self._app(_moved(scope, "/health"), receive, send)

    async def _pause(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle `/pause`. Resume if the caller has disconnected before the response."""
        was_paused, left = self._watch.paused, False
        leaving = asyncio.ensure_future(_disconnect(receive))

        async def answer(message: Message) -> None:
            nonlocal left
            # A server reports a client as disconnected, too, once it has its whole response.
            if message["type"] == "http.response.start":
                left = leaving.done()
            await send(message)

        try:
            call = await self._control("/pause", scope, _empty_until(leaving), answer)
        finally:
            leaving.cancel()
        if left and not was_paused and self._watch.paused and self._watch.is_last(call):
            # Not before vLLM has answered: with data parallelism it resumes no engine until then.
            never = asyncio.get_running_loop().create_future()
            await self._control("/resume", _moved(scope, "/resume"), _empty_until(never), _unheard)

    async def _control(self, route: str, scope: Scope, receive: Receive, send: Send) -> int:
        """Handle a control call. Return its number."""
        body, status = bytearray(), 500

        async def overhear() -> Message:
            message = await receive()
            if len(body) <= MAX_BODY_BYTES:
                body.extend(message.get("body", b""))
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        call = self._watch.call_begins()
        try:
            await self._app(scope, overhear, answer)
        finally:
            is_finish = route == "/finish_weight_update"
            version = _field(body, "weight_version") if is_finish else None
            self._watch.call_ends(call, route, ok=status == 200, version=version)
        return call

    async def _refuse(self, receive: Receive, send: Send) -> None:
        body, more = bytearray(), True
        while more and len(body) <= MAX_BODY_BYTES:
            message = await receive()
            body.extend(message.get("body", b""))
            more = message.get("more_body", False)
        reason = _field(body, "reason")
        if more or not isinstance(reason, str) or not reason.strip():
            said = f'send {{"reason": "why"}}, at most {MAX_BODY_BYTES:,} bytes of JSON'
            return await _answer(send, 400, _error(400, said))
        if len(reason) > MAX_REASON_CHARACTERS:
            reason = reason[: MAX_REASON_CHARACTERS - 1] + "…"
        self._watch.refuse(reason)
        await _answer(send, 200, {})


def _moved(scope: Scope, route: str) -> Scope:
    """Return the same request for another route, without its query."""
    path = scope.get("root_path", "") + route
    return {**scope, "path": path, "raw_path": path.encode(), "query_string": b""}


async def _disconnect(receive: Receive) -> None:
    """Block until the client has disconnected. Drop whatever it sends before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _empty_until(gone: asyncio.Future[None]) -> Receive:
    """Return a `receive` that yields an empty body, then blocks until the client disconnects."""
    coming = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        message = next(coming, None)
        if message is None:
            await asyncio.shield(gone)
            message = {"type": "http.disconnect"}
        return message

    return receive


async def _unheard(message: Message) -> None:
    pass


def _field(body: bytearray, name: str) -> Any:
    """Return a field of a JSON body; None if it is missing, or the body is no JSON object."""
    try:
        reported = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return reported.get(name) if isinstance(reported, dict) else None


def _error(status: int, message: str) -> dict[str, Any]:
    """Return an error in the form that OpenAI and vLLM use."""
    return {"error": {"message": message, "type": KINDS[status], "param": None, "code": status}}


async def _deny(scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
    """Answer with an error. Close a websocket; a client that is not yet connected sees a 403."""
    metrics.denied(status)
    if scope["type"] == "websocket":
        await receive()
        closing = {"type": "websocket.close", "code": CLOSE_CODES[status], "reason": why[:100]}
        return await send(closing)
    await _answer(send, status, _error(status, why))


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503:
        headers.append((b"retry-after", b"%d" % RETRY_SECONDS))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
