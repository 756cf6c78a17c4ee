from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree

import pytest
from report_documents import make_document

from eigenzoo.errors import OutputError, UsageError
from eigenzoo.report import write_figures
from eigenzoo.report.document import read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.sizes import size_table

ALL = [
    "scree",
    "cumulative",
    "axes",
    "heldout",
    "mean",
    "rolemap",
    "layerranks",
    "similarity",
    "map",
    "growthrank",
    "growthcaptured",
    "halves",
    "suitability",
    "secondary",
    "function",
    "residuals",
    "sizes",
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, str]:
    """Every figure as SVG."""
    folder = tmp_path_factory.mktemp("figures")
    paths = write_figures(make_document(num_models=20, num_layers=8, axes=True), folder / "figures", ("svg",))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def texts_of(svg: str) -> list[str]:
    return [text for text in ElementTree.fromstring(svg).itertext() if text.strip()]


def test_every_figure_of_the_page_is_drawn(drawn):
    report = read_document(make_document(num_models=20, num_layers=8, axes=True))
    assert list(drawn) == ALL == list(all_figures(report, size_table(report)))


@pytest.mark.parametrize("name", ["growthrank", "growthcaptured", "halves", "suitability", "secondary", "residuals"])
def test_ticks_of_counts_are_whole_numbers(drawn, name):
    ticks = ElementTree.fromstring(drawn[name]).iter()
    groups = [element for element in ticks if (element.get("id") or "").startswith("xtick_")]
    found = ["".join(group.itertext()).strip() for group in groups]
    assert len(found) > 2
    assert all(tick.lstrip("−").isdigit() for tick in found)


@pytest.mark.parametrize("width", [8.5, 17.0])
def test_figures_have_the_width_that_is_asked_for(tmp_path, width):
    document = make_document(num_models=6, num_layers=2, axes=True)
    for path in write_figures(document, tmp_path, ("svg",), width=width):
        points = ElementTree.fromstring(path.read_text(encoding="utf-8")).attrib["width"].removesuffix("pt")
        assert float(points) == pytest.approx(72 * width / 2.54, rel=1e-4)


@pytest.mark.parametrize("width", [5.9, 101.0, float("nan")])
def test_a_width_out_of_range_is_refused(tmp_path, width):
    with pytest.raises(UsageError, match="Figures are 6 to 100 cm wide"):
        write_figures(make_document(num_models=6, num_layers=2), tmp_path / "figures", ("svg",), width=width)
    assert not (tmp_path / "figures").exists()


def test_every_figure_in_both_formats(tmp_path):
    paths = write_figures(make_document(num_models=6, num_layers=2, axes=True), tmp_path / "figures")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in ALL for kind in ("png", "svg")]
    for path in paths:
        assert path.parent == tmp_path / "figures"
        if path.suffix == ".png":
            head = path.read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", head[16:])
            assert width > 600
            assert height > 400
        else:
            drawn = ElementTree.fromstring(path.read_text(encoding="utf-8"))
            assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
            texts = "".join(drawn.itertext())
            assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 5
            assert texts.strip()


def test_figures_name_their_axes(drawn):
    texts = {name: texts_of(svg) for name, svg in drawn.items()}
    assert "share of variance about the mean" in texts["scree"]
    assert "held out" in texts["heldout"]
    assert "chance, held out" in texts["heldout"]
    assert "models fitted" in texts["growthcaptured"]
    assert "cosine" in texts["halves"]


def test_only_what_there_are_numbers_for(tmp_path):
    document = make_document(num_models=12, num_layers=4, function=False)
    document["evidence"]["growth"] = None
    names = {path.stem for path in write_figures(document, tmp_path, formats=("svg",))}
    assert names == set(ALL) - {"axes", "function", "growthrank", "growthcaptured"}


def test_hostile_names_are_letters_and_not_formulas(tmp_path):
    (tmp_path / "one").mkdir()
    document = make_document(hostile=True, num_models=12, num_layers=12)
    for path in write_figures(document, tmp_path / "one", formats=["svg"]):
        drawn = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        tags = {element.tag.rpartition("}")[2] for element in drawn.iter()}
        assert not tags & {"script", "foreignObject", "a"}
    roles = ElementTree.fromstring((tmp_path / "one" / "rolemap.svg").read_text(encoding="utf-8"))
    assert "<img src=x onerror=alert(1)>" in "".join(roles.itertext())
    assert "$x^2$" in "".join(roles.itertext())


@pytest.mark.slow
def test_the_same_document_gives_the_same_figures(tmp_path):
    document = make_document(num_models=12, num_layers=4)
    for one, other in zip(
        write_figures(document, tmp_path / "one", ("svg",)),
        write_figures(document, tmp_path / "two", ("svg",)),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="figure format 'gif'"):
        write_figures(make_document(num_models=6, num_layers=2), tmp_path / "figures", ("svg", "gif"))
    assert not (tmp_path / "figures").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "scree.svg").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"scree\.svg: exists already"):
        write_figures(make_document(num_models=6, num_layers=2), tmp_path, ("svg",))
    assert [path.name for path in tmp_path.iterdir()] == ["scree.svg"]
    assert (tmp_path / "scree.svg").read_text(encoding="utf-8") == "mine"
