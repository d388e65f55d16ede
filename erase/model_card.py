"""The model card of an erased pipeline: what was erased, how, and with what result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase_concept.errors import one_line
from erase_concept.exports import public_recipe
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.delta import Delta
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.prompts.concept import in_words


def write_card(run: Path, run_info: dict[str, Any], scores: Sequence[dict[str, Any]] = ()) -> None:
    """Write ``pipeline/README.md`` of a run from its run_info, with scores as they stand in a report, if any."""
    text = card(run_info, (run / "recipe.yaml").read_text(encoding="utf-8"), scores)
    with atomic_write(run / "pipeline" / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def card(run_info: dict[str, Any], recipe: str, scores: Sequence[dict[str, Any]]) -> str:
    """Return the card's Markdown from a run's run_info, its recipe in YAML, and the scores of its report."""
    checks, mask = run_info["checks"], run_info["mask"]
    if mask is None:
        masked = "No mask: every weight was free to change."
    else:
        which = "scope of the method" if mask["kind"] == "none" else f"{_plain(model_name(mask['kind']))} mask"
        masked = (
            f"Only the {100 * mask['density']:.3g} % of the weights in the {which} were free to change "
            f"(mask SHA-256 {_code(mask['sha256'][:16])}); {checks['changed_outside_mask']} weights outside it differ."
        )
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-erasure, machine-unlearning]
---
# {_base(run_info)} without {_plain(run_info["concept"])}

{_erased(run_info)} {_parts(run_info)}
{checks["weights"]:,} weights {checks["changed"]:,} changed. {masked}{_earlier(run_info)}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
```

## Result

{_result(scores)}

## Provenance

| | |
|---|---|
| base | {_base(run_info)} |
{_loaded(run_info["base"])}| base UNet, SHA-256 | {_code(run_info["base"]["unet"])} |
{_hashes(run_info["erased"])}{_files(run_info)}| seed | {_plain(str(run_info["seed"]))} |
| versions | {_plain(", ".join(f"{name} {number}" for name, number in run_info["versions"].items()))} |

```yaml
{public_recipe(recipe).rstrip().replace("```", "` ` `")}
```
"""


def delta_card(delta: Delta, model: str, *, revert: bool, transfer: bool) -> str:
    """Return the Markdown of the card of a model that a delta was applied to, from what the delta says of itself."""
    source, concept = _plain(model_name(model)), _plain(delta.about.get("concept", "a concept"))
    title = f"{source}, {concept} given back" if revert else f"{source} without {concept}"
    method = f" with {_code(delta.about['method'])} of erase-concept" if "method" in delta.about else ""
    way = "took the steps of that erasing back" if revert else "made the same steps, float by float,"
    if transfer:
        result = (
            "**Transferred:** the delta was made for another model of the same shapes. Each weight moved by as many "
            "floats as there. Whether the concept is gone, and what else, is not known before it is measured."
        )
    else:
        which = "base model" if revert else "erased model"
        result = f"Checked bit for bit: the UNet is the {which} that the delta was made from."
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-erasure, machine-unlearning]
---
# {title}

*{concept}* was erased{method} from the model that the delta names as its base. `erase-concept apply` {way} in the UNet
of {source}; VAE, text encoder, tokenizer and scheduler are its own.

{result}

## Provenance

| | |
|---|---|
| model | {source} |
| delta | {_plain(delta.file.name)} |
| reverted | {"yes" if revert else "no"} |
| transferred | {"yes" if transfer else "no"} |
| the delta's base UNet, SHA-256 | {_code(delta.base)} |
| the delta's erased UNet, SHA-256 | {_code(delta.erased)} |
"""


def _parts(run_info: dict[str, Any]) -> str:
    """Say which parts are the base model's, and begin the sentence on the part that was changed."""
    if "text_encoder" in run_info["erased"]:
        return "UNet, VAE, tokenizer and scheduler are the base model's; of the text encoder's"
    return "VAE, text encoder, tokenizer and scheduler are the base model's; of the UNet's"


def _hashes(erased: dict[str, str]) -> str:
    """Return the table's lines with the hashes of the erased parts."""
    words = {"unet": "UNet", "text_encoder": "text encoder"}
    return "".join(f"| erased {words[part]}, SHA-256 | {_code(sha256)} |\n" for part, sha256 in erased.items())


def _base(run_info: dict[str, Any]) -> str:
    return _plain(model_name(run_info["base"]["source"]))


def _files(run_info: dict[str, Any]) -> str:
    """Return the table's lines with the hashes of the files; AutoV2 is what model managers show of one."""
    files = run_info.get("files", {}).items()
    return "".join(
        f"| {_plain(name)}, SHA-256 (AutoV2 {_code(value[:10])}) | {_code(value)} |\n" for name, value in files
    )


def _erased(run_info: dict[str, Any]) -> str:
    """Say what was erased, by which method, and what its prompts were remapped to."""
    how = f"erased from this model with {_code(run_info['method'])} of erase-concept"
    if "parts" not in run_info:
        what = f"The {_plain(run_info['kind'])} *{_plain(run_info['concept'])}* was {how}"
        return f"{what}: its prompts were remapped to {_anchor(run_info)}."
    parts = [f"the {_plain(p['kind'])} *{_plain(p['concept'])}* (remapped to {_anchor(p)})" for p in run_info["parts"]]
    return f"These concepts were {how}, all at once: {in_words(parts)}."


def _earlier(run_info: dict[str, Any]) -> str:
    """Say what earlier runs erased, and from which model."""
    runs = [
        f"*{_plain(run['concept']['name'])}* (from {_plain(model_name(run['base']))})"
        for run in run_info.get("earlier", ())
    ]
    if not runs:
        return ""
    return f"\n\nEarlier runs erased from the base model, one after the other: {'; '.join(runs)}."


def _anchor(part: dict[str, Any]) -> str:
    return f"*{_plain(part['anchor'])}*" if part["anchor"] else "the empty prompt"


def _result(scores: Sequence[dict[str, Any]]) -> str:
    if not scores:
        return "Not measured yet: `erase-concept eval RUN --out RUN` measures this model and its base."
    lines = ["| metric | base | this model | 95 % interval | n | protocol |", "|---|---|---|---|---|---|"]
    for score in scores:
        base = "" if score["baseline"] is None else f"{score['baseline']:.3f}"
        low, high = score["ci95"]
        value = f"{score['value']:.3f} | {low:.3f} to {high:.3f} | {score['n']}"
        what = _plain(f"{score['metric']}, {score['target']}" if score["metric"] == "ua" else score["metric"])
        lines.append(f"| {what} | {base} | {value} | {_plain(score['protocol'])} |")
    return "\n".join(lines)


def _loaded(base: dict[str, str]) -> str:
    """Return the table's line on what the base model is; the first runs do not say."""
    words = {"family": "", "prediction_type": "prediction type ", "dtype": "weights in "}
    words_of_base = ", ".join(word + base[key] for key, word in words.items() if base.get(key))
    return f"| base, loaded as | {_plain(words_of_base)} |\n" if words_of_base else ""


def _plain(text: str) -> str:
    """Keep names from outside from being read as Markdown or HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#~&" else c for c in one_line(text))
    return re.sub(r"://|www\.|@", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", escaped, flags=re.IGNORECASE)


def _code(text: object) -> str:
    """Return a text as Markdown's code, whatever it holds."""
    shown = one_line(str(text)).translate({ord("`"): "'", ord("|"): "/"})
    return f"`{shown}`"
