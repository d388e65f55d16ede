"""The API reference: which modules there are, and docstrings as reStructuredText that shows them as they are.

Our docstrings are plain text with ``literals``: formulas hold stars and bars that are no markup.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

FLOORS = ("cli", "eval", "pipelines", "prompts")  # the packages beside the top one's own modules


def module_names(package: str) -> list[str]:
    """Return the modules of a package, those of its packages too; of the top package without the other floors."""
    found = importlib.import_module(package)
    names = [package]
    for module in pkgutil.iter_modules(found.__path__):
        name = f"{package}.{module.name}"
        if module.name.startswith("__") or (package == "erase_concept" and module.name in FLOORS):
            continue
        names += module_names(name) if module.ispkg else [name]
    return names


def plain_lines(lines: list[str]) -> list[str]:
    """Return a docstring's lines as reStructuredText that shows the text as it is.

    ``Literals``, lists, and blocks with an indent of four stay what they are; all else is made plain text.
    """
    found: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if block.startswith("    "):
            found += ["::", "", *block.splitlines()]
        else:
            for item in re.split(r"\n(?=[-*] )", block):
                if found and found[-1] and not found[-1].startswith("- "):
                    found.append("")
                mark = "- " if item.startswith(("- ", "* ")) else ""
                found.append(mark + _escaped(" ".join(item.removeprefix("* ").removeprefix("- ").split())))
        found.append("")
    return found


def _escaped(text: str) -> str:
    """Escape what reStructuredText would format, outside ``literals``."""
    parts = re.split(r"(``.+?``)", text)
    return "".join(part if part.startswith("``") else re.sub(r"([\\*`|_])", r"\\\1", part) for part in parts)


def settings_lines(obj: Any) -> list[str]:
    """Return a list of the fields of a class of settings; of anything else, nothing."""
    from erase_concept.settings import settings_of

    if not (inspect.isclass(obj) and hasattr(obj, "__pydantic_fields__") and hasattr(obj, "__dataclass_fields__")):
        return []
    found = [""]
    for setting in settings_of(obj).values():
        found.append(f"- ``{setting.name}`` ({_escaped(setting.allowed)}; default ``{setting.default!r}``): ")
        found[-1] += _escaped(" ".join(setting.sentence.split()))
    return [*found, ""]


def public_text() -> str:
    """Return the public names' documentation: those of ``erase_concept.__all__``."""
    import erase_concept

    lines = ["```{eval-rst}"]
    for name in sorted(set(erase_concept.__all__) - {"__version__"}, key=str.lower):
        kind = "class" if inspect.isclass(getattr(erase_concept, name)) else "function"
        lines += [f".. auto{kind}:: erase_concept.{name}", "   :no-index:", ""]
    return "\n".join([*lines, "```"])


def modules_text(package: str) -> str:
    """Return a section for each module of a package."""
    # What a package takes over from its modules is described there.
    described = "\n".join(("```{{eval-rst}}", ".. automodule:: {name}", "   :ignore-module-all:", "```"))
    return "\n\n".join(f"## {name}\n\n{described.format(name=name)}" for name in module_names(package))
