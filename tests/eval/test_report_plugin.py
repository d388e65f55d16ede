"""A metric of another package: its own title, direction and words are in the report, the Markdown and the plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from erase_concept.eval.report.text import NOTHING

METRICS = """
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import Metric

METRICS.add(
    Metric(
        "traces",
        "Traces of the concept",
        "Share of the images in which an oracle senses the concept.",
        "forget",
        "lower",
        finding="of the images bear traces of {it}, says the oracle",
    )
)
METRICS.add(
    Metric(
        "charm",
        "Charm of the rest",
        "Share of all other images that please.",
        "retain",
        "higher",
        finding="of the pictures of another {kind} please",
    )
)
METRICS.add(Metric("gloom", "Gloom of the rest", "How gloomy all other images are.", "retain", "lower", unit="shades"))
"""
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.write import write_report, write_side_by_side
from erase_concept.eval.score import Score, wilson

out = Path(sys.argv[1])

def run(name, traces, charm, gloom):
    def share(metric, count, base):
        ends = wilson(count, 50), wilson(base, 50)
        return Score(metric, "church", count / 50, 50, ends[0], "fraction", "asked", base / 50, ends[1])
    scores = (
        share("traces", traces, 45),
        share("charm", charm, 50),
        Score("gloom_dark", "church", gloom, 50, (gloom - 1, gloom + 1), "shades", "asked", 5.0, (4.0, 6.0)),
    )
    return Report("church", "object", "", "a model", "oracle", {}, {}, scores)

runs = {"good": run("good", 1, 49, 6.0), "bad": run("bad", 30, 40, 9.0)}
write_report(runs["good"], out / "one")
write_side_by_side(runs, out / "both")
write_side_by_side({n: replace(r, scores=(r.scores[0], r.scores[2])) for n, r in runs.items()}, out / "gloom")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the reports in a process that has the other package installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "oracle_metrics.py").write_text(METRICS, encoding="utf-8")
    (site / "oracle-1.0.dist-info").mkdir()
    (site / "oracle-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: oracle\nVersion: 1.0\n")
    (site / "oracle-1.0.dist-info" / "entry_points.txt").write_text(
        "[erase_concept.metrics]\noracle = oracle_metrics\n", encoding="utf-8"
    )
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{SCRIPT}"
    subprocess.run([sys.executable, "-c", code, str(site / "out")], check=True)
    return site / "out"


def plain(file: Path) -> str:
    return file.read_text(encoding="utf-8").replace("\u00a0", " ").replace("\\", "")


def test_the_verdict_says_what_the_metric_finds_in_its_own_words(written: Path) -> None:
    summary = json.loads((written / "one" / "report.json").read_text(encoding="utf-8"))["summary"]
    assert (summary["gone"], summary["lost"]) == ("Gone", "Hardly anything")
    text = summary["text"].replace("\u00a0", " ")
    assert "2 % of the images bear traces of it, says the oracle; of the base model's images, 90 %." in text
    assert "98 % of the pictures of another object please, 98 % of the base model's share." in text


def test_the_report_has_its_titles(written: Path) -> None:
    for name in ("report.html", "report.md"):
        for folder in ("one", "both"):
            for title in ("Traces of the concept", "Charm of the rest", "Gloom of the rest, dark"):
                assert title in plain(written / folder / name), (folder, name, title)
    assert "of the images bear traces of it, says the oracle" in plain(written / "one" / "report.html")
    # Only what was to stay is held against the base model's: the erased concept is well when it is low.
    row = next(line for line in plain(written / "one" / "report.md").splitlines() if line.startswith("| Traces of"))
    assert row.split(" | ")[5] == NOTHING


def test_the_plot_knows_which_direction_is_better(written: Path) -> None:
    points = json.loads((written / "both" / "report.json").read_text(encoding="utf-8"))["pareto"]
    assert points["forget"].replace("\u00a0", " ") == "100 % \N{MINUS SIGN} Traces of the concept"
    assert points["points"]["good"] == {"forget": pytest.approx(0.98), "retain": pytest.approx(0.98), "best": True}
    assert not points["points"]["bad"]["best"]
    # Without a share, the first metric of the rest is plotted: of gloom the lower is better.
    gloom = json.loads((written / "gloom" / "report.json").read_text(encoding="utf-8"))["pareto"]
    assert gloom["retain"] == "Gloom of the rest, dark (lower is better)"
    assert {name: point["best"] for name, point in gloom["points"].items()} == {"good": True, "bad": False}
