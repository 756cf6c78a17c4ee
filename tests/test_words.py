"""Help texts, documentation and error messages are written in plain sentences: the cheap rules, checked mechanically."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from eigenzoo.cli.app import app

ROOT = Path(__file__).parent.parent

PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")})
PAGES_OF_THEIR_OWN = {
    "errors.md": "written from the messages, which are checked at their source",
    "log.md": "a diary: entries are left as they were written",
}

OPENERS = ("What", "Whatever", "Who", "Whoever", "Whom", "Whose", "Of")
"""A sentence names its subject. One that begins with these is turned round. Questions may begin as they like."""

OPENER = re.compile(rf"(?:{'|'.join(OPENERS)})\b")

NO_NOUN = re.compile(
    r"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|larger\b|smaller\b|better\b|faster\b)"
)
"""`X is no Y` is written `X is not a Y`. `There is no X` and comparisons are plain English."""

PLAIN_PACKAGES = ("adapt", "cli", "evidence", "integrations", "merge", "nursery", "report", "routing", "subspace")
"""Packages of which docstrings and comments are checked too."""

LONGEST_HELP = 40
"""Words of a sentence in a help text."""


def sentences(text: str) -> list[str]:
    """Split text at full stops, question marks and colons that a space follows."""
    return [part.strip() for part in re.split(r"(?<=[.?!:])\s+", text) if part.strip()]


def faults(text: str) -> Iterator[str]:
    """Find what the rules forbid in a text of whole sentences."""
    for sentence in sentences(text):
        if OPENER.match(sentence) and not sentence.endswith("?"):
            yield f"begins with {sentence.split()[0]!r}: {sentence}"
        if NO_NOUN.search(sentence):
            yield f"says 'is no': {sentence}"


def paragraphs(page: str) -> Iterator[str]:
    """The prose of a Markdown page: paragraphs, list items and cells of tables, without code, links' targets and markup."""
    page = re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )|\n(?=\|)|\n(?=#)", page):
        if block.startswith("    "):
            continue
        for cell in block.split(" | ") if block.startswith("|") else [block]:
            text = re.sub(r"`[^`]*`", "CODE", cell)
            text = re.sub(r"\]\([^)]*\)", "]", text)
            yield " ".join(re.sub(r"[*_#\[\]|]|^\s*(?:-|\d+\.) ", "", text).split())


def strings(node: ast.AST) -> Iterator[str]:
    """The texts of a string, an f-string, or a choice between them; what is filled in is X."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)


def messages(source: str) -> Iterator[tuple[int, str]]:
    """What errors say: the texts of every call of a name that ends in `Error`, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.endswith("Error"):
                for part in (*node.args, *(word.value for word in node.keywords if word.arg in ("rule", "next_step"))):
                    for text in strings(part):
                        yield node.lineno, text[:1].upper() + text[1:]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Find docstrings (of constants too) and comments, with their lines. Examples and indented tables are left out."""
    for node in ast.walk(ast.parse(source)):
        for child in getattr(node, "body", None) if isinstance(getattr(node, "body", None), list) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(child.value.value)):
                    if not paragraph.startswith(("    ", ">>>")):
                        yield child.lineno, re.sub(r"`[^`]*`", "CODE", " ".join(paragraph.split()))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            yield token.start[0], text[:1].upper() + text[1:]


def help_texts() -> Iterator[tuple[str, str]]:
    """Every help text by its command: of the command itself, and of each option and argument."""
    pending = [("eigenzoo", typer.main.get_command(app))]
    while pending:
        name, command = pending.pop()
        yield name, command.help or ""
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
        pending += [(f"{name} {word}", inner) for word, inner in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_written_in_plain_sentences(page: Path) -> None:
    if page.name in PAGES_OF_THEIR_OWN:
        pytest.skip(PAGES_OF_THEIR_OWN[page.name])
    assert not [fault for text in paragraphs(page.read_text(encoding="utf-8")) for fault in faults(text)]


def test_help_is_written_in_plain_and_short_sentences() -> None:
    texts = list(help_texts())
    assert len(texts) > 150
    assert not [f"{name} {fault}" for name, text in texts for fault in faults(text)]
    long = {name: part for name, text in texts for part in sentences(text) if len(part.split()) > LONGEST_HELP}
    assert not long


def test_errors_are_written_in_plain_sentences() -> None:
    source = ROOT / "src" / "eigenzoo"
    texts = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in sorted(source.rglob("*.py"))
        for line, text in messages(path.read_text(encoding="utf-8"))
    ]
    assert len(texts) > 500
    assert not [f"{place} {fault}" for place, text in texts for fault in faults(text)]


@pytest.mark.parametrize("package", PLAIN_PACKAGES)
def test_docstrings_and_comments_are_written_in_plain_sentences(package: str) -> None:
    texts = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in sorted((ROOT / "src" / "eigenzoo" / package).rglob("*.py"))
        for line, text in prose(path.read_text(encoding="utf-8"))
    ]
    assert len(texts) > 30
    assert not [f"{place} {fault}" for place, text in texts for fault in faults(text)]


def test_docstrings_and_comments_are_read_out_of_a_file() -> None:
    source = '"""Of a bundle it\nreads `X`.\n\n    what  table\n"""\nN = 1  # what is read\n"""Numbers."""\n'
    assert sorted(prose(source)) == [(1, "Of a bundle it reads CODE."), (6, "What is read"), (7, "Numbers.")]


@pytest.mark.parametrize(
    "text",
    [
        "What is stored is small.",
        "It reads no file. Of a bundle it reads the moments.",
        "Two rules: Whoever reads it is told.",
        "It is no bundle.",
        "The names are no text.",
    ],
)
def test_what_the_rules_forbid_is_found(text: str) -> None:
    assert list(faults(text))


@pytest.mark.parametrize(
    "text", ["What is shared?", "There is no such file.", "It is no longer read.", "Office: often, offline."]
)
def test_plain_sentences_pass(text: str) -> None:
    assert not list(faults(text))


def test_messages_are_read_out_of_calls() -> None:
    source = 'raise FormatError(f"file {name!r} is no list" if odd else "is empty", where=path, rule="what is read")\n'
    assert list(messages(source)) == [(1, "File X is no list"), (1, "Is empty"), (1, "What is read")]
