"""What a pickle of tensors may say, looked at before torch loads it.

`weights_only=True` runs no code, but it builds what the file asks for: a bytearray of any size, a text that doubles with every
call, tuples within tuples whose hash takes 2⁶⁰ steps, records that unpack to a thousand times their size. So the instructions are
read first, by Python's own table of them (`pickletools`), and nothing is built: only what state dicts need may be named, and the
number of instructions and the size of what they stand for are bounded.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from eigenzoo.errors import FormatError, UnsupportedError

MAX_PROGRAM_BYTES = 64 * 2**20
"""Of the instructions, the tensors' values not in them: a tensor takes some 200 bytes."""

MAX_INSTRUCTIONS = 1_000_000
"""A tensor takes some 35."""

MAX_WORK = 50_000_000
"""Objects within all tuples, counted as often as they are in one: hashing and comparing visits each of them."""

ZIP = b"PK\x03\x04"
_LEGACY_PROGRAMS = 5
"""The form before zip files: a magic number, a version, the system, the object itself, the keys of its storages."""

_ENCODE = "_codecs encode"
"""How Python writes bytes for protocol 2: a text and its encoding. Of anything else it could double a text at every call."""

_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)"
    rf"|{_ENCODE}"
    r"|torch\._utils _rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.parameter Parameter"
    r"|torch (Size|device|[A-Z]\w*Storage)"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
    r"|(builtins|__builtin__) (set|complex)"
)
_DTYPE = re.compile(r"torch ([a-z]\w*)")
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "UNICODE"})
_LIST_OF_TEXTS = frozenset({"PROTO", "EMPTY_LIST", "MARK", "APPEND", "APPENDS", "STOP"}) | _TEXTS | _GETS | _PUTS
_MOST_PARTS = 8
_GLOBAL = "global "


def check_pickle(path: Path) -> None:
    """Raise UnsupportedError for a pickle that holds more than tensors, FormatError for one that is no file of torch's."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(ZIP)) == ZIP:
                _check_zip(stream, path.stat().st_size)
            else:
                stream.seek(0)
                _check_legacy(stream)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ArithmeticError,
        struct.error,
    ) as error:
        raise FormatError(f"is not a zip file that torch wrote ({str(error)[:200]})") from error
    except (ValueError, IndexError, KeyError) as error:
        raise FormatError(f"the pickle is damaged ({type(error).__name__}: {str(error)[:200]})") from error


def _check_zip(stream: BinaryIO, num_bytes: int) -> None:
    """Check every pickle in the archive, since readers disagree about which of two entries of one name counts."""
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries
        ):
            raise FormatError("an entry of the zip file is compressed", rule="torch stores entries uncompressed")
        if sum(entry.file_size for entry in entries) > num_bytes:
            raise FormatError(
                "the entries of the zip file overlap", rule="together they are at most as long as the file"
            )
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                if entry.file_size > MAX_PROGRAM_BYTES:
                    raise _too_long()
                _check_program(io.BytesIO(archive.read(entry)))


def _check_legacy(stream: BinaryIO) -> None:
    programs = io.BytesIO(stream.read(MAX_PROGRAM_BYTES))
    if programs.getvalue()[:1] != b"\x80":
        raise FormatError(
            "is not a pickle", rule="torch's files begin with a zip file's signature or a pickle's protocol"
        )
    scanned = [_check_program(programs) for _ in range(_LEGACY_PROGRAMS)]
    keys = scanned[-1]
    if not keys.instructions <= _LIST_OF_TEXTS:
        raise FormatError("the keys of the storages are not a list of strings")
    # A storage that is not listed is memory that torch takes and never fills: whatever was there before is then a tensor.
    unfilled = {key for program in scanned for key in program.storages} - keys.texts
    if unfilled:
        raise FormatError(
            f"{len(unfilled)} storages have no values in the file", rule="the file lists all storages' keys"
        )


@dataclass
class _Program:
    """What was seen of one pickle: its texts, its kinds of instructions, and the keys of its storages."""

    texts: set[str] = field(default_factory=set)
    instructions: set[str] = field(default_factory=set)
    storages: set[str | None] = field(default_factory=set)


class _Thing(NamedTuple):
    """What stands for an object: its size, the text or the global that it is, and of a tuple the texts of its parts."""

    size: int
    text: str | None = None
    parts: tuple[str | None, ...] = ()


def _check_program(stream: BinaryIO) -> _Program:
    """Follow one pickle to its end with sizes in the place of objects."""
    program = _Program()
    stack: list[_Thing] = []
    marks: list[int] = []
    memo: dict[int, _Thing] = {}
    work = 0
    for number, (opcode, given, _) in enumerate(pickletools.genops(stream)):
        name, argument = opcode.name, cast(Any, given)
        program.instructions.add(name)
        if number >= MAX_INSTRUCTIONS:
            raise _too_long()
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name in _TEXTS:
            program.texts.add(argument)
            stack.append(_Thing(1, argument))
        else:
            if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                _check_global(argument)
            taken = _take(opcode, stack, marks)
            if name == "REDUCE" and taken[1].text == _GLOBAL + _ENCODE and not _is_text_in_latin1(taken[0]):
                raise _more_than_tensors(_ENCODE)
            if name == "BINPERSID":
                program.storages.add(taken[0].parts[2] if len(taken[0].parts) > 2 else None)
            parts = tuple(thing.text for thing in taken[:_MOST_PARTS]) if name in _TUPLES else ()
            text = f"{_GLOBAL}{argument}" if name == "GLOBAL" else None
            made = _Thing(1 + sum(thing.size for thing in taken), text, parts)
            stack.extend([made] * len(opcode.stack_after))
        if name in _TUPLES or name in _GETS:
            work += stack[-1].size
        if work > MAX_WORK:
            raise FormatError("the pickle holds endlessly nested tuples", rule="a state dict has no such tuples")
    return program


def _take(opcode: pickletools.OpcodeInfo, stack: list[_Thing], marks: list[int]) -> list[_Thing]:
    """Take from the stack what an instruction takes."""
    before = opcode.stack_before
    taken: list[_Thing] = []
    if pickletools.markobject in before:
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        before = before[: before.index(pickletools.markobject)]
    return [*(stack.pop() for _ in before), *taken]


def _is_text_in_latin1(arguments: _Thing) -> bool:
    return len(arguments.parts) == 2 and arguments.parts[0] is not None and arguments.parts[1] == "latin1"


def _check_global(name: object) -> None:
    text = str(name)
    dtype = _DTYPE.fullmatch(text)
    if _ALLOWED.fullmatch(text) or (dtype and isinstance(getattr(torch, dtype[1], None), torch.dtype)):
        return
    raise _more_than_tensors(text)


def _more_than_tensors(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the pickle holds more than tensors, or is damaged ({name.replace(' ', '.')[:100]})",
        rule="pickles are read only with weights_only=True, and may name only the functions that tensors need",
        next_step="load it where it was made and save its state dict as safetensors",
    )


def _too_long() -> FormatError:
    return FormatError(
        "the pickle has too many instructions",
        rule=f"at most {MAX_INSTRUCTIONS} in {MAX_PROGRAM_BYTES} bytes are read",
        next_step="save the state dict alone, as safetensors",
    )
