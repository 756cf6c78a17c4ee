"""The card's front matter and its licences: what the hub reads, made of what sources say, and none of it able to do harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.subspace.bundles.provenance import MAX_README_BYTES
from hub_server import Hub, Repository


def write_zoo(root: Path, heads: list[str]) -> list[Path]:
    """Checkpoints with READMEs of these front matters; none where it is empty."""
    paths = write_stacks(root, {"block.weight": random_stack(len(heads), (7, 6), 0)})
    for path, head in zip(paths, heads, strict=True):
        if head:
            (path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    return paths


def card_of(bundle: Path) -> tuple[dict[str, Any], str]:
    data = metadata_load(bundle / "README.md")
    assert data is not None
    return data, (bundle / "README.md").read_text()


def test_one_licence_of_all_is_that_of_the_bundle(tmp_path: Path) -> None:
    data, text = card_of(ez.fit(write_zoo(tmp_path / "zoo", ["license: apache-2.0"] * 4), 2).save(tmp_path / "bundle"))
    assert data == {"library_name": "eigenzoo", "tags": ["eigenzoo", "weight-subspace"], "license": "apache-2.0"}
    assert "| apache-2.0 | m0, m1, m2, m3 |" in text
    assert ModelCard(text).data.license == "apache-2.0"


def test_several_licences_are_all_named_and_unknown_is_said(tmp_path: Path) -> None:
    heads = [
        "license: mit",
        "license: other\nlicense_name: my-own 1.0",
        "",
        "license: [mit, apache-2.0]",
        "license: mit",
    ]
    data, text = card_of(ez.fit(write_zoo(tmp_path / "zoo", heads), 2).save(tmp_path / "bundle"))
    assert (data["license"], data["license_name"]) == ("other", "those-of-the-sources")
    for row in ("mit | m0, m4", "my-own 1.0 | m1", "unknown | m2", "mit + apache-2.0 | m3"):
        assert f"| {row} |" in text
    data, _ = card_of(ez.fit(write_zoo(tmp_path / "none", [""] * 3), 2).save(tmp_path / "unknown"))
    assert data["license"] == "unknown"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "head",
    [
        "license: '<script>alert(1)</script>'",
        'license: "mit |\\n\\n# Taken over"',
        "license: '[click](javascript:alert(1))'",
        "license: !!python/object/apply:os.system ['true']",
        "license: {mit: 1}",
        "license: 7",
        "license: mit\nlicense: apache-2.0: x",
        "[" * 5000,
        BOMB + "license: mit",
        "license: mit\n# " + "x" * MAX_README_BYTES,
        "license: " + "m" * 100,
    ],
)
def test_what_a_readme_says_wrongly_is_unknown(tmp_path: Path, head: str) -> None:
    heads = ["license: mit", head, "license: mit"]
    data, text = card_of(ez.fit(write_zoo(tmp_path / "zoo", heads), 2).save(tmp_path / "bundle"))
    assert data["license"] == "other"
    assert "| unknown | m1 |" in text
    assert "| mit | m0, m2 |" in text
    assert "<script" not in text
    assert "\n# Taken over" not in text


def test_the_base_of_adapters_is_named_where_it_is_an_id(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"m{n}", random_factors({"q": (7, 6)}, 2, n)) for n in range(4)]
    for path in paths:
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "org/base", "revision": "v1"}
        (path / "adapter_config.json").write_text(json.dumps(config))
    data, text = card_of(ez.fit(paths, 2).save(tmp_path / "bundle"))
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert "Base model: org/base, revision v1, licence not read." in text
    for path in paths:
        (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/base"}))
    data, text = card_of(ez.fit(paths, 2).save(tmp_path / "local"))
    assert "base_model" not in data
    assert "/home/me" not in text


def test_the_base_of_a_difference_with_its_commit_and_licence(hub: Hub, tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo", ["license: mit"] * 4)
    weights = (paths[3] / "model.safetensors").read_bytes()
    hub.repos["org/base"] = Repository({"README.md": b"---\nlicense: llama3\n---\n", "model.safetensors": weights})
    commit = hub.repos["org/base"].branches["main"]
    data, text = card_of(ez.fit(ez.open_zoo(paths[:3], base="org/base"), 2).save(tmp_path / "bundle"))
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert data["license"] == "other", "mit of the models, llama3 of the base"
    assert f"Base model: org/base, revision {commit}, licence llama3." in text
    assert f"--base org/base@{commit} " in text


def test_the_command_makes_the_same_bundle(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eigenzoo.cli.app import main

    for path in write_zoo(tmp_path / "zoo", ["license: mit"] * 4):
        hub.repos[f"org/{path.name}"] = Repository({"model.safetensors": (path / "model.safetensors").read_bytes()})
    ids = [f"org/m{place}" for place in range(4)]
    space = ez.fit(ids, {"outputs": 3, "inputs": 0.9}, ("outputs", "inputs"), center="none", seed=3)
    bundle = space.save(tmp_path / "bundle")
    _, text = card_of(bundle)
    command = text.split("```bash\n")[1].split("\n```")[0].split()
    again = tmp_path / "again"
    monkeypatch.setattr("sys.argv", [*command[:-1], str(again), "--quiet"])
    with pytest.raises(SystemExit, match="0"):
        main()
    files = [path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file()]
    assert [name for name in files if (bundle / name).read_bytes() != (again / name).read_bytes()] == []


def test_a_stranger_s_manifest_puts_nothing_into_the_card(tmp_path: Path) -> None:
    space = ez.fit(write_zoo(tmp_path / "zoo", ["license: mit"] * 3), 2)
    evil = "x\n---\n<script>alert(1)</script>`rm -rf`"
    known = {
        "licences": {"m0": evil, "m1": ["a"], "m2": {"b": 1}},
        "bases": [{"id": evil, "licence": evil}, {"id": "org/base", "revision": evil, "licence": evil}, 3],
        "include": [evil, "block.*"],
        "exclude": {"a": 1},
    }
    space.manifest = space.manifest.model_copy(update={"report": {**space.report, "provenance": known}})
    data, text = card_of(space.save(tmp_path / "bundle"))
    assert data["base_model"] == "org/base"
    assert "<script" not in text
    assert text.count("\n---\n") == 1
    assert text.split("```bash\n")[1].split("```")[0].count("\n") == 1
    assert "--include 'block.*'" in text


def test_growth_adds_the_licences_of_the_new(tmp_path: Path) -> None:
    bundle = ez.fit(write_zoo(tmp_path / "zoo", ["license: mit"] * 4), 2).save(tmp_path / "bundle")
    new = write_stacks(tmp_path / "new", {"block.weight": random_stack(1, (7, 6), 5)})[0].rename(tmp_path / "m9")
    (new / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    for refresh in (False, True):
        grown = ez.load(bundle).add(new, refresh=refresh)
        data, text = card_of(grown.save(tmp_path / f"grown-{refresh}"))
        assert data["license"] == "other"
        assert "| bsd-3-clause | m9 |" in text
        assert "| mit | m0, m1, m2, m3 |" in text
    assert torch.isfinite(next(iter(grown.all_coefficients.values()))).all()
