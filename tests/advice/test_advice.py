"""Every error message about files in the table says what to do, and doing that leads to the right answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from advice_case import PAGE, Case, page, table
from advice_lora_configs import UNFOLLOWED

from eigenzoo.formats.lora.config import _REFUSED

CASES = table()


PARAMETERS = [
    pytest.param(case, id=re.sub(r"\W+", "-", case.name.lower()), marks=[pytest.mark.slow] if case.slow else [])
    for case in CASES
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_the_next_step_leads_to_the_right_answer(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    message = case.message(folder)
    for words in case.says:
        assert words in message
    assert case.section(message) in PAGE.read_text(encoding="utf-8"), "run tests/advice/write_page.py"
    case.follow(folder)


def test_the_page_has_these_cases_and_no_others() -> None:
    """That each is there word for word, its own test shows."""
    text = PAGE.read_text(encoding="utf-8")
    sections = ["## " + part for part in text.split("\n## ")[1:]]
    assert text == page([section.removesuffix("\n") + "\n" for section in sections])
    assert [section.splitlines()[0] for section in sections] == [f"## {case.name}" for case in CASES]
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_entry_of_a_config_that_is_refused_has_a_case() -> None:
    refused = [entry for entry in _REFUSED if not any(entry in case.says for case in CASES)]
    assert set(refused) == set(UNFOLLOWED)
