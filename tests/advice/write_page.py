"""Write docs/errors.md from the table of cases: `python tests/advice/write_page.py`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).parents[1]))

from advice_case import PAGE, page, table


def main() -> None:
    """Provoke every error once, in folders that are removed."""
    warnings.simplefilter("ignore")
    sections = []
    for case in table():
        with TemporaryDirectory() as folder:
            sections.append(case.section(case.message(Path(folder).resolve())))
    PAGE.write_text(page(sections), encoding="utf-8")
    print(f"{PAGE}: {len(sections)} messages")


if __name__ == "__main__":
    main()
