# SPDX-License-Identifier: Apache-2.0
"""HTTP servers on 127.0.0.1 that remember what they were asked, and whose requests a test can have go wrong."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asks."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        """Whether a parameter of the URL says yes."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Reply:
    """What the server answers."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class _Fault:
    """Something that goes wrong, so many times."""

    kind: str
    method: str
    pattern: str
    times: int
    value: Any


class LoopbackServer:
    """
    Several ports that give the same answers, within a `with` block.

    Args:
        ports (`int`): How many; which ones, the system chooses.
    """

    def __init__(self, ports: int):
        self.requests: list[tuple[str, str]] = []
        """Method and path of all that was asked, in order."""
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        handler = type("Handler", (_Handler,), {"owner": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(ports)]
        self.endpoints = [f"http://127.0.0.1:{server.server_port}" for server in self._servers]

    def __enter__(self) -> LoopbackServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def answer(self, request: Request) -> Reply:
        """What the server has to say."""
        raise NotImplementedError

    def fail(self, method: str, path_pattern: str, status: int = 500, times: int = 1) -> None:
        """
        Answer requests with an error, whatever they ask.

        Args:
            method (`str`): `"GET"`, `"POST"`, ..., or `"*"` for any.
            path_pattern (`str`): Paths, without the host and parameters, by `*` and `?`, as in `"*/preupload/*"`. What
                is uploaded to the storage goes to `"/storage/*"`.
            status (`int`, defaults to 500): The HTTP status.
            times (`int`, defaults to 1): How many requests.
        """
        self._add(_Fault("fail", method, path_pattern, times, status))

    def cut(self, path_pattern: str, after_bytes: int = 0, times: int = 1) -> None:
        """
        Close the connection in the middle of a request, without an answer.

        Args:
            path_pattern (`str`): As for [`fail`][LoopbackServer.fail].
            after_bytes (`int`, defaults to 0): How much of the body is read before.
            times (`int`, defaults to 1): How many requests.
        """
        self._add(_Fault("cut", "*", path_pattern, times, after_bytes))

    def before(self, path_pattern: str, callback: Callable[[], object]) -> None:
        """Call a function once, when a request to such a path has come and before anything is made of it."""
        self._add(_Fault("before", "*", path_pattern, 1, callback))

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        with self.lock:
            self._faults.clear()

    def _add(self, fault: _Fault) -> None:
        with self.lock:
            self._faults.append(fault)

    def take(self, kind: str, method: str, path: str) -> Any:
        """The value of the first fault of a kind that a request meets, which happens once less from then on."""
        with self.lock:
            for fault in self._faults:
                meets = fnmatchcase(method, fault.method) and fnmatchcase(path, fault.pattern)
                if meets and fault.kind == kind and fault.times:
                    fault.times -= 1
                    return fault.value
        return None


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets its faults happen, and writes what the server answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: LoopbackServer

    def _serve(self) -> None:
        if "Transfer-Encoding" in self.headers:  # as the storage of the real Hub does
            self.send_error(501, "Transfer-Encoding is not implemented")
            return
        url = urlsplit(self.path)
        self.owner.requests.append((self.command, url.path))
        if callback := self.owner.take("before", self.command, url.path):
            callback()
        length = int(self.headers.get("Content-Length", 0))
        after = self.owner.take("cut", self.command, url.path)
        body = self.rfile.read(length if after is None else min(after, length))
        if after is not None or len(body) < length:  # the client, too, may have gone
            self.close_connection = True
            return
        if status := self.owner.take("fail", self.command, url.path):
            reply = Reply({"error": "Internal Error - We're working hard to fix this as soon as possible!"}, status)
        else:
            reply = self.owner.answer(Request(self.command, url.path, parse_qs(url.query), self.headers, body))
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(content))}
        for name, value in {**headers, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def content_reply(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    """A file, or the range of it that was asked."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not match or match[0] == "bytes=-":
        return Reply(content, headers=headers)
    size = len(content)
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    end = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if start > end:
        return Reply(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    return Reply(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})
