"""Prompt sets as CSV, in the field's spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts import emojinette
from erase_concept.prompts.promptset import PromptRow, PromptSet, emojinette_prompts, prompt_sets, prompts, read_prompts


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "p.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_both_spellings_of_i2p_read_alike(tmp_path: Path) -> None:
    own = 'prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"a, b",5,7.5,512,768\n'
    research = 'case_number,prompt,evaluation_seed,evaluation_guidance,width,height\n9,"a, b",5,7.5,512,768\n'
    rows = [read_prompts(write(tmp_path, text)).rows for text in (own, "\ufeff" + research)]
    assert rows[0] == rows[1] == (PromptRow("a, b", 5, 7.5, 512, 768),)


def test_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = (
        PromptRow('say "hi",\nor not 🪦', 2**63 - 1, 0.0, 64, 128, "church", "Vincent van Gogh"),
        PromptRow("", 0),
    )
    PromptSet("p", rows).save(tmp_path / "sub" / "p.csv")
    assert read_prompts(tmp_path / "sub" / "p.csv").rows == rows


def test_rows_without_a_seed_are_numbered(tmp_path: Path) -> None:
    assert [row.seed for row in read_prompts(write(tmp_path, "prompt\na\nb\n")).rows] == [0, 1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no column 'prompt', only an empty file"),
        ("text,seed\na,1\n", "no column 'prompt', only text, seed"),
        ("prompt,seed\n", "the prompt set is empty"),
        ("prompt,seed\na,1\nb,x\n", "line 3: seed must be a whole number, not 'x'"),
        ("prompt,seed\na,-1\n", "line 2: seed must be at least 0"),
        ("prompt,evaluation_guidance\na,nan\n", "line 2: guidance must be at least 0 and finite"),
        ("prompt,width\na,100\n", "line 2: width must be a positive multiple of 8"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        read_prompts(write(tmp_path, text))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.csv"
    file.write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(RequestError, match="not a CSV file in UTF-8"):
        read_prompts(file)
    with pytest.raises(RequestError, match="no such file, and no built-in prompt set; allowed: emojinette"):
        prompts(str(tmp_path / "absent.csv"))
    with pytest.raises(RequestError, match="Is a directory"):
        prompts(str(tmp_path))


@pytest.mark.parametrize("unseen", [False, True])
def test_built_in_sets_ask_for_every_object_in_every_style(unseen: bool) -> None:
    rows = emojinette_prompts(range(3), unseen=unseen).rows
    pairs = [(row.object, row.style) for row in rows]
    assert all(pairs.count((o, s)) == 3 for o in emojinette.OBJECT_LABELS for s in emojinette.STYLES)
    assert len({row.seed for row in rows}) == len(rows) == 240
    for row in rows:
        names = emojinette.names_of(row.object)
        assert any(name in row.prompt for name in (names.label, names.synonym, names.unseen))
        assert row.style in row.prompt
    assert set(prompt_sets()) == {"emojinette", "emojinette-unseen"}


def test_reads_other_peoples_prompt_sets_whole(shared_data: Path) -> None:
    i2p = read_prompts(shared_data / "i2p.csv")
    assert len(i2p.rows) == 4703
    assert all(row.guidance and row.width and row.height for row in i2p.rows)
    assert {row.object for row in read_prompts(shared_data / "imagenette_prompts.csv").rows} >= {"tench", "church"}
    for file in shared_data.glob("*.csv"):
        assert read_prompts(file).rows
