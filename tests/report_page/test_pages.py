"""The page itself: complete, well-formed, and nobody's text becomes markup."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fips_ext.report_page import Facts, collect, svg, to_html, to_markdown
from fips_ext.report_page.facts import Latency

from .test_facts import saved

pytestmark = pytest.mark.usefixtures("single_thread")
_EMPTY = {"meta", "br"}


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order; collects the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("models") / "m"
    model, _ = saved(folder)
    latency = [Latency(1, 0.5, 0.25), Latency(64, 2.0, 4.0)]
    return collect(folder, model, latency=latency, samples=[("<b>Once", "upon & a </b> time")])


def test_a_whole_page(facts: Facts) -> None:
    page = Balance()
    page.feed(to_html(facts))
    assert page.open == []
    assert page.links == []
    text = " ".join(page.text)
    assert "<b>Once" in text
    assert "upon & a </b> time" in text
    for layer in facts.layers:
        assert layer.name in text
    assert f"{facts.info['ratios']['mlp']:.4f}" in text
    assert "2.00" in text  # speed-up at one token
    assert '"pattern": "bitmap:16x32"' in text


def test_what_was_not_measured_is_left_out(facts: Facts) -> None:
    bare = dataclasses.replace(facts, latency=[], samples=[], info={**facts.info, "recipe": None})
    text = to_html(bare)
    assert "Latency" not in text
    assert "What it writes" not in text
    assert "Recipe" not in text
    assert "Latency" not in to_markdown(bare)


def test_markdown(facts: Facts) -> None:
    text = to_markdown(facts)
    rows = [line for line in text.splitlines() if line.startswith("| model.layers.")]
    assert len(rows) == len(facts.layers)
    assert "| 64 | 2.000 | 4.000 | 0.50 |" in text
    columns = {line.count("|") for line in rows}
    assert columns == {7}


def test_a_heat_map_has_a_square_per_entry() -> None:
    drawing = ElementTree.fromstring(svg.heat([[0, 0.5, 1], [1, 0.1, 0]], "a & b"))
    assert drawing.get("aria-label") == "a & b"
    paths = {path.get("fill-opacity"): path.get("d") for path in drawing.findall("path")}
    squares = {opacity: re.findall(r"M(\d+) (\d+)", path) for opacity, path in paths.items()}
    assert squares == {"0.125": [("1", "1")], "0.500": [("1", "0")], "1.000": [("2", "0"), ("0", "1")]}


def test_bars_are_in_proportion() -> None:
    drawing = ElementTree.fromstring(svg.bars([("one", (1.0, None)), ("<two>", (2.0, 0.5))], "bars"))
    widths = [float(rect.get("width")) for rect in drawing.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.01)
    assert "<two>" in [text.text for text in drawing.findall("text")]


@pytest.mark.parametrize("log", [False, True])
def test_lines_stay_on_the_plane(log: bool) -> None:
    curve = [(1, 3.0), (10, 0.02), (512, 3.0)]
    drawing = ElementTree.fromstring(svg.lines({"a": curve, "b": [(1, 1.0)]}, "l", "x", "y", log=log))
    numbers = [float(v) for line in drawing.findall("polyline") for v in re.split("[ ,]", line.get("points"))]
    assert all(0 <= value <= 600 for value in numbers)


def test_drawings_of_nothing() -> None:
    assert svg.lines({}, "l", "x", "y") == ""
    ElementTree.fromstring(svg.bars([], "b"))
    ElementTree.fromstring(svg.heat([], "h"))


def test_equal_points_are_drawn() -> None:
    ElementTree.fromstring(svg.lines({"a": [(5, 2.0)]}, "l", "x", "y", log=True))


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fips_ext.cli import app

    saved(tmp_path / "m")
    arguments = ["report", str(tmp_path / "m"), "--out", str(tmp_path / "new" / "page.html"), "--no-measure"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "new" / "page.md").read_text().startswith("# m")
