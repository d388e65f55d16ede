"""Run the scenarios of the tests of several processes: this file is run by itself, for each rank is a fork of it.

A process that forks before it has any threads pays for the imports once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from fsdp import refused, same_module, same_steps, under_fsdp

from erase_concept.classification.recipe import NOTHING, unlearn_recipe
from erase_concept.classification.run import iter_unlearn
from erase_concept.errors import EraseError, RequestError
from erase_concept.masks.make import compute_mask
from erase_concept.methods import METHODS
from erase_concept.pipelines import processes as together
from erase_concept.pipelines.load import load
from erase_concept.pipelines.processes import from_main, lost_process, processes
from erase_concept.recipe import Recipe, make_recipe
from erase_concept.run import iter_erase
from erase_concept.training.checkpoint import previous

STEPS = 4


def recipe(folder: Path, method: str = "salun", **settings: object) -> Recipe:
    """A recipe of few steps for the model in a folder, with four batches in a step where the method has batches."""
    concept = json.loads((folder / "concept.json").read_text())
    names = METHODS.find(method).settings.__dataclass_fields__
    small = {"steps": STEPS, "batch_size": 2, "accumulation": 4, "lr": 1e-3, "checkpoint_every": 2, "sampling_steps": 2}
    small |= {"fisher_rows": 2, "trim_batches": 1, **settings}
    return make_recipe(
        {
            "model": str(folder / "model"),
            "concept": concept,
            "method": method,
            "seed": 3,
            "data": {"forget": 20, "retain": 36, "steps": 2, "guidance": 2.0},
            "mask": {"kind": "salient", "batch_size": 8},
            "settings": {name: value for name, value in small.items() if name in names},
        }
    )


def spread(ranks: int, work: Callable[[], object]) -> list[int]:
    """Do some work in so many forks, which find each other, and return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            if ranks > 1:
                os.environ.update(there, WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(_ended(rank, work))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _ended(rank: int, work: Callable[[], object]) -> int:
    """Do a rank's work, say what went wrong, and return the code that the rank ends with."""
    try:
        work()
    except (RequestError, EraseError) as problem:
        _say(f"rank {rank}: {problem}")
        return 2
    except Exception as problem:
        if lost_process(problem):
            _say(f"rank {rank}: lost")
            return 1
        traceback.print_exc()
        return 3
    return 0


def _say(line: str) -> None:
    # At once with its end: where Python does not buffer, it writes the end by itself, and another rank may be between.
    print(f"{line}\n", end="", flush=True)


def erased(
    asked: Recipe, out: Path, *, killed: int | str | None = None, by: signal.Signals = signal.SIGKILL
) -> Callable[[], None]:
    """Return work that follows a recipe; the second rank gets a signal at a stage, or after a step, where one is named.

    ``by`` is the signal.
    """
    return lambda: _signalled(iter_erase(asked, out), killed, by)


def _signalled(events: Iterable[object], killed: int | str | None, by: signal.Signals) -> None:
    for event in events:
        here = killed is not None and killed in (event, getattr(event, "step", None))
        if here and processes().process_index == 1:
            os.kill(os.getpid(), by)


def differing(asked: Recipe, out: Path, what: str) -> Callable[[], None]:
    """Return work that follows a recipe, where the second rank has another base model, or another version of torch."""

    def work() -> None:
        model = load(asked.model)
        if os.environ["RANK"] == "1":
            if what == "model":
                with torch.no_grad():
                    model.unet.conv_out.bias[0] += 1
            else:
                together.version = lambda _: "1.0"
        deque(iter_erase(asked, out, model=model), maxlen=0)

    return work


def masked(asked: Recipe, file: Path) -> Callable[[], None]:
    """Return work that makes a mask alone, as the command does."""

    def work() -> None:
        made = compute_mask(asked)
        from_main(lambda: made.save(file))

    return work


def unlearned(
    folder: Path, out: Path, forget: str = "random:10%", *, told: int | None = None, **settings: object
) -> Callable[[], None]:
    """Return work that unlearns some of a classifier's images, or trains it first.

    After the step ``told``, where there is one, SIGTERM tells the second rank to end.
    """
    start = "resnet18-cifar[width=2,stride=2]" if forget == NOTHING else str(folder / "classifier")
    method = "retrain" if forget == NOTHING else "salun"
    data = {"source": f"folder:{folder / 'images'}", "size": 8}
    small = {"epochs": 2, "batch_size": 20, "lr": 0.01, "checkpoint_every": 1}
    asked = unlearn_recipe(start, data, forget, method=method, settings={**small, **settings})
    return lambda: _signalled(iter_unlearn(asked, out), told, signal.SIGTERM)


def in_shards(folder: Path, asked: Recipe) -> Iterator[tuple[str, list[int]]]:
    """Yield the scenarios of FSDP2: all parts by themselves, a run, and its second half once more, with and without."""
    yield "same-steps", spread(2, same_steps)
    yield "refused", spread(2, under_fsdp(refused))
    yield "same-module", spread(2, under_fsdp(lambda: same_module(folder / "model")))
    yield "fsdp", spread(2, under_fsdp(erased(asked, folder / "fsdp")))
    for name in ("fsdp-half", "ddp-half"):
        shutil.copytree(folder / "fsdp", folder / name, ignore=shutil.ignore_patterns("run.json", "pipeline"))
        last = folder / name / "checkpoints" / "last.safetensors"
        previous(last).replace(last)
    yield "fsdp-half", spread(2, under_fsdp(erased(asked, folder / "fsdp-half")))
    yield "ddp-half", spread(2, erased(asked, folder / "ddp-half"))


def scenarios(folder: Path, methods: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each scenario's name and how its ranks ended."""
    asked = recipe(folder)
    assert asked.concept.forget_prompts  # imports what every fork would import by itself
    for name, ranks in (("one", 1), ("two", 2), ("four", 4)):
        yield name, spread(ranks, erased(asked, folder / name))
    yield "mask", spread(2, masked(asked, folder / "mask.safetensors"))
    yield "uneven", spread(2, erased(recipe(folder, accumulation=3), folder / "uneven"))
    for what in ("model", "versions"):
        yield f"other-{what}", spread(2, differing(asked, folder / f"other-{what}", what))
    yield "killed", spread(2, erased(asked, folder / "killed", killed=3))
    yield "other", spread(1, erased(asked, folder / "killed"))
    yield "told", spread(2, erased(asked, folder / "told", killed=3, by=signal.SIGTERM))
    yield "stopped", spread(2, erased(asked, folder / "stopped", killed="erase"))
    yield "alone", spread(1, erased(asked, folder / "stopped"))
    yield "resumed", spread(2, erased(asked, folder / "killed"))
    yield from in_shards(folder, asked)
    for method in methods:
        for ranks in (1, 2):
            yield f"{method}-{ranks}", spread(ranks, erased(recipe(folder, method), folder / f"{method}-{ranks}"))
    yield "classifier", spread(1, unlearned(folder, folder / "classifier", NOTHING))
    shares = {"accumulation": 4, "batch_norm": "frozen"}
    for ranks in (1, 2):
        yield f"unlearned-{ranks}", spread(ranks, unlearned(folder, folder / f"unlearned-{ranks}", **shares))
    yield "unlearned-told", spread(2, unlearned(folder, folder / "unlearned-told", told=1, **shares))
    yield "unlearned-on", spread(2, unlearned(folder, folder / "unlearned-told", **shares))


if __name__ == "__main__":
    for scenario, ended in scenarios(Path(sys.argv[1]), sys.argv[2:]):
        print(json.dumps([scenario, ended]), flush=True)
