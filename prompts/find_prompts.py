"""From the name of a prompt set to its prompts."""

from __future__ import annotations

from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalogs
from erase_concept.prompts.hub import HUB, hub_prompts
from erase_concept.prompts.label_grid import catalog_prompts
from erase_concept.prompts.promptset import PromptSet, read_prompts

_FOLDER = Path(__file__).parent


def prompt_sets() -> dict[str, PromptSet]:
    """Return the built-in prompt sets by name: those of the catalogues' labels, and the CSV files of this folder."""
    labelled = [catalog for catalog in catalogs().values() if catalog.objects and catalog.styles]
    made = (catalog_prompts(catalog, range(1), unseen=unseen) for catalog in labelled for unseen in (False, True))
    return {found.name: found for found in (*made, *map(read_prompts, sorted(_FOLDER.glob("*.csv"))))}


def find_prompts(name: str, *, limit: int | None = None) -> PromptSet:
    """Return a prompt set by its built-in name, by the path of its CSV file, or from the hub, ``hub:OWNER/NAME:SPLIT``.

    ``limit`` takes the first rows and reads no further. Raises RequestError when there is no such set, or it is bad.
    """
    if name.startswith(HUB):
        return hub_prompts(name, limit)
    known = prompt_sets()
    if name in known:
        rows = known[name].rows[:limit]
        return PromptSet(name, rows, "" if limit is None else f"the first {len(rows):,} prompts")
    if not Path(name).exists():
        allowed = f"no such file, and no built-in prompt set; allowed: {', '.join(known)}, or {HUB}OWNER/NAME"
        raise RequestError("prompts", name, allowed)
    return read_prompts(Path(name), limit=limit)
