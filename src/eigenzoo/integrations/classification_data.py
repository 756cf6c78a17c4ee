"""Read labelled texts and images as batches for a classifier: tables with columns text and label, and folders of images.

    reviews.csv, .json, .jsonl, .parquet     one table, a part of which is held out
    reviews/train.csv, reviews/test.csv      or two of them
    pictures/cat/1.png, pictures/dog/…       a folder per class, a part of which is held out
    pictures/train/cat/…, pictures/test/…    or two such folders

All data are checked before training starts: every text is tokenized and every image decoded once.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import DataError, FormatError, UsageError
from eigenzoo.integrations.models import IMAGE, TEXT, pad_token, read_config, read_tokenizer, require, told
from eigenzoo.passes.process import quietly

READERS = {".csv": "from_csv", ".json": "from_json", ".jsonl": "from_json", ".parquet": "from_parquet"}
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
TRAIN, TESTS = "train", ("test", "validation")
TEST_SHARE = 0.2
MOST_POINTS = 2**25
"""Largest number of pixels of an image file. Decoded and converted it takes about 14 bytes per pixel."""
MOST_SIDE = 4096
"""Largest side of an image as a model's input."""
LONGEST = 512
"""Largest number of tokens of a text. Model or tokenizer may set a lower limit."""

_SPLIT_SEED = 0
FORMS = "data are a .csv, .json, .jsonl or .parquet file with columns text and label, or a folder with a folder of images per class"


@dataclass(frozen=True)
class Labelled:
    """A classification task.

    Attributes:
        kind: `text` or `image`.
        train, test: training data and held-out data; batches are (inputs, labels).
        classes: class names in the order of the model's outputs.
        notes: remarks on changes of the data.
    """

    kind: str
    train: Texts | Images
    test: Texts | Images
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Texts or paths of images, each with its label."""

    items: Sequence[Any]
    labels: Sequence[Any]

    def part(self, places: Sequence[int]) -> Rows:
        """Return these rows."""
        return Rows([self.items[place] for place in places], [self.labels[place] for place in places])


class Texts:
    """Tokenized texts. A batch is padded on the right to its longest text."""

    def __init__(self, encoded: Mapping[str, Sequence[Sequence[int]]], labels: Tensor, pad: int) -> None:
        self.encoded, self.labels, self._pad = encoded, labels, pad
        digest = hashlib.sha256(repr([sorted(encoded.items()), labels.tolist(), pad]).encode())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the model is called with, and the labels."""
        inputs = {}
        for key, rows in self.encoded.items():
            chosen = [torch.tensor(rows[place]) for place in indices.tolist()]
            filling = self._pad if key == "input_ids" else 0
            inputs[key] = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=filling)
        return inputs, self.labels[indices]


class Images:
    """Images in files, decoded when a batch is taken."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, processor: Any, mode: str) -> None:
        self._data, self.labels = _image_table(paths), labels
        self._processor, self._mode, self._paths = processor, mode, paths
        sizes = [path.stat().st_size for path in paths]
        digest = hashlib.sha256(repr([[path.name for path in paths], sizes, labels.tolist()]).encode())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the model is called with, and the labels."""
        # One by one, because small files may be large images. Only the processor's result is small.
        made = [self._prepared(place) for place in indices.tolist()]
        return {key: torch.cat([one[key] for one in made]) for key in made[0]}, self.labels[indices]

    def _prepared(self, place: int) -> dict[str, Tensor]:
        def prepare() -> dict[str, Tensor]:
            image = self._data[place]["image"].convert(self._mode)
            return dict(self._processor(images=image, return_tensors="pt"))

        return told("cannot be prepared for the model", self._paths[place], prepare)


def read_labelled(path: Path, model: Path, test_share: float | None = None) -> Labelled:
    """Read a classification task, prepared by a model's own tokenizer or image processor.

    Args:
        path: see the top of the file.
        model: the folder of the transformers checkpoint.
        test_share: share of each class to hold out if the data have no test part (0.2). The items are always the same.

    Labels that are names or numbers of the model's classes are these classes. Otherwise classes are numbered in the order of their
    names. Raises DataError with the first bad row or file for data that cannot be used.
    """
    share = TEST_SHARE if test_share is None else test_share
    if not 0 < share < 1:
        raise UsageError(
            f"test share {share} is out of range", rule="the held-out share of the data lies between 0 and 1"
        )
    kind, found = _find(path)
    require("datasets", "transformers", *(["PIL"] if kind == IMAGE else []))
    config = read_config(model)
    read = _read_images if kind == IMAGE else _read_table
    train, test = read(found[0]), read(found[1]) if found[1] is not None else None
    if test is None:
        train, test = _held_out(train, share, path)
    elif test_share is not None:
        raise UsageError(
            "the data has a test part and --test-share is given too", where=str(path), next_step="leave one of them out"
        )
    classes, numbers = _number(train.labels, config, path)
    unknown = sorted({str(label) for label in test.labels if label not in numbers})
    if unknown:
        raise DataError(f"the training data lacks these test labels: {', '.join(unknown[:5])}", where=str(path))
    labels = [torch.tensor([numbers[label] for label in rows.labels]) for rows in (train, test)]
    if kind == IMAGE:
        prepare = _prepare_images(model, config)
        return Labelled(kind, prepare(train.items, labels[0]), prepare(test.items, labels[1]), classes)
    tokenizer, longest = read_tokenizer(model), _longest(model, config)
    parts = [_encode(tokenizer, rows.items, label, longest) for rows, label in zip((train, test), labels, strict=True)]
    num_cut = parts[0][1] + parts[1][1]
    cut = f"{num_cut} of {len(train.items) + len(test.items)} texts are longer than {longest} tokens and were cut"
    return Labelled(kind, parts[0][0], parts[1][0], classes, (cut,) if num_cut else ())


def _find(path: Path) -> tuple[str, tuple[Path, Path | None]]:
    """Find the kind of data by names alone, and the paths of the training part and of the test part if there is one."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"files with suffix {path.suffix!r} are not supported", where=str(path), rule=FORMS)
        return TEXT, (path, None)
    if not path.is_dir():
        raise DataError("there is no such file or folder", where=str(path), rule=FORMS)
    entries = {entry.name: entry for entry in path.iterdir() if not entry.name.startswith(".")}
    tables = {entry.stem: entry for entry in entries.values() if entry.suffix.lower() in READERS and entry.is_file()}
    tests = [name for name in TESTS if name in tables or name in entries]
    if TRAIN in tables:
        return TEXT, (tables[TRAIN], tables.get(tests[0]) if tests else None)
    if TRAIN in entries and tests and {TRAIN, *TESTS} >= set(entries):
        return IMAGE, (entries[TRAIN], entries[tests[0]])
    return IMAGE, (path, None)


def _read_table(path: Path) -> Rows:
    """Read and check a table's columns text and label."""
    import datasets

    # pandas must not read texts like "None" and "NA" as empty cells.
    options = {"keep_default_na": False} if path.suffix.lower() == ".csv" else {}
    with tempfile.TemporaryDirectory(prefix="eigenzoo-") as cache, _silent_datasets():
        reader: Any = getattr(datasets.Dataset, READERS[path.suffix.lower()])
        table = told("cannot be read", path, lambda: reader(str(path), cache_dir=cache, keep_in_memory=True, **options))
        names = list(table.column_names)
        if not {"text", "label"} <= set(names):
            raise DataError(
                f"the table has the columns {', '.join(map(repr, names[:8])) or 'none'}",
                where=str(path),
                rule="a table of texts has columns 'text' and 'label'",
            )
        label = table.features["label"]
        labels = list(table["label"])
        if isinstance(label, datasets.ClassLabel):
            labels = [label.int2str(number) if number is not None else None for number in labels]
        rows = Rows(list(table["text"]), labels)
    for number, (text, label) in enumerate(zip(rows.items, rows.labels, strict=True), 1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"row {number} has no text ({str(text)[:40]!r})", where=str(path))
        if not isinstance(label, int | str) or (isinstance(label, str) and not label.strip()):
            raise DataError(
                f"row {number} has an invalid label {str(label)[:40]!r}",
                where=str(path),
                rule="a label is a word or a whole number",
            )
    # All labels have one type: 1 and "1" in a mixed column are the same class.
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in rows.labels):
        rows = Rows(rows.items, [str(label) for label in rows.labels])
    return rows


def _read_images(folder: Path) -> Rows:
    """List a folder of images per class, and decode every image once."""
    from PIL import Image

    items: list[Path] = []
    labels: list[str] = []
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for place in classes:
        files = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
        odd = [file.name for file in files if file.suffix.lower() not in IMAGES or not file.is_file()]
        if odd or not files:
            raise DataError(
                f"{odd[0]!r} is not an image" if odd else "this class is empty", where=str(place), rule=FORMS
            )
        items += files
        labels += [place.name] * len(files)
    if not classes:
        raise DataError("this folder has no subfolders", where=str(folder), rule=FORMS)
    for file in items:
        with warnings.catch_warnings():
            # Pillow only warns about an image of more than some hundred megabytes. Here it is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            told("this image cannot be read", file, lambda file=file: _decode(file))  # type: ignore[misc]
    return Rows(items, labels)


def _decode(file: Path) -> None:
    from PIL import Image

    with Image.open(file) as image:
        width, height = image.size
        if width * height > MOST_POINTS:
            raise DataError(
                f"an image of {width} × {height} is too large",
                where=str(file),
                rule=f"at most {MOST_POINTS} points",
                next_step="make it smaller",
            )
        image.load()


def _image_table(paths: Sequence[Path]) -> Any:
    import datasets

    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths]})
    return table.cast_column("image", datasets.Image())


def _held_out(rows: Rows, share: float, path: Path) -> tuple[Rows, Rows]:
    """Hold out a share of each class, drawn by a fixed seed, so that figures of two runs are of the same items."""
    places: dict[Any, list[int]] = {}
    for place, label in enumerate(rows.labels):
        places.setdefault(label, []).append(place)
    generator, test = torch.Generator().manual_seed(_SPLIT_SEED), set()
    for label in sorted(places, key=str):
        order = torch.randperm(len(places[label]), generator=generator).tolist()
        number = min(len(order) - 1, max(1, round(share * len(order))))
        test |= {places[label][place] for place in order[:number]}
    if not test:
        raise DataError("no class has two items, so none can be held out", where=str(path))
    return rows.part([place for place in range(len(rows.labels)) if place not in test]), rows.part(sorted(test))


def _number(labels: Sequence[Any], config: Any, path: Path) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the class names in the order of the model's outputs, and the number of each label."""
    found = set(labels)
    if len(found) < 2:
        raise DataError(
            f"the data has {len(found)} class{'es' * (not found)}", where=str(path), rule="a task has at least 2"
        )
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    names = tuple(str(config.id2label.get(number, number)) for number in range(config.num_labels))
    if all(isinstance(label, int) for label in found):
        if found <= set(range(config.num_labels)):
            return names, {label: label for label in found}
    elif found <= set(known):
        return names, {label: known[label] for label in found}
    numbered = all(isinstance(label, int) or label.isdecimal() for label in found)
    ordered = sorted(found, key=lambda label: (int(label) if numbered else 0, label))
    return tuple(map(str, ordered)), {label: number for number, label in enumerate(ordered)}


def _longest(model: Path, config: Any) -> int:
    """Return the largest number of tokens for model and tokenizer."""
    limits = [getattr(config, "max_position_embeddings", None), read_tokenizer(model).model_max_length, LONGEST]
    # Tokenizers without a limit return 10^30. Positions of models like RoBERTa start after the padding's number.
    offset = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return min(int(limit) - (offset if place == 0 else 0) for place, limit in enumerate(limits) if limit)


def _encode(tokenizer: Any, texts: Sequence[str], labels: Tensor, longest: int) -> tuple[Texts, int]:
    """Tokenize texts and truncate those that are too long. Return the number of truncated texts."""
    with quietly():
        # The length is checked first, because a tokenizer does not report which texts it has truncated.
        whole = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        encoded = tokenizer(list(texts), truncation=True, max_length=longest)
    empty = [place for place, ids in enumerate(encoded["input_ids"]) if not len(ids)]
    if empty:
        raise DataError(f"a text has no tokens: {texts[empty[0]][:40]!r}", rule="every text needs at least one")
    kept = {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}
    return Texts(kept, labels, pad_token(tokenizer)[1]), sum(len(ids) > longest for ids in whole)


def _prepare_images(model: Path, config: Any) -> Callable[[Sequence[Path], Tensor], Images]:
    from transformers import AutoImageProcessor

    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    with quietly():
        processor = told(
            "has no image processor",
            model,
            lambda: AutoImageProcessor.from_pretrained(model, local_files_only=True, trust_remote_code=False),
        )
    sizes = [number for name in ("size", "crop_size") for number in _numbers(getattr(processor, name, None))]
    if any(number > MOST_SIDE for number in sizes):
        raise FormatError(
            f"its image processor makes images of {max(sizes)}", where=str(model), rule=f"at most {MOST_SIDE} a side"
        )
    return lambda paths, labels: Images(paths, labels, processor, mode)


def _numbers(size: Any) -> list[int]:
    """Return the numbers in an image processor's size, which is a number or a mapping from names to numbers."""
    entries = [size] if isinstance(size, int) else list((dict(size) if size else {}).values())
    return [entry for entry in entries if isinstance(entry, int)]


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Hide the library's progress bars and its output, because errors are reported in one line."""
    import datasets

    level, shown = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
