"""Check the code's shape: sizes, import circles, and words that belong to some files alone. Run by ``make lint``.

A comment ``# shape: REASON`` on a function's first line, or on one of a file's first lines, allows it to be larger.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
# The words of one model family: other files ask the family.
FAMILY_WORDS = ("text_encoder_2", "attn2", "alphas_cumprod", "addition_embed_type")
REASON = re.compile(r"# shape: \S+ \S+")
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def modules() -> dict[str, Path]:
    """Return the product's files by the names under which they are imported."""
    found = {}
    for folder, package in (("erase", ""), ("pipelines", ".pipelines"), ("eval", ".eval"), ("prompts", ".prompts")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in file.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([f"erase_concept{package}", *parts])] = file
    return found


def sizes(file: Path, text: str, tree: ast.Module) -> Iterator[str]:
    """Yield what is too large."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES and not any(map(REASON.search, lines[:5])):
        yield f"{len(lines)} lines, more than {FILE_LINES}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or REASON.search(lines[node.lineno - 1]):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{node.name} has {length} lines, more than {FUNCTION_LINES}"
        count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        if count > PARAMETERS and "cli" not in file.parts:
            yield f"{node.name} has {count} parameters, more than {PARAMETERS}"


def words(file: Path, text: str, tree: ast.Module, builtin: list[str]) -> Iterator[str]:
    """Yield the words that do not belong into the file."""
    for name in builtin:
        if name in text.lower() and name not in str(file):
            yield f"names the built-in model {name}"
    if "families" not in file.parts:
        yield from (f"holds {word}, which only model families know" for word in FAMILY_WORDS if word in text)
    for node in ast.walk(tree) if "cli" not in file.parts else ():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("RequestError", "EraseError"):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(isinstance(text, str) and FLAG.search(text) for text in texts):
                yield f"line {node.lineno}: an error holds a flag of the command; say the setting"


def imports(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Return the modules of the product that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known.keys()) or {node.module}
    return found & known.keys()


def faults() -> Iterator[str]:
    """Yield every fault, with its file."""
    known = modules()
    builtin = [file.parent.name for file in (ROOT / "pipelines").glob("*/builtin.yaml")]
    edges = {}
    for module, file in known.items():
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        edges[module] = imports(tree, known) - {module}
        place = file.relative_to(ROOT)
        yield from (f"{place}: {fault}" for fault in (*sizes(place, text, tree), *words(place, text, tree, builtin)))
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as problem:
        yield f"import circle: {' -> '.join(problem.args[1])}"


if __name__ == "__main__":
    sys.exit("\n".join(faults()) or 0)
