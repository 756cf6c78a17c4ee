"""The project's own promises: every public name is documented, importing is light, and tests can fail."""

from __future__ import annotations

import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import eigenzoo
from tests.import_graph import circles, import_graph

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there_has_a_docstring_and_stands_in_the_docs():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in eigenzoo.__all__:
        assert inspect.getdoc(getattr(eigenzoo, name)), name
        assert f"| `{name}` |" in page, name
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == set(eigenzoo.__all__)


def test_public_methods_have_docstrings():
    for name in eigenzoo.__all__:
        value = getattr(eigenzoo, name)
        if inspect.isclass(value):
            for method, function in _methods(value).items():
                assert inspect.getdoc(function), f"{name}.{method}"


def _methods(value: type) -> dict[str, Any]:
    """A class's public methods, its own and those of eigenzoo's classes that it inherits from."""
    classes = [each for each in reversed(value.__mro__) if each.__module__.startswith("eigenzoo.")]
    found = {name: each for owner in classes for name, each in vars(owner).items()}
    return {name: each for name, each in found.items() if not name.startswith("_") and callable(each)}


def test_signatures_show_every_parameter():
    """`inspect.signature`, and with it editors and notebooks, must not see `*args` or `**options` of a wrapper."""
    for name in eigenzoo.__all__:
        value = getattr(eigenzoo, name)
        public = {name: value}
        if inspect.isclass(value) and not issubclass(value, Exception):
            public |= {f"{name}.{key}": each for key, each in _methods(value).items()}
        for full, function in public.items():
            for parameter in inspect.signature(function).parameters.values():
                assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), f"{full}: {parameter}"


def test_evidence_is_shown_as_the_function_that_it_calls():
    from eigenzoo.evidence.evidence import evidence

    assert inspect.signature(eigenzoo.evidence) == inspect.signature(evidence)
    shown = pydoc.plain(pydoc.render_doc(eigenzoo.evidence))
    assert "Test a zoo for a shared subspace with all controls, and give a verdict." in shown
    assert "rank: 'RankRule' = 'auto'," in shown
    assert all(f" {name}: " in shown or f"\n    {name}," in shown for name in inspect.signature(evidence).parameters)


def test_importing_is_light():
    code = "import sys, eigenzoo; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert "eigenzoo" in loaded
    assert not loaded & {"torch", "transformers", "peft", "plotly", "dask", "sklearn", "rich", "typer", "pydantic"}


def test_no_import_circles():
    """Imports inside functions and under TYPE_CHECKING count: a circle that is only hidden still ties its modules together."""
    found = circles(import_graph(ROOT / "src" / "eigenzoo"))
    assert not found, f"these modules import each other: {[sorted(circle) for circle in found]}"


def test_circles_are_found(tmp_path):
    package = tmp_path / "room"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "inner/__init__.py": "",
        "first.py": "from room.inner import second\n",
        "inner/second.py": "def later():\n    import room.third\n",
        "third.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.first import Name\n",
        "fourth.py": "from room import first\nfrom room.first import Name\n",
    }.items():
        (package / name).write_text(text)
    assert circles(import_graph(package)) == [{"room.first", "room.inner.second", "room.third"}]


def test_an_unknown_name_is_an_attribute_error():
    import pytest

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        eigenzoo.nothing  # noqa: B018


def test_every_expected_error_says_what_it_expects():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if (
                re.search(r"pytest\.raises\(", line)
                and "match" not in line
                and "KeyboardInterrupt" not in line
                and not line.rstrip().endswith("(")
            ):
                raise AssertionError(f"{path.relative_to(ROOT)}:{number}: pytest.raises without match=")


def test_no_test_has_a_limit_of_time_but_the_guard():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"timeout\s*=\s*\d|\.(wait|join|result)\(\d", line):
                raise AssertionError(
                    f"{path.relative_to(ROOT)}:{number}: a time of its own; take HANG of tests/guard.py"
                )


FIRST_IN = {
    "torch": {"float8_e8m0fnu": (2, 7), "out_dtype": (2, 8)},
    # Below, an option that is required is not, with the click that huggingface_hub asks for.
    "typer": {"typer": (0, 20)},
}
"""Names of dependencies that not all their versions have, and the first one that has them."""


def test_the_least_versions_of_dependencies_have_what_the_code_names():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    for package, names in FIRST_IN.items():
        (floor,) = re.findall(rf'^    "{package}>=([\d.]+)",$', declared, re.MULTILINE)
        for name, first in names.items():
            assert re.search(rf"\b{name}\b", source), f"{name} is not named any more"
            assert tuple(map(int, floor.split("."))) >= first, f"{package}>={floor}, but {name} came with {first}"


def test_a_virtual_environment_that_failed_halfway_is_made_anew(tmp_path):
    """Python leaves .venv/bin/python behind where it has no ensurepip, and make would take that for the whole."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p .venv/bin\ntouch .venv/bin/python\nexit 1\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    words = ["make", ".venv/bin/python", f"PYTHON={python}"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 2
    assert not (tmp_path / ".venv").exists()
