"""Find a prompt set by what a person types."""

from __future__ import annotations

from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.files import is_there
from erase_concept.prompts.catalog import catalogs
from erase_concept.prompts.hub import HUB, hub_prompts
from erase_concept.prompts.label_grid import catalog_prompts
from erase_concept.prompts.promptset import PromptSet, read_prompts

_FOLDER = Path(__file__).parent


def prompt_sets() -> dict[str, PromptSet]:
    """Return the built-in prompt sets by name: those made from the catalogues' labels, and this folder's CSV files."""
    labelled = [catalog for catalog in catalogs().values() if catalog.objects and catalog.styles]
    made = (catalog_prompts(catalog, range(1), unseen=unseen) for catalog in labelled for unseen in (False, True))
    return {found.name: found for found in (*made, *map(read_prompts, sorted(_FOLDER.glob("*.csv"))))}


def find_prompts(name: str, *, limit: int | None = None) -> PromptSet:
    """Return a prompt set by its built-in name, by the path of a CSV file, or from the hub by ``hub:OWNER/NAME:SPLIT``.

    With ``limit``, only the first rows are read. Raises RequestError when there is no such set or it cannot be read.
    """
    if name.startswith(HUB):
        return hub_prompts(name, limit)
    known = prompt_sets()
    if name in known:
        rows = known[name].rows[:limit]
        return PromptSet(name, rows, "" if limit is None else f"the first {len(rows):,} prompts")
    if not is_there(name):
        allowed = (
            f"no such file and no such built-in prompt set; allowed: {', '.join(known)}, a CSV file, or {HUB}OWNER/NAME"
        )
        raise RequestError("prompts", name, allowed)
    return read_prompts(Path(name), limit=limit)
