"""No export names a folder of the machine on which it was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.exports import EXPORT_FORMATS, export
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.run_folder import read_run


@pytest.mark.parametrize("base", ["file", "relative", "pipeline"])
def test_exports_name_no_folder(
    tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    private = tmp_path / "private"
    save_pipeline(tiny, private / "base")
    save_original(tiny, private / "base.safetensors", None, {})
    monkeypatch.chdir(private)
    model, given = (
        {"file": str(private / "base.safetensors"), "relative": "base"}.get(base, str(private / "base")),
        None,
    )
    if base == "pipeline":  # as its owner loaded it: diffusers notes where
        pipeline = load(model).pipeline()
        pipeline.unet.register_to_config(_name_or_path=str(private / "base" / "unet"))
        given = Diffusion.from_pipeline(pipeline)
    notes = [f"set up in {private}/settings.yaml"]
    for name, start in (("first", model), ("second", str(private / "first"))):
        asked = make_recipe({"model": start, "concept": square, "method": "uce", "notes": notes})
        list(iter_erase(asked, private / name, model=given if name == "first" else None))
    assert (str(private) in str(read_run(private / "second")["earlier"])) == (base != "pipeline")  # there it is needed
    out = tmp_path / "out"
    for run in ("first", "second"):
        for format in EXPORT_FORMATS[: 3 if base == "pipeline" and run == "first" else None]:  # the rest needs the base
            export(private / run, out / run / (format if format == "diffusers" else f"{format}.safetensors"), format)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if str(tmp_path).encode() in file.read_bytes()] == []
