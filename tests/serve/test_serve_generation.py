"""Generation: rows, beams and packed tokens belong to their models; models come and go while others are computed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from served_zoos import stock, write_adapters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import eigenzoo as ez
from eigenzoo.errors import UsageError
from eigenzoo.serve import BASE, Served
from eigenzoo.serve.route import GATHERED, Packed
from real_models import VOCABULARY, make
from tolerance import tolerance

NEW = 7
SIDES = {"outputs": 8, "inputs": 8}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
    "without cache": {"use_cache": False},
}


def fit(kind: str, folder: Path) -> ez.Subspace:
    return ez.fit(write_adapters(kind, folder), axes=("outputs", "inputs"), rank={"outputs": 12, "inputs": 12})


def prompts(kind: str, rows: int) -> dict[str, Tensor]:
    """Prompts of several lengths, padded on the left (T5's on the right)."""
    draw = torch.Generator().manual_seed(5)
    lengths = [2 + 2 * (row % 3) for row in range(rows)]
    tokens = torch.zeros(rows, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        where = slice(0, length) if kind == "t5" else slice(max(lengths) - length, None)
        tokens[row, where] = torch.randint(1, VOCABULARY, (length,), generator=draw)
        mask[row, where] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def options(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_rows_generate_what_their_models_do_alone(kind: str, way: str, tmp_path: Path) -> None:
    space = fit(kind, tmp_path / "zoo")
    names = [space.names[2], BASE, space.names[0], space.names[1], space.names[0]]
    batch, how = prompts(kind, len(names)), options(**WAYS[way])
    served = ez.serve.attach(make(kind), space)
    found = served.generate(**batch, **how, models=names)
    each = how.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        alone = stock(space, kind, name, tmp_path / "rebuilt")
        expected = alone.generate(**{key: values[row : row + 1] for key, values in batch.items()}, **how)
        assert torch.equal(found[row * each : (row + 1) * each], expected), (row, name)
    assert len({tuple(row.tolist()) for row in found}) > 1, "the models say the same"


def test_ways_to_generate_that_make_other_rows_are_refused(tmp_path: Path) -> None:
    space = fit("llama", tmp_path / "zoo")
    served = ez.serve.attach(make("llama"), space)
    batch = prompts("llama", 2)
    with pytest.raises(UsageError, match="gets 4 rows, but 2 models are named"), served.route(["a0", "a1"]):
        served.model.generate(**batch, **options(num_beams=2))
    with pytest.raises(UsageError, match="one name for each row"):
        served.generate(**batch, models="a0")


def packed(served: Served, runs: list[tuple[str, list[int]]], *, padding: int = 0, keep: bool = False) -> list[Tensor]:
    """Logits of prompts packed into one row, which attend to themselves only; of each the last if `keep`."""
    tokens = [token for _, run in runs for token in run] + [0] * padding
    positions = [place for _, run in runs for place in range(len(run))] + [0] * padding
    owner = torch.tensor([number for number, (_, run) in enumerate(runs) for _ in run] + [-1] * padding)
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    allowed = (owner[:, None] == owner[None]) & causal
    ends = torch.tensor([len(run) for _, run in runs]).cumsum(0) - 1
    tickets = [served.acquire(name) for name, _ in runs]
    more = {"logits_to_keep": ends} if keep else {}
    with torch.no_grad(), served.packed(tickets, [len(run) for _, run in runs], ends if keep else None):
        logits = served.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            attention_mask=allowed[None, None],
            **more,
        ).logits[0]
    for ticket in tickets:
        ticket.release()
    return list(logits) if keep else list(torch.split(logits[: int(ends[-1]) + 1], [len(run) for _, run in runs]))


@pytest.mark.parametrize("view", ["adapters", "with heads"])
def test_packed_tokens(view: str, tmp_path: Path) -> None:
    """Runs of one token and of many, of models and the base, with padding behind them."""
    more = {"modules_to_save": ["lm_head"]} if view == "with heads" else {}
    space = ez.fit(write_adapters("llama", tmp_path / "zoo", **more), axes=("outputs", "inputs"), rank=SIDES)
    model = make("llama")
    served = ez.serve.attach(model, space)
    draw = torch.Generator().manual_seed(1)
    names = [space.names[1], BASE, space.names[0], space.names[2], space.names[1], BASE]
    runs = [
        (name, torch.randint(1, VOCABULARY, (length,), generator=draw).tolist())
        for name, length in zip(names, [7, 6, 1, 9, 1, 2], strict=True)
    ]
    for keep in (False, True):
        found = packed(served, runs, padding=3, keep=keep)
        for (name, run), logits in zip(runs, found, strict=True):
            with torch.no_grad():
                alone = stock(space, "llama", name, tmp_path / "rebuilt")(torch.tensor([run])).logits[0]
            expected = alone[-1] if keep else alone
            assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


class Largest(TorchDispatchMode):
    """The values of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.values = max(self.values, found.numel())
        return found


@pytest.mark.parametrize("length", [40, 3])
def test_temporaries_of_a_long_prompt_are_no_larger_than_its_activations(length: int) -> None:
    """Twenty models in one packed row, in long runs and short ones. Cores of all tokens would be 64 times the outputs."""
    side, width, count = 64, 64, 20
    runs = [1 + number % count for number in range(4096 // length)]
    cores = torch.randn(count + 1, side, side)
    tokens = torch.randn(1, len(runs) * length, side)
    pick = Packed(runs, [length] * len(runs), torch.device("cpu")).pick(tokens.shape, "module")
    with torch.no_grad(), Largest() as largest:
        found = pick.times(tokens, cores)
    assert largest.values <= max(tokens.numel(), GATHERED)
    assert tokens.shape[1] * side * width / 3 > GATHERED
    expected = torch.stack([tokens[0, place] @ cores[runs[place // length]].T for place in range(tokens.shape[1])])
    assert float((found[0] - expected).abs().max()) <= tolerance(side, dtype=torch.float32, scale=side)


def test_models_come_and_go_beside_others(tmp_path: Path) -> None:
    """A model is added, replaced and removed while another thread computes with the old ones: nothing changes in it."""
    paths = write_adapters("llama", tmp_path / "zoo", [{"r": 2}] * 6)
    space = ez.fit(paths, axes=("outputs", "inputs"), rank={"outputs": 12, "inputs": 12})
    served = ez.serve.attach(make("llama"), space, space.names[:3])
    names, batch = ["a0", "a1", "a2", BASE], prompts("llama", 4)
    expected = served.generate(**batch, **options(max_new_tokens=24, min_new_tokens=24), models=names)
    before = served.memory()
    others, stop, faults = {}, threading.Event(), []

    def compute() -> None:
        while not stop.is_set():
            try:
                with served.route(names):
                    got = served.model.generate(**batch, **options(max_new_tokens=24, min_new_tokens=24))
                if not torch.equal(got, others.setdefault("expected", expected)):
                    faults.append(got)
            except UsageError:  # between two routes the name was taken away
                others["expected"] = None
                return

    thread = threading.Thread(target=compute)
    thread.start()
    for name in ("a3", "a4", "a5"):
        served.add(name)
    found = served.generate(**batch, **options(), models=["a3", "a4", "a5", BASE])
    for row, name in enumerate(("a3", "a4", "a5")):
        alone = stock(space, "llama", name, tmp_path / "rebuilt")
        assert torch.equal(
            found[row : row + 1], alone.generate(**{k: v[row : row + 1] for k, v in batch.items()}, **options())
        )
    ticket = served.acquire("a1")
    with served.route(["a2"] * 4):
        kept = served.model.generate(**batch, **options())
        served.add("a2", space.coefficients("a5"), replace=True)
        served.remove("a1")
        served.add("a6", paths[3])
        assert torch.equal(kept, served.model.generate(**batch, **options())), "the request began with the old model"
    stop.set()
    thread.join()
    assert not faults
    assert set(served.names) == {"a0", "a2", "a3", "a4", "a5", "a6"}
    assert ticket.slot not in {served.acquire(name).slot for name in served.names}, "its slot was given away"
    ticket.release()
    assert torch.equal(
        served.generate(**batch, **options(), models=["a2"] * 4),
        served.generate(**batch, **options(), models=["a5"] * 4),
    )
    with pytest.raises(UsageError, match="no model is called 'a1'"):
        served.remove("a1")
    with pytest.raises(UsageError, match="'a0' is attached already"):
        served.add("a0")
    with pytest.raises(UsageError, match="cannot name a model"):
        served.add(BASE)
    after = served.memory()
    assert after["per_model"] == before["per_model"]
    assert after["cores"] <= before["cores"] + 6 * before["per_model"]


def test_a_thousand_models_take_little_more_than_their_cores(tmp_path: Path) -> None:
    """Added one by one: at most a tenth more than the cores, and each is the model that it is called."""
    space = fit("llama", tmp_path / "zoo")
    served = ez.serve.attach(make("llama"), space)
    values = [space.coefficients(name) for name in space.names]
    for number in range(1000):
        served.add(f"copy {number}", values[number % len(values)])
    memory = served.memory()
    sides = sum(12 * 12 for _ in space.layers)
    assert memory["models"] == 1000 + len(values)
    assert memory["per_model"] <= sides * 4
    assert memory["cores"] <= 1.1 * memory["models"] * memory["per_model"]
    batch = prompts("llama", 2)
    found = served.generate(**batch, **options(), models=["copy 997", "copy 2"])
    expected = served.generate(**batch, **options(), models=[space.names[997 % 4], space.names[2]])
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_compiled_model_answers_the_same(tmp_path: Path) -> None:
    """One graph, without breaks, for every mix of models."""
    space = fit("llama", tmp_path / "zoo")
    model = make("llama")
    served = ez.serve.attach(model, space)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = {"input_ids": prompts("llama", 3)["input_ids"], "use_cache": False}
    for names in (["a0", "a1", BASE], ["a2", "a0", "a1"], [BASE, BASE, "a3"]):
        with torch.no_grad(), served.route(names):
            assert torch.equal(compiled(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)
