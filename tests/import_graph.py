"""Which modules of a package import which: every `import` of the source, inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """Return each module's imports of modules of the same package, by full names."""
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: set(_imports(path, set(files))) - {name} for name, path in files.items()}


def circles(graph: Graph) -> list[set[str]]:
    """Return the groups of modules that reach each other, the largest first."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(other for other in names if name in reached[other]) for name, names in reached.items()}
    return sorted((set(group) for group in groups if group), key=lambda group: (-len(group), sorted(group)))


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module


def _reached(graph: Graph, start: str) -> set[str]:
    """Modules that a module imports, directly or through others."""
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached
