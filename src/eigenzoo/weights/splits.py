"""Rules that split a fused weight into parts along its outputs. Users declare them; nothing is guessed.

    blocks.*.attn.qkv.*=3               three equal parts, called part0, part1, part2
    blocks.*.attn.qkv.*=q,k,v           three equal parts by name
    layers.*.attn.qkv_proj.*=q:4,k:1,v:1    sizes in proportion: as many rows of q as 4 of 6

A part is a range of whole rows, which are outputs. The part `q` of the tensor `blocks.0.attn.qkv.weight` is the layer
`blocks.0.attn.qkv.weight.q`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from eigenzoo.errors import UsageError

MAX_PARTS = 1024
_PART = re.compile(r"(?P<name>[A-Za-z_]\w{0,63})(?::(?P<share>[1-9][0-9]{0,5}))?")
_FORM = "a rule is GLOB=NUMBER, GLOB=NAME,NAME,… or GLOB=NAME:SHARE,…, of 2 to 1024 parts"


@dataclass(frozen=True)
class SplitRule:
    """Which tensors are cut, and into which parts with which shares of the rows.

    >>> parse_split("*.qkv.weight=q,k,v").cut("blocks.0.attn.qkv.weight", 12)
    (('q', 4), ('k', 4), ('v', 4))
    """

    glob: str
    parts: tuple[tuple[str, int], ...]
    typed: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.glob}={','.join(f'{name}:{share}' for name, share in self.parts)}"

    @property
    def shown(self) -> str:
        """The rule as errors show it: as it was typed."""
        return self.typed or str(self)

    def matches(self, name: str) -> bool:
        """Tell whether a tensor of this name is cut."""
        return fnmatchcase(name, self.glob)

    def cut(self, name: str, rows: int) -> tuple[tuple[str, int], ...]:
        """Return the parts of a tensor of so many rows, each with its own number of rows; raises UsageError for a rest."""
        total = sum(share for _, share in self.parts)
        if rows == 0 or rows % total:
            raise UsageError(
                f"{rows} outputs cannot be split into {total} equal parts",
                where=f"tensor {name[:200]!r}",
                rule=f"the split is {self.shown}",
                next_step="correct the number of parts, or narrow the glob",
            )
        return tuple((part, rows // total * share) for part, share in self.parts)


def parse_split(text: str) -> SplitRule:
    """Read a rule; raises UsageError.

    >>> parse_split("*.qkv.*=2").parts
    (('part0', 1), ('part1', 1))
    """
    glob, _, right = text.rpartition("=")
    right = right.strip()
    if re.fullmatch(r"[0-9]{1,4}", right):
        names = [(f"part{number}", 1) for number in range(int(right))]
    else:
        matches = [_PART.fullmatch(part.strip()) for part in right.split(",")]
        names = [(match["name"], int(match["share"] or 1)) for match in matches if match]
        names = names if len(names) == len(matches) else []
    if not glob or not 2 <= len(names) <= MAX_PARTS or len({name for name, _ in names}) < len(names):
        raise UsageError(
            f"{text[:200]!r} is not a rule for --split", rule=_FORM, next_step="write '*.attn.qkv.*=q,k,v'"
        )
    return SplitRule(glob, tuple(names), text[:500])
