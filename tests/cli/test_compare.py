"""``compare``: what it refuses before anything is erased."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
WRONG = {
    "seeds": (["--seeds", "0,x"], "--seeds 0,x: must be whole numbers of at least 0"),
    "multipliers": (["--multipliers", "-1"], "--multipliers -1: must be numbers of at least 0"),
    "method": (["--methods", "esd"], "esd"),
    "setting": (["--methods", "esd-x[etta=1]"], "etta"),
    "concept": (["--concepts", "chruch"], "--concept chruch: unknown concept"),
    "tuned on": (["--concepts", "church", "--tune", "church"], "--tune church: is compared on too"),
    "mask": (["--masks", "absent.safetensors"], "--masks absent.safetensors: not a readable mask"),
    "benchmark": (["--benchmark", "y"], "--benchmark y: unknown benchmark"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_get_one_line_and_2(
    case: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, problem = WRONG[case]
    methods = [] if "--methods" in arguments else ["--methods", "esd-x"]
    code, out, err = command("compare", *methods, *arguments, "-o", "x")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert problem in err
    assert not list(tmp_path.iterdir())
