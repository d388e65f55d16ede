"""Commands in forked children with faults, a small world for each command, and what a folder holds at the end."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.model import Diffusion

if not hasattr(os, "fork"):  # Windows
    collect_ignore_glob = ["test_*.py"]

FULL = os.environ.get("FAULTS") == "full"
CONCEPT = "name: square\nkind: object\nanchor: circle\ntemplates: ['a {O}']\nretain: [circle, line]\n"
PROMPTS = "prompt,seed,class\n" + "".join(
    f"{words},{seed},{label}\n"
    for seed, (words, label) in enumerate(
        [("the square", "square"), ("a circle", "circle"), ("one line", "line"), ("my square", "square"), ("a dot", "")]
    )
)
BENCHMARK = """
prompts: p.csv
judges: ["torchscript:judge.pt", nudenet]
metrics: [ua, ira, pixel_distance]
settings: {steps: 2}
"""
DATA = ("-s", "data.forget=3", "-s", "data.retain=2", "-s", "data.steps=2", "-s", "batch_size=2")
ERASE = ("erase", "model", "-c", "square.yaml", "-m", "salun", *DATA, "-s", "lr=1e-3", "-o", "run")
STEPS = ("-s", "steps=4", "-s", "checkpoint_every=2")
IMAGES = ("--data", "fashion-mnist:images", "--preset", "small", "-s", "epochs=1", "-s", "batch_size=20")
FEW = ("-s", "data.train=80", "-s", "data.test=40")
TRAIN = ("train", "resnet18-cifar[width=2,stride=2]", *IMAGES, *FEW, "-s", "checkpoint_every=2", "-o", "original")
FORGET = ("unlearn", "original", *IMAGES, "--forget", "random:25%", "--sparsity", "0.5", "-s", "checkpoint_every=2")
METHOD = f"esd-x[{','.join(one for one in (*DATA, '-s', 'steps=2') if one != '-s')}]"


@dataclass(frozen=True)
class Stage:
    """A command, and those that have to be run before it."""

    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    once: str = ""  # what says that the command was done, where it cannot be done twice


_RUN = (*ERASE, *STEPS)
_EVAL = ("eval", "run", "-b", "own.yaml", "--batch-size", "2", "-o", "run")
STAGES = {
    "erase": Stage(_RUN),
    "mask": Stage(("mask", "model", "-c", "square.yaml", *DATA[:6], "-o", "mask.safetensors")),
    "sample": Stage(("sample", "model", "-p", "p.csv", "--steps", "2", "--batch-size", "2", "-o", "sampled")),
    "eval": Stage(_EVAL, (_RUN,)),
    "compare": Stage(
        (
            *("compare", "--model", "model", "-b", "own.yaml", "--methods", METHOD, "--concepts", "square.yaml"),
            *("--seeds", "0", "--masks", "none,random", "-o", "compared"),
        )
    ),
    "train": Stage(TRAIN),
    "unlearn": Stage((*FORGET, "-o", "unlearned"), (TRAIN,)),
    "eval-classifier": Stage(("eval-classifier", "unlearned", "-o", "report"), (TRAIN, (*FORGET, "-o", "unlearned"))),
} | {
    f"export {name}": Stage(("export", "run", "-f", name, "-o", out), (_RUN,), out)
    for name, out in (
        ("diffusers", "exported"),
        ("unet", "unet.safetensors"),
        ("single-file", "single.safetensors"),
        ("lora", "lora.safetensors"),
        ("delta", "delta.safetensors"),
    )
}


@dataclass
class Ended:
    """How a child ended: exit code, or minus the signal; or that it stopped itself."""

    code: int = 0
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    operations: dict[str, int] = field(default_factory=dict)
    stopped: int = 0

    @property
    def lines(self) -> list[str]:
        """The lines on stderr that are ours."""
        return [line for line in self.err.splitlines() if line.startswith("erase-concept: ")]


@dataclass
class World:
    """A working folder, always of the same path, and the process that runs commands in it."""

    folder: Path
    told: Path
    bases: dict[str, Path]
    server: subprocess.Popen[str]
    begun: int = 0
    stages: Mapping[str, Stage] = field(default_factory=lambda: STAGES)

    def run(self, *command: str, **fault: Any) -> Ended:
        """Run a command with a fault: harm at an operation, killed after seconds, or with a largest size of files."""
        self.begun += 1
        told = self.told / str(self.begun)
        told.mkdir()
        return self._ask({"command": command, "folder": str(self.folder), "told": str(told), **fault})

    def go_on(self, child: int) -> Ended:
        """Let a stopped child go on to its end."""
        return self._ask({"go_on": child})

    def _ask(self, asked: dict[str, Any]) -> Ended:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return Ended(**json.loads(self.server.stdout.readline()))

    def begin(self, name: str) -> Stage:
        """Empty the folder, and fill it with what a stage needs."""
        stage = STAGES[name]
        key = json.dumps(stage.before)
        if key not in self.bases:
            self._copy(self.bases["[]"], self.folder)
            for command in stage.before:
                ended = self.run(*command)
                assert ended.code == 0, ended.err
            self.bases[key] = self.told / f"base-{len(self.bases)}"
            self._copy(self.folder, self.bases[key])
        self._copy(self.bases[key], self.folder)
        return stage

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)  # a mounted disk is emptied
        shutil.copytree(source, target, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def world(new_model: Callable[..., Diffusion], tokenizer: CLIPTokenizer) -> Iterator[World]:
    # Not pytest's own folder, which nobody but its owner may enter: one test is not root.
    with tempfile.TemporaryDirectory() as there:
        place = Path(there)
        place.chmod(0o755)
        (place / "told").mkdir()
        base = place / "told" / "base"
        base.mkdir()
        save_pipeline(new_model(tokenizer), base / "model")
        (base / "square.yaml").write_text(CONCEPT)
        (base / "p.csv").write_text(PROMPTS)
        (base / "own.yaml").write_text(BENCHMARK)
        _write_judge(base / "judge.pt")
        _write_images(base / "images")
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as server:
            yield World(place / "work", place / "told", {"[]": base}, server)
            assert server.stdin is not None
            server.stdin.close()


class _Judge(torch.nn.Module):
    """Takes images for one of three classes by the brightest channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 9 * images.mean((2, 3))


def _write_judge(file: Path) -> None:
    torch.jit.save(torch.jit.trace(_Judge(), torch.rand(1, 3, 16, 16)), file)
    file.with_suffix(".txt").write_text("square\ncircle\nline\n")


def _write_images(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 50)):
        pixels, labels = generator.integers(0, 256, (count, 8, 8)), np.arange(count) % 10
        for name, array in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            with gzip.open(folder / f"{name}-ubyte.gz", "wb", compresslevel=1) as stream:
                sizes = np.array(array.shape, ">i4").tobytes()
                stream.write(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


# What says how long something took, when it was, or how often it was begun.
_TIMES = ("seconds", "trial_seconds", "peak_gib", "evaluated", "resumed_at_step", "sampled", "modelspec.date")
_PAGES = (".html", ".svg", ".md")  # their numbers are those of the JSON beside them


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        if "autov2" in value:  # an export's, whose hash is also that of the order of its metadata
            value = value | {"autov2": "", "sha256": ""}
        return {key: _without_times(one) for key, one in value.items() if key not in _TIMES}
    if isinstance(value, list):
        value = [_without_times(one) for one in value if not (isinstance(one, dict) and one.get("metric") in _TIMES)]
        # An export is noted again when it was killed just before it got its name.
        return [one for place, one in enumerate(value) if "autov2" not in str(one) or one not in value[:place]]
    return value


def _digest(file: Path) -> str:
    if file.suffix in _PAGES:
        return "there"
    content = file.read_bytes()
    if file.suffix == ".json":
        content = json.dumps(_without_times(json.loads(content))).encode()
    elif file.name.endswith((".safetensors", ".safetensors.previous")):
        size = 8 + int.from_bytes(content[:8], "little")
        # The library writes the metadata in any order.
        content = json.dumps(_without_times(json.loads(content[8:size])), sort_keys=True).encode() + content[size:]
    elif file.suffix == ".jsonl":
        content = json.dumps([_without_times(line) for line in _lines(content)]).encode()
    return sha256(content).hexdigest()


def _lines(content: bytes) -> Iterator[Any]:
    """Yield the lines of a file; one that a kill cut short counts for nothing."""
    for line in content.splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Return a function that gives the hash of every file of a folder, without the times in them."""

    def read(folder: Path) -> dict[str, str]:
        # A lock that nobody holds is an empty file, which a kill may leave.
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
        return {file.relative_to(folder).as_posix(): _digest(file) for file in files}

    return read


@pytest.fixture(scope="session")
def whole(world: World, contents: Callable[[Path], dict[str, str]]) -> Callable[[str], tuple[dict[str, str], Ended]]:
    """Return a function that gives what a stage makes when nothing goes wrong, and how its command ended."""
    known: dict[str, tuple[dict[str, str], Ended]] = {}

    def of(name: str) -> tuple[dict[str, str], Ended]:
        if name not in known:
            stage = world.begin(name)
            ended = world.run(*stage.command)
            assert ended.code == 0, ended.err
            known[name] = contents(world.folder), ended
        return known[name]

    return of


@pytest.fixture(scope="session")
def stages() -> Sequence[str]:
    """The names of all stages."""
    return tuple(STAGES)


_kills: dict[str, int] = {}


@pytest.fixture(scope="session")
def kills() -> dict[str, int]:
    """How often each stage was killed."""
    return _kills


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether every operation is tried, and not only a few of them."""
    return FULL


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _kills:
        told = ", ".join(f"{name} {count}" for name, count in _kills.items())
        terminalreporter.write_line(f"faults: {sum(_kills.values())} kills ({told})")
