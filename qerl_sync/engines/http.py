"""Drive a vLLM OpenAI server over its RL routes and those of `serving.middleware`.

A server may lack the latter: requests then wait where they would be refused. Needs no vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from qerl_sync.engines.base import (
    PROBING,
    EngineClient,
    PauseMode,
    complaint,
    ends_within,
    in_thread,
    lost,
    read_prompt_logprobs,
    timed_out,
)
from qerl_sync.errors import ConfigError, PeerLostError, SyncError, TransportError
from qerl_sync.wire.connection import SOCKET_OPTIONS
from qerl_sync.wire.tokens import PROOF_HEADER, TOKEN_VARIABLE, proof
from qerl_sync.worker.compat.caches import forget_caches
from qerl_sync.worker.compat.coupling import lacking

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 5.0
# How often to ask, during a call that takes long, whether the server is still there.
WATCH_SECONDS = 2.0
# vLLM's own, for the routes below /v1.
API_KEY_VARIABLE = "VLLM_API_KEY"


class RouteMissingError(TransportError):
    """The server answers 404: it was started without its RL routes, or its vLLM lacks this one."""


class HTTPClient(EngineClient):
    """Drive vLLM's RL routes below `base_url`, such as http://127.0.0.1:8000.

    Example:
        client = HTTPClient("http://127.0.0.1:8000")
        with SyncSession(source, RemoteTransport(client), config) as session:
            session.push(step=1)

    Several threads may use one client at a time.

    The server must run with VLLM_SERVER_DEV_MODE=1, as `qerl-sync serve` does. Where
    QERL_SYNC_TOKEN is set when this is made, each request shows that it is known. A server with
    an API key needs VLLM_API_KEY here too, for `sync.verify: full`, which asks it for a prompt.

    Args:
        timeout_seconds: how long one call but `update_weights` may take on the server's side.
            Connecting is given 5 s.

    Raises (all methods but `health` and `refuse`):
        PeerLostError, TransportTimeout, TransportError: as EngineClient says.
    """

    def __init__(self, base_url: str, timeout_seconds: float = 300) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{base_url!r} is no address of a vLLM server; write http://127.0.0.1:8000"
            )
        self.base_url = base_url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        self._api_key = os.environ.get(API_KEY_VARIABLE, "")

    def __str__(self) -> str:
        return f"the vLLM server at {self.base_url}"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = None if weight_version is None else {"weight_version": weight_version}
        self._post("finish_weight_update", version)

    def pause(self, mode: PauseMode) -> None:
        # vLLM would empty the caches along with it; `reset_caches` does, when the weights are new.
        self._post("pause", mode=mode, clear_cache="false")

    def resume(self) -> None:
        self._post("resume")

    def reset_caches(self, *, running: bool) -> bool | None:
        def call(route: str, **options: bool) -> Any:
            # The route has another name for the connector than vLLM's methods have.
            names = {"reset_connector": "reset_external"}
            params = {names.get(name, name): str(on).lower() for name, on in options.items()}
            return self._post(route, **params).get("success")

        return forget_caches(call, running=running)

    def refuse(self, reason: str) -> None:
        try:
            with suppress(RouteMissingError):  # without the serving guard middleware they wait
                # vLLM's errors may be long, and the middleware takes no body above 16 KiB.
                self._post("qerl_sync/refuse", {"reason": reason[:1000]})
        except SyncError as exc:
            logger.warning("requests to %s are not told why they wait: %s", self, exc)

    def admit(self) -> None:
        with suppress(RouteMissingError):
            self._post("qerl_sync/admit")

    def health(self) -> bool:
        """Return whether the server answers within 5 s and its engine lives."""
        import requests

        try:
            return self._health_status() == 200
        except requests.RequestException:
            return False

    def _health_status(self) -> int:
        return int(self._send("GET", "health", HEALTH_SECONDS).status_code)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        model = self._part(self._get("v1/models"), "data", 0, "id")
        answer = self._post(
            "v1/completions", {"model": model, "prompt": list(token_ids), **PROBING}
        )
        logprobs = self._part(answer, "choices", 0, "prompt_logprobs")
        return read_prompt_logprobs(token_ids, logprobs)

    def weight_version(self) -> str:
        """Return the version passed with the last finished update; `default` before the first.

        Raises:
            CompatError: the server's vLLM keeps no version (0.25).
        """
        try:
            return str(self._part(self._get("weight_info"), "weight_version"))
        except RouteMissingError:
            # Without any RL route it was started without them, whatever its version: that raises.
            self.world_size()
            version = str(self._part(self._get("version"), "version"))
            raise lacking("weight versions", version, ("/weight_info",)) from None

    def world_size(self) -> int:
        """See `EngineClient`. Behind a load balancer of the user's own (vLLM's hybrid or external
        load balancing) it counts the workers of the other servers too."""
        return int(self._part(self._get("get_world_size", include_dp="true"), "world_size"))

    def _part(self, answer: Any, *path: str | int) -> Any:
        """Return `answer[path[0]][path[1]]...`, which vLLM's answers have."""
        part = answer
        try:
            for key in path:
                part = part[key]
        except (KeyError, IndexError, TypeError):
            raise self._no_vllm(f"no {path[-1]!r}", str(answer)) from None
        return part

    def _no_vllm(self, what: str, answer: str) -> TransportError:
        return TransportError(
            f"{what}: what answers at {self.base_url} is no vLLM server: {answer[:200]!r}"
        )

    def _get(self, route: str, **params: str) -> dict[str, Any]:
        return self._request("GET", route, params=params)

    def _post(
        self, route: str, body: dict[str, Any] | None = None, /, **params: str
    ) -> dict[str, Any]:
        return self._request("POST", route, json=body, params=params)

    def _request(self, method: str, route: str, **content: Any) -> dict[str, Any]:
        import requests

        def check_alive() -> None:
            """Raise PeerLostError if the server reports its engine dead, or no longer listens.
            Slowness is neither."""
            try:
                gone = self._health_status() == 503
            except requests.Timeout:
                gone = False
            except requests.ConnectionError:
                gone = True
            if gone:
                raise lost(str(self), route)

        # A whole sync is one update, and has timeouts of its own.
        seconds = None if route == "update_weights" else self.timeout_seconds
        try:
            answer = in_thread(route, partial(self._send, method, route, seconds, **content))
            ends_within(answer, None, check_alive, WATCH_SECONDS)
            return self._answer(route, answer.result())
        except requests.ConnectTimeout as exc:
            raise self._unreachable(route, f"no connection within {CONNECT_SECONDS:g} s") from exc
        except requests.Timeout as exc:
            raise timed_out(str(self), route, self.timeout_seconds) from exc
        except requests.ConnectionError as exc:
            cause: BaseException = exc  # requests and urllib3 wrap the system's error several times
            while (inner := cause.__cause__ or cause.__context__) is not None:
                cause = inner
            raise self._unreachable(route, str(cause)) from exc
        except requests.JSONDecodeError as exc:
            raise self._no_vllm(route, exc.doc) from exc
        except requests.RequestException as exc:
            raise TransportError(f"{route}: {self} cannot be asked: {exc}") from exc

    def _send(self, method: str, route: str, read_seconds: float | None, **content: Any) -> Any:
        import requests

        headers = {}
        if method == "POST" and self._token:
            headers[PROOF_HEADER] = proof(self._token, "http", f"/{route}")
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        # A session for each call: one that is kept meets connections that the server has closed.
        with requests.Session() as session:
            # Nor a proxy, which is for the internet, nor a .netrc.
            session.trust_env = False
            # One call lasts as long as a sync and says nothing meanwhile: a router that forgets it
            # would take its answer away.
            pool = session.get_adapter(self.base_url).poolmanager  # type: ignore[attr-defined]
            pool.connection_pool_kw["socket_options"] = SOCKET_OPTIONS
            return session.request(
                method,
                f"{self.base_url}/{route}",
                headers=headers,
                timeout=(CONNECT_SECONDS, read_seconds),
                allow_redirects=False,
                **content,
            )

    def _answer(self, route: str, response: Any) -> dict[str, Any]:
        """Return the answer's JSON, {} without a body. Raise TransportError for an error status."""
        if response.status_code == 404:
            raise RouteMissingError(
                f"{self} has no route /{route}: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, or by `qerl-sync serve`"
            )
        if response.status_code == 401:
            raise TransportError(
                f"{route}: {self} asks for an API key; set {API_KEY_VARIABLE} for the trainer to "
                "the server's --api-key"
            )
        if response.status_code != 200:
            status = response.status_code
            raise TransportError(f"{route}: {self} refuses ({status}): {_message(response)}")
        answer = response.json() if response.content else {}
        if not isinstance(answer, dict):
            raise self._no_vllm(route, str(answer))
        return answer

    def _unreachable(self, route: str, why: str) -> PeerLostError:
        return PeerLostError(
            f"{route}: {self} cannot be reached ({why}); is it running, and is this its address?"
        )


def _message(response: Any) -> str:
    """Return the server's error text. vLLM has two forms of errors, FastAPI a third."""
    try:
        parsed = response.json()
    except ValueError:
        return str(response.text[:500]).strip() or str(response.reason)
    error = parsed.get("error", parsed.get("detail")) if isinstance(parsed, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return complaint(str(error if error is not None else parsed))
