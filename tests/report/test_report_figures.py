from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree

import pytest
from report_documents import make_document

from eigenzoo.errors import OutputError, UsageError
from eigenzoo.report import write_figures

ALL = [
    "scree",
    "heldout",
    "rolemap",
    "similarity",
    "growthrank",
    "growthcaptured",
    "halves",
    "suitability",
    "function",
]


def test_every_figure_in_both_formats(tmp_path):
    paths = write_figures(make_document(num_models=20, num_layers=8), tmp_path / "figures")
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


def test_figures_name_their_axes(tmp_path):
    write_figures(make_document(num_models=20, num_layers=8), tmp_path, formats=["svg"])
    texts = {name: (tmp_path / f"{name}.svg").read_text(encoding="utf-8") for name in ALL}
    assert "share of variance about the mean" in texts["scree"]
    assert "held out" in texts["heldout"]
    assert "chance" in texts["heldout"]
    assert "models fitted" in texts["growthcaptured"]
    assert "cosine" in texts["halves"]


def test_only_what_there_are_numbers_for(tmp_path):
    document = make_document(num_models=12, num_layers=4, function=False)
    document["evidence"]["growth"] = None
    names = {path.stem for path in write_figures(document, tmp_path, formats=("svg",))}
    assert names == set(ALL) - {"function", "growthrank", "growthcaptured"}


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
