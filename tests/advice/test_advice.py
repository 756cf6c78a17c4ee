"""Every error message about files in the table says what to do, and doing that leads to the right answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from advice_case import PAGE, Case, page, table
from advice_lora_configs import UNFOLLOWED
from sentences import EXCEPTIONS, is_said, sentences

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


def test_every_next_step_of_the_source_is_followed_by_a_case() -> None:
    """What the cases say is on the page, word for word: a sentence of the source that is not there has no case."""
    text = PAGE.read_text(encoding="utf-8")
    said = "\n".join(part.partition("\n```")[0] for part in text.split("```text\n")[1:])
    unsaid = {pattern: files for pattern, files in sentences().items() if not is_said(pattern, said)}
    excused = {start: [pattern for pattern in unsaid if pattern.startswith(re.escape(start))] for start in EXCEPTIONS}
    assert [start for start, patterns in excused.items() if not patterns] == [], "followed, or gone"
    assert set(unsaid) == {pattern for patterns in excused.values() for pattern in patterns}, "add a case for these"


def test_a_next_step_is_found_as_a_whole_sentence_only() -> None:
    assert is_said("download\\ it", "A list is here. Download it.")
    assert is_said("name\\ .*?, where", "Name m0, where it is.")
    assert not is_said("download\\ it", "Download items.")
    assert not is_said("load\\ it", "Download it.")


def test_every_entry_of_a_config_that_is_refused_has_a_case() -> None:
    refused = [entry for entry in _REFUSED if not any(entry in case.says for case in CASES)]
    assert set(refused) == set(UNFOLLOWED)
