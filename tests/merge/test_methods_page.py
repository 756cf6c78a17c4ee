"""docs/merge.md lists the methods as their signatures have them, and the command has all of their options."""

from __future__ import annotations

from dataclasses import fields

from methods_page import PAGE, with_table

from eigenzoo.cli.merge import PER_MODEL, MethodOptions
from eigenzoo.merge.methods import METHODS


def test_the_page_has_the_table_of_methods() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run `python tests/merge/methods_page.py --write`"


def test_the_command_has_every_option_of_every_method() -> None:
    wanted = {name for method in METHODS.values() for name in method.parameters}
    assert {field.name for field in fields(MethodOptions)} == wanted
    assert {
        name for method in METHODS.values() for name, each in method.parameters.items() if each.per_model
    } == PER_MODEL
