"""Each kind of number looks alike on the page and on paper."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from eigenzoo.report.curves import NULLS
from eigenzoo.report.page import TEMPLATES
from eigenzoo.report.series import SERIES
from eigenzoo.report.static_figures import COLOURS, _style


@pytest.mark.parametrize("name", SERIES)
def test_a_kind_of_number_can_be_drawn_on_the_page_and_on_paper(name: str) -> None:
    kind, style = SERIES[name], _style(name)
    # The page's colours are darker where text of that colour could not be read: only their names are the same.
    assert re.search(rf"--{kind.colour}: #[0-9a-f]{{6}}", (TEMPLATES / "style.css").read_text(encoding="utf-8"))
    assert (style["label"], style["color"]) == (kind.name, COLOURS[kind.colour])
    assert ("marker" in style) == bool(kind.symbol)
    assert not (kind.symbol and name in NULLS)


def test_the_page_draws_by_the_same_list(page):
    _, text = page("subspace")
    data = re.search(r'id="report-data"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["kinds"] == {name: asdict(kind) for name, kind in SERIES.items()}
