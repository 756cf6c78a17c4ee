"""A Hugging Face hub on the loopback, as far as huggingface_hub's own client asks: repositories with commits and branches,
small files and large ones, uploads; and what a hub or the way to it can do wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from eigenzoo.formats.remote import retrying
from remote_servers import Quiet

Files = dict[str, bytes]
LARGE = (".safetensors", ".bin", ".pt")


class Repository:
    """Whole trees by commit, and branches that name commits."""

    def __init__(self, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})

    def commit(self, files: Files, branch: str = "main", message: str = "first") -> str:
        """Put a tree on a branch; returns its commit."""
        text = f"{len(self.commits)}{sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        self.messages.append(message)
        return commit

    @property
    def files(self) -> Files:
        """The tree of main."""
        return self.commits[self.branches["main"]]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: by id.
        token: who sends it may read what is private or gated, and may write.
        fault: takes (method, path, number of the request) and returns what goes wrong with it, or None: a status,
            `drop` (half of the body), `short`, `long` or `other` (bodies that are not what they were said to be).
        requests: (method, path) of each.
        body_bytes: bytes of files that were sent.
        listed_sizes: sizes that listings say in the place of the true ones, `head_sizes` those of HEAD.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.token = ""
        self.fault: Callable[[str, str, int], Any] = lambda *_: None
        self.wait: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.body_bytes = 0
        self.listed_sizes: dict[str, int] = {}
        self.head_sizes: dict[str, int] = {}
        self.tokens: set[str] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault of the server."""

    def forget(self) -> None:
        """Count anew."""
        self.requests.clear()
        self.body_bytes = 0


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(Quiet):
    server: Hub

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.server.lock:
            self.server.requests.append((self.command, path))
            self.server.tokens |= {token} - {""}
            fault = self.server.fault(self.command, path, len(self.server.requests))
        self.known = bool(self.server.token) and token == self.server.token
        try:
            if isinstance(fault, int):
                raise _Refused(fault)
            self._route(path, data, fault)
        except _Refused as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if self.server.wait is not None and refusal.status == 429:
                headers["Retry-After"] = self.server.wait
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self.answer(refusal.status, b"{}", headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path: str, data: bytes, fault: Any) -> None:
        if path.startswith("/objects/"):
            self._object(path.removeprefix("/objects/"), data, fault)
        elif path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._writable()
            self._batch(json.loads(data))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), data)
        elif "/resolve/" in path:
            repo, _, rest = path.strip("/").partition("/resolve/")
            files, commit, rest = self._tree(repo, rest)
            if rest not in files:
                raise _Refused(404, "EntryNotFound")
            self._file(rest, files[rest], commit, fault)
        else:
            raise _Refused(404)

    def _repo(self, name: str, reading: bool = False) -> Repository:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.known):
            raise _Refused(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if reading and repo.gated and not self.known:
            raise _Refused(403, "GatedRepo", "Access to this model is restricted")
        return repo

    def _tree(self, name: str, rest: str) -> tuple[Files, str, str]:
        """A commit's files, by a revision at the head of a path; what of the path is left."""
        repo = self._repo(name, reading=True)
        for revision in sorted((*repo.branches, *repo.commits), key=len, reverse=True):
            if rest == revision or rest.startswith(f"{revision}/"):
                commit = repo.branches.get(revision, revision)
                return repo.commits[commit], commit, rest[len(revision) + 1 :]
        raise _Refused(404, "RevisionNotFound")

    def _api(self, path: str, data: bytes) -> None:
        org, name, *rest = path.split("/", 2)
        repo_id, (kind, _, rest_of) = f"{org}/{name}", (rest[0] if rest else "").partition("/")
        repo = self._repo(repo_id)
        if kind in ("", "revision"):
            commit = repo.branches.get(rest_of or "main", rest_of)
            if commit not in repo.commits:
                raise _Refused(404, "RevisionNotFound")
            self._json({"id": repo_id, "sha": commit, "private": repo.private, "siblings": [], "tags": []})
        elif kind == "tree":
            files, _, _ = self._tree(repo_id, rest_of)
            folders = {name.rpartition("/")[0] for name in files} - {""}
            self._json(
                [{"type": "directory", "oid": "0", "size": 0, "path": name} for name in sorted(folders)]
                + [self._entry(name, data) for name, data in sorted(files.items())]
            )
        elif kind == "branch":
            self._writable()
            if rest_of in repo.branches:
                raise _Refused(409)
            repo.branches[rest_of] = json.loads(data)["startingPoint"]
            self._json({})
        elif kind == "preupload":
            self._writable()
            asked = json.loads(data)["files"]
            mode = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in asked}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]})
        elif kind == "commit":
            self._writable()
            self._commit(repo, repo_id, rest_of, [json.loads(line) for line in data.splitlines()])
        else:
            raise _Refused(404)

    def _writable(self) -> None:
        if not self.known:
            raise _Refused(403, message="You don't have the rights to do this")

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.server.listed_sizes.get(name, len(data))
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": git_hash(data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(data), "size": size, "pointerSize": 130}
        return entry

    def _file(self, name: str, data: bytes, commit: str, fault: Any) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            self._body(data, headers, fault, self.server.head_sizes.get(name))
            return
        self.server.objects[sha256(data)] = data
        size = self.server.head_sizes.get(name, len(data))
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{sha256(data)}"'}
        # Another host than the hub's own, as with its own stores: that is where clients stop to ask for metadata.
        headers["Location"] = f"{self.server.url.replace('127.0.0.1', 'localhost')}/objects/{sha256(data)}"
        self.answer(302, b"", headers)

    def _object(self, oid: str, data: bytes, fault: Any) -> None:
        if self.command == "PUT":
            self.server.objects[sha256(data)] = data
            self.answer(200, b"")
        else:
            self._body(self.server.objects[oid], {"ETag": f'"{oid}"'}, fault)

    def _body(self, data: bytes, headers: dict[str, str], fault: Any, size: int | None = None) -> None:
        if self.command == "HEAD":
            self.answer(200, data, headers | ({"Content-Length": str(size)} if size is not None else {}))
            return
        status, asked = 200, self.headers.get("Range")
        if asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            end = min(int(stop or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[int(start) : end + 1]
        changed = {"short": data[: len(data) // 2], "long": data + b"more", "other": bytes(len(data))}.get(fault, data)
        with self.server.lock:
            self.server.body_bytes += len(changed)
        self.answer(status, changed, headers, len(changed) // 2 if fault == "drop" else None)

    def _create(self, asked: dict[str, Any]) -> None:
        self._writable()
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id in self.server.repos:
            raise _Refused(409)
        self.server.repos[repo_id] = Repository({}, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _batch(self, asked: dict[str, Any]) -> None:
        found = []
        for item in asked["objects"]:
            action = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}", "header": {}}}
            found.append({**item, **({} if item["oid"] in self.server.objects else {"actions": action})})
        self._json({"transfer": "basic", "objects": found})

    def _commit(self, repo: Repository, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        header, files = lines[0]["value"], dict(repo.commits[repo.branches[branch]])
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise _Refused(412)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        commit = repo.commit(files, branch, header["summary"])
        self._json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _json(self, document: Any) -> None:
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})


@contextmanager
def reached_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub's client reaches, with its cache below a folder, and without a token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = Hub()
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's own storage, which this one has not
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        close_session()
        server.shutdown()
        thread.join()
        server.server_close()


def never_slept(patch: pytest.MonkeyPatch) -> list[float]:
    """Wait nowhere; what would have been waited for is in the list."""
    waited: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> Any:
        waited.append(seconds)
        real(min(seconds, 0.001))

    patch.setattr(time, "sleep", sleep)  # huggingface_hub's own attempts
    patch.setattr(retrying, "pause", lambda seconds, stopped: sleep(seconds))
    return waited
