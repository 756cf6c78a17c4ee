"""Whatever bytes a reader is given, it accepts them or raises an error of eigenzoo's own, in bounded memory and time.

The targets are the fuzzer's (`fuzz.targets`), the inputs few and always the same; `make fuzz` looks further. What that finds is
kept in tests/fuzz_findings and read here.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.limits import limited_memory, limited_time
from fuzz.mutations import mutate
from fuzz.targets import TARGETS, Parser

FINDINGS = Path(__file__).parent.parent / "fuzz_findings"
SECONDS = 60
"""Processor time; a reader that takes more hangs."""

# torch's own words on pickles of a protocol that nobody writes.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


@pytest.fixture(scope="module", params=list(TARGETS))
def parser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parser:
    return TARGETS[request.param](tmp_path_factory.mktemp(request.param))


def test_sound_inputs_are_accepted(parser: Parser) -> None:
    assert all(parser.survives(seed) for seed in parser.seeds)


@settings(max_examples=25, derandomize=True)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4))
def test_changed_inputs_are_accepted_or_refused(parser: Parser, seed: int, changes: int) -> None:
    random = Random(seed)
    data = random.choice(parser.seeds)
    for _ in range(changes):
        data = mutate(data, parser.kind, random)
    with limited_memory(), limited_time(SECONDS):
        parser.survives(data)


@settings(max_examples=10, derandomize=True)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))))
def test_other_inputs_are_accepted_or_refused(parser: Parser, data: bytes) -> None:
    with limited_memory(), limited_time(SECONDS):
        parser.survives(data)


def test_every_finding_is_a_file_of_a_target() -> None:
    assert {path.name for path in FINDINGS.iterdir()} <= {*TARGETS, "README.md"}


@pytest.mark.parametrize("name", sorted({path.parent.name for path in FINDINGS.glob("*/*")}))
def test_what_was_found_once_is_accepted_or_refused(name: str, tmp_path: Path) -> None:
    parser = TARGETS[name](tmp_path)
    for path in sorted((FINDINGS / name).iterdir()):
        with limited_memory(), limited_time(SECONDS):
            parser.survives(path.read_bytes())
