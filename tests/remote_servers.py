"""Real servers on the loopback: files with ranges and faults, a hub, and a proxy that counts, breaks and refuses."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from guard import HANG


class Server(ThreadingHTTPServer):
    """A threaded server that knows its URL and says nothing."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault of the server."""


@contextmanager
def running(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept connections and whole answers."""

    protocol_version = "HTTP/1.1"
    timeout = HANG
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, send: int | None = None
    ) -> None:
        """Answer; `send` cuts the body, and the connection with it, after so many bytes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
        if send is not None:
            self.cut()

    def cut(self) -> None:
        """Close the connection in the middle of an answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


class FileServer(Server):
    """Files by path, with ranges, tags and HTML listings; `fault` may change the answer to a range.

    A fault takes (path, start, number of the request) and returns `short`, `long`, `whole`, `other`, `drop`, a status, which
    comes with `wait` as its Retry-After, or None. It may hold its request up: that holds up no other.
    """

    def __init__(
        self, files: dict[str, bytes], fault: Callable[[str, int, int], str | int | None] = lambda *_: None
    ) -> None:
        super().__init__(_FileHandler)
        self.files, self.fault = files, fault
        self.wait = "0"
        self.ranges: list[tuple[str, int, int]] = []


class _FileHandler(Quiet):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        files = self.server.files
        if path not in files:
            self._list(path.rstrip("/"))
            return
        data = files[path]
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, data, headers)
            return
        start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        with self.server.lock:
            self.server.ranges.append((path, start, stop + 1))
            number = len(self.server.ranges)
        fault = self.server.fault(path, start, number)
        if isinstance(fault, int):
            self.answer(fault, b"", {"Retry-After": self.server.wait})
            return
        if start >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        stop = min(stop + 1, len(data))
        if fault == "short":
            stop = start + max(1, (stop - start) // 2)
        if fault == "other":
            start += 1
        body = data[start:stop] + (b"more" if fault == "long" else b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if fault == "whole":
            self.answer(200, data, {"ETag": headers["ETag"]})
        else:
            self.answer(206, body, headers, len(body) // 2 if fault == "drop" else None)

    def _list(self, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in self.server.files if name.startswith(prefix)]
        if not below:
            self.answer(404, b"")
            return
        names = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in below})
        text = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
        self.answer(200, text.encode(), {"Content-Type": "text/html"})


class HubServer(Server):
    """As much of the Hugging Face Hub as listing and reading one repository takes; `commits` are whole trees, the last is main."""

    def __init__(self, repository: str, commits: dict[str, dict[str, bytes]]) -> None:
        super().__init__(_HubHandler)
        self.repository, self.commits = repository, commits
        self.resolved: list[str] = []


class _HubHandler(Quiet):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repository, commits = self.server.repository, self.server.commits
        api, files = f"/api/models/{repository}", f"/{repository}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self.server.resolved.append(revision)
            data = commits[self._commit(revision)][name]
            start, stop = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            headers = {"Content-Range": f"bytes {start}-{min(stop, len(data) - 1)}/{len(data)}"}
            self.answer(206, data[start : stop + 1], headers)
        elif path.startswith(f"{api}/tree/"):
            revision, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            self._json(self._tree(commits[self._commit(revision)], folder))
        elif path.startswith(api):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            self._json({"id": repository, "sha": self._commit(revision), "siblings": []})
        else:
            self.answer(404, b"")

    def _commit(self, revision: str) -> str:
        return list(self.server.commits)[-1] if revision == "main" else revision

    def _tree(self, files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
        folders = {name.rpartition("/")[0] for name in files} - {""}
        found = [{"type": "directory", "oid": "0", "size": 0, "path": name} for name in sorted(folders)]
        found += [
            {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
            for name, data in files.items()
        ]
        return [entry for entry in found if str(entry["path"]).startswith(f"{folder}/" if folder else "")]

    def _json(self, document: Any) -> None:
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})


class Proxy(Server):
    """In front of another server: counts what it answers, cuts some answers in the middle, refuses some requests.

    Args:
        target: the URL of the server behind.
        cut_every: every so many-th answer with a body ends in its middle.
        refuse_every: every so many-th request is answered by 503.
    """

    def __init__(self, target: str, *, cut_every: int = 0, refuse_every: int = 0) -> None:
        super().__init__(_ProxyHandler)
        self.target, self.cut_every, self.refuse_every = target, cut_every, refuse_every
        self.num_requests = self.num_bytes = self.num_cut = self.num_refused = 0

    def decide(self) -> str:
        """Say what becomes of the next request."""
        with self.lock:
            self.num_requests += 1
            if self.refuse_every and self.num_requests % self.refuse_every == 0:
                self.num_refused += 1
                return "refuse"
            if self.cut_every and self.num_requests % self.cut_every == 0:
                self.num_cut += 1
                return "cut"
            return "pass"


class _ProxyHandler(Quiet):
    def handle_one_request(self) -> None:
        body = self.rfile.peek(1)
        if not body:
            self.close_connection = True
            return
        super().handle_one_request()

    def cut(self) -> None:
        """Reset the connection, as a machine that dies does: what was sent may be lost too."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.server.decide()
        if fate == "refuse":
            self.answer(503, b"busy")
            return
        place = urlsplit(self.server.target)
        behind = http.client.HTTPConnection(str(place.hostname), place.port, timeout=HANG)
        try:
            behind.request(self.command, self.path, body, dict(self.headers.items()))
            response = behind.getresponse()
            data = response.read()
            head = {name: value for name, value in response.getheaders() if name.lower() not in _OWN_HEADERS}
        finally:
            behind.close()
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        if length is not None:
            head["Content-Length"] = length
        with self.server.lock:
            self.server.num_bytes += len(data) + sum(len(name) + len(value) + 4 for name, value in head.items()) + 40
        self.answer(response.status, data, head, len(data) // 2 if fate == "cut" else None)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on


_OWN_HEADERS = frozenset({"connection", "transfer-encoding", "content-length", "server", "date"})
