"""What a terminal shows: tables and sentences at several widths, and the examples of each command's help."""

from __future__ import annotations

import io
import shlex
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from rich.console import Console

from eigenzoo.cli import console
from eigenzoo.cli.app import GOES_ON, app
from eigenzoo.cli.examples import EXAMPLES

NAMES = ("base_model.model.model.layers.11.self_attn.q_proj", "task-01234", "sentiment-of-reviews-in-seven-languages")
COLUMNS = ("name", "verdict", "mean's energy", "beyond chance", "k", "variance kept", "… held out", "… chance", "bytes")
NUMBERS = ("95.8 %", "12–345", "16", "83.2 %", "61.6 %", "4.07 %", "1.23 MB")
SENTENCE = (
    "Shared subspace, within one lineage: the top 16 directions of each layer explain 61.6 % of the variance of held-out "
    "models (in-sample 83.2 %, chance 4.07 %); the bundle has 1.23 MB and lies at "
    "/a/rather/long/path/of/a/bundle/that/a/line/cannot/hold."
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is printed on a terminal of so many columns, line by line."""

    def use(width: int) -> io.StringIO:
        written = io.StringIO()
        shown = Console(file=written, width=width, force_terminal=True, color_system=None, highlight=False)
        monkeypatch.setattr(console, "output", lambda: shown)
        return written

    return use


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_table_breaks_a_cell_or_is_wider_than_the_terminal(terminal: Any, width: int) -> None:
    written = terminal(width)
    console.print_table("by role", COLUMNS, [(name, "shared-subspace", *NUMBERS) for name in NAMES], left=2)
    lines = written.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    for name in NAMES:
        shown = next(line.split()[0] for line in lines if line.startswith(name[:7]) and name[-6:] in line)
        head, _, tail = shown.partition("…")
        assert shown == name or (name.startswith(head) and name.endswith(tail) and len(shown) >= console.SHORTEST)
    for number in NUMBERS:
        assert sum(number in line for line in lines) >= len(NAMES), number
    headings = " ".join(word for line in lines for word in line.split())
    assert all(word in headings for column in COLUMNS for word in column.split())


def test_names_are_shortened_only_where_that_saves_a_table(terminal: Any) -> None:
    name = "model.layers.*.self_attn.q_proj"  # 31 columns
    numbers = [
        "n" * 10
    ] * 6  # a table with 16 columns of name takes 88, one with 31 takes 103, two with 31 take 67 each

    def printed(width: int) -> list[str]:
        written = terminal(width)
        console.print_table("", ("role", *"abcdef"), [(name, *numbers)])
        return [line.split()[0] for line in written.getvalue().splitlines() if "n" * 10 in line]

    assert printed(103) == [name]
    assert printed(88) == ["model.la….q_proj"]
    assert printed(87) == [name, name]
    assert printed(67) == [name, name]
    assert printed(66)[0] == "model.layers.*.…lf_attn.q_proj"


def test_a_pipe_gets_whole_names() -> None:
    written = io.StringIO()
    shown = Console(file=written, width=console.PIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "output", lambda: shown)
        console.print_table("", ("name", "path"), [("n" * 300, "p" * 500)], left=2)
    assert "n" * 300 in written.getvalue()
    assert "p" * 500 in written.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_sentences_are_wrapped_between_words_and_numbers_keep_their_units(terminal: Any, width: int) -> None:
    written = terminal(width)
    console.say(SENTENCE, hang=4)
    lines = written.getvalue().replace("\N{NO-BREAK SPACE}", "_").splitlines()
    assert " ".join(line.strip() for line in lines) == SENTENCE.replace(" %", "_%").replace(" MB", "_MB")
    assert all(cell_len(line) <= width for line in lines if "/a/rather" not in line)
    assert all(line.startswith("    ") for line in lines[1:])


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_example_of_a_help_text_is_a_command_line(command: str) -> None:
    root = typer.main.get_command(app)
    for line in EXAMPLES[command].lines:
        words = shlex.split(line)
        assert " ".join(words).startswith(command)
        found: Any = root
        for word in command.split():
            found = found.commands[word]
        # Raises for an option or a number of arguments that the command does not take.
        found.make_context(command, words[len(command.split()) :], resilient_parsing=False)


def test_each_command_has_examples_and_a_page_that_is_there(request: pytest.FixtureRequest) -> None:
    root: Any = typer.main.get_command(app)
    names = {name for name in root.commands if name != "nursery"} | {"nursery make"}
    assert names == set(EXAMPLES)
    assert set(GOES_ON) <= names
    for name, examples in EXAMPLES.items():
        assert len(examples.lines) >= 2 or name == "demo"
        assert (request.config.rootpath / "docs" / examples.page).is_file()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_a_short_flag_and_names_the_exit_codes(call: Any, flag: str) -> None:
    code, out, _ = call(flag)
    assert code == 0
    assert "130" in out
    assert "eigenzoo fit" in call("fit", flag)[1]
