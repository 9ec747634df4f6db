"""The gate in front of vLLM's server: what it refuses, by which words, and what opens it again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
import requests
from support.engines import NEW, OLD
from support.models import save_model
from support.remote import push, session
from support.servers import answering, wait_until

from qerl_sync import HFSource, SyncError
from qerl_sync.engines.base import why_refused
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import TransportTimeout
from qerl_sync.serving.auth import GENERATING, is_open
from qerl_sync.serving.middleware import (
    CONTROL,
    MAX_BODY_BYTES,
    MAX_REASON_CHARACTERS,
    QUIET_SECONDS,
    ServingGuardMiddleware,
)
from qerl_sync.wire.tokens import PROOF_HEADER, TOKEN_VARIABLE, proof

TOKEN = "a secret of both"
UPDATE = ["start_weight_update", "update_weights"]

# POST routes that change or control an engine.
CLOSED = {
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/weight_checker",  # it can set weights to zero
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/abort_requests",
    "/inference/v1/abort_requests",
    "/sleep",
    "/wake_up",
    "/release_kv_cache_memory",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/scale_elastic_ep",
    "/fault_tolerance/apply",
    "/start_profile",
    "/stop_profile",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/adapters",
}
# The gate's own.
OURS = {"/qerl_sync/refuse", "/qerl_sync/admit"}


class Server:
    """A gate before an application that answers 200, or what `status` says, in two pieces."""

    def __init__(self) -> None:
        self.status = 200
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None
        self.leave = asyncio.Event()
        self.seconds = 100.0
        self.gate = ServingGuardMiddleware(self.app, clock=lambda: self.seconds)

    async def app(self, scope, receive, send) -> None:
        self.asked.append(scope["path"])
        if scope["type"] == "websocket":
            return await send({"type": "websocket.accept"})
        more = True
        while more:
            more = (await receive()).get("more_body", False)
        if self.hold is not None:
            await self.hold.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async def send(self, method: str, path: str, body: bytes = b"", **scope) -> list[dict]:
        """All messages of the answer."""
        pieces = [body[i : i + 7] for i in range(0, len(body), 7)] or [b""]
        coming = [{"type": "http.request", "body": one, "more_body": True} for one in pieces]
        coming[-1]["more_body"] = False
        sent: list[dict] = []

        async def receive():
            if coming:
                return coming.pop(0)
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            self.leave.set()  # as uvicorn, which takes who has had his answer for gone

        whole = {"type": "http", "method": method, "path": path, **scope}
        await self.gate(whole, receive, send)
        return sent

    def ask(self, method: str, path: str, reported: object = None, **scope) -> int:
        """The answer's status."""
        body = b"" if reported is None else json.dumps(reported).encode()
        return asyncio.run(self.send(method, path, body, **scope))[0]["status"]

    def control(self, *routes: str) -> None:
        for route in routes:
            self.ask("POST", f"/{route}")

    def commit(self, version: str | None = "3") -> None:
        self.ask("POST", "/finish_weight_update", {"weight_version": version})

    def refuse(self, reason: str = "a shard was lost") -> None:
        assert self.ask("POST", "/qerl_sync/refuse", {"reason": reason}) == 200

    def be_quiet(self) -> None:
        self.seconds += QUIET_SECONDS + 0.1

    @property
    def is_open(self) -> bool:
        ready = self.ask("GET", "/qerl_sync/ready")
        generates = self.ask("POST", "/v1/completions")
        assert ready == generates
        assert generates in (200, 503)
        return generates == 200


@pytest.fixture
def server(monkeypatch) -> Server:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return Server()


@pytest.fixture
def guarded(monkeypatch) -> Server:
    """One that has a token."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    return Server()


class TestScaling:
    """Replicas that vLLM adds to an engine that runs have not had the sync that it has had."""

    def test_a_scaled_engine_refuses_until_the_next_sync(self, server):
        server.control("pause", *UPDATE)
        server.commit()
        server.control("resume")
        assert server.is_open
        assert server.ask("POST", "/scale_elastic_ep", {"new_data_parallel_size": 4}) == 200
        assert not server.is_open
        server.control("pause", *UPDATE, "finish_weight_update", "resume")
        assert not server.is_open, "no sync has been committed"
        server.commit("4")
        assert server.is_open

    def test_before_the_first_sync_all_have_the_weights_that_they_were_started_with(self, server):
        server.control("scale_elastic_ep")
        assert server.is_open

    def test_an_engine_that_vllm_did_not_scale_goes_on(self, server):
        server.commit()
        server.status = 400
        server.control("scale_elastic_ep")
        server.status = 200
        assert server.is_open


class TestRequests:
    def test_an_open_gate_hands_on_every_piece(self, server):
        sent = asyncio.run(server.send("POST", "/v1/completions", b"{}"))
        assert [message.get("body") for message in sent] == [None, b"one ", b"two"]

    @pytest.mark.parametrize("path", sorted(GENERATING))
    def test_refused(self, server, path):
        server.refuse("a shard was lost")
        start, body = asyncio.run(server.send("POST", path))
        headers = dict(start["headers"])
        assert start["status"] == 503
        assert int(headers[b"retry-after"]) > 0
        assert int(headers[b"content-length"]) == len(body["body"])
        assert json.loads(body["body"]) == {
            "error": {
                "message": why_refused("a shard was lost"),
                "type": "ServiceUnavailableError",
                "param": None,
                "code": 503,
            }
        }
        assert server.asked == []

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/health"),
            ("GET", "/is_paused"),
            ("GET", "/v1/models"),
            ("OPTIONS", "/v1/completions"),
            ("POST", "/tokenize"),
            ("POST", "/update_weights"),
            ("POST", "/collective_rpc"),
        ],
    )
    def test_what_goes_through_a_closed_gate(self, server, method, path):
        server.refuse()
        assert server.ask(method, path) == 200
        assert server.asked == [path]

    def test_a_server_below_a_path(self, server):
        server.refuse()
        sent = asyncio.run(server.send("POST", "/model/v1/completions", root_path="/model"))
        assert sent[0]["status"] == 503

    def test_a_websocket(self, server):
        connect = {"type": "websocket", "path": "/v1/realtime"}
        assert asyncio.run(self.connect(server, connect)) == ["websocket.accept"]
        server.refuse()
        assert asyncio.run(self.connect(server, connect)) == ["websocket.close"]

    async def connect(self, server, scope) -> list[str]:
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message["type"])

        await server.gate(scope, receive, send)
        return sent

    def test_readiness_is_health_where_the_gate_is_open(self, server):
        assert server.ask("GET", "/qerl_sync/ready") == 200
        assert server.asked == ["/health"]
        server.status = 503
        assert server.ask("GET", "/qerl_sync/ready") == 503


class TestWhatIsTold:
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"{}", b'{"reason": 3}', b'{"reason": " "}', b"\xff", b"[" * 9000],
    )
    def test_bad_bodies(self, server, body):
        sent = asyncio.run(server.send("POST", "/qerl_sync/refuse", body))
        assert sent[0]["status"] == 400
        assert '"why"' in json.loads(sent[1]["body"])["error"]["message"]
        assert server.is_open

    def test_a_body_that_is_too_long(self, server):
        reported = {"reason": "x" * MAX_BODY_BYTES}
        assert server.ask("POST", "/qerl_sync/refuse", reported) == 400
        assert server.is_open

    def test_a_long_reason_is_cut(self, server):
        server.refuse("x" * 2 * MAX_REASON_CHARACTERS)
        body = asyncio.run(server.send("POST", "/v1/completions"))[1]["body"]
        assert "x" * (MAX_REASON_CHARACTERS - 1) + "\\u2026" in body.decode()
        assert "x" * MAX_REASON_CHARACTERS not in body.decode()

    def test_nobody_can_close_a_server_without_rl_routes(self, monkeypatch):
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
        server = Server()
        server.status = 404
        assert server.ask("POST", "/qerl_sync/refuse", {"reason": "no"}) == 404
        assert server.asked == ["/qerl_sync/refuse"]
        server.status = 200
        assert server.is_open

    def test_admitted(self, server):
        server.refuse()
        assert not server.is_open
        for _ in range(2):
            assert server.ask("POST", "/qerl_sync/admit") == 200
            assert server.is_open

    def test_a_commit_admits(self, server):
        server.refuse()
        server.control("pause", *UPDATE)
        assert not server.is_open
        server.commit()
        assert server.is_open

    def test_a_commit_that_fails_does_not(self, server):
        server.refuse()
        server.status = 500
        server.commit()
        server.status = 200
        assert not server.is_open

    @pytest.mark.parametrize("routes", [["resume"], ["finish_weight_update"], ["pause", *UPDATE]])
    def test_nothing_else_does(self, server, routes):
        """An engine that is resumed with a poisoned model would end with its first request."""
        server.refuse()
        server.control(*routes)
        server.commit(version=None)
        assert not server.is_open


class TestMetrics:
    def test_what_vllm_serves_beside_its_own(self, server):
        prometheus_client = pytest.importorskip("prometheus_client")

        def read(name: str, **labels: str) -> float:
            server.ask("GET", "/metrics")
            full = f"qerl_sync_server_{name}"
            return prometheus_client.REGISTRY.get_sample_value(full, labels) or 0.0

        counters = [("syncs_total", {}), ("paused_seconds_total", {})]
        counters.append(("denied_requests_total", {"status": "503"}))
        before = [read(name, **labels) for name, labels in counters]
        assert (read("refusing"), read("paused")) == (0, 0)
        server.control("pause")
        server.refuse()
        assert server.ask("POST", "/v1/completions") == 503
        assert (read("refusing"), read("paused")) == (1, 1)
        server.seconds += 3
        server.commit("7")
        server.control("resume")
        assert (read("refusing"), read("paused")) == (0, 0)
        assert read("weight_version") == 7
        after = [read(name, **labels) for name, labels in counters]
        assert [new - old for new, old in zip(after, before, strict=True)] == [1, 3, 1]
        server.commit("by words")
        assert read("weight_version") == 7


class TestAbandoned:
    @pytest.mark.parametrize(
        "routes",
        [UPDATE[:1], UPDATE, [*UPDATE, "finish_weight_update"], ["start_draft_weight_update"]],
    )
    def test_an_update_that_nobody_goes_on_with(self, server, routes):
        server.control("pause", *routes)
        server.seconds += QUIET_SECONDS / 2
        assert server.is_open, "its trainer may still go on"
        server.be_quiet()
        assert not server.is_open
        assert b"has not gone on with it" in asyncio.run(server.send("POST", "/score"))[1]["body"]

    @pytest.mark.parametrize(
        "routes", [["pause"], UPDATE, [*UPDATE, "pause"], ["pause", *UPDATE, "resume"]]
    )
    def test_a_pause_alone_and_an_engine_that_runs_are_somebodys_own(self, server, routes):
        server.control(*routes)
        server.be_quiet()
        assert server.is_open

    def test_a_pause_that_vllm_refuses_is_none(self, server):
        server.status = 400
        server.control("pause")
        server.status = 200
        server.control(*UPDATE)
        server.be_quiet()
        assert server.is_open

    def test_requests_wait_during_a_long_update(self, server):
        server.control("pause", "start_weight_update")

        async def update() -> None:
            server.hold = asyncio.Event()
            call = asyncio.create_task(server.send("POST", "/update_weights"))
            await asyncio.sleep(0)  # the call begins
            server.be_quiet()
            hold, server.hold = server.hold, None
            assert (await server.send("POST", "/v1/completions"))[0]["status"] == 200
            hold.set()
            await call

        asyncio.run(update())
        assert server.is_open
        server.be_quiet()
        assert not server.is_open

    def test_an_update_that_raises(self, server):
        async def fails(scope, receive, send):
            raise ValueError("the engine died")

        server.control("pause", "start_weight_update")
        server.gate._app = fails
        with pytest.raises(ValueError, match="the engine died"):
            server.control("update_weights")
        server.gate._app = server.app
        server.be_quiet()
        assert not server.is_open

    @pytest.mark.parametrize("seen", [True, False], ids=["after a request", "before any"])
    def test_a_new_trainer_that_is_not_yet_done_opens_nothing(self, server, seen):
        """It closes the update that the dead one has left open, and asks for the layer map."""
        server.control("pause", *UPDATE)
        server.be_quiet()
        assert not (seen and server.is_open)
        server.control("finish_weight_update", *UPDATE, "finish_weight_update", "pause", *UPDATE)
        assert not server.is_open
        server.commit()
        assert server.is_open
        server.control("resume")
        server.be_quiet()
        assert server.is_open

    def test_a_trainer_that_dies_before_it_resumes(self, server):
        server.control("pause", *UPDATE)
        server.commit()
        server.be_quiet()
        assert not server.is_open

    @pytest.mark.parametrize("route", ["resume", "qerl_sync/admit"])
    def test_a_trainer_that_was_only_slow_opens_it(self, server, route):
        server.control("pause", *UPDATE)
        server.be_quiet()
        assert not server.is_open
        server.control("finish_weight_update", route)
        assert server.is_open


class TestPauseOfOneWhoLeaves:
    """`/pause?mode=wait` is answered when the requests in flight have ended."""

    async def pause(self, server: Server, *, leaves: bool = True, meanwhile: str = "") -> None:
        server.hold = asyncio.Event()
        server.leave.clear()
        path, query = "/model/pause", b"mode=wait"
        scope = {"root_path": "/model", "query_string": query}
        call = asyncio.create_task(server.send("POST", path, **scope))
        await asyncio.sleep(0)  # the call begins
        if leaves:
            server.leave.set()
        await asyncio.sleep(0)
        hold, server.hold = server.hold, None
        if meanwhile:
            await server.send("POST", meanwhile)
        hold.set()
        await call

    def test_is_undone(self, server):
        asyncio.run(self.pause(server))
        assert server.asked == ["/model/pause", "/model/resume"]
        server.control(*UPDATE)
        server.be_quiet()
        assert server.is_open, "it still counts as paused"

    def test_of_one_who_stays_is_not(self, server):
        asyncio.run(self.pause(server, leaves=False))
        assert server.asked == ["/model/pause"]
        server.control(*UPDATE)
        server.be_quiet()
        assert not server.is_open

    def test_a_pause_from_before_stays(self, server):
        server.control("pause")
        asyncio.run(self.pause(server))
        assert "/model/resume" not in server.asked

    @pytest.mark.parametrize("route", ["/pause", "/resume", "/start_weight_update"])
    def test_others_have_come_and_go_on(self, server, route):
        asyncio.run(self.pause(server, meanwhile=route))
        assert server.asked == ["/model/pause", route]

    def test_one_that_was_resumed_before_it_was_complete_is_none(self, server):
        asyncio.run(self.pause(server, meanwhile="/resume"))
        server.control(*UPDATE)
        server.be_quiet()
        assert server.is_open

    def test_one_that_vllm_refuses_is_none(self, server):
        server.status = 400
        asyncio.run(self.pause(server))
        assert server.asked == ["/model/pause"]

    def test_who_may_not_pause_undoes_nothing(self, guarded):
        assert guarded.ask("POST", "/pause") == 403
        assert guarded.asked == []


def shown(route: str, token: str = TOKEN) -> list[tuple[bytes, bytes]]:
    return [(PROOF_HEADER.encode(), proof(token, "http", route).encode())]


ORIGIN = [(b"origin", b"http://a.page")]
PAGES = [ORIGIN, [(b"sec-fetch-site", b"cross-site")]]
OPEN = ["/v1/completions", "/v1/responses/resp_1-a/cancel", "/tokenize"]


def disguises(path: str) -> list[str]:
    """Paths that some part of a server may take for `path`, as they are when they are decoded."""
    endings = ["", "\n", "\r", "\r\n", "\n\n", "\0", "\t", " ", "\x0b", "\x85", "\u2028", "/", "//"]
    endings += ["/.", "/..", ";", ";x", "?x", "#x", "%0A", "%0a", "%00", "%2f", ".json"]
    starts = ["/", "//", "/.", "/x/..", "/health/..", "/v1/completions/..", "/metrics", "\n", ""]
    others = [path.upper(), path.title(), f"/%{ord(path[1]):x}{path[2:]}", path.replace("/", "\\")]
    others += [path[:3] + "\n" + path[3:], path.replace("e", "\uff45"), f"http://host{path}"]
    return [path + end for end in endings] + [start + path for start in starts] + others


class Application:
    """One of Starlette behind the gate, of which `asked` says which routes it has run."""

    def __init__(self, app, routes) -> None:
        self.app = app
        self.asked: list[str] = []
        for route in routes:
            if getattr(route, "path", "/metrics") != "/metrics":  # instrumented, and only read
                route.app = self._endpoint(route.path)

    def _endpoint(self, name: str):
        async def endpoint(scope, receive, send):
            self.asked.append(name)
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close"})
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return endpoint

    def ask(self, method: str, path: str, headers=()) -> int:
        """The answer's status; 0 for a websocket."""
        return asyncio.run(self.send(method, path, headers))

    async def send(self, method: str, path: str, headers=(), root: str = "") -> int:
        sent = []

        async def receive():
            return {"type": "websocket.connect" if method == "WS" else "http.request"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "root_path": root}
        scope |= {"raw_path": b"/health", "query_string": b"", "headers": list(headers)}
        scope |= {"scheme": "http", "server": ("host", 80), "http_version": "1.1"}
        if method == "WS":
            scope |= {"type": "websocket", "scheme": "ws", "subprotocols": []}
            del scope["method"]
        await self.app(scope, receive, send)
        return sent[0].get("status", 0)

    def assert_closed(self, method: str, path: str, headers) -> None:
        """No path leads to this route for who sends these headers."""

        async def try_all() -> None:
            for disguise in disguises(path):
                for how in (method, method.lower(), "WS"):
                    await self.send(how, disguise, headers)
                for root in ("/", "/v1", path):
                    await self.send(method, disguise, headers, root)
                    await self.send(method, root + disguise, headers, root)

        self.asked.clear()
        asyncio.run(try_all())
        assert path not in self.asked
        assert self.ask(method, path, headers) == 403


@pytest.fixture
def small(monkeypatch):
    """`small()`: an application with some of vLLM's routes and a mount."""
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Mount, Route, WebSocketRoute

    def endpoint() -> None:
        raise AssertionError("it is replaced")

    inner = [Route("/inner", endpoint, methods=["POST"])]
    routes = [Route(path, endpoint, methods=["POST"]) for path in (*sorted(CLOSED), "/later")]
    routes += [Route(path, endpoint, methods=["POST"]) for path in ("/v1/completions", "/ping")]
    routes += [Route("/health", endpoint), Route("/v1/responses/{of}", endpoint)]
    routes += [WebSocketRoute("/v1/realtime", endpoint), WebSocketRoute("/console", endpoint)]
    app = Starlette(
        routes=[Mount("/rl", routes=inner), *routes],
        middleware=[Middleware(ServingGuardMiddleware)],
    )
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return Application(app, [*routes, *inner])


class TestStrangers:
    @pytest.mark.parametrize("route", sorted(CLOSED | OURS))
    def test_who_knows_the_token_may_drive_the_engine(self, guarded, route):
        reported = {"reason": "why"}
        for headers in ([], shown("/other"), shown(route, "guessed"), [(b"x", b"y"), *ORIGIN]):
            assert guarded.ask("POST", route, reported, headers=headers) == 403
        for odd in (b"", b"\xff\xfe", b"0" * 64):
            assert guarded.ask("POST", route, headers=[(PROOF_HEADER.encode(), odd)]) == 403
        assert guarded.asked == []
        assert guarded.is_open
        assert guarded.ask("POST", route, reported, headers=shown(route)) == 200

    def test_what_they_are_told(self, guarded):
        for headers, words in (([], "is missing"), (shown("/pause", "x"), "is that of another")):
            answer = asyncio.run(guarded.send("POST", "/pause", headers=headers))
            error = json.loads(answer[1]["body"])["error"]
            assert f"The header x-qerl-sync-proof {words}; set the same" in error["message"]
            assert TOKEN not in error["message"]
            assert (error["type"], error["code"]) == ("PermissionDeniedError", 403)

    def test_a_strangers_commit_opens_nothing(self, guarded):
        refuse = "/qerl_sync/refuse"
        assert guarded.ask("POST", refuse, {"reason": "why"}, headers=shown(refuse)) == 200
        guarded.commit()
        guarded.control("resume", "qerl_sync/admit")
        assert not guarded.is_open

    @pytest.mark.parametrize("route", OPEN)
    def test_what_generates_and_reads_is_open(self, guarded, route):
        assert guarded.ask("POST", route) == 200
        assert guarded.ask("GET", "/server_info") == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/a_route_of_a_later_vllm"),
            ("GET", "/a_route_of_a_later_vllm"),
            ("PUT", "/v1/completions"),
            ("DELETE", "/adapters/one"),
            ("POST", "/v1/responses/a/b/cancel"),
            ("POST", "/health"),
        ],
    )
    def test_what_is_not_known_to_be_open_is_closed(self, guarded, method, path):
        assert guarded.ask(method, path) == 403
        assert guarded.ask(method, path, headers=shown(path)) == 200

    @pytest.mark.parametrize("driven", ["0", "1"])
    def test_with_and_without_rl_routes(self, driven, monkeypatch):
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", driven)
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert Server().ask("POST", "/v1/load_lora_adapter") == 403

    def test_a_browsers_question_before_it_generates(self, guarded):
        assert guarded.ask("OPTIONS", "/v1/completions", headers=ORIGIN) == 200

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\0", "\x7f", "\u2028"])
    def test_a_closed_gate_has_no_side_door(self, server, end):
        server.refuse()
        assert server.ask("POST", f"/v1/completions{end}") == 400
        assert server.asked == []

    @pytest.mark.parametrize("headers", [[], ORIGIN])
    @pytest.mark.parametrize("root", ["/", "/model", "/model/"])
    def test_servers_below_a_path(self, guarded, root, headers):
        """Starlette takes routes with and without it."""
        pytest.importorskip("starlette")
        from starlette._utils import get_route_path

        for path in ("/ping", "/model/ping", "//ping", "/model//ping", "/modelping"):
            scope = {"path": path, "root_path": root}
            guarded.asked.clear()
            asyncio.run(guarded.send("POST", path, root_path=root, headers=headers))
            assert (get_route_path(scope) == "/ping") is (guarded.asked == [path])

    @pytest.mark.parametrize("token", ["", TOKEN])
    def test_no_path_leads_around_it(self, small, token, monkeypatch):
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        headers = [] if token else ORIGIN
        for path in ("/collective_rpc", "/pause", "/later", "/rl/inner"):
            small.assert_closed("POST", path, headers)
        assert set(small.asked) <= {"/v1/completions", "/health", "/ping", "/v1/responses/{of}"}
        small.asked.clear()
        for path in ("/v1/realtime", "/console"):
            small.ask("WS", path, headers)
        assert small.asked == ["/v1/realtime"]
        proof = shown("/pause") if token else []
        assert small.ask("POST", "/pause", proof) == 200, "the test tells nothing"

    @pytest.mark.parametrize("headers", PAGES)
    @pytest.mark.parametrize("route", sorted(CLOSED | OURS))
    def test_web_pages_drive_no_engine(self, server, route, headers):
        assert server.ask("POST", route, headers=headers) == 403
        assert server.asked == []
        reported = {"reason": "why"}
        assert server.ask("POST", route, reported, headers=[(b"user-agent", b"a program")]) == 200

    @pytest.mark.parametrize("route", OPEN)
    def test_web_pages_may_generate(self, server, route):
        assert server.ask("POST", route, headers=ORIGIN) == 200


class TestClient:
    @pytest.mark.parametrize("token", ["", TOKEN])
    def test_it_shows_that_it_knows_the_token(self, token, monkeypatch):
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        with answering() as (url, answers):
            client = HTTPClient(url)
            monkeypatch.delenv(TOKEN_VARIABLE)
            client.admit()
            client.health()
            expected = proof(token, "http", "/qerl_sync/admit") if token else None
            assert [headers.get(PROOF_HEADER) for headers in answers.headers] == [expected, None]
            assert TOKEN not in str(answers.headers)

    def test_refuse_and_admit(self):
        with answering() as (url, answers):
            routes = ["POST /qerl_sync/refuse", "POST /qerl_sync/admit"]
            answers.by_route = dict.fromkeys(routes, (200, "{}"))
            HTTPClient(url).refuse("why")
            HTTPClient(url).admit()
            assert answers.asked == [(routes[0], {"reason": "why"}), (routes[1], None)]

    def test_a_long_reason_is_taken(self, server):
        with answering() as (url, answers):
            answers.by_route = {"POST /qerl_sync/refuse": (200, "{}")}
            HTTPClient(url).refuse("é" * MAX_BODY_BYTES)
        ((_, told),) = answers.asked
        assert server.ask("POST", "/qerl_sync/refuse", told) == 200
        assert not server.is_open

    def test_a_server_without_the_gate(self, caplog):
        with answering() as (url, answers):
            HTTPClient(url).refuse("why")
            HTTPClient(url).admit()
            assert len(answers.asked) == 2
        assert caplog.text == ""

    def test_a_failure_is_not_hidden_by_one_to_tell_of_it(self, caplog):
        with answering() as (url, _):
            pass
        HTTPClient(url).refuse("why")
        assert "are not told why they wait" in caplog.text


# ---- vLLM's own server


NOT_GENERATING = {
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
    "/ping",
}
# Routes that vLLM 0.25 does not have.
LATER = {"/start_draft_weight_update"}


@pytest.fixture(scope="module")
def vllms_app():
    """vLLM's own application, with every route that an option or a variable adds, and no engine."""
    from typing import get_args
    from unittest.mock import MagicMock

    from vllm import envs
    from vllm.config import ProfilerConfig
    from vllm.tasks import SupportedTask
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # where vLLM 0.28 and older have them
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser())
    wished = ["--enable-tokenizer-info-endpoint", "--enable-fault-tolerance"]
    switches = [switch for switch in wished if switch in parser._option_string_actions]
    args = parser.parse_args(
        [*switches, "--middleware=qerl_sync.serving.middleware.ServingGuardMiddleware"]
    )
    args.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir="/nowhere")
    with pytest.MonkeyPatch.context() as patch:
        # Not the environment, of which vLLM keeps a copy once an engine has started.
        patch.setitem(envs.__dict__, "VLLM_SERVER_DEV_MODE", True)
        patch.setitem(envs.__dict__, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", True)
        return build_app(args, get_args(SupportedTask), MagicMock())


@pytest.mark.vllm
@pytest.mark.slow
class TestEveryRouteOfVLLM:
    @pytest.fixture
    def app(self, vllms_app, monkeypatch):
        """With a token: its gate is made with the first request."""
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        monkeypatch.setattr(vllms_app, "middleware_stack", None)
        return Application(vllms_app, vllms_app.routes)

    def test_is_open_or_needs_the_token(self, app):
        """One that is new is in neither list: closed where a token is set, until it is judged."""
        found = {
            (method, route.path)
            for route in app.app.routes
            for method in getattr(route, "methods", None) or default_method(route)
        }
        closed = {(method, path) for method, path in found if not is_open(method, filled(path))}
        removing = {("DELETE", "/adapters/{adapter_name}")}
        assert closed - removing <= {("POST", path) for path in CLOSED}
        assert closed >= {("POST", path) for path in CONTROL - LATER}
        assert CONTROL < CLOSED
        assert len(found - closed) > 30

    def test_that_is_closed_has_no_side_door(self, app):
        routes = {getattr(route, "path", None) for route in app.app.routes}
        for path in sorted(CLOSED & routes):
            app.assert_closed("POST", path, [])
            assert set(app.asked).isdisjoint(CLOSED)
            assert app.ask("POST", path, shown(path)) == 200, "the test tells nothing"
        assert app.ask("DELETE", "/adapters/one") == 403
        assert app.ask("DELETE", "/adapters/one", shown("/adapters/one")) == 200

    def test_that_generates_is_open(self, app):
        for path in sorted(GENERATING):
            if any(getattr(route, "path", None) == path for route in app.app.routes):
                app.ask("WS" if path == "/v1/realtime" else "POST", path)
                assert app.asked[-1] == path


def default_method(route) -> set[str]:
    """The gate's word for a websocket; a mount is read."""
    return {"POST" if type(route).__name__.endswith("WebSocketRoute") else "GET"}


def filled(path: str) -> str:
    return path.replace("{response_id}", "resp_1").replace("{adapter_name}", "one")


def posts(part: str) -> set[str]:
    """The POST routes of routers that are there as soon as a package of vLLM is imported."""
    import importlib
    import pkgutil

    from fastapi import APIRouter
    from vllm import entrypoints

    package, found = importlib.import_module(f"{entrypoints.__name__}.{part}"), set()
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith("api_router"):
            router = getattr(importlib.import_module(module.name), "router", None)
            if isinstance(router, APIRouter):
                found |= {r.path for r in router.routes if "POST" in getattr(r, "methods", ())}
    return found


@pytest.mark.vllm
@pytest.mark.slow
def test_no_route_of_vllm_that_runs_the_model_is_forgotten():
    """Every POST that vLLM has outside of its RL and administrative routers."""
    # The realtime and Cohere routers are made on demand, of the routes that are left.
    parts = ("openai", "anthropic", "generate", "pooling", "scale_out", "speech_to_text")
    found = set().union(*map(posts, parts)) - CLOSED
    assert all(is_open("POST", filled(path)) for path in found)
    forgotten = found - GENERATING - NOT_GENERATING
    assert len(found) > 10
    assert {path for path in forgotten if not path.endswith("render")} == set()


def completion(engine, seconds: float = 60) -> requests.Response:
    request = engine._request([1, 2, 3], 4)
    return requests.post(f"{engine.process.url}/v1/completions", json=request, timeout=seconds)


def ready(engine) -> bool:
    status = requests.get(f"{engine.process.url}/qerl_sync/ready", timeout=10).status_code
    assert status in (200, 503)
    return status == 200


def metrics(engine) -> dict[str, float]:
    """What the guard tells of itself in vLLM's own metrics."""
    text = requests.get(f"{engine.process.url}/metrics", timeout=10).text
    words = (line.split() for line in text.splitlines() if line.startswith("qerl_sync_server_"))
    return {name.removeprefix("qerl_sync_server_"): float(value) for name, value in words}


class Breaking(HFSource):
    """Raises in the middle, if chunks are as small as `SMALL`."""

    def materialize(self, names):
        for named in super().materialize(names):
            if named[0] == "model.norm.weight":
                raise SyncError("the disk is full")
            yield named


SMALL = {"chunk_bytes": "16KiB"}


@pytest.mark.vllm
class TestServer:
    def test_a_failed_sync_refuses_until_a_good_one(self, remote):
        engine = remote("server")
        assert ready(engine)
        before = metrics(engine)
        assert before["refusing"] == 0
        with (
            session(engine, Breaking(engine.trainers[NEW]), **SMALL) as sync,
            pytest.raises(SyncError, match="the disk is full"),
        ):
            sync.push()

        refused = completion(engine)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "does not generate: a sync failed: the disk is full" in refused.text
        assert engine.client().health()
        assert not ready(engine)
        failed = metrics(engine)
        denied = 'denied_requests_total{status="503"}'
        assert (failed["refusing"], failed["paused"]) == (1, 1)
        assert failed["syncs_total"] == before["syncs_total"]
        assert failed[denied] > before.get(denied, 0)

        # What somebody else has begun leaves the worker as it is; so does resuming it by hand.
        engine.client().resume()
        assert completion(engine).status_code == 503
        report = push(engine, NEW)
        assert ready(engine)
        assert engine.generates_as(NEW)
        after = metrics(engine)
        assert (after["refusing"], after["paused"]) == (0, 0)
        assert after["syncs_total"] == before["syncs_total"] + 1
        assert after["weight_version"] == report.version
        assert after["paused_seconds_total"] > before["paused_seconds_total"]

    def test_a_disguised_path_drives_no_engine(self, remote):
        """Starlette's router takes a path that ends in a line feed for the route without it."""
        engine = remote("server")
        for path in ("pause%0A", "collective_rpc%0A", "v1/completions%0A"):
            for headers in ({}, {"origin": "http://a.page"}):
                answer = requests.post(f"{engine.process.url}/{path}", headers=headers, timeout=10)
                assert answer.status_code == 400, path
        assert not is_paused(engine)

    def test_a_request_in_the_engine_goes_on_with_the_next_good_sync(self, remote):
        engine = remote("server")
        future, grown = engine.stream([5, 6, 7], 300)
        assert wait_until(lambda: len(grown[0]) > 5)
        with (
            session(engine, Breaking(engine.trainers[NEW]), **SMALL) as sync,
            pytest.raises(SyncError, match="the disk is full"),
        ):
            sync.push()
        assert completion(engine).status_code == 503
        assert not future.done()
        push(engine, NEW)
        assert len(future.result(timeout=120)[0]) == 300

    def test_a_trainer_that_is_killed(self, remote, tmp_path):
        engine = remote("server")
        model = save_model(engine.trainers[NEW], tmp_path / "model")
        with trainer(engine.process.url, model) as process:
            assert process.stdout.readline() == "sending\n"
            process.send_signal(signal.SIGKILL)
        assert wait_until(lambda: not ready(engine), QUIET_SECONDS + 10)
        refused = completion(engine)
        assert refused.status_code == 503
        assert "has not gone on with it" in refused.text

        with (
            session(engine, Breaking(engine.trainers[NEW]), **SMALL) as sync,
            pytest.raises(SyncError, match="the disk is full"),
        ):
            sync.push()
        assert "the disk is full" in completion(engine).text

        push(engine, OLD)
        assert engine.wrong_weights(OLD) == []
        assert engine.generates_as(OLD)

    def test_who_leaves_while_the_engine_waits_to_pause(self, remote):
        """As a trainer that is killed does, or one that runs into its timeout."""
        engine = remote("server")
        impatient = HTTPClient(engine.process.url, timeout_seconds=0.2)
        for _ in range(5):  # on a busy machine the request may have ended before
            future, grown = engine.stream([5, 6, 7], 480)
            assert wait_until(lambda grown=grown: len(grown[0]) > 5)
            try:
                impatient.pause("wait")
            except TransportTimeout:
                break
            engine.client().resume()
        else:
            raise AssertionError("in 5 tries no request was in flight at the pause")
        assert not future.done(), "the test tells nothing"
        assert len(future.result(timeout=120)[0]) == 480
        assert completion(engine, seconds=10).status_code == 200
        assert not is_paused(engine)

        engine.client().pause("wait")  # whoever is there to hear it has it
        assert is_paused(engine)
        engine.client().resume()
        assert engine.generates_as(OLD)


def is_paused(engine) -> bool:
    answer = requests.get(f"{engine.process.url}/is_paused", timeout=10)
    return bool(answer.json()["is_paused"])


# Stands still in the middle of its first chunk.
TRAINER = """
import sys, time
from transformers import AutoModelForCausalLM
from qerl_sync import HFSource, RemoteTransport, SyncConfig, SyncSession
from qerl_sync.engines.http import HTTPClient

class Stuck(HFSource):
    def materialize(self, names):
        for index, named in enumerate(super().materialize(names)):
            if index == 2:
                print("sending", flush=True)
                time.sleep(600)
            yield named

url, model = sys.argv[1:]
source = Stuck(AutoModelForCausalLM.from_pretrained(model))
transport = RemoteTransport(HTTPClient(url))
SyncSession(source, transport, SyncConfig.of(timeout_seconds=60)).push()
"""


def trainer(url: str, model) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, url, str(model)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
