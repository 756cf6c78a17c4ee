"""Folders that many of the tests here open."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from model_builders import add_adapter, make_llama, save_adapter, save_model

from eigenzoo.formats.remote import retrying


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain adapter of rank 4 on two kinds of modules."""
    return save_adapter(add_adapter(make_llama(), r=4, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for before attempts at remote files, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(retrying, "pause", lambda seconds, stopped: waited.append(seconds))
    return waited


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model(make_llama(), tmp_path / "sharded", max_shard_size="10KB")


class Bucket:
    """A new bucket of an S3-compatible server; its URL and the server's."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.name = endpoint, f"zoo-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.name}"
        self.direct = fsspec.filesystem("s3", **s3_settings(endpoint))
        self.direct.mkdir(self.name)

    def lead_by(self, endpoint: str) -> None:
        """Let `s3://` URLs reach their server by another way, such as a proxy."""
        fsspec.config.conf["s3"] = s3_settings(endpoint)

    def put(self, folder: Path, name: str = "zoo") -> str:
        """Upload a folder of this machine; returns its URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.direct.pipe_file(f"{self.name}/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{name}"


def s3_settings(endpoint: str) -> dict[str, object]:
    return {
        "endpoint_url": endpoint,
        "key": "test",
        "secret": "test",
        "client_kwargs": {"region_name": "eu-central-1"},
    }


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3-compatible server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> Iterator[Bucket]:
    """A new bucket, which `s3://` URLs reach by fsspec's own settings."""
    bucket = Bucket(s3_endpoint)
    bucket.lead_by(s3_endpoint)
    yield bucket
    del fsspec.config.conf["s3"]
