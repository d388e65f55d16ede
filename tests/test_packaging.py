"""The package as it is installed: every folder, every file, one import name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import erase_concept

if sys.version_info >= (3, 11):
    import tomllib
else:
    import pip._vendor.tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"erase": "", "pipelines": "pipelines", "eval": "eval", "prompts": "prompts"}


def test_packages_are_the_folders() -> None:
    """A folder with an __init__.py that is not listed would import here and be missing from the wheel."""
    found = {}
    for top, name in FOLDERS.items():
        for init in (ROOT / top).rglob("__init__.py"):
            parts = [part for part in (name, *init.parent.relative_to(ROOT / top).parts) if part]
            found[".".join(("erase_concept", *parts))] = init.parent.relative_to(ROOT).as_posix()
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(found)
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    for package, folder in found.items():
        parent = next(p for p in (package, *parents(package)) if p in mapping)
        rest = package.removeprefix(parent).strip(".").replace(".", "/")
        assert "/".join(part for part in (mapping[parent], rest) if part) == folder


def parents(package: str) -> list[str]:
    """The packages above one, nearest first."""
    parts = package.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def test_the_installed_package_is_the_one_under_test() -> None:
    site = os.environ.get("WHEEL_SITE")
    home = Path(erase_concept.__file__).resolve().parent
    assert home == (Path(site).resolve() / "erase_concept" if site else ROOT / "erase")


def test_every_data_file_is_installed() -> None:
    import erase_concept.eval
    import erase_concept.pipelines.emojinette

    packages = {"erase": erase_concept, "eval": erase_concept.eval, "pipelines": erase_concept.pipelines}
    for top, package in packages.items():
        here = Path(package.__file__).parent
        for file in (ROOT / top).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                assert (here / file.relative_to(ROOT / top)).is_file(), file


def _names(requirements: list[str]) -> set[str]:
    """The names of packages in requirements, as the index spells them."""
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def _imported(*, needed: bool) -> set[str]:
    """The packages that our modules import; with ``needed`` those alone without which a line cannot run.

    An import that answers its ImportError itself is not needed.
    """
    found: set[str] = set()
    for file in (file for top in FOLDERS for file in (ROOT / top).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
        answered = {
            id(inner)
            for node in tries
            if any("ImportError" in ast.dump(handler) for handler in node.handlers)
            for line in node.body
            for inner in ast.walk(line)
        }
        for node in ast.walk(tree):
            if needed and id(node) in answered:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    owners = packages_distributions()
    return _names([owners.get(name, [name])[0] for name in found - sys.stdlib_module_names - {"erase_concept"}])


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    """But for the extras of the tests and of the documentation, which the package never imports."""
    project = PROJECT["project"]
    optional, ours = project["optional-dependencies"], ("dev", "docs", "fuzz")
    extras = [values for name, values in optional.items() if name not in ours]
    declared = _names(project["dependencies"]).union(*map(_names, extras))
    read = {"nudenet", "open-clip-torch"}  # of which weights and vocabulary are used, and no code
    assert declared - read - _imported(needed=False) == set(), "declared and never imported"
    assert _imported(needed=True) - declared == set(), "imported and not declared"


def test_no_other_extra_brings_the_agpl() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name for name, values in extras.items() if "nudenet" in _names(values)} == {"nudenet"}
    assert "nudenet" not in _names(PROJECT["project"]["dependencies"])


def test_version_is_told_once() -> None:
    assert erase_concept.__version__ == PROJECT["project"]["version"] == version("erase-concept")


def test_public_names_exist_and_are_documented() -> None:
    for name in erase_concept.__all__:
        value = getattr(erase_concept, name)
        assert name == "__version__" or value.__doc__
    assert set(erase_concept.__all__) <= set(dir(erase_concept))


def test_import_and_help_load_no_torch() -> None:
    code = (
        "import sys, erase_concept, erase_concept.cli; print(sorted({'torch', 'diffusers', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shipped_model_is_small_enough() -> None:
    home = ROOT / "pipelines" / "emojinette"
    files = [
        file for file in home.rglob("*") if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts
    ]
    assert sum(file.stat().st_size for file in files) <= 20e6
