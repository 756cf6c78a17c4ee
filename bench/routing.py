"""Which model for this input: the router beside its controls, on held-out inputs. The tables of docs/route.md.

    python -m bench.routing [FOLDER] [--write]
    python -m bench.routing --texts [--write]
    python -m bench.routing --examples POOL --inputs TEST [--bundle BUNDLE]

The first form trains two zoos of LoRA adapters in FOLDER (`zoos`) and keeps them: `domains`, whose models have tasks and kinds of
images of their own, and `turned`, whose models have one task and images turned by angles of their own. `--write` puts the tables
between the marks in docs/route.md. About two minutes on one core.

The second form needs the extra `text`: passages of docstrings, by the encoder of the nursery's kind `docstrings-lora`, with a model
for each of ten kinds of docstrings, and twenty models of that zoo, whose inputs are of all kinds. A few minutes.

The third form measures any zoo, such as one of texts: POOL and TEST are safetensors files with one tensor of features (n, D) per
model. Examples are drawn from POOL, and TEST is what they are measured on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from bench.pages import markdown, with_tables
from eigenzoo.display import in_percent
from eigenzoo.linalg.discriminant import discriminant
from eigenzoo.routing.routing import mix

PAGE = Path(__file__).parent.parent / "docs" / "route.md"
NUM_EXAMPLES, DRAWS, FOLDS, ALPHA = (8, 16, 32, 64), 5, 3, 0.05
"""Examples per model; draws of examples; a router of each draw lacks one of so many parts of the models."""

SHARES = (0.1, 0.2, 0.4)
"""Of a mean that comes from models of similar coefficients."""

ANGLES = tuple(range(0, 360, 45))
SHOWN = 16
"""Examples per model where functions are measured."""

Features = Mapping[str, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pool: Features, count: int, seed: int) -> dict[str, Tensor]:
    """Draw examples of each model, other rows for each, as if its inputs had come by themselves."""
    return {
        name: rows[torch.randperm(len(rows), generator=seeded(1000 * seed + place))[:count]]
        for place, (name, rows) in enumerate(pool.items())
    }


def controls(examples: Features, rows: Tensor) -> dict[str, Tensor]:
    """What the nearest centroid and a linear probe choose, as numbers of models."""
    from sklearn.linear_model import LogisticRegression

    pooled = torch.cat(list(examples.values()))
    center, spread = pooled.mean(0), pooled.std(0).clamp_min(1e-6)
    labels = torch.cat([torch.full((len(each),), place) for place, each in enumerate(examples.values())])
    probe = LogisticRegression(max_iter=5000).fit(((pooled - center) / spread).numpy(), labels.numpy())
    means = torch.stack([each.mean(0) for each in examples.values()])
    return {
        "centroid": torch.cdist(rows, means).argmin(1),
        "probe": torch.from_numpy(probe.predict(((rows - center) / spread).numpy())),
    }


def by_coefficients(examples: Features, rows: Tensor, similar: Tensor) -> dict[float, Tensor]:
    """What the router would choose if each mean came in part from models of similar coefficients."""
    fitted = discriminant(list(examples.values()))
    return {
        share: replace(fitted, means_GD=(1 - share) * fitted.means_GD + share * similar @ fitted.means_GD)
        .distances(rows)
        .argmin(1)
        for share in SHARES
    }


def similarity(space: ez.Subspace, names: Sequence[str]) -> Tensor:
    """Positive cosines of models' coefficients about their mean, without the model itself; rows sum to 1, or to nothing."""
    vectors = torch.stack(
        [torch.cat([values.flatten() for values in space.coefficients(name).values.values()]) for name in names]
    ).double()
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    cosines = (vectors @ vectors.T).clamp_min(0).fill_diagonal_(0)
    return cosines / cosines.sum(1, keepdim=True).clamp_min(1e-12)


def measure(pool: Features, test: Features, count: int, space: ez.Subspace | None) -> dict[str, float | None]:
    """Measure routers of `count` examples per model: shares of right answers, and of inputs without an answer."""
    names = list(pool)
    found: dict[str, list[float]] = {}

    def note(what: str, right: Tensor | float) -> None:
        found.setdefault(what, []).append(float(right.double().mean()) if isinstance(right, Tensor) else right)

    rows = torch.cat([test[name] for name in names])
    labels = torch.cat([torch.full((len(test[name]),), place) for place, name in enumerate(names)])
    for seed in range(DRAWS):
        examples = drawn(pool, count, seed)
        routing = ez.Router.fit(examples).route(rows, alpha=0)
        note("router", torch.tensor([names.index(str(model)) for model in routing.models]) == labels)
        note("weight", routing.weights.gather(1, labels[:, None]))
        for name, chosen in controls(examples, rows).items():
            note(name, chosen == labels)
        if space is not None:
            shifted = by_coefficients(examples, rows, similarity(space, names))
            note("coefficients", max(float((chosen == labels).double().mean()) for chosen in shifted.values()))
        for fold in range(FOLDS):
            known = [name for place, name in enumerate(names) if place % FOLDS != fold]
            router = ez.Router.fit({name: examples[name] for name in known}, seed=seed)
            if len(router.scores) + 1 < 1 / ALPHA:
                continue
            for what, group in (("seen", known), ("unseen", [name for name in names if name not in known])):
                routing = router.route(torch.cat([test[name] for name in group]), alpha=ALPHA)
                note(what, routing.num_abstained / len(routing.models))
    averages: dict[str, float | None] = {what: statistics.fmean(values) for what, values in found.items()}
    return {"chance": 1 / len(names), **averages}


COLUMNS = {
    "chance": "chance",
    "centroid": "nearest centroid",
    "probe": "linear probe",
    "router": "router",
    "coefficients": "with coefficients",
    "seen": "seen tasks left out",
    "unseen": "unseen tasks left out",
}


def accuracy_table(measured: Sequence[tuple[str, int, Mapping[str, float | None]]]) -> list[str]:
    shown = {key: title for key, title in COLUMNS.items() if any(key in row for _, _, row in measured)}
    return markdown(
        ("features", "examples per model", *shown.values()),
        [
            (title, str(count), *("–" if row.get(key) is None else in_percent(row[key]) for key in shown))
            for title, count, row in measured
        ],
    )


# The nursery.


def kinds_of_images() -> dict[str, Callable[[Tensor], Tensor]]:
    """Twelve kinds of images (n, 1, 8, 8), one task each."""
    functional = torch.nn.functional
    return {
        "upright": lambda x: x,
        "turned-90": lambda x: x.rot90(1, (2, 3)),
        "turned-180": lambda x: x.rot90(2, (2, 3)),
        "turned-270": lambda x: x.rot90(3, (2, 3)),
        "mirrored": lambda x: x.flip(3),
        "transposed": lambda x: x.transpose(2, 3),
        "inverted": lambda x: -x,
        "noisy": lambda x: x + 0.5 * torch.randn(x.shape, generator=seeded(1)),
        "blurred": lambda x: functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), value=-1), 3, 1),
        "dim": lambda x: (x + 1) * 0.4 - 1,
        "shifted": lambda x: x.roll(2, 3),
        "upper-half": lambda x: torch.cat([x[:, :, :4], -torch.ones_like(x[:, :, 4:])], 2),
    }


def turned(images: Tensor, degrees: float) -> Tensor:
    """Turn images about their middle, bilinearly."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]]).expand(len(images), 2, 3)
    grid = torch.nn.functional.affine_grid(turn, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


@dataclass(frozen=True)
class Zoo:
    """A zoo of adapters, what its models are for, and its subspace."""

    kind: Any
    views: Mapping[str, Callable[[Tensor], Tensor]]
    tasks: Mapping[str, Any]
    space: ez.Subspace

    def correct(self, model: ez.Coefficients | str, images: Tensor, task: Any, digits: Tensor) -> Tensor:
        """Tell which images (n,) a rebuilt model answers correctly."""
        from eigenzoo.nursery.lora import ALPHA as LORA_ALPHA
        from eigenzoo.nursery.lora import RANK

        rebuilt, weights = self.space.rebuild(model), {}
        for module in self.space.layers:
            b_OR, a_RI = rebuilt.factors(module)
            weights[f"base_model.model.{module}.lora_A.default.weight"] = a_RI.float()
            weights[f"base_model.model.{module}.lora_B.default.weight"] = b_OR.float() * RANK / LORA_ALPHA
        with torch.no_grad():
            answers = self.kind.forward(weights, images).argmax(-1)
        return answers == task.label(digits)

    def features(self, images: Tensor) -> Tensor:
        """The parent's hidden states, averaged over tokens, of the embedding and both layers: (n, 96)."""
        base = self.kind.model.get_base_model()
        with torch.no_grad(), self.kind.model.disable_adapter():
            states = base(images, output_hidden_states=True).hidden_states
        return torch.cat([state.mean(1) for state in states], 1)


def make(folder: Path, views: Mapping[str, Callable[[Tensor], Tensor]], tasks: Mapping[str, Any]) -> Zoo:
    """Train one adapter for each view of the images, unless it is there, and fit their subspace."""
    from eigenzoo.nursery import digits
    from eigenzoo.nursery.lora import LoraKind
    from eigenzoo.nursery.recipe import plan_zoo
    from eigenzoo.nursery.training import train
    from eigenzoo.nursery.vit import pretrain, save_checkpoint

    plan = plan_zoo("digits-lora", None, 0, False, False, None)
    parent, _ = pretrain(plan)
    kind, data = LoraKind(plan, parent), digits.load()
    if not (folder / "_base").is_dir():
        for seed, (name, view) in enumerate(views.items(), 1):
            start = {key: values[None] for key, values in kind.start(seed).items()}
            labels = tasks[name].label(data.train_digits)[None]
            weights = train(kind.forward, start, view(data.train_images), labels, plan.schedule, [seed])
            kind.save({key: values[0] for key, values in weights.items()}, folder / "models", name)
        save_checkpoint(parent, folder / "_base")
    return Zoo(kind, views, tasks, ez.fit(ez.open_zoo(folder / "models"), rank=1.0))


def domains(folder: Path) -> dict[str, list[str]]:
    """Measure a zoo whose models have tasks and kinds of images of their own."""
    from eigenzoo.nursery import digits

    views = kinds_of_images()
    tasks = dict(zip(views, digits.tasks()[::10], strict=False))
    zoo, data = make(folder / "routing-domains", views, tasks), digits.load()
    measured = []
    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "hidden states of the base": zoo.features,
        "pixels": lambda images: images.flatten(1),
    }
    for title, encode in encoders.items():
        pool, test = (
            {name: encode(view(images)) for name, view in views.items()}
            for images in (data.train_images, data.test_images)
        )
        measured += [(title, count, measure(pool, test, count, zoo.space)) for count in NUM_EXAMPLES]
        if encode == zoo.features:
            function = answers(zoo, pool, test)
    return {"routing": accuracy_table(measured), "routing-function": function}


def answers(zoo: Zoo, pool: Features, test: Features) -> list[str]:
    """Measure what inputs of each domain are answered, when a router chooses the model."""
    from eigenzoo.nursery import digits

    data, names = digits.load(), list(zoo.views)
    images = {name: view(data.test_images) for name, view in zoo.views.items()}
    # Entry (model, domain, image).
    right = torch.stack(
        [
            torch.stack([zoo.correct(model, images[name], zoo.tasks[name], data.test_digits) for name in names])
            for model in names
        ]
    ).double()
    places, found = torch.arange(len(data.test_digits)), dict[str, list[float]]()
    for seed in range(DRAWS):
        examples = drawn(pool, SHOWN, seed)
        router = ez.Router.fit(examples)
        chosen_by = controls(examples, torch.cat(list(test.values())))
        for place, name in enumerate(names):
            mine = slice(place * len(places), (place + 1) * len(places))
            routing = router.route(test[name], alpha=0)
            chosen = {
                "each input by the router's model": torch.tensor([names.index(str(model)) for model in routing.models]),
                **{f"each input by the {key}'s model": each[mine] for key, each in chosen_by.items()},
            }
            row = {title: right[models, place, places] for title, models in chosen.items()}
            models = torch.tensor([names.index(str(model)) for model in routing.models])
            most = int(models.bincount(minlength=len(names)).argmax())
            row["500 inputs of a task by the model of most"] = right[most, place]
            mixed = routing.coefficients(zoo.space)
            row["500 inputs of a task by the router's mixture"] = zoo.correct(
                mixed, images[name], zoo.tasks[name], data.test_digits
            ).double()
            row["the task's own model"] = right[place, place]
            row["any model, at random"] = right[:, place]
            for title, share in row.items():
                found.setdefault(title, []).append(float(share.mean()))
    order = sorted(found, key=lambda title: -statistics.fmean(found[title]))
    return markdown(
        ("answered by", "right answers"), [(title, in_percent(statistics.fmean(found[title]))) for title in order]
    )


def between(folder: Path) -> dict[str, list[str]]:
    """Measure a zoo of one task at eight angles, on images halfway between two of them."""
    from eigenzoo.nursery import digits

    views = {f"turned-{angle:03d}": lambda x, angle=angle: turned(x, angle) for angle in ANGLES}
    task = digits.tasks()[0]
    zoo, data, names = make(folder / "routing-turned", views, dict.fromkeys(views, task)), digits.load(), list(views)
    pool = {name: zoo.features(view(data.train_images)) for name, view in views.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for where, offset in (("at the models' angles", 0.0), ("halfway between two", 22.5)):
        for angle in ANGLES:
            images = turned(data.test_images, angle + offset)
            right = torch.stack([zoo.correct(name, images, task, data.test_digits) for name in names]).double()
            equal = mix(zoo.space, {name: 1 / len(names) for name in names})
            uniform = zoo.correct(equal, images, task, data.test_digits)
            neighbours = [names[place] for place in nearest_two(angle, offset)]
            half = mix(zoo.space, {name: 1 / len(neighbours) for name in neighbours})
            halves = zoo.correct(half, images, task, data.test_digits)
            for seed in range(DRAWS):
                routing = ez.Router.fit(drawn(pool, SHOWN, seed)).route(zoo.features(images), alpha=0)
                models = torch.tensor([names.index(str(model)) for model in routing.models])
                mixed = zoo.correct(routing.coefficients(zoo.space), images, task, data.test_digits).double()
                row = {
                    "the better of the two nearest models, known": right.mean(1)[nearest_two(angle, offset)].max(),
                    "each input by the router's model": right[models, torch.arange(len(images))].mean(),
                    "500 inputs of an angle by the router's mixture": mixed.mean(),
                    "500 inputs of an angle by the model of most": right[int(models.bincount().argmax())].mean(),
                    "the two nearest models, half of each": halves.double().mean(),
                    "the equal mixture of all models": uniform.double().mean(),
                    "any model, at random": right.mean(),
                }
                for title, share in row.items():
                    found.setdefault(title, {}).setdefault(where, []).append(float(share))
    rows = [
        (title, *(in_percent(statistics.fmean(shares)) for shares in each.values())) for title, each in found.items()
    ]
    return {"routing-between": markdown(("answered by", *next(iter(found.values()))), rows)}


def nearest_two(angle: int, offset: float) -> list[int]:
    first = ANGLES.index(angle)
    return [first] if offset == 0 else [first, (first + 1) % len(ANGLES)]


def texts() -> dict[str, list[str]]:
    """Models with kinds of texts of their own, and models of `docstrings-lora`, which all see the same kinds."""
    from eigenzoo.nursery.docstrings import GROUPS, load, tasks
    from eigenzoo.nursery.encoder import build_parent, find_encoder, tokens_of

    parent, tokenizer = build_parent(find_encoder())
    passages, features = load(), {}
    with torch.no_grad():
        for part in ("train", "test"):
            batches = tokens_of(tokenizer, passages.texts[part]).split(250)
            features[part] = torch.cat([parent.bert(input_ids=ids).last_hidden_state.mean(1) for ids in batches])
    kinds = {part: torch.tensor(passages.groups[part]) for part in features}
    draw = seeded(0)

    def by_kind(part: str) -> dict[str, Tensor]:
        return {name: features[part][kinds[part] == number] for number, name in enumerate(GROUPS)}

    def of_all_kinds(part: str) -> dict[str, Tensor]:
        rows = features[part]
        return {task.name: rows[torch.randperm(len(rows), generator=draw)[:150]] for task in tasks()[:20]}

    measured = [
        (title, count, measure(pool, test, count, None))
        for title, pool, test in (
            ("ten models, one for each kind of text", by_kind("train"), by_kind("test")),
            ("twenty models, all for all kinds", of_all_kinds("train"), of_all_kinds("test")),
        )
        for count in NUM_EXAMPLES
    ]
    return {"routing-texts": accuracy_table(measured)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("zoos"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--texts", action="store_true")
    parser.add_argument("--examples", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--bundle", type=Path)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.examples is not None:
        pool, test = load_file(asked.examples), load_file(asked.inputs)
        space = None if asked.bundle is None else ez.load(asked.bundle)
        fewest = min(len(rows) for rows in pool.values())
        counts = [count for count in NUM_EXAMPLES if count <= fewest]
        rows = [(asked.examples.stem, count, measure(pool, test, count, space)) for count in counts]
        print("\n".join(accuracy_table(rows)))
        return
    tables = texts() if asked.texts else {**domains(asked.folder), **between(asked.folder)}
    for name, lines in tables.items():
        print(f"\n{name}", *lines, sep="\n")
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables, PAGE), encoding="utf-8")


if __name__ == "__main__":
    main()
