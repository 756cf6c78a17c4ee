from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import functional_call

from eigenzoo.nursery import digits
from eigenzoo.nursery.cnn import GROUP_SIZE, Cnn, CnnKind, permute
from eigenzoo.nursery.recipe import Schedule, plan_zoo
from eigenzoo.nursery.training import batches, predict, rate, share, train

SCHEDULE = Schedule(steps=12, batch_size=16, learning_rate=1e-2)


def started(seeds: list[int]) -> tuple[CnnKind, dict[str, torch.Tensor], torch.Tensor]:
    kind = CnnKind(plan_zoo("digits-cnn", 1, 0, False, False, own_init=True))
    starts = [kind.start(seed) for seed in seeds]
    labels = torch.stack([task.label(digits.load().train_digits) for task in digits.tasks()[: len(seeds)]])
    return kind, {name: torch.stack([start[name] for start in starts]) for name in starts[0]}, labels


def test_models_trained_together_equal_models_trained_by_a_plain_loop() -> None:
    seeds, images = [5, 6, 7], digits.load().train_images
    kind, start, labels = started(seeds)
    together = train(kind.forward, start, images, labels, SCHEDULE, seeds)
    for row, seed in enumerate(seeds):
        net = Cnn()
        net.load_state_dict({name: tensor[row] for name, tensor in start.items()})
        optimizer = torch.optim.Adam(net.parameters())
        for step, batch in enumerate(batches(len(images), SCHEDULE, seed)):
            optimizer.param_groups[0]["lr"] = rate(SCHEDULE, step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images[batch]), labels[row, batch]).backward()
            optimizer.step()
        moved = sum(float((weight.detach() - start[name][row]).abs().max()) for name, weight in net.named_parameters())
        assert moved > 0.1
        for name, weight in net.named_parameters():
            # Adam divides by the gradient's size: round-off in a near-zero gradient can move a weight by its rate.
            torch.testing.assert_close(together[name][row], weight.detach(), rtol=0, atol=2e-3)


def test_training_leaves_its_start_alone_and_ticks_every_step() -> None:
    kind, start, labels = started([1])
    before, ticks = {name: tensor.clone() for name, tensor in start.items()}, []
    train(kind.forward, start, digits.load().train_images, labels, SCHEDULE, [1], ticks.append)
    assert ticks == list(range(1, 13))
    assert all(torch.equal(before[name], start[name]) for name in start)


def test_each_seed_has_its_own_order_and_each_epoch_sees_every_image() -> None:
    schedule = Schedule(steps=8, batch_size=5, learning_rate=1.0)
    one, two = batches(20, schedule, 1), batches(20, schedule, 2)
    assert sorted(one[:4].flatten().tolist()) == sorted(one[4:].flatten().tolist()) == list(range(20))
    assert not torch.equal(one, two)
    assert not torch.equal(one[:4], one[4:])


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [rate(Schedule(100, 1, 0.5), step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("seed", range(3))
def test_permuted_channels_are_the_same_function_of_other_weights(seed: int) -> None:
    # Norms of a fresh network scale all channels alike, and would hide an order that they do not follow.
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(w.shape, generator=generator).double() for name, w in Cnn().named_parameters()}
    state, images = torch.get_rng_state(), digits.load().test_images[:50].double()
    moved = permute(weights, seed)
    assert torch.equal(torch.get_rng_state(), state)
    wanted, got = (functional_call(Cnn().double(), each, (images,)) for each in (weights, moved))
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    same = {name for name in weights if torch.equal(weights[name], moved[name])}
    assert same == {"head.bias"}
    again, other = permute(weights, seed), permute(weights, seed + 1)
    assert all(torch.equal(moved[name], again[name]) for name in weights)
    assert not any(torch.equal(moved[name], other[name]) for name in weights if name != "head.bias")


def test_groups_change_places_and_channels_change_them_within_their_group() -> None:
    weights = {name: weight.detach() for name, weight in Cnn().named_parameters()}
    weights["norm2.weight"] = torch.arange(16.0)
    drawn = torch.stack([permute(weights, seed)["norm2.weight"].int() for seed in range(40)])
    assert (drawn.sort(1).values == torch.arange(16)).all()
    groups = (drawn // GROUP_SIZE).view(40, 4, GROUP_SIZE)
    assert (groups == groups[:, :, :1]).all()
    # Every group was seen first, and every channel of a group first in it: in 40 draws none is missed by chance.
    assert set(groups[:, 0, 0].tolist()) == set(range(4))
    assert set((drawn % GROUP_SIZE)[:, 0].tolist()) == set(range(GROUP_SIZE))


def test_predict_gives_each_model_its_own_classes() -> None:
    kind, start, _ = started([1, 2])
    images = digits.load().test_images
    both = predict(kind.forward, start, images)
    for row in range(2):
        own = kind.forward({name: tensor[row] for name, tensor in start.items()}, images).argmax(-1)
        # A tie decided otherwise by round-off is possible, two of them are not.
        assert share(both[row], own) >= 0.998
