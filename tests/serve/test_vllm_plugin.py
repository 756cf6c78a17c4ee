"""The plugin of vLLM without vLLM: inert without its setting, and names to folders."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from served_zoos import Zoo, write_adapters

import eigenzoo as ez
from eigenzoo.integrations.vllm_plugin import Adapters, register
from real_models import PEFT_CALLS_OLD_NAMES

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_CALLS_OLD_NAMES}:FutureWarning")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("BUNDLE", "MAX_RANK", "BASE", "MAX_GB"):
        monkeypatch.delenv(f"EIGENZOO_VLLM_{name}", raising=False)
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "cache"))


def test_the_entry_point_is_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["eigenzoo"].partition(":")
    assert getattr(import_module(module), function) is register


@pytest.mark.parametrize("bundles", [None, "", ":"])
def test_it_is_inert_without_its_setting(bundles: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if bundles is not None:
        monkeypatch.setenv("EIGENZOO_VLLM_BUNDLE", bundles)
    monkeypatch.setitem(sys.modules, "vllm", None)  # any import of it fails
    register()
    monkeypatch.setenv("EIGENZOO_VLLM_BUNDLE", "somewhere")
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        register()


def test_it_registers_one_resolver(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With stand-ins of what it imports of vLLM; tests/serve/test_engines.py has the real ones."""
    resolvers: dict[str, Any] = {}
    registry = SimpleNamespace(
        get_supported_resolvers=lambda: resolvers.keys(),
        register_resolver=lambda name, made: resolvers.update({name: made}),
    )
    contents = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("EIGENZOO_VLLM_BUNDLE", str(zoo.bundle))
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    register()
    assert "without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caplog.text
    registered = resolvers["eigenzoo"]
    register()
    assert resolvers == {"eigenzoo": registered}
    request = asyncio.run(registered.resolve_lora(str(zoo.base), "a1"))
    assert (request.lora_name, Path(request.lora_path).name.partition("-")[0]) == ("a1", "a1")
    assert asyncio.run(registered.resolve_lora(str(zoo.base), "../a1")) is None


def test_names_of_several_bundles_are_found_and_others_are_not(zoo: Zoo, tmp_path: Path) -> None:
    others = write_adapters("llama", tmp_path / "zoo")
    named = [path.rename(path.with_name(f"b{number}")) for number, path in enumerate(others)]
    ez.fit(named, rank=1).save(tmp_path / "bundle")
    adapters = Adapters([str(zoo.bundle), str(tmp_path / "bundle")])
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda name: adapters.find(str(zoo.base), name), ["a0", "a19", "b0", "b3", "a0"]))
    assert [path is not None and path.parent == tmp_path / "cache" / "handed-out" for path in paths] == [True] * 5
    assert len(set(paths)) == 4
    assert not torch.nn.Linear(2, 2).weight.is_meta, "threads that load dry at once leave torch's functions replaced"
    before = sorted((tmp_path / "cache").rglob("*"))
    for name in ("a20", "../a0", "a0/../a1", "/etc/passwd", str(paths[0]), "", " a0", "A0", "a0\0", "\ud800"):
        assert adapters.find(str(zoo.base), name) is None
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_errors_are_those_that_vllm_shows(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"org/model: the base is not a folder.* EIGENZOO_VLLM_BASE"):
        Adapters([str(zoo.bundle)]).find("org/model", "a0")
    monkeypatch.setenv("EIGENZOO_VLLM_BASE", str(zoo.base))
    assert Adapters([str(zoo.bundle)]).find("org/model", "a0") is not None
    monkeypatch.setenv("EIGENZOO_VLLM_MAX_RANK", "3")
    with pytest.raises(ValueError, match=r"its adapter has rank 4\. The engine was started for ranks up to 3"):
        Adapters([str(zoo.bundle)]).find("org/model", "a2")
    monkeypatch.setenv("EIGENZOO_VLLM_MAX_RANK", "-1")
    with pytest.raises(ValueError, match="EIGENZOO_VLLM_MAX_RANK: '-1' is not a whole number"):
        Adapters([str(zoo.bundle)]).find("org/model", "a0")
    monkeypatch.delenv("EIGENZOO_VLLM_MAX_RANK")
    with pytest.raises(ValueError, match="there is no such folder"):
        Adapters([str(tmp_path / "none")]).find("org/model", "a0")
