"""``concept``: a concept as YAML that can be edited and handed back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from erase_concept.prompts.find import find_concept

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", ["person:Elon Musk", "nudity", "style:Monet", "tench"])
def test_what_is_printed_is_the_concept_when_it_is_handed_back(name: str, command: Command, tmp_path: Path) -> None:
    code, out, _ = command("concept", name)
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out, encoding="utf-8")
    assert find_concept(str(tmp_path / "mine.yaml")) == find_concept(name)
    found = find_concept(name)
    assert f"#   {found.forget_prompts[0]} -> {found.anchor_prompts[0]}" in out
    assert json.loads(command("concept", name, "--json")[1]) == yaml.safe_load(out)


def test_model_method_and_preset_change_it(command: Command) -> None:
    def anchor(*options: str) -> str:
        return yaml.safe_load(command("concept", "church", *options)[1])["anchor"]

    assert (anchor(), anchor("--model", "emojinette")) == ("French horn", "horn")
    told = yaml.safe_load(command("concept", "nudity", "-m", "salun", "--preset", "paper")[1])
    assert (told["templates"], told["retain"]) == (["a photo of {o}"], ["person wearing clothes"])
    several = yaml.safe_load(command("concept", "church", "nudity")[1])
    assert [part["name"] for part in several["combined"]] == ["church", "nude person"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Elon Musk"], "--concept Elon Musk: not a known concept; say what it is: object:Elon Musk, style:…"),
        (["church", "-m", "magic"], "--method magic: "),
        (["church", "--preset", "best"], "--preset best: allowed: default, paper, latest-code"),
    ],
)
def test_bad_requests_get_one_line(arguments: list[str], told: str, command: Command) -> None:
    code, out, err = command("concept", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
