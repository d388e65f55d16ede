"""Settings: checked wherever they are made, and described where they stand."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest

from erase_concept.errors import RequestError
from erase_concept.methods import METHODS
from erase_concept.settings import check_settings, described, settings, settings_of


@settings
class Base:
    """Settings of every type."""

    steps: Annotated[int, described("Steps.", ge=1, source="a paper")] = 5
    lr: Annotated[float, described("Rate.", ge=0, lt=1)] = 1e-5
    how: Annotated[Literal["fast", "slow"], described("How.")] = "fast"
    clip: Annotated[float | None, described("Clip.", gt=0)] = None


@settings
class Other(Base):
    """Other defaults."""

    steps: int = 7
    lr: Annotated[float, described(source="ours")] = 0.5
    own: Annotated[bool, described("Own.")] = False


def test_a_subclass_with_another_default_keeps_sentence_and_bounds_but_not_the_source() -> None:
    found = settings_of(Other)
    assert list(found) == ["steps", "lr", "how", "clip", "own"]
    assert (found["steps"].default, found["steps"].sentence, found["steps"].source) == (7, "Steps.", "")
    assert found["steps"].allowed == settings_of(Base)["steps"].allowed == "whole number, at least 1"
    assert (found["lr"].default, found["lr"].sentence, found["lr"].source) == (0.5, "Rate.", "ours")
    assert settings_of(Base)["steps"].source == "a paper"
    assert found["how"].allowed == "fast, slow"


@pytest.mark.parametrize("cls", [Base, Other])
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"steps": 0}, r"x\.steps 0: should be greater than or equal to 1"),
        ({"steps": 1.5}, r"x\.steps 1\.5: should be a valid integer"),
        ({"lr": 1.0}, r"x\.lr 1\.0: should be less than 1"),
        ({"lr": float("nan")}, r"x\.lr nan: should be a finite number"),
        ({"lr": "fast"}, r"x\.lr fast: should be a valid number"),
        ({"how": "soon"}, r"x\.how soon: should be 'fast' or 'slow'"),
        ({"clip": 0}, r"x\.clip 0: should be greater than 0"),
        ({"step": 1}, r"x\.step 1: no such setting; there are: steps, lr"),
    ],
)
def test_a_bad_value_is_named_in_one_line(cls: Any, values: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as raised:
        check_settings(cls, values, "x.")
    assert "\n" not in str(raised.value)


def test_a_bad_value_is_refused_however_it_comes_in() -> None:
    with pytest.raises(ValueError, match="steps"):
        Other(steps=0)
    with pytest.raises(ValueError, match="steps"):
        replace(Other(), steps=0)


@pytest.mark.parametrize("name", METHODS.all())
def test_every_setting_of_a_method_is_described(name: str) -> None:
    for setting in settings_of(METHODS.find(name).settings).values():
        assert setting.sentence.endswith("."), setting.name
        assert setting.allowed
