"""A case of an error message about files: how to provoke it, and a function that follows its next step.

Every file `advice_*.py` of this folder with a list `CASES` is part of the table; `docs/errors.md` is written from it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eigenzoo.errors import EigenzooError

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
HEAD = """# Errors about files, and their next steps

Each message below is copied from the test that provokes it. The same test follows the next step to the letter, and then
compares with the library that the file is for (PEFT, transformers, diffusers) or with the file's own values. The line under a
message says what the test did and what it compared. `…` stands for a path. The cases are in `tests/advice/advice_*.py`;
`python tests/advice/write_page.py` writes this page.

A command that is refused prints its message to standard error, as `KIND: message`, and leaves with exit code 2. Standard output
stays empty, with `--json` too: there is a JSON document where the exit code is 0 or 1, and none otherwise. Warnings are
not refusals: they are in the document (`warnings`), or on standard output without `--json`. Python raises the same message as
`eigenzoo.errors.KIND`, whose `what`, `where`, `rule` and `next_step` are its parts.
"""


@dataclass(frozen=True)
class Case:
    """One message.

    Attributes:
        name: what is wrong with the files, as a heading of the page.
        provoke: makes the files in a new folder and reads them; raises the error, or returns the text that a command printed.
        says: words of the message that matter, its next step among them.
        follow: follows the next step in the same folder, then asserts that the answer is right. The first line of its
            docstring stands on the page.
        slow: whether `make test` leaves it out, since a case like it is in.
    """

    name: str
    provoke: Callable[[Path], object]
    says: tuple[str, ...]
    follow: Callable[[Path], None]
    slow: bool = False

    def message(self, folder: Path) -> str:
        """Provoke the error in an empty folder, and return its text with `…` for that folder."""
        try:
            text = self.provoke(folder)
        except EigenzooError as error:
            text = str(error)
        assert isinstance(text, str), f"{self.name}: no error was raised"
        return _without_paths(text, folder)

    def section(self, message: str) -> str:
        """The part of the page that tells of this case."""
        done = inspect.getdoc(self.follow)
        assert done, f"{self.name}: the function that follows the next step has no docstring"
        return f"## {self.name}\n\n```text\n{message}\n```\n\n{done.splitlines()[0]}\n"


def table() -> list[Case]:
    """All cases, by file and by their place in it."""
    files = sorted(Path(__file__).parent.glob("advice_*.py"))
    modules = [importlib.import_module(file.stem) for file in files if file != Path(__file__)]
    return [case for module in modules for case in module.CASES]


def page(sections: list[str]) -> str:
    """The page of these sections."""
    return "\n".join([HEAD, *sections])


def fresh(folder: Path) -> Path:
    """An empty folder of this name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _without_paths(text: str, folder: Path) -> str:
    """The message is the same wherever the test runs, whatever port a server has and whatever a commit or content is called."""
    text = re.sub(r"(?<=http://127\.0\.0\.1:)\d+|(?<=@)[0-9a-f]{40}|(?<=/)[0-9a-f]{32}(?=\.json|/)", "…", text)
    return " ".join(re.sub(re.escape(str(folder)) + r"(?=[/'\" :,.;)]|$)", "…", text).split())
