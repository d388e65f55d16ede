"""``mask-info``: what is in mask files."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, examples
from erase_concept.cli.terminal import print_json, print_table

EXAMPLES = examples(
    "erase-concept mask-info runs/church/mask.safetensors",
    "erase-concept mask-info runs/church/mask.safetensors runs/dog/mask.safetensors",
)


def mask_info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Mask files.")], json_: JsonOption = False
) -> None:
    """Describe masks: density by kind of layer, origin, and the overlap of several."""
    from erase_concept.masks.mask import Mask, describe

    masks = {str(file): Mask.load(file, setting="file") for file in files}
    overlaps = {(a, b): masks[a].overlap(masks[b]) for a, b in combinations(masks, 2)}
    if json_:
        listed = [{"masks": pair, "jaccard": share} for pair, share in overlaps.items()]
        print_json({"masks": {file: describe(m) for file, m in masks.items()}, "overlaps": listed})
        return
    for file, m in masks.items():
        about = describe(m)
        rows = [[kind, f"{share:.1%}"] for kind, share in about["kinds"].items()]
        rows.append(["all", f"{m.density:.1%} ({m.count:,} of {m.total:,})"])
        rows += [[key, value] for key, value in m.provenance.items()]
        print_table(file, ["", ""], rows)
    if overlaps:
        pairs = [[f"{a} and {b}", f"{share:.3f}"] for (a, b), share in overlaps.items()]
        print_table("overlap", ["masks", "Jaccard"], pairs)
