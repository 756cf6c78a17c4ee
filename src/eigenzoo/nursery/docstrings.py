"""Passages of the standard library's docstrings by the subject of their module, and the binary tasks on them.

The sources are parsed, never imported. Each of ten groups of modules gives 400 passages of 24 words: the name of a class or
function, and a part of its docstring, which begins at every eighth word. Fitted and held-out models have passages of different
docstrings, and so have training and test. A copied docstring is found by eight equal words in a row, so no two of the four parts
have as much in common. The version of Python decides which passages there are, so a zoo contains its own.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from eigenzoo.errors import DataError, FormatError, UsageError
from eigenzoo.formats.json_file import read_json

NUM_WORDS = 24
"""Words of a passage: all have as many, so that none is padded."""

STRIDE, COPIED = 8, 8
"""Words from one passage of a docstring to the next, and equal words in a row that make a passage a copy of another docstring's."""

PARTS: Mapping[str, int] = {"train": 200, "test": 50, "held-out train": 100, "held-out test": 50}
"""Passages of each group in each part."""

SPLIT_SEED = 0

GROUPS: Mapping[str, str] = {
    "concurrency": "asyncio concurrent selectors",
    "mail": "email mailbox imaplib smtplib poplib",
    "messages": "logging warnings traceback",
    "options": "argparse optparse configparser cmd getopt shlex gettext locale",
    "imports": "importlib pkgutil zipimport runpy inspect site sysconfig",
    "markup": "xml html json csv plistlib",
    "numbers": "_pydecimal fractions statistics numbers datetime _pydatetime calendar random",
    "web": "http urllib xmlrpc ftplib wsgiref",
    "debugging": "unittest doctest pdb bdb",
    "files": "pathlib shutil tarfile zipfile _pyio os tempfile gzip bz2 lzma",
}
"""Groups of modules by their subject. The number of a group is its position here."""

_PREFIX, _HELD_OUT = "docstrings:", ";held-out"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_WORDS_OF_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NOT_LIBRARY = frozenset({"site-packages", "test", "tests"})


@dataclass(frozen=True)
class Task:
    """Five groups of modules against the other five; `held_out` takes other passages than the tasks of fitted models.

    `groups` is the class that holds group 0 and is answered 0, the others are answered 1.

    >>> str(Task((0, 1, 2, 3, 4), held_out=True))
    'docstrings:0,1,2,3,4;held-out'
    >>> Task.parse("docstrings:0,1,2,3,4").held_out
    False
    """

    groups: tuple[int, ...]
    held_out: bool = False

    def __post_init__(self) -> None:
        groups = self.groups
        if len(groups) != 5 or list(groups) != sorted(set(groups) & set(range(10))) or 0 not in groups:
            raise UsageError(
                f"groups {groups} are not a task",
                rule="a task is five different groups in rising order, beginning with 0",
            )

    @property
    def name(self) -> str:
        """The name of the model that learns it, e.g. `task-01234`."""
        return "task-" + "".join(map(str, self.groups))

    def __str__(self) -> str:
        return _PREFIX + ",".join(map(str, self.groups)) + (_HELD_OUT if self.held_out else "")

    @classmethod
    def parse(cls, text: str) -> Task:
        """Read what `str` writes; `UsageError` on anything else."""
        listed = text.removeprefix(_PREFIX).removesuffix(_HELD_OUT)
        try:
            task = cls(tuple(int(group) for group in listed.split(",")), text.endswith(_HELD_OUT))
        except ValueError:
            task = None
        if task is None or str(task) != text:
            raise UsageError(f"{text!r} is not a task", rule="a task is written like 'docstrings:0,1,2,3,4'")
        return task

    def part(self, part: str) -> str:
        """Return the part of the passages that `train` or `test` means for this task."""
        return f"held-out {part}" if self.held_out else part


def is_task(text: str) -> bool:
    """Tell whether a task is one of docstrings."""
    return text.startswith(_PREFIX)


def tasks() -> list[Task]:
    """Return all 126 tasks in lexical order, on the passages of fitted models."""
    return [Task((0, *rest)) for rest in combinations(range(1, 10), 4)]


@dataclass(frozen=True)
class Passages:
    """The passages of every part, and the number of each one's group."""

    texts: Mapping[str, Sequence[str]]
    groups: Mapping[str, Sequence[int]]

    def to_json(self) -> str:
        """Give all of them as text, by part and group."""
        names = list(GROUPS)
        document = {
            part: {
                name: [text for text, group in zip(texts, self.groups[part], strict=True) if group == number]
                for number, name in enumerate(names)
            }
            for part, texts in self.texts.items()
        }
        return json.dumps(document, indent=1) + "\n"


def read_passages(path: Path) -> Passages:
    """Read what `Passages.to_json` gave; raises FormatError for anything else."""
    document = read_json(path, where=str(path))
    if set(document) != set(PARTS):
        raise FormatError("has not exactly the four parts of a zoo's passages", where=str(path))
    texts: dict[str, list[str]] = {}
    groups: dict[str, list[int]] = {}
    for part, by_group in document.items():
        if not isinstance(by_group, dict) or list(by_group) != list(GROUPS):
            raise FormatError(f"{part} has not exactly the ten groups", where=str(path))
        listed = [(text, number) for number, found in enumerate(by_group.values()) for text in found]
        if not all(isinstance(text, str) for text, _ in listed):
            raise FormatError(f"{part} has something else than passages", where=str(path))
        texts[part], groups[part] = [text for text, _ in listed], [number for _, number in listed]
    return Passages(texts, groups)


@lru_cache(maxsize=1)
def load() -> Passages:
    """Collect the passages of this Python's standard library.

    Raises DataError for a library with too few of a group. Cost: parsing some 500 files, a few seconds.
    """
    texts: dict[str, list[str]] = {part: [] for part in PARTS}
    groups: dict[str, list[int]] = {part: [] for part in PARTS}
    for number, (name, found) in enumerate(_by_group().items()):
        random.Random(SPLIT_SEED).shuffle(found)
        rest = iter(found)
        for part, wanted in PARTS.items():
            chosen: list[str] = []
            # Surplus passages of a docstring are left out, since its other passages are in this part.
            while len(chosen) < wanted and (docstring := next(rest, None)) is not None:
                chosen += docstring[: wanted - len(chosen)]
            if len(chosen) < wanted:
                raise DataError(
                    f"too few passages about {name}: {len(chosen)} of {wanted} for {part}",
                    where=str(_library()),
                    rule="the docstrings of Python's standard library are read from its source files",
                    next_step="use a Python with the sources of its library, 3.11 or later",
                )
            texts[part] += chosen
            groups[part] += [number] * wanted
    return Passages(texts, groups)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _by_group() -> dict[str, list[list[str]]]:
    """Return the passages of each docstring by group, without copies of other docstrings."""
    group_of = {module: name for name, modules in GROUPS.items() for module in modules.split()}
    found: dict[str, list[list[str]]] = {name: [] for name in GROUPS}
    first: dict[str, int] = {}
    library, num_docstrings = _library(), 0
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        name = group_of.get(parts[0].removesuffix(".py"))
        if name is None or not _NOT_LIBRARY.isdisjoint(parts):
            continue
        for names, docstring in _docstrings(ast.parse(path.read_bytes()), ()):
            num_docstrings += 1
            passages = [text for text in _passages(names, docstring) if _is_new(text, first, num_docstrings)]
            if passages:
                found[name].append(passages)
    return found


def _docstrings(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names and docstring of a node, and those of each class and function in it."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield names, text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, (*names, child.name) if isinstance(child, _DOCUMENTED[1:]) else names)


def _passages(names: Sequence[str], docstring: str) -> Iterator[str]:
    """Yield the passages of a docstring without its examples of code, which begin with a prompt and end at an empty line."""
    paragraphs = (paragraph.partition(">>>")[0] for paragraph in re.split(r"\n\s*\n", docstring))
    named, words = _WORDS_OF_NAME.findall(" ".join(names)), " ".join(paragraphs).split()
    length = NUM_WORDS - len(named)
    for start in range(0, len(words) - length + 1, STRIDE):
        yield " ".join([*named, *words[start : start + length]])


def _is_new(passage: str, first: dict[str, int], docstring: int) -> bool:
    """Tell whether a passage has no `COPIED` words in a row of an earlier docstring; `first` says which had them first."""
    words = passage.lower().split()
    rows = [" ".join(words[start : start + COPIED]) for start in range(len(words) - COPIED + 1)]
    return all(first.setdefault(row, docstring) == docstring for row in rows)
