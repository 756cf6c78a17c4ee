"""The page in a browser: it opens without a word, asks nobody, moves as it should, and can be read by everybody."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_documents import HOSTILE

from eigenzoo.report.csv_text import section_csv
from eigenzoo.report.document import read_document
from eigenzoo.report.sizes import THRESHOLDS
from guard import HANG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@dataclass
class Opened:
    """A page, what it asked for, and what it complained of."""

    page: Any
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def draw_all(self) -> None:
        """Scroll to every figure, so that it is drawn."""
        for name in self.page.eval_on_selector_all(".plot", "boxes => boxes.map((box) => box.id)"):
            self.draw(name)

    def draw(self, name: str) -> Any:
        """Scroll to one figure, so that it is drawn."""
        plot = self.page.locator(f"#{name}")
        plot.scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#{name}[data-drawn]")
        return plot

    def move(self, slider: str, value: float) -> None:
        """Drag a slider."""
        script = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }"
        self.page.locator(f"#{slider}").evaluate(script, value)

    @property
    def bytes(self) -> int:
        return int(self.page.locator("#size-bytes").get_attribute("data-bytes"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=HANG * 1000)
        yield running
        running.close()


@pytest.fixture
def show(browser, page, tmp_path):
    """Open the page of a kind, in a context with these options."""

    @contextmanager
    def opened(kind: str, **options: Any) -> Iterator[Opened]:
        path = tmp_path / "report.html"
        path.write_text(page(kind)[1], encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(1000 * HANG)
        found = Opened(context.new_page())
        context.on("request", lambda request: found.asked.append(request.url))
        found.page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("dialog", lambda dialog: (found.dialogs.append(dialog.message), dialog.dismiss()))
        found.page.goto(path.as_uri())
        yield found
        context.close()

    return opened


@pytest.mark.parametrize(
    ("kind", "theme"),
    [
        *((kind, "light") for kind in ("subspace", "nothing", "lineage", "small")),
        *((kind, "dark") for kind in ("subspace", "hostile")),
    ],
)
def test_a_page_draws_everything_without_a_word_and_asks_nobody(show, kind, theme):
    with show(kind, color_scheme=theme) as opened:
        opened.draw_all()
        assert opened.page.locator(".plot .main-svg").count() >= 10
        assert opened.said == []
        assert opened.dialogs == []
        assert {url.partition(":")[0] for url in opened.asked} <= {"file", "data", "blob"}
        assert len([url for url in opened.asked if url.startswith("file")]) == 1


def test_figures_wait_until_they_are_seen(show):
    with show("subspace") as opened:
        opened.page.wait_for_timeout(300)
        assert opened.page.locator("#plot-residuals[data-drawn]").count() == 0
        opened.draw("plot-residuals")


def weigh(document: dict[str, Any], ranks: dict[str, int]) -> int:
    """The formula of the document's sizes."""
    sizes = document["sizes"]
    fixed = sizes["shared"] + sizes["per_model"] * sizes["num_models"]
    return int(fixed) + sum(
        size["fixed"] + ranks[name] * (size["per_direction"] + sizes["num_models"] * size["per_coefficient"])
        for name, size in sizes["layers"].items()
    )


def test_sliders_weigh_the_bundle(show, page):
    document, _ = page("subspace")
    layers = document["evidence"]["layers"]
    with show("subspace") as opened:
        for rank in (0, 1, 7, 39):
            opened.move("size-rank", rank)
            ranks = {name: min(rank, len(layer["explained_variance_ratio"])) for name, layer in layers.items()}
            assert opened.bytes == weigh(document, ranks)
        words = opened.page.locator("#size-rank").get_attribute("aria-valuetext")
        assert words == "rank 39"
        for share in (0.5, 0.9, 0.995):
            opened.move("size-threshold", THRESHOLDS.index(share))
            sums = {name: np.cumsum(layer["explained_variance_ratio"]) for name, layer in layers.items()}
            ranks = {
                name: int(np.sum(values < share - 1e-9)) + 1 if len(values) else 0 for name, values in sums.items()
            }
            assert opened.bytes == weigh(document, ranks)
            assert f"{100 * share:.1f} %" in opened.page.locator("#size-chosen").inner_text()
        shown = opened.page.locator("#size-exact").inner_text()
        assert shown == f"{opened.bytes:,} bytes"


def test_sliders_move_by_the_keyboard(show, page):
    document, _ = page("subspace")
    layers = document["evidence"]["layers"]
    with show("subspace") as opened:
        slider = opened.page.locator("#size-rank")
        slider.focus()
        opened.page.keyboard.press("ArrowRight")
        ranks = {name: min(17, len(layer["explained_variance_ratio"])) for name, layer in layers.items()}
        assert slider.get_attribute("aria-valuetext") == "rank 17"
        assert opened.bytes == weigh(document, ranks)


def test_thresholds_of_suitability_follow_the_rule(show, page):
    found = [layer["suitability"] for layer in page("subspace")[0]["evidence"]["layers"].values()]
    known = [np.array(layer["exponents"]) for layer in found if layer["exponents"]]

    def retained(low: float, high: float, spread: float, share: float, q: float) -> int:
        inside = [((values >= low) & (values <= high)).mean() for values in known]
        return sum(
            low <= values.mean() <= high and values.std() <= spread and part >= share and part / (1 + values.std()) >= q
            for values, part in zip(known, inside, strict=True)
        )

    usual = {"low": 2.0, "high": 6.0, "spread": 1.0, "share": 0.5, "q": 0.2}
    with show("subspace") as opened:
        for change in ({}, {"low": 3.2}, {"spread": 0.35}, {"share": 1.0}, {"q": 0.72}, {"high": 0.0}):
            for name, value in (usual | change).items():
                opened.move(f"limit-{name}", value)
            shown = opened.page.locator("#suitable-retained").inner_text()
            assert shown == f"{retained(**(usual | change))} of {len(known)} layers"


def test_hovering_shows_values(show, page):
    document, _ = page("subspace")
    with show("subspace") as opened:
        opened.draw_all()  # figures that are drawn later would move this one away from the mouse
        plot = opened.draw("plot-heldout")
        box = plot.locator(".nsewdrag").first.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.5)
        opened.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        opened.page.wait_for_function(
            "document.querySelector('#plot-heldout .hoverlayer').textContent.includes('held out')"
        )
        shown = plot.locator(".hoverlayer").text_content()
        values = document["evidence"]["summary"]["captured"]
        assert any(f"held out : {value:.4g}"[:15] in shown for value in values), shown


def test_hovering_a_map_names_layers_as_text(show):
    with show("hostile") as opened:
        opened.draw_all()  # figures that are drawn later would move this one away from the mouse
        plot = opened.draw("plot-layerranks")
        box = plot.locator(".nsewdrag").first.bounding_box()
        for step in (0.02, 0.021):
            opened.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * step)
        opened.page.wait_for_function(
            "document.querySelector('#plot-layerranks .hoverlayer').textContent.includes('rank')"
        )
        assert HOSTILE[0] in plot.locator(".hoverlayer").text_content()


def test_choosing_a_layer_redraws_every_figure_that_follows(show, page):
    document, _ = page("subspace")
    names = list(read_document(document).layers)
    still = names.index(next(name for name, layer in document["evidence"]["layers"].items() if not layer["variance"]))
    script = "name => document.getElementById('plot-' + name).data.map((trace) => trace.y)"
    with show("subspace") as opened:
        opened.draw_all()
        opened.page.select_option("#layer-spectrum", "3")
        assert opened.page.locator("#layer-heldout").input_value() == "3"
        layer = document["evidence"]["layers"][names[3]]
        drawn = opened.page.evaluate(script, "heldout")[-1]
        assert drawn == pytest.approx(layer["heldout"]["captured"], rel=1e-3)
        assert "directions keep" in opened.page.locator("#halves .layer-sentence").inner_text()
        opened.page.select_option("#layer-spectrum", str(still))
        assert opened.page.evaluate(script, "scree") == []
        assert "no spectrum" in opened.page.locator("#plot-scree").text_content()
        assert opened.said == []


def test_choosing_a_quantity_redraws_the_map(show, page):
    document, _ = page("subspace")
    script = "document.getElementById('plot-rolemap').data[0].z"
    with show("subspace") as opened:
        opened.draw("plot-rolemap")
        opened.page.select_option("#choice-rolemap", "var90")
        layers = read_document(document).layers
        drawn = [value for row in opened.page.evaluate(script) for value in row]
        assert sorted(drawn) == sorted(layer["rank"]["var90"] for layer in layers.values())


def test_hostile_names_stay_text(show):
    with show("hostile") as opened:
        opened.draw_all()
        assert opened.dialogs == []
        assert opened.said == []
        assert opened.page.locator("img:visible").count() == 0
        assert opened.page.locator("img:not(.still)").count() == 0
        assert opened.page.locator("a[href^='javascript']").count() == 0
        assert opened.page.locator("body b", has_text="bold").count() == 0
        for name in HOSTILE[:3]:
            assert opened.page.get_by_text(name, exact=True).count() > 0
        drawn = "".join(opened.page.locator(".plot").all_text_contents())
        assert HOSTILE[0] in drawn
        assert "<b>bold</b>" in drawn
        links = opened.page.eval_on_selector_all(
            ".plot a",
            "all => all.map((a) => a.getAttributeNS('http://www.w3.org/1999/xlink', 'href') || a.getAttribute('href'))",
        )
        assert not any(links)


def test_numbers_and_pictures_can_be_taken_away(show, page, tmp_path):
    report = read_document(page("lineage")[0])
    with show("lineage") as opened:
        opened.draw("plot-scree")
        for section in ("spectrum", "growth"):
            with opened.page.expect_download() as waiting:
                opened.page.locator(f"#{section} .tool", has_text="Data (CSV)").first.click()
            waiting.value.save_as(tmp_path / "table.csv")
            assert waiting.value.suggested_filename == f"eigenzoo-{section}.csv"
            assert (tmp_path / "table.csv").read_text(encoding="utf-8") == section_csv(report, section)
        for kind, head in (("svg", b"<svg"), ("png", b"\x89PNG")):
            with opened.page.expect_download() as waiting:
                opened.page.locator(f"#figure-scree button[data-format={kind}]").click()
            waiting.value.save_as(tmp_path / "picture")
            assert (tmp_path / "picture").read_bytes().startswith(head)
        assert opened.said == []


def test_the_theme_follows_the_system_and_the_button(show):
    paper = "document.getElementById('plot-scree').layout.paper_bgcolor"
    with show("subspace", color_scheme="dark") as opened:
        opened.draw("plot-scree")
        dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor"), opened.page.evaluate(paper)
        opened.page.locator("#theme").click()
        light = opened.page.evaluate("getComputedStyle(document.body).backgroundColor"), opened.page.evaluate(paper)
        assert dark[0] != light[0]
        assert dark[1] != light[1]
        opened.page.locator("#theme").click()
        assert opened.page.evaluate(paper) == dark[1]
        opened.page.emulate_media(color_scheme="light")
        assert opened.page.evaluate(paper) == dark[1]


def test_it_can_be_read_without_javascript(show, page):
    document, _ = page("subspace")
    with show("subspace", java_script_enabled=False) as opened:
        shown = opened.page
        assert shown.get_by_role("heading", level=1).is_visible()
        assert shown.get_by_text(document["evidence"]["verdict"]["text"]).first.is_visible()
        assert shown.locator("table:visible").count() >= 8
        assert shown.get_by_text("rank 32", exact=True).first.is_visible()
        assert shown.locator("input:visible, select:visible, button:visible, .plot:visible").count() == 0
        stills = shown.locator("img.still")
        assert stills.count() == 17
        assert all(still.bounding_box()["height"] > 150 for still in stills.all())
        assert {url.partition(":")[0] for url in opened.asked} <= {"file", "data"}


@pytest.mark.parametrize("kind", ["hostile", "lineage"])
@pytest.mark.parametrize("script", [True, False])
def test_a_phone_scrolls_down_only(show, kind, script):
    with show(kind, viewport={"width": 390, "height": 844}, java_script_enabled=script) as opened:
        if script:
            opened.draw_all()
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
            opened.page.locator("details").first.evaluate("box => { box.open = true; }")
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        for table in opened.page.locator(".scroll:visible").all():
            box = table.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("kind", ["subspace", "lineage"])
def test_tables_are_whole_on_a_laptop(show, kind):
    with show(kind) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
        for table in opened.page.locator(".scroll").all():
            assert table.evaluate("box => box.scrollWidth - box.clientWidth") <= 1, table.get_attribute("aria-label")


def test_a_table_that_is_scrolled_keeps_its_names(show):
    with show("subspace", viewport={"width": 390, "height": 844}) as opened:
        box = opened.page.locator(".scroll[aria-label='All layers']")
        box.evaluate("box => { box.scrollLeft = 300; }")
        assert box.evaluate("box => box.scrollLeft") > 200
        left = box.bounding_box()["x"]
        assert box.locator("tbody th").first.bounding_box()["x"] - left < 2


@pytest.mark.parametrize(("kind", "theme"), [("subspace", "light"), ("lineage", "dark")])
def test_a4_has_every_figure_and_every_table_whole(show, kind, theme):
    # A4 less the margins: 182 mm at 96 pixels an inch.
    with show(kind, viewport={"width": 688, "height": 1009}, color_scheme=theme) as opened:
        opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        opened.page.emulate_media(media="print", color_scheme=theme)
        figures = opened.page.locator(".figure").count()
        assert opened.page.locator("img.still:visible").count() == figures > 10
        assert opened.page.locator(".plot:visible, select:visible, button:visible, input:visible").count() == 0
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 688
        for table in opened.page.locator(".scroll").all():
            assert table.is_visible()
            assert table.evaluate("box => box.scrollWidth - box.clientWidth") <= 1, table.get_attribute("aria-label")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_figures_follow_a_change_of_width(show):
    width = "document.querySelector('#plot-similarity .heatmaplayer image').getBoundingClientRect().width"
    with show("lineage") as opened:
        opened.draw("plot-similarity")
        wide = opened.page.evaluate(width)
        opened.page.set_viewport_size({"width": 390, "height": 900})
        opened.page.wait_for_function(f"{width} > 200 && {width} < 390")
        opened.page.set_viewport_size({"width": 1280, "height": 900})
        opened.page.wait_for_function(f"Math.abs({width} - {wide}) < 2")


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)])
def test_nothing_serious_stands_in_anybodys_way(show, theme, width):
    from axe_playwright_python.sync_playwright import Axe

    with show("subspace", color_scheme=theme, viewport={"width": width, "height": 900}) as opened:
        opened.draw_all()
        opened.page.evaluate("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
        found = Axe().run(opened.page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == []
        levels = opened.page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((head) => Number(head.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        for slider in opened.page.locator("input[type=range]").all():
            assert slider.get_attribute("aria-valuetext")
        for plot in opened.page.locator(".plot").all():
            assert len(plot.get_attribute("aria-label")) > 40


def test_screenshots_of_both_themes_differ(show, tmp_path):
    shots: dict[str, bytes] = {}
    for theme in ("light", "dark"):
        with show("subspace", color_scheme=theme) as opened:
            opened.draw_all()
            shots[theme] = opened.page.screenshot(path=Path(tmp_path / f"{theme}.png"))
    assert all(len(shot) > 20_000 for shot in shots.values())
    assert shots["light"] != shots["dark"]


def test_five_hundred_models_of_two_hundred_layers_open(show, page):
    page("large")
    with show("large") as opened:
        opened.draw_all()
        assert opened.said == []
        assert re.search("500 models", opened.page.locator("#verdict").inner_text())
