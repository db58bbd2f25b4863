"""The report: built without a network, needing nothing from outside, safe against what logs say."""

from __future__ import annotations

import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from observe_runs import SIX, write_run

from dlion.cli.errors import fault_of
from dlion.cli.report import report

pytest.importorskip("matplotlib", reason="the report extra is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from dlion.observe.read import read_directory
from dlion.observe.report import build_report
from dlion.observe.report.links import links
from dlion.observe.report.style import LIGHT, PAGE, apart

FOUR = ["a1", "a2", "b1", "c1"]


class Resources(HTMLParser):
    """Collects everything a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data") and value and value[0] != "#":
                self.fetched.append(value)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the report opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_two_runs_make_one_page_that_needs_nothing_and_pictures(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", FOUR, 6.0)
    second = write_run(tmp_path / "two", FOUR, 5.0, 1, "full")
    result = CliRunner().invoke(report, [str(first), str(second), "--out", str(tmp_path / "out" / "x.html")])
    assert result.exit_code == 0, result.output
    written = [Path(text) for text in result.output.split()]
    assert [p.name for p in written] == [
        "x.html", "x-overview.png", "x-peers-0.png", "x-links-0.png", "x-peers-1.png", "x-links-1.png",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[1:])
    text = written[0].read_text()
    seen = Resources()
    seen.feed(text)
    assert all(value.startswith("data:image/png;base64,") for value in seen.fetched)
    assert not seen.tags & {"script", "link", "iframe", "object", "img", "form", "base"}
    assert not re.search(r"url\((?!#)|@import", text)
    for colour in vars(PAGE).values():
        assert colour not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    ids = re.findall(r' id="([^"]+)"', text)
    clips = [i for i in ids if re.fullmatch(r"p[0-9a-f]{8,}", i)]
    assert clips and len(clips) == len(set(clips))
    assert "prefers-color-scheme:dark" in text
    assert "2 runs compared" in text and 'class="best"' in text


def test_the_same_logs_make_the_same_page(tmp_path: Path) -> None:
    run = read_directory(write_run(tmp_path / "one", SIX[:2], 3.0))
    pages = [build_report([run], tmp_path / name)[0].read_bytes() for name in ("x.html", "y.html")]
    assert pages[0] == pages[1]


def test_names_from_logs_cannot_inject_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "<b>&run", ["a<script>1", "b1"], 3.0)
    (page, *_) = build_report([read_directory(tmp_path / "<b>&run")], tmp_path / "r.html")
    text = page.read_text()
    assert "<script" not in text and "&lt;b&gt;&amp;run" in text


def test_many_peers_few_events_and_dollar_signs_still_draw(tmp_path: Path) -> None:
    many = read_directory(write_run(tmp_path / "many", [f"{c}{i}" for c in "abc" for i in range(4)], 3.0))
    none = read_directory(write_run(tmp_path / r"$\frac$", ["a1"], 0.0))
    assert len(build_report([many, none], tmp_path / "r.html")) == 5


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_directory(write_run(tmp_path / side / "run", ["a1", "b1"], 2.5)) for side in ("x", "y")]
    text = build_report(runs, tmp_path / "r.html")[0].read_text()
    assert "run dlion #1" in text and "run dlion #2" in text


def test_without_matplotlib_one_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, ["a1"], 1.0)
    for name in ("style", "figures", "links"):
        monkeypatch.delitem(sys.modules, f"dlion.observe.report.{name}", raising=False)
        monkeypatch.delattr(f"dlion.observe.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(report, [str(tmp_path)])
    assert isinstance(result.exception, ModuleNotFoundError)
    fault = fault_of(result.exception)
    assert fault is not None
    assert (fault.code, fault.advice) == (78, "pip install 'dlion[report]'")


@pytest.mark.parametrize(("name", "code"), [("nowhere", 74), ("damaged", 65)])
def test_bad_directories_end_with_their_exit_code(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a1.jsonl").write_text("nonsense\n")
    result = CliRunner().invoke(report, [str(tmp_path / name)])
    assert isinstance(result.exception, Exception)
    fault = fault_of(result.exception)
    assert fault is not None
    assert fault.code == code and str(tmp_path / name) in fault.text() and fault.advice


def test_labels_are_moved_apart_and_stay_inside() -> None:
    placed = apart([0.98, 0.98, 0.985, 0.99], 0.1)
    assert placed == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize("names", [["a1", "b1"], ["alpine", "baltic", "coast"], ["atlantic-trainer-0001", "b1"]])
def test_the_names_of_peers_stay_in_the_picture_of_links(tmp_path: Path, names: list[str]) -> None:
    figure = links(read_directory(write_run(tmp_path, names)), LIGHT)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text() in names]
    assert len(texts) == len(names) and all(text.get_window_extent(renderer).x0 >= 0 for text in texts)
