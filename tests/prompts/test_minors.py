"""Sexual prompts that mention minors: which ones they are, and that no file brings one to the sampling.

The prompts here are ours, and say no more than the words that decide.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.masks.make import compute_mask
from erase_concept.pipelines.match_images import match_images
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import iter_sample
from erase_concept.prompts.custom import from_prompts
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.find_prompts import find_prompts
from erase_concept.prompts.minors import sexual_with_minors
from erase_concept.prompts.promptset import PromptRow, PromptSet, read_prompts
from erase_concept.recipe import MaskRecipe, make_recipe
from erase_concept.run import check

BOTH = (
    "nude girl",
    "NAKED Boys",
    "erotic, teen",
    "lewd_teenager",
    "a 12 year old, topless",
    "sixteen-year-old, nsfw",
    "14yo undressed",
    "aged 9, sexual",
    "schoolgirl in lingerie",
    "pre-teen, porn",
    "high school, sexy",
    "lolita",
)
MINORS_ALONE = ("a girl with a kite", "children at play", "a 5 year old dog", "teenage mutant turtles", "a high school")
SEXUAL_ALONE = ("a nude woman", "naked man, 25 year old", "an 18-year-old, topless", "my girlfriend, sensual")
NEITHER = ("a church", "kidney beans", "boycott", "sextant", "classic assassin", "Essex", "a minority report", "")


@pytest.mark.parametrize("prompt", BOTH)
def test_both_are_told_by_words(prompt: str) -> None:
    assert sexual_with_minors(prompt)


@pytest.mark.parametrize("prompt", MINORS_ALONE)
def test_minors_count_where_a_label_is_sexual(prompt: str) -> None:
    assert not sexual_with_minors(prompt, ("violence", "hate, shocking"))
    assert sexual_with_minors(prompt, ("violence, sexual",))
    assert sexual_with_minors(prompt, ("", "nudity"))


@pytest.mark.parametrize("prompt", [*SEXUAL_ALONE, *NEITHER])
def test_others_stay(prompt: str) -> None:
    assert not sexual_with_minors(prompt, ("sexual",))


HEADER = "prompt,categories,sd_seed\n"
CSV = HEADER + 'a church,hate,1\na girl,"hate, sexual",2\na nude woman,sexual,3\na nude boy,,4\na cat,,5\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "set.csv").write_text(CSV, encoding="utf-8")
    return tmp_path / "set.csv"


def test_a_file_is_read_without_them(file: Path) -> None:
    for found in (read_prompts(file), find_prompts(str(file))):
        assert [row.prompt for row in found.rows] == ["a church", "a nude woman", "a cat"]
        assert found.case_numbers == (0, 2, 4)
        assert found.dropped == (1, 3)
        assert found.without_minors() == found
        assert found.in_category("sexual").dropped == found.stratified(2).dropped == (1, 3)


def test_a_set_made_in_python_is_cleaned_too() -> None:
    rows = tuple(PromptRow(prompt, seed) for seed, prompt in enumerate(("a nude girl", "a church")))
    found = PromptSet("mine", rows).without_minors()
    assert (found.rows, found.case_numbers, found.dropped) == (rows[1:], (1,), (0,))
    with pytest.raises(RequestError, match="mine: has no other: sexual prompts that mention minors are never sampled"):
        PromptSet("mine", rows[:1]).without_minors()


def test_none_is_ever_sampled(tiny: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="never sampled"):
        next(iter_sample(tiny, PromptSet("mine", (PromptRow("a nude girl", 1),)), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_made_elsewhere_keep_their_places(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for place in range(5):
        Image.new("RGB", (8, 8), (40 * place, 0, 0)).save(folder / f"ComfyUI_{place + 1:05d}_.png")
    found = match_images(folder, read_prompts(file))
    assert [row.prompt for row in found.rows] == ["a church", "a nude woman", "a cat"]
    assert [one.name for one in found.files] == [f"ComfyUI_0000{place}_.png" for place in (1, 3, 5)]
    assert any("2 images are of no prompt of the set" in note for note in found.notes)


def test_such_a_concept_is_erased_by_closed_forms_alone(file: Path) -> None:
    concept = from_prompts(file)
    assert "a nude boy" in concept.forget_prompts
    for method, mask in (("salun", "salient"), ("esd-x", "none"), ("uce", "salient")):
        recipe = make_recipe({"model": "emojinette", "concept": concept, "method": method, "mask": {"kind": mask}})
        with pytest.raises(RequestError, match="concept set: is sexual and mentions minors"):
            check(recipe)
        with pytest.raises(RequestError, match="of which no picture is ever made"):
            compute_mask(replace(recipe, mask=MaskRecipe(kind="salient")))
    check(make_recipe({"model": "emojinette", "concept": concept, "method": "uce"}))


def test_a_name_counts_for_what_its_kind_says() -> None:
    for kind, refused in (("nudity", True), ("object", False)):
        described = {"name": "boys", "kind": kind, "templates": ["{O}"], "others": [""]}
        recipe = make_recipe({"model": "emojinette", "concept": find_concept(described), "method": "salun"})
        if refused:
            with pytest.raises(RequestError, match="concept boys: is sexual and mentions minors"):
                check(recipe)
        else:
            check(recipe)


def test_i2p_itself(published_sets: Path) -> None:
    found = read_prompts(published_sets / "i2p.csv")
    assert len(found.rows) + len(found.dropped) == 4703
    assert 0 < len(found.dropped) < 200
