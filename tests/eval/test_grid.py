"""The grid: what a cell is, what it depends on, and one real comparison from the command to its pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from erase_concept.cli.compare import split_entries
from erase_concept.errors import RequestError
from erase_concept.eval.compare.compare import compare
from erase_concept.eval.compare.trials import (
    PRESETS,
    Cell,
    _append,
    fingerprint,
    read_cells,
    read_pairs,
    recipe_of,
    split_entry,
)
from erase_concept.eval.report.report import read_report
from erase_concept.methods import METHODS
from erase_concept.pipelines.emojinette import MODEL


def test_entries_are_names_with_settings_in_brackets() -> None:
    assert split_entry("esd-x") == ("esd-x", {})
    assert split_entry("salun[lr=1.0e-3, remap=random]") == ("salun", {"settings": {"lr": 1e-3, "remap": "random"}})
    assert split_entry("default[mask.sparsity=0.9,steps=3,lr=1e-4]") == (
        "default",
        {"settings": {"steps": 3, "lr": 1e-4}, "mask": {"sparsity": 0.9}},
    )
    assert split_entries("default,esd-x[eta=2,steps=5], uce") == ["default", "esd-x[eta=2,steps=5]", "uce"]
    for wrong in ("", "a b", "esd-x[eta]", "esd-x[eta=1", "[eta=1]"):
        with pytest.raises(RequestError, match=r"--methods .*must be (NAME or NAME\[)?KEY=VALUE"):
            split_entry(wrong)


@pytest.mark.parametrize("entry", [*PRESETS, *METHODS.all()])
@pytest.mark.parametrize("concept", ["church", "flat"])
def test_every_method_has_a_recipe_whose_knob_turns(entry: str, concept: str) -> None:
    own, double = (recipe_of("emojinette", Cell(entry, concept, 0, strength=factor)) for factor in (1.0, 2.0))
    tuned_setting = own.erasure().tuned_setting
    before, after = (getattr(recipe.config(), tuned_setting) for recipe in (own, double))
    assert after == pytest.approx(2 * before)
    assert before > 0
    same = own.model_copy(update={"settings": own.settings | {tuned_setting: after}})
    assert same.to_dict() == double.to_dict()


def test_a_cell_s_fingerprint_is_of_all_that_it_depends_on() -> None:
    cells = [
        Cell("salun", "church", 0),
        Cell("salun", "church", 1),
        Cell("salun", "dog", 0),
        Cell("salun", "church", 0, "random"),
        Cell("salun", "church", 0, strength=2.0),
        Cell("salun[alpha=0.3]", "church", 0),
        Cell("uce", "church", 0),
    ]
    assert len({fingerprint("emojinette", cell) for cell in cells}) == len(cells)
    assert fingerprint("emojinette", cells[0]) == fingerprint("emojinette", Cell("salun", "church", 0, "salient"))


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    assert read_cells(file) == {}
    file.write_text('{"fingerprint": "a", "seconds": 1}\n{"fingerprint": "b", "sec', encoding="utf-8")
    assert list(read_cells(file)) == ["a"]
    _append(file, {"fingerprint": "c"})
    _append(file, {"fingerprint": "d"})
    assert list(read_cells(file)) == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no/such/folder"}, "MODEL no/such/folder: "),
        ({"benchmark": "i2p"}, "--benchmark i2p: tells neither UA nor IRA"),
        ({"benchmark": "no-such"}, "--benchmark no-such: unknown benchmark"),
        ({"benchmark": "imagenette", "concepts": ["cat"]}, "--concept cat: no prompt of imagenette"),
        ({"entries": ["no-such"]}, "method no-such: allowed: .*esd-x"),
        ({"entries": ["esd-x[no=1]"]}, "--set no=1: esd-x has"),
        ({"concepts": ["nudity"]}, "--concept .*Emojinette's objects and styles are"),
        ({"tune_on": ["church"]}, "--tune church: is compared on too"),
        ({"masks": ["absent.safetensors"]}, "--masks absent.safetensors"),
        ({"masks": ["random@0"]}, "--masks random@0: the factor must be a number above 0"),
        ({"masks": ["random@much"]}, "--masks random@much: the factor must be a number above 0"),
        ({"masks": ["absent@2"]}, "--masks absent@2: "),
    ],
)
def test_a_request_that_cannot_be_followed_measures_nothing(tmp_path: Path, options: dict, said: str) -> None:
    given = {"model": "emojinette", "entries": ["uce"], "concepts": ["church"], "seeds": [0], "out": tmp_path / "out"}
    with pytest.raises(RequestError, match=said):
        list(compare(**given | options))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_from_the_methods_to_the_page_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given = {"model": "emojinette", "concepts": ["church"], "seeds": [0], "out": tmp_path}
    first = list(compare(entries=["uce"], **given))
    assert first == [("uce__1_church_0", 1, 1)]
    line = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    both = list(compare(entries=["uce", "salun[steps=2,lr=1.0e-9]"], **given))
    assert [done for _, done, _ in both] == [1, 2]
    lines = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    assert lines.startswith(line)  # the first cell was not measured again
    edited, still = (json.loads(text) for text in lines.splitlines())
    assert edited["scores"]["ua"]["n"] == 20
    assert edited["scores"]["ua"]["value"] > 0.5
    assert 0 < edited["changed"] < 0.1  # keys and values of cross-attention alone
    assert still["scores"]["ua"]["value"] == 0  # nothing was erased with such a rate
    assert still["scores"]["ira"]["value"] == still["scores"]["ira"]["baseline"]
    assert 0.2 < edited["peak_gib"] < 8
    assert len(read_pairs(tmp_path, edited)) == 12
    assert all(pair.erased.is_file() and pair.base is not None for pair in read_pairs(tmp_path, edited))
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| uce | " in table
    told = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert told["methods"]["uce"]["share"]["ua"] == edited["scores"]["ua"]["value"]
    with Image.open(tmp_path / "sheets" / "church.png") as sheet:  # the base and two methods, 12 prompts each
        assert sheet.height == 3 * 100 + 54
        assert sheet.width > 12 * 100
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "uce" in page
    with pytest.raises(RequestError, match="lays several runs side by side"):
        read_report(tmp_path)
    # What was measured under one name is told, pictures and all, under the one that is asked for.
    (only,) = compare(entries=["salun[steps=2,lr=2.0e-9]"], masks=["salient@0.5"], **given)
    assert only == ("salun-steps=2-lr=2.0e-9-_salient_0.5_church_0", 1, 1)
    assert (tmp_path / "cells.jsonl").read_text(encoding="utf-8") == lines
    told = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert told["methods"].keys() == {"salun[steps=2,lr=2.0e-9], mask salient"}
    with Image.open(tmp_path / "sheets" / "church.png") as sheet:
        assert sheet.height == 2 * 100 + 54


@pytest.mark.slow
def test_any_model_is_compared_by_any_benchmark_that_tells_what_is_gone_and_what_is_kept(tmp_path: Path) -> None:
    """A copy of the built-in model, which nothing knows by name, judged by a benchmark of one's own."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (tmp_path / "prompts.csv").write_text(
        "prompt,evaluation_seed,object\na church in town,1,church\na green tree,2,tree\nsome nice dog,3,dog\n"
    )
    (tmp_path / "own.yaml").write_text(
        "{prompts: prompts.csv, metrics: [classes],"
        " settings: {classifier: emojinette, guidance: 5.0, steps: 12, seeds: 2}}"
    )
    given = {"concepts": ["church"], "seeds": [0, 1], "out": tmp_path / "out", "benchmark": str(tmp_path / "own.yaml")}
    list(compare(str(folder), ["uce", "negative-prompt"], **given))
    cells = list(read_cells(tmp_path / "out" / "cells.jsonl").values())
    assert [cell["scores"]["ua"]["n"] for cell in cells] == [2] * 4
    assert [cell["scores"]["ira"]["n"] for cell in cells] == [4] * 4
    assert {cell["scores"]["ua"]["baseline"] for cell in cells} == {0.0}
    assert [cell["scores"]["ua"]["value"] for cell in cells if cell["entry"] == "uce"] == [1.0, 1.0]
    told = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["methods"]
    assert told["uce"]["of_base"].keys() == {"ira"}
    assert "own.yaml" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines()[0]
    # Another seed is other noise.
    first, second = (tmp_path / "out" / "base").iterdir()
    assert (first / "00000.png").read_bytes() != (second / "00000.png").read_bytes()
