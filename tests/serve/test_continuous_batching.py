"""Requests of many models in one packed batch of transformers' continuous batching answer as each does alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from served_zoos import MANY, Zoo, write_adapters

import eigenzoo as ez
from eigenzoo.errors import ResourceError, UnsupportedError, UsageError
from eigenzoo.integrations import continuous_batching
from eigenzoo.integrations.continuous_batching import INSIDE, MAX_BATCH_TOKENS, PAGE, ZooBatching, check_inside
from eigenzoo.serve import BASE, Served
from real_models import VOCABULARY, make

NEW = 12


def serve(zoo: Zoo, models: int = 20) -> Served:
    space = ez.load(zoo.bundle)
    return ez.serve.attach(make("llama"), space, space.names[:models])


def serve_gpt2(folder: Path) -> Served:
    space = ez.fit(
        write_adapters("gpt2", folder, MANY[:2]), axes=("outputs", "inputs"), rank={"outputs": 8, "inputs": 8}
    )
    return ez.serve.attach(make("gpt2"), space)


def shared_prompts(count: int) -> list[list[int]]:
    """Prompts that begin with the same two pages and more, and end differently or not at all."""
    draw = torch.Generator().manual_seed(3)
    common = torch.randint(1, VOCABULARY, (2 * PAGE + 5,), generator=draw).tolist()
    return [common + [1 + number % 7] * (number % 3) for number in range(count)]


def alone(served: Served, tokens: list[int], name: str, count: int = NEW) -> list[int]:
    with torch.no_grad():
        found = served.generate(
            torch.tensor([tokens]),
            models=[name],
            max_new_tokens=count,
            eos_token_id=VOCABULARY + 1,
            do_sample=False,
            pad_token_id=0,
        )
    return list(found[0, len(tokens) :].tolist())


@pytest.mark.parametrize("batch_tokens", [50, pytest.param(MAX_BATCH_TOKENS, marks=pytest.mark.slow)])
def test_prompts_that_share_pages_in_two_waves(zoo: Zoo, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty models and the base. Blocks of the cache that models shared would give wrong answers without a word.

    In batches of fewer tokens than a prompt has, each is read in parts.
    """
    monkeypatch.setattr(continuous_batching, "MAX_BATCH_TOKENS", batch_tokens)
    served = serve(zoo)
    names = [*served.names, BASE]
    prompts = shared_prompts(len(names))
    expected = [alone(served, tokens, name) for tokens, name in zip(prompts, names, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) > 10
    with ZooBatching(served, cache_tokens=2**12) as batching:
        for _ in range(2):
            found = batching.generate(prompts, names, max_new_tokens=NEW, end=-1)
            assert found == expected
        assert batching.num_requests == 0
        assert batching.fault is None
    assert alone(served, prompts[0], names[0]) == expected[0], "the model is as before"


def test_each_request_samples_as_it_asks(zoo: Zoo) -> None:
    """Beside hot requests, greedy ones take the best token, and top_k=1 or a tiny top_p sample it too."""
    served = serve(zoo, 3)
    prompt = shared_prompts(1)[0]
    expected = {name: alone(served, prompt, name) for name in served.names}
    with ZooBatching(served, cache_tokens=2**12) as batching:
        sure = {
            batching.add(prompt, "a0", max_new_tokens=NEW, end=-1): ("a0", NEW),
            batching.add(prompt, "a1", max_new_tokens=NEW - 3, temperature=2.0, top_k=1, end=-1): ("a1", NEW - 3),
            batching.add(prompt, "a2", max_new_tokens=NEW - 5, temperature=1.0, top_p=1e-6, end=-1): ("a2", NEW - 5),
        }
        hot = [batching.add(prompt, "a0", max_new_tokens=NEW, temperature=50.0, end=-1) for _ in range(4)]
        found = {output.request_id: output.generated_tokens for output in batching if output.is_finished()}
    for request_id, (name, length) in sure.items():
        assert found[request_id] == expected[name][:length]
    assert len({tuple(found[request_id]) for request_id in hot}) > 1


def test_models_that_are_removed_and_requests_that_are_cancelled(zoo: Zoo) -> None:
    """A request keeps the model that it began with. A cancelled one gives back its place and its slot."""
    served = serve(zoo, 3)
    prompt = shared_prompts(1)[0]
    expected = alone(served, prompt, "a1")
    with ZooBatching(served, cache_tokens=2**12, max_queue=3) as batching:
        kept = batching.add(prompt, "a1", max_new_tokens=NEW, end=-1)
        gone = batching.add(prompt, "a2", max_new_tokens=1900, end=-1)
        served.add("a1", served.space.coefficients("a0"), replace=True)
        served.remove("a2")
        batching.cancel(gone)
        found = {output.request_id: output.generated_tokens for output in batching if output.is_finished()}
        assert found[kept] == expected
        assert gone not in found
        assert batching.num_requests == 0
        slot = served.acquire("a0").slot
        served.add("a3", served.space.coefficients("a2"))
        served.add("a4", served.space.coefficients("a2"))
        assert slot not in {served.acquire(name).slot for name in ("a3", "a4")}
        with pytest.raises(UsageError, match="no model is called 'a2'"):
            batching.add(prompt, "a2")
        with pytest.raises(UsageError, match="The model has 2048 positions"):
            batching.add(prompt, "a0", max_new_tokens=4096)
        with pytest.raises(UsageError, match="top_p above 0 and at most 1"):
            batching.add(prompt, "a0", top_p=1.5)
        for _ in range(3):
            batching.add(prompt, "a0", max_new_tokens=1900, end=-1)
        with pytest.raises(ResourceError, match="3 requests wait or run"):
            batching.add(prompt, "a0")
        assert batching.num_requests == 3
    assert batching.num_requests == 0, "stopping gives back the slots"


@pytest.mark.slow
def test_a_cache_that_is_too_small_for_all_requests(zoo: Zoo) -> None:
    """Requests that lose their place in the cache are computed once more, by the same model."""
    served = serve(zoo, 2)
    names = list(served.names) * 3
    prompts = [[1 + number, *tokens[:40]] for number, tokens in enumerate(shared_prompts(len(names)))]
    expected = [alone(served, tokens, name, 40) for tokens, name in zip(prompts, names, strict=True)]
    with ZooBatching(served, cache_tokens=4 * PAGE) as batching:
        offloading, lost = batching.manager.batch_processor.scheduler, []
        add_again = offloading.add_waiting_request
        offloading.add_waiting_request = lambda state: (lost.append(state._true_initial_tokens), add_again(state))
        assert batching.generate(prompts, names, max_new_tokens=40, end=-1) == expected
        assert any(lost), "no request lost its place"
        assert batching.num_requests == 0


def test_an_output_is_never_lost_between_its_end_and_its_delivery(zoo: Zoo) -> None:
    served = serve(zoo, 2)
    with ZooBatching(served, cache_tokens=2**12) as batching:
        router = batching.manager.output_router
        deliver = router.deliver_batch

        def late(outputs: list[Any]) -> None:
            time.sleep(0.3)
            deliver(outputs)

        router.deliver_batch = late
        assert len(batching.generate([[3, 4]], ["a0"], max_new_tokens=1, end=-1)[0]) == 1


def test_what_would_end_the_thread_for_all_is_refused(tmp_path: Path) -> None:
    """Positions that the model has no embedding for, and numbers that are not tokens."""
    served = serve_gpt2(tmp_path)
    positions = served.model.config.max_position_embeddings
    with ZooBatching(served, cache_tokens=2**12) as batching:
        assert batching.longest == positions
        with pytest.raises(UsageError, match=f"The model has {positions} positions"):
            batching.add([3] * positions, "a0", max_new_tokens=1)
        for token in (-1, VOCABULARY):
            with pytest.raises(UsageError, match=f"token {token}"):
                batching.add([3, token], "a0", max_new_tokens=1)
        found = batching.generate([[3] * (positions - 2)], ["a0"], max_new_tokens=2, end=-1)[0]
        assert len(found) == 2
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        ZooBatching(Mock(model=make("t5")))


@pytest.mark.parametrize(
    "missing", [("ContinuousBatchingManager", "_create_batch_processor"), ("OutputRouter", "deliver_batch")]
)
def test_another_inside_of_transformers_is_named(missing: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The inside that is used is that of the tested version; a version without a part of it is refused by name."""
    check_inside()
    owner = next(owner for owner in INSIDE if owner.__name__ == missing[0])
    monkeypatch.delattr(owner, missing[1])
    with pytest.raises(UnsupportedError, match=rf"{missing[0]}.{missing[1]}.*Tested with transformers 5\.23"):
        check_inside()


def test_a_request_that_lost_its_place_to_one_that_is_cancelled(zoo: Zoo) -> None:
    """It waits until a request ends. A cancelled one has ended too, and nothing else would let it run again."""
    served = serve(zoo, 2)
    prompts = [[1 + number] * 60 for number in range(2)]
    with ZooBatching(served, cache_tokens=4 * PAGE) as batching:
        scheduler, lost = batching.manager.batch_processor.scheduler, []
        add_again = scheduler.add_waiting_request

        def cancel_the_other(state: Any) -> None:
            add_again(state)
            if state._true_initial_tokens and not lost:
                lost.append(state.request_id)
                batching.cancel(next(each for each in ids if each != state.request_id))

        scheduler.add_waiting_request = cancel_the_other
        ids = [batching.add(tokens, "a0", max_new_tokens=60, end=-1) for tokens in prompts]
        found = {output.request_id: output.generated_tokens for output in batching if output.is_finished()}
        assert lost
        assert found == {lost[0]: alone(served, prompts[ids.index(lost[0])], "a0", 60)}
