"""The next steps that the source can say about files, found in its syntax tree.

A sentence is a regular expression of its fixed words: an f-string's values may be anything, constants stand for their text,
and each branch of a condition is a sentence of its own.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

from eigenzoo.formats import refused
from eigenzoo.formats.lora import config, factor_names
from eigenzoo.formats.opening import _REFUSED_FACTORS

SOURCE = Path(refused.__file__).parents[1]
ROOMS = ("formats", "zoo")
ANYTHING = ".*?"

TABLES = {
    "formats/lora/config.py": [step for _, step in config._REFUSED.values()],
    "formats/lora/factor_names.py": [tool.next_step for tool in factor_names.TOOLS],
    "formats/opening.py": [step for _, _, step in _REFUSED_FACTORS.values()],
    "formats/refused.py": [step for _, step in refused.FOREIGN.values()],
}
"""Next steps that stand in a table: an error takes them from there by a variable."""

EXCEPTIONS = {
    "where Megatron is installed, merge it": "needs Megatron and its process groups",
    "with the PEFT that wrote it, 0.2 or older": "that PEFT runs with no transformers that is supported",
    "with the quantised base that it was trained on": "PEFT's LoftQ needs bitsandbytes",
    "dequantise the model (model.dequantize() in transformers)": "quantising needs bitsandbytes or a GPU",
    "run litgpt merge_lora": "LitGPT needs another torch than the one that is tested",
    "upgrade eigenzoo": "needs a version that is not written yet",
    "pip install ": "tests install nothing",
    "reserve more bytes for the header": "no file leads there: a fit reserves what its own layers take",
    "open the model again": "no public call leads there: a zoo keeps its rules",
}
"""Next steps that no test follows, by their first words, and why."""

OF_OTHERS = frozenset({"scrubbed"})
"""Functions that give another library's text."""


def sentences() -> dict[str, set[str]]:
    """Return every next step as a pattern, with the files that say it."""
    found: dict[str, set[str]] = {}
    for file, steps in TABLES.items():
        for step in steps:
            found.setdefault(re.escape(step), set()).add(file)
    for room in ROOMS:
        for path in sorted((SOURCE / room).rglob("*.py")):
            file = path.relative_to(SOURCE).as_posix()
            for pattern in _of_file(path, file):
                if re.search(r"[a-z]{3}", pattern):
                    found.setdefault(pattern, set()).add(file)
    return found


def _of_file(path: Path, file: str) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = importlib.import_module(f"eigenzoo.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "next_step":
            around = [
                function for function in functions if function.lineno <= node.value.lineno <= (function.end_lineno or 0)
            ]
            innermost = max(around, key=lambda function: function.lineno, default=None)
            yield from _Reader(module, functions, innermost, file).patterns(node.value)


class _Reader:
    """Reads expressions of one function."""

    def __init__(
        self, module: ModuleType, functions: list[ast.FunctionDef], function: ast.FunctionDef | None, file: str
    ) -> None:
        self._module, self._functions, self._function, self._file = module, functions, function, file

    def patterns(self, node: ast.expr) -> list[str]:
        """What an expression can say: one pattern for each way through its conditions."""
        if isinstance(node, ast.Constant):
            return [re.escape(str(node.value))]
        if isinstance(node, ast.JoinedStr):
            parts = [
                self._inserted(part) if isinstance(part, ast.FormattedValue) else self.patterns(part)
                for part in node.values
            ]
            return ["".join(chosen) for chosen in product(*parts)]
        if isinstance(node, ast.BinOp):
            return [left + right for left, right in product(self.patterns(node.left), self.patterns(node.right))]
        if isinstance(node, ast.IfExp):
            return [*self.patterns(node.body), *self.patterns(node.orelse)]
        if isinstance(node, ast.BoolOp):
            return [pattern for value in node.values for pattern in self.patterns(value)]
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return [] if node.func.id in OF_OTHERS else self._called(node.func.id)
        if isinstance(node, ast.Attribute) and node.attr == "next_step":
            return []  # what another error says, or a table
        raise AssertionError(f"{self._file}:{node.lineno}: a next step that no test can follow: {ast.unparse(node)}")

    def _inserted(self, part: ast.FormattedValue) -> list[str]:
        value = getattr(self._module, part.value.id, None) if isinstance(part.value, ast.Name) else None
        return [re.escape(value)] if isinstance(value, str) else [ANYTHING]

    def _named(self, name: str) -> list[str]:
        assigned = [
            value for node in ast.walk(self._function or ast.Module([], [])) for value in _values_of(node, name)
        ]
        if assigned:
            return [pattern for value in assigned for pattern in self.patterns(value)]
        value = getattr(self._module, name, None)
        if isinstance(value, str):
            return [re.escape(value)]
        if self._file in TABLES or self._is_argument(name):
            return []
        raise AssertionError(f"{self._file}: where does the next step {name!r} come from?")

    def _is_argument(self, name: str) -> bool:
        return self._function is not None and name in {argument.arg for argument in self._function.args.args}

    def _called(self, name: str) -> list[str]:
        function = next((function for function in self._functions if function.name == name), None)
        if function is None:
            found = getattr(self._module, name)
            tree = ast.parse(Path(importlib.import_module(found.__module__).__file__ or "").read_text(encoding="utf-8"))
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            module = importlib.import_module(found.__module__)
            return _Reader(module, functions, None, self._file)._called(name)
        inner = _Reader(self._module, self._functions, function, self._file)
        returned = [
            node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None
        ]
        return [pattern for value in returned for pattern in inner.patterns(value)]


def _values_of(node: ast.AST, name: str) -> list[ast.expr]:
    """The expressions that a statement gives to a variable, where it can be told."""
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name:
                return [node.value]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                return [
                    value
                    for inner, value in zip(target.elts, node.value.elts, strict=True)
                    if isinstance(inner, ast.Name) and inner.id == name
                ]
    if isinstance(node, ast.NamedExpr) and node.target.id == name:
        return [node.value]
    return []


def is_said(pattern: str, text: str) -> bool:
    """Tell whether a text has these words from the start of a sentence, or of a part of one, to its end."""
    pattern = pattern.removeprefix(re.escape("; "))
    first = pattern[0]
    if first.isalpha():
        pattern = f"[{first.lower()}{first.upper()}]{pattern[1:]}"
    return re.search(rf"(?<!\w){pattern}(?=[.?;,\s]|$)", text) is not None
