"""The sockets of the loopback hub: two origins, a log of requests, and faults on demand."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.hub.loopback.state import Refusal, State

CHUNK = 1 << 20


@dataclass(frozen=True)
class Request:
    """A request as the log keeps it."""

    origin: str  # "hub" or "cdn"
    method: str
    path: str  # as it came, percent signs and all, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # lower-case names
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # of a HEAD answer, or a lie
    cut: int | None = None  # bytes after which the connection is closed


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    pattern: str  # of "METHOD path"
    before: Callable[[Request], Answer | None] = lambda request: None  # an answer instead of the hub's
    after: Callable[[Answer], Answer | None] = lambda answer: answer  # None: close the socket
    times: int = 1
    origin: str | None = None
    seen: int = 0

    def takes(self, request: Request) -> bool:
        if self.seen >= self.times or self.origin not in (None, request.origin):
            return False
        if not re.search(self.pattern, str(request)):
            return False
        self.seen += 1
        return True


class Loopback:
    """The hub: `with Loopback() as hub:` and clients talk to `hub.url`."""

    def __init__(self, *, xet: str | None = None) -> None:
        self.state, self.log, self.faults = State(), list[Request](), list[Fault]()
        self.xet = xet  # a folder: Xet uploads go to a local store there
        self.multipart: int | None = None  # bytes of a part; None: basic transfers only
        self.servers = {origin: _server(self, origin) for origin in ("hub", "cdn")}
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers.values())

    def __enter__(self) -> Loopback:
        for server in self.servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for server in self.servers.values():
            server.shutdown()
            server.server_close()
            server.hang_up()

    # --- faults ---

    def fault(self, pattern: str, **how: object) -> Fault:
        """Let the next requests that match fail; `how` are the fields of Fault."""
        rule = Fault(pattern, **how)  # type: ignore[arg-type]
        self.faults.append(rule)
        return rule

    def refuse(self, pattern: str, status: int, *, times: int = 1, headers: dict[str, str] | None = None) -> Fault:
        def answer(_: Request) -> Answer:
            return Answer(status, b'{"error": "as asked"}', {"Content-Type": "application/json", **(headers or {})})

        return self.fault(pattern, before=answer, times=times)

    def close(self, pattern: str, *, times: int = 1, after_work: bool = False) -> Fault:
        """Close the socket without an answer, before or after the hub did its work."""
        if after_work:
            return self.fault(pattern, after=lambda _: None, times=times)
        return self.fault(pattern, before=lambda _: Answer(cut=-1), times=times)

    def change(self, pattern: str, how: Callable[[Answer], Answer], *, times: int = 1) -> Fault:
        return self.fault(pattern, after=how, times=times)

    # --- what was asked ---

    def asked(self, pattern: str) -> list[Request]:
        return [r for r in self.log if re.search(pattern, str(r))]

    @property
    def writes(self) -> list[Request]:
        """Requests that change something, or could."""
        harmless = r"^POST \S*/(validate-yaml|paths-info)"
        return [r for r in self.log if r.method not in ("GET", "HEAD") and not re.search(harmless, str(r))]

    # --- answering ---

    def answer(self, request: Request) -> Answer | None:
        from tests.hub.loopback.routes import route

        with self.state.lock:
            self.log.append(request if len(request.body) < CHUNK else replace(request, body=b"(long)"))
            rules = [f for f in self.faults if f.takes(request)]
        for rule in rules:
            if (instead := rule.before(request)) is not None:
                return instead
        try:
            answer: Answer | None = route(self, request)
        except Refusal as refusal:
            answer = _of_refusal(refusal)
        for rule in rules:
            answer = answer and rule.after(answer)
        return answer


def flipped(answer: Answer) -> Answer:
    """The same answer with one bit of its body changed, in the middle."""
    middle = len(answer.body) // 2
    body = bytearray(answer.body)
    body[middle] ^= 1
    return replace(answer, body=bytes(body))


def cut(answer: Answer) -> Answer:
    return replace(answer, cut=len(answer.body) // 2)


def slow(seconds: float) -> Callable[[Answer], Answer]:
    def wait(answer: Answer) -> Answer:
        threading.Event().wait(seconds)  # time.sleep is taken away from the client in tests
        return answer

    return wait


def header(name: str, value: str | None) -> Callable[[Answer], Answer]:
    """The same answer with a header replaced, or without it."""

    def change(answer: Answer) -> Answer:
        kept = {k: v for k, v in answer.headers.items() if k.lower() != name.lower()}
        return replace(answer, headers=kept if value is None else {**kept, name: value})

    return change


def _of_refusal(refusal: Refusal) -> Answer:
    import json

    headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message, **refusal.headers}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return Answer(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.__dict__.setdefault("connections", []).append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self.__dict__.get("connections", []):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests; anything else is a mistake in here, and to be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


def _server(hub: Loopback, origin: str) -> _Server:
    handler = type("Handler", (_Handler,), {"hub": hub, "origin": origin})
    return _Server(("127.0.0.1", 0), handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = CHUNK  # without it every answer costs 40 ms: Nagle waits for a delayed acknowledgement
    disable_nagle_algorithm = True
    hub: Loopback
    origin: str

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.origin, self.command, address.path, parse_qs(address.query), headers, body)
        answer = self.hub.answer(request)
        if answer is None or answer.cut == -1:
            self._hang_up()
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _chunked(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"X-Request-Id": "loopback", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(memoryview(answer.body)[: answer.cut])
        self.wfile.flush()
        if answer.cut is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
