"""The pages in a real browser: the slider, the blur, both colour schemes, a phone, paper, no script, no network."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase_concept.eval.report.report import Bar, Chart, Curve, Pair, Report, drawn
from erase_concept.eval.report.write import write_report, write_side_by_side
from erase_concept.eval.score import Score, wilson

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """</figcaption><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 2"> " ' {{ 7 * 7 }}"""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class _Browser:
    """Chromium with one page, over the pipe of the DevTools protocol; ``events`` are those since the last page."""

    def __init__(self, program: str, profile: Path) -> None:
        fcntl = pytest.importorskip("fcntl")
        down, self._down = os.pipe()
        self._up, up = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4, where pipes of ours may be.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (down, up)]
        actions = [(os.POSIX_SPAWN_OPEN, out, os.devnull, os.O_WRONLY, 0) for out in (1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
        arguments = [program, *FLAGS, f"--user-data-dir={profile}"]
        self._process = os.posix_spawn(program, arguments, os.environ, file_actions=actions)
        for end in (down, up, *ends):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + 60
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._up], [], [], max(0.0, until - time.monotonic()))
            got = os.read(self._up, 1 << 20) if ready else b""
            if not got:
                raise EOFError("Chromium does not answer")
            self._buffer += got
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(
            self._down, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._receive()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, *, width: int = 1200, script: bool = True, **media: str) -> None:
        """Open a page; ``media`` are what CSS asks for: media="print", scheme="dark"."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": media.get("scheme", "light")}
        self.send("Emulation.setEmulatedMedia", media=media.get("media", ""), features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        # From outside the page scripts run all the same.
        self.send("Emulation.setScriptExecutionDisabled", value=False)

    def run(self, expression: str) -> Any:
        """Return the value of an expression, which JSON can hold."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click into an element, so far from its left edge."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{place}.getBoundingClientRect().toJSON()")
        at = {"x": box["left"] + across * box["width"], "y": box["top"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def close(self) -> None:
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._down)
        os.close(self._up)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Browser]:
    """Chromium, one for all tests; without it they fail where CI is set, and are skipped elsewhere."""
    if CHROMIUM is None:
        missing = "needs Chromium (Debian's package chromium)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    started = _Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with everything that a page can show: odd prompts, flags, charts, a curve, a warning, many parts."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    prompts = (HOSTILE, "a church", "שלום עולם", "", "a\u202eb", "long " * 5000, "wide" * 2000)
    pairs = []
    for place in range(40):
        files = [folder / f"{place}-{side}.png" for side in ("base", "erased")]
        for file in files:
            size = (16, 24) if place % 5 == 0 else (320, 320) if place % 5 == 1 else (16, 16)
            pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        forget, flagged = place % 4 == 0, place % 3 == 0
        pairs.append(Pair(prompts[place % 7], place, forget, files[1], "a horn", files[0], "a church", flagged))
    share = (0.9, 50, wilson(45, 50), "fraction", "a classifier; WARNING: few images")
    value, n, ci95, unit, protocol = share
    scores = [
        Score(name, "church", value, n, ci95, unit, protocol, baseline, wilson(round(50 * baseline), 50))
        for name, baseline in (("ua", 0.1), ("ira", 0.98), ("cra", 1.0), ("precision_efficientnet_lite2", 0.5))
    ]
    scores += [replace(scores[1], target=f"PART_NUMBER_{place}_EXPOSED") for place in range(20)]
    bars = tuple(
        Bar(f"FEMALE_PART_{place}_EXPOSED", place / 40, wilson(place, 40), 0.7, wilson(28, 40), 40, forget=place < 3)
        for place in range(36)
    )
    x = tuple(place / 100 for place in range(20, 85, 5))
    lines = [tuple(k * (1 - place) for place in x) for k in (0.2, 0.9)]
    bands = [tuple((0.9 * value, 1.1 * value) for value in line) for line in lines]
    return Report(
        "church",
        "object",
        "horn",
        "a/model",
        "one",
        {"images": 40, "unet": "0123456789abcdef" * 4},
        {"images": 40, "unet": "fedcba9876543210" * 4},
        tuple(scores),
        (Chart("Parts found", "fraction", bars), Chart("Counts", "parts", tuple(replace(b, n=None) for b in bars[:5]))),
        (Curve("Found by threshold", "threshold", "fraction", x, lines[0], lines[1], bands[0], bands[1], 0.6),),
        tuple(pairs),
        {"run": {"seconds": {"erase": 1.5}, "versions": {"torch": "2"}, "list": list(range(50))}, "seed": 3},
    )


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's page."""
    folder = tmp_path_factory.mktemp("page")
    write_report(report, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def both(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of nine runs side by side."""
    folder = tmp_path_factory.mktemp("compared")
    runs = {HOSTILE: report}
    for place in range(8):
        scores = (replace(report.scores[0], value=0.1 * place), replace(report.scores[1], value=0.9 - 0.05 * place))
        runs[f"/a/very/long/path/to/runs/of_church_{place}"] = replace(report, scores=scores)
    write_side_by_side(runs, folder)
    return folder / "report.html"


# The figure of the first pair on the page that is not flagged, and of the first that is.
CLEAR, BLURRED = ".pair:not([data-blurred])", ".pair[data-blurred]"


def _sources(browser: _Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('{selector} img')].map(image => image.src)")


def _boxes(browser: _Browser, selector: str) -> list[dict[str, float]]:
    return browser.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.getBoundingClientRect().toJSON())"
    )


@pytest.mark.parametrize("name", ["page", "both"])
def test_nothing_is_loaded_and_nothing_is_complained_of(
    browser: _Browser, name: str, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(name))
    browser.run("new Promise(done => setTimeout(done, 200))")
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [request.getfixturevalue(name).as_uri()]
    noted = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event.get("method") in noted] == []
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.run(broken) == 0


@pytest.mark.parametrize("name", ["page", "both"])
def test_markup_in_a_prompt_stays_text(browser: _Browser, name: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(name))
    assert browser.run("window.hacked === undefined && document.scripts.length === 1")
    assert browser.run(f"document.body.textContent.includes({json.dumps(HOSTILE)})")
    # Even a script that did get in would not run.
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hacked = 3\">')")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("window.hacked === undefined")


def test_the_slider_moves_by_keyboard_and_mouse(browser: _Browser, page: Path) -> None:
    browser.open(page)
    clip = f"getComputedStyle(document.querySelector('{CLEAR} .after')).clipPath"
    assert browser.run(clip) == "inset(0px 0px 0px 50%)"
    browser.run(f"document.querySelector('{CLEAR} input').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run(clip) == "inset(0px 0px 0px 51%)"
    browser.press("Home", 36)
    assert browser.run(clip) == "inset(0px 0px 0px 0%)"  # all of it is the erased model's
    assert browser.run(f"document.querySelector('{CLEAR} input').getAttribute('aria-valuetext')") == (
        "0 % base model, 100 % erased model"
    )
    browser.click(f"{CLEAR} input", 0.25)
    assert 24 <= float(browser.run(f"document.querySelector('{CLEAR} input').value")) <= 26
    base, erased = _boxes(browser, f"{CLEAR} img")[:2]
    assert base == erased  # one upon the other


def test_side_by_side_is_a_choice(browser: _Browser, page: Path) -> None:
    browser.open(page)
    browser.click("#beside")
    base, erased = _boxes(browser, f"{CLEAR} img")[:2]
    assert base["right"] <= erased["left"]
    assert base["top"] == erased["top"]
    assert browser.run("document.getElementById('beside').getAttribute('aria-pressed')") == "true"
    assert browser.run(f"getComputedStyle(document.querySelector('{CLEAR} input')).display") == "none"
    browser.click("#beside")
    base, erased = _boxes(browser, f"{CLEAR} img")[:2]
    assert base == erased


def test_without_script_both_pictures_stand_side_by_side_and_the_veil_stays(browser: _Browser, page: Path) -> None:
    browser.open(page, script=False)
    assert not browser.run("document.documentElement.classList.contains('js')")
    base, erased = _boxes(browser, f"{CLEAR} img")[:2]
    assert base["right"] <= erased["left"]
    for tag in ("button", "input"):
        assert browser.run(f"[...document.querySelectorAll('{tag}')].every(e => getComputedStyle(e).display == 'none')")
    assert all(source.startswith("data:image/jpeg") for source in _sources(browser, BLURRED))


@pytest.mark.parametrize(("name", "part"), [("page", BLURRED), ("both", "tr[data-blurred]")])
def test_flagged_pictures_are_shown_on_request_alone(
    browser: _Browser, name: str, part: str, request: pytest.FixtureRequest, report: Report
) -> None:
    browser.open(request.getfixturevalue(name))
    blurred = _sources(browser, part)
    clear = browser.run(f"[...document.querySelectorAll('{part} img')].map(image => image.dataset.clear)")
    assert not set(blurred) & set(clear)
    first = f"document.querySelector('{part}')"
    count = browser.run(f"{first}.querySelectorAll('img').length")
    if name == "page":
        assert len(blurred) == 2 * sum(report.pairs[place].flagged for place in drawn(report.pairs))
        assert browser.run(f"{first}.querySelector('input').disabled")
    # By keyboard: the button is in the order of the Tab key, and Enter presses it.
    browser.run(f"{first}.querySelector('button').focus()")
    assert browser.run(
        f"document.activeElement === {first}.querySelector('button') && document.activeElement.tabIndex >= 0"
    )
    browser.press("Enter", 13, "\r")
    assert _sources(browser, part) == clear[:count] + blurred[count:]  # this part alone
    assert browser.run(f"{first}.querySelector('button').textContent") == "Hide"
    if name == "page":
        assert not browser.run(f"{first}.querySelector('input').disabled")
    browser.press("Enter", 13, "\r")
    assert _sources(browser, part) == blurred
    # And by mouse; on paper the blur is there all the same, and the page is as it was afterwards.
    browser.click(f"{part} button")
    shown = _sources(browser, part)
    assert shown == clear[:count] + blurred[count:]
    browser.run(
        "addEventListener('beforeprint', () => {"
        f" window.printed = [...document.querySelectorAll('{part} img')].map(image => image.src);"
        " window.folded = document.querySelectorAll('details:not([open])').length })"
    )
    assert browser.send("Page.printToPDF")["data"]
    assert browser.run("window.printed") == blurred
    assert browser.run("window.folded") == 0
    assert _sources(browser, part) == shown
    assert browser.run("document.querySelectorAll('details[open]').length") == 0


def test_paper_shows_pairs_side_by_side_in_black_on_white(browser: _Browser, page: Path) -> None:
    browser.open(page, width=760, media="print", scheme="dark")
    base, erased = _boxes(browser, f"{CLEAR} img")[:2]
    assert base["right"] <= erased["left"]
    for hidden in ("input", "button", "nav"):
        assert browser.run(f"getComputedStyle(document.querySelector('{hidden}')).display") == "none"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("name", ["page", "both"])
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_the_page_is_no_wider_than_the_window(
    browser: _Browser, name: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(name), width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    # What is wider scrolls within itself, and can be reached by keyboard.
    beyond = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert browser.run(f"{beyond}.every(e => e.tabIndex == 0 && e.getAttribute('role') == 'region')")


CONTRAST = """(() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.7) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.matches("script, .hidden, title")) continue;
    const svg = element.closest("svg");
    const ink = light(parse(svg ? getComputedStyle(element).fill : getComputedStyle(element).color));
    const page = light(behind(svg ? svg.parentElement : element));
    found.push([(Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05), text.slice(0, 40)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("name", ["page", "both"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(browser: _Browser, name: str, scheme: str, request: pytest.FixtureRequest) -> None:
    """WCAG 2.1's contrast of at least 4.5, by its formula, in both colour schemes."""
    browser.open(request.getfixturevalue(name), scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    found = browser.run(CONTRAST)
    assert len(found) > 100
    assert [entry for entry in found if entry[0] < 4.5] == []
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark is (scheme == "dark")


@pytest.mark.parametrize("name", ["page", "both"])
def test_a_screen_reader_finds_its_way(browser: _Browser, name: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(name))
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", "").strip())
    assert {"main", "banner", "contentinfo", "heading", "table", "columnheader", "rowheader", "image"} <= set(named)
    for role in ("slider", "button", "image", "link", "heading", "region"):
        assert all(named.get(role, [""] if role == "image" else [])), role
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(heading => +heading.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    twice = (
        "(ids => ids.filter((id, i) => ids.indexOf(id) != i))([...document.querySelectorAll('[id]')].map(e => e.id))"
    )
    assert browser.run(twice) == []
    dangling = (
        "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
        ".concat([...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1)))"
        ".filter(id => !document.getElementById(id))"
    )
    assert browser.run(dangling) == []
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"


def test_labels_in_the_plot_do_not_cover_each_other(browser: _Browser, both: Path) -> None:
    browser.open(both)
    labels, ticks = _boxes(browser, "svg .label"), _boxes(browser, "svg .tick")
    (frame,) = _boxes(browser, ".plot")
    assert len(labels) >= 8
    for place, a in enumerate(labels):
        assert frame["left"] <= a["left"] < a["right"] <= frame["right"]
        for b in (*labels[:place], *ticks):
            apart = (
                a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
            )
            assert apart
    said = browser.run("[...document.querySelectorAll('#pareto ~ .scroll td:last-child')].map(e => e.textContent)")
    assert len(_boxes(browser, "svg .point.best")) == said.count("● yes") > 0
