"""Prompts to images: one random generator per image, so neither batch size nor resuming changes its noise.

A folder of images has a line for each in ``manifest.jsonl``. Images made elsewhere have none: ``match_images`` finds
out which prompt each was made from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.read_single_file import out_of_memory
from erase_concept.pipelines.guards.guard import AppliedGuard, classifier_free
from erase_concept.pipelines.load import silence_hub_logs
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.processes import processes
from erase_concept.prompts.promptset import PromptRow, PromptSet

STEPS = 25
GUIDANCE = 7.5
SAMPLER = "DPM-Solver++ 2M"  # where no scheduler is named
# What diffusers counts as fit for Stable Diffusion, and the two of its distilled models. One draws its noise for a
# whole batch at once, so an image would depend on the others; one has a schedule of its own, not that of the model.
SCHEDULERS = tuple(
    sorted(
        {scheduler.name for scheduler in KarrasDiffusionSchedulers} - {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
        | {"LCMScheduler", "TCDScheduler"}
    )
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# 00012.png, 12_0.png (the first image of case 12), case_12.png: a case number alone, and no other program's counter.
_CASE = re.compile(r"(?:case[_-]?)?([0-9]{1,18})(?:_([0-9]{1,9}))?", re.IGNORECASE)


@dataclass(frozen=True)
class ImageSet:
    """Images on disk with the rows they were made from; ``settings`` say how, ``notes`` what is odd about them."""

    files: tuple[Path, ...]
    rows: tuple[PromptRow, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def arrays(self) -> np.ndarray:
        """Return the images as uint8 [n, h, w, 3]; raises RequestError when they are not all of one size."""
        found = [np.asarray(Image.open(file).convert("RGB")) for file in self.files]
        if len(sizes := sorted({f"{image.shape[1]} x {image.shape[0]}" for image in found})) > 1:
            raise RequestError("DIR", self.files[0].parent, f"its images are of several sizes: {_some(sizes)}")
        return np.stack(found)


def make_scheduler(model: Diffusion, name: str | None, steps: int) -> Any:
    """Return one of diffusers' schedulers for the model's noise schedule, ready for so many steps.

    ``None`` is DPM-Solver++ (arXiv 2211.01095) of second order. Raises RequestError when there is none of that name,
    when it lacks a package, or when it cannot go that many steps.
    """
    if name is not None and name not in SCHEDULERS:
        raise RequestError("--scheduler", name, f"allowed: {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, name or "DPMSolverMultistepScheduler")
    options = {} if name else {"algorithm_type": "dpmsolver++"}
    try:
        with silence_hub_logs():
            scheduler = kind.from_config(model.scheduler.config, **options)
            scheduler.set_timesteps(steps)
    except ImportError as problem:
        raise RequestError("--scheduler", str(name), str(problem)) from None
    except ValueError as problem:
        raise RequestError("--scheduler", name or SAMPLER, f"cannot go {steps} steps: {problem}") from None
    return scheduler


@torch.no_grad()
def sample_latents(
    model: Diffusion,
    embeddings: Tensor,
    empty: Tensor,
    seeds: Sequence[int],
    guidance: Sequence[float],
    *,
    steps: int = STEPS,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    guard: AppliedGuard | None = None,
    stop: int | None = None,
) -> Tensor:
    """Sample scaled latents [n, 4, h/f, w/f], one seed and guidance scale each, with a scheduler of ``SCHEDULERS``.

    ``embeddings`` [n, tokens, width] and ``empty`` [1, tokens, width] are prompts, the former as ``guard`` encodes
    them. The noise of an image, be it at the start or, with some schedulers, in every step, depends on its own seed
    alone. Sizes in pixels default to the model's. ``stop`` ends the way before the time step of that place, with
    latents as noisy as that one takes them.
    """
    solver = make_scheduler(model, scheduler, steps)
    sides = ((side or model.size) // model.factor for side in (height, width))
    shape = (model.unet.config.in_channels, *sides)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    latents = torch.stack(noise).to(embeddings) * solver.init_noise_sigma
    scale = torch.tensor(guidance, dtype=embeddings.dtype, device=embeddings.device).view(-1, 1, 1, 1)
    taken = inspect.signature(solver.step).parameters
    # As diffusers' own pipelines call them: no noise where it is a choice, and where it is none, from the image's seed.
    drawn = {key: value for key, value in (("generator", generators), ("eta", 0.0)) if key in taken}
    if guard is None:
        predict = classifier_free(model, (), None, embeddings, empty, scale, len(solver.timesteps))
    else:
        predict = guard.guide(model, embeddings, empty, scale, len(solver.timesteps))
    for step, timestep in enumerate(solver.timesteps[:stop]):
        noisy = solver.scale_model_input(latents, timestep)
        latents = solver.step(predict(noisy, timestep, step), timestep, latents, **drawn).prev_sample
    return latents


def sample_images(
    model: Diffusion,
    rows: Sequence[PromptRow],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 16,
    scheduler: str | None = None,
    guard: AppliedGuard | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place in rows, uint8 image [h, w, 3]) for every row; batches mix prompts but not sizes.

    ``guidance`` is for rows that name none. Each prompt is encoded once. ``share`` (k, n) makes only every n-th batch
    from the k-th on; whole batches, so that an image is the same to the bit however many share the work. Raises
    EraseError when there is too little memory for a batch.
    """
    batches = _batches(rows, batch_size)[share[0] :: share[1]]
    if not batches:
        return
    empty = model.encode_uncond()
    left = Counter(rows[i].prompt for batch in batches for i in batch)
    encoded: dict[str, Tensor] = {}  # of the prompts that are still to come, out of the device's memory
    for batch in batches:
        asked = [rows[i].prompt for i in batch]
        height, width = rows[batch[0]].height, rows[batch[0]].width
        try:
            if new := list(dict.fromkeys(prompt for prompt in asked if prompt not in encoded)):
                embedded = model.encode_prompts(new) if guard is None else guard.encode(model, new)
                rows_of_new = embedded.cpu().split(1)
                encoded.update((prompt, row.clone()) for prompt, row in zip(new, rows_of_new, strict=True))
            latents = sample_latents(
                model,
                torch.cat([encoded[prompt] for prompt in asked]).to(empty.device),
                empty,
                [rows[i].seed for i in batch],
                [guidance if (g := rows[i].guidance) is None else g for i in batch],
                steps=steps,
                height=height,
                width=width,
                scheduler=scheduler,
                guard=guard,
            )
            images = model.decode(latents).numpy()
        except (RuntimeError, MemoryError) as problem:
            if not out_of_memory(problem):
                raise
            size = f"{width or model.size} x {height or model.size} pixels"
            what = f"too little memory to sample {len(batch)} images of {size} at once: give a smaller --batch-size"
            if len(batch) == 1:
                what = f"too little memory to sample an image of {size}"
            raise EraseError(what) from problem
        left.subtract(asked)
        for prompt in set(asked):
            if not left[prompt]:
                del encoded[prompt]
        yield from zip(batch, images, strict=True)


def _batches(rows: Sequence[PromptRow], batch_size: int) -> list[list[int]]:
    """Return the places of the rows in batches of one size of image each."""
    sizes: dict[tuple[int | None, int | None], list[int]] = {}
    for place, row in enumerate(rows):
        sizes.setdefault((row.height, row.width), []).append(place)
    groups = [sizes[size] for size in sorted(sizes, key=str)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def sample(
    model: Diffusion,
    prompts: PromptSet,
    out: Path,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 16,
    scheduler: str | None = None,
    guard: AppliedGuard | None = None,
) -> Iterator[Path]:
    """Sample a prompt set into a folder, yielding each image's file as soon as it is written.

    Images are named by their place in the set; ``manifest.jsonl`` gets a line for each, with its row and SHA-256.
    Run again with the same model, prompts and settings, it makes only what is missing or has changed since; a folder
    made with others is refused with RequestError. ``scheduler`` is one of ``SCHEDULERS``, ``guard`` what ``find_guard``
    gives: it changes no weight, and the settings tell of it.

    Where Accelerate has started several processes, they share the batches; each yields the images that it makes, and
    when all have gone to the end, the folder is as one process would have made it.
    """
    make_scheduler(model, scheduler, steps)
    settings = {
        "unet": weights_hash(model.unet),
        **{name: weights_hash(encoder) for name, encoder in model.text_encoders.items()},
        "vae": weights_hash(model.vae),
        "prompts": _rows_hash(prompts.rows),
        "sampler": scheduler or SAMPLER,
        "steps": steps,
        "guidance": guidance,
        **({} if guard is None else {"guard": str(guard)}),
    }
    out.mkdir(parents=True, exist_ok=True)
    about = out / "sampling.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise RequestError("--out", out, "holds images of another model, prompt set or setting; choose another folder")
    state = processes()
    if state.is_main_process:
        with atomic_write(about) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        _merge(out, prompts.rows)
    state.wait_for_everyone()
    done = {line["image"] for line in _manifest(out)}
    state.wait_for_everyone()  # before anybody writes a line that somebody has not read yet
    missing = [place for place in range(len(prompts.rows)) if _name(place) not in done]
    rows = [prompts.rows[place] for place in missing]
    share = (state.process_index, state.num_processes)
    manifest = out / ("manifest.jsonl" if state.num_processes == 1 else f"manifest-{state.process_index}.jsonl")
    with manifest.open("a", encoding="utf-8") as stream:
        for place, image in sample_images(
            model,
            rows,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            scheduler=scheduler,
            guard=guard,
            share=share,
        ):
            file = out / _name(missing[place])
            with atomic_write(file) as partial:
                Image.fromarray(image).save(partial, format="PNG")
            stream.write(_line(file, rows[place]))
            stream.flush()
            yield file
    state.wait_for_everyone()
    if state.num_processes > 1 and state.is_main_process:
        _merge(out, prompts.rows)
    state.wait_for_everyone()


def _merge(folder: Path, rows: Sequence[PromptRow]) -> None:
    """Write one manifest from those of all processes, of the images that are there and whole, in their order."""
    places = {_name(place): place for place in range(len(rows))}
    parts = _manifests(folder)
    kept = sorted(
        places[line["image"]] for line in _manifest(folder) if line["image"] in places and _intact(folder, line)
    )
    with atomic_write(folder / "manifest.jsonl") as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_line(folder / _name(place), rows[place]) for place in kept)
    for part in parts:
        if part.name != "manifest.jsonl":
            part.unlink()


def _name(place: int) -> str:
    return f"{place:05d}.png"


def _rows_hash(rows: Sequence[PromptRow]) -> str:
    """Return the SHA-256 over what makes the images and over their labels."""
    names = ("prompt", "seed", "guidance", "width", "height", "object", "style")
    told = (f"PromptRow({', '.join(f'{name}={getattr(row, name)!r}' for name in names)})" for row in rows)
    return hashlib.sha256(f"({', '.join(told)}{',' * (len(rows) == 1)})".encode()).hexdigest()


def read_images(folder: Path, *, argument: str = "DIR") -> ImageSet:
    """Read what ``sample`` wrote; raises RequestError when there is none or an image is missing or has changed."""
    lines = sorted(_manifest(folder), key=lambda line: _natural(line["image"]))
    if not lines:
        raise RequestError(argument, folder, "holds no manifest.jsonl with images in it")
    try:
        for line in lines:
            if not _intact(folder, line):
                raise RequestError(argument, folder, f"{line['image']} is missing or differs from the manifest")
        rows = tuple(PromptRow(**{k: v for k, v in line.items() if k not in ("image", "sha256")}) for line in lines)
        settings = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as problem:
        raise RequestError(argument, folder, f"not as 'sample' writes it: {problem!r}") from None
    return ImageSet(tuple(folder / line["image"] for line in lines), rows, settings)


def match_images(folder: Path, prompts: PromptSet, *, argument: str = "DIR") -> ImageSet:
    """Return the images of a folder with the rows that they were made from, in the order of the prompt set.

    They are found, whichever holds first,

    1. by ``manifest.jsonl``, where there is one: prompt, seed, guidance scale and size must be the row's;
    2. by case number, where every image is named by one (``00012.png``, ``case_12.png``, or ``12_0.png`` and
       ``12_1.png`` for several images of one prompt), and these numbers are among the set's, or the set's among them;
    3. by order, where there are as many images as prompts: the n-th in the natural order of their names is the n-th
       prompt's. So are those of programs that count by themselves, such as ``ComfyUI_00001_.png``.

    What is only a part is matched all the same, and ``notes`` say what it is: prompts without an image, images of no
    prompt of the set, files that are none, images of one colour, as a safety checker leaves them. Raises RequestError
    where there is no telling what belongs together, and naming images that are empty or cannot be read.
    """
    if not folder.is_dir():
        raise RequestError(argument, folder, "no such folder")
    notes: list[str] = []
    if _manifests(folder):
        made = read_images(folder, argument=argument)
        pairs, strangers = _match_manifest(made, prompts)
        settings, how = made.settings, "manifest"
        if not pairs:
            raise RequestError(argument, folder, f"no line of its manifest.jsonl is a prompt of {prompts.name}")
    else:
        entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=lambda e: _natural(e.name))
        files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGES]
        others = [entry.name for entry in entries if entry.is_dir() or entry.suffix.lower() not in IMAGES]
        if not files:
            what = f"holds no images ({', '.join(IMAGES)})"
            raise RequestError(argument, folder, f"{what}, only {_some(others)}" if others else what)
        pairs, strangers, how = _match_names(files, prompts, folder, argument)
        settings = {"matched": how}
        if others:
            notes.append(f"{_count(others, 'file')} no image: {_some(others)}")
    matched = {place for place, _ in pairs}
    if absent := [number for place, number in enumerate(prompts.case_numbers) if place not in matched]:
        notes.append(f"of {len(prompts.rows):,} prompts {len(absent):,} without an image: case number {_some(absent)}")
    if strangers:
        notes.append(f"{_count(strangers, 'image')} of no prompt of the set: {_some(strangers)}")
    rows, chosen = tuple(prompts.rows[place] for place, _ in pairs), tuple(file for _, file in pairs)
    if how != "manifest" and (plain := _check_readable(chosen, folder, argument)):  # those are known by their hash
        notes.append(f"{_count(plain, 'image')} of one colour only: {_some(plain)}")
    return ImageSet(chosen, rows, settings, (f"matched by {how}", *notes))


def _match_manifest(made: ImageSet, prompts: PromptSet) -> tuple[list[tuple[int, Path]], list[str]]:
    """Return (place in the set, file) for every image of the set, and the names of the others."""
    asked: dict[tuple[object, ...], list[int]] = {}
    for place, row in enumerate(prompts.rows):
        asked.setdefault(_asked(row), []).append(place)
    pairs, strangers = [], []
    for file, row in zip(made.files, made.rows, strict=True):
        if places := asked.get(_asked(row)):
            pairs.append((places.pop(0), file))
        else:
            strangers.append(file.name)
    return sorted(pairs), strangers


def _asked(row: PromptRow) -> tuple[object, ...]:
    return row.prompt, row.seed, row.guidance, row.width, row.height


def _match_names(
    files: Sequence[Path], prompts: PromptSet, folder: Path, argument: str
) -> tuple[list[tuple[int, Path]], list[str], str]:
    """Return (place in the set, file), the names of images of no prompt, and how they were matched."""
    places = {number: place for place, number in enumerate(prompts.case_numbers)}
    found = {file: match for file in files if (match := _CASE.fullmatch(file.stem))}
    unnamed = [file.name for file in files if file not in found]
    if found and unnamed:
        names = f"{_some(unnamed)} {'is' if len(unnamed) == 1 else 'are'} not named by a case number, as the others are"
        raise RequestError(argument, folder, names)
    keys = {file: (int(match[1]), int(match[2] or 0)) for file, match in found.items()}
    times = Counter(keys.values())
    numbers = {number for number, _ in times}
    missing, strange = places.keys() - numbers, numbers - places.keys()
    if found and len(places) == len(prompts.rows) and not (missing and strange):
        if twice := [file.name for file, key in keys.items() if times[key] > 1]:
            raise RequestError(argument, folder, f"several images have one case number: {_some(twice)}")
        ordered = sorted((places[key[0]], key[1], file) for file, key in keys.items() if key[0] in places)
        strangers = [file.name for file, key in keys.items() if key[0] in strange]
        return [(place, file) for place, _, file in ordered], strangers, "case number"
    if len(files) == len(prompts.rows):
        return list(enumerate(files)), [], "file order"
    what = f"{len(files):,} images for {len(prompts.rows):,} prompts, and their names are no case numbers of the set"
    if found and len(places) == len(prompts.rows):
        what += f" (strange: {_some(sorted(strange))}; missing: {_some(sorted(missing))})"
    raise RequestError(argument, folder, f"{what}; name them by case number, such as {prompts.case_numbers[0]:05d}.png")


def _check_readable(files: Sequence[Path], folder: Path, argument: str) -> list[str]:
    """Read every image, and return the names of those of one colour only; raises RequestError naming the unreadable."""
    bad, plain = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file in files:
            try:
                with Image.open(file) as image:
                    one_colour = image.convert("RGB").getcolors(1) is not None
            except Exception as problem:  # whatever a decoder may run into in a file that is no image
                why = str(problem).split(str(file))[0].strip(" '") if file.stat().st_size else "an empty file"
                bad.append(f"{file.name} ({why})")
                continue
            if one_colour:
                plain.append(file.name)
    if bad:
        raise RequestError(argument, folder, f"{_count(bad, 'image')} not to be read: {_some(bad)}; make it again")
    return plain


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """Order names as people do: img2 before img10."""
    return [(text.lower(), int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)], name


def _count(items: Sequence[object], noun: str) -> str:
    return f"1 {noun} is" if len(items) == 1 else f"{len(items):,} {noun}s are"


def _some(items: Sequence[object]) -> str:
    """List a few of many."""
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


def _manifests(folder: Path) -> list[Path]:
    """Return the manifest, and those of processes that were killed before they were merged."""
    return [file for file in sorted(folder.glob("manifest*.jsonl")) if re.fullmatch(r"manifest(-\d+)?", file.stem)]


def _manifest(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's lines; one that a kill cut short does not count."""
    lines = {}
    for file in _manifests(folder):
        for text in file.read_text(encoding="utf-8").split("\n"):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if (
                isinstance(line, dict)
                and isinstance(line.get("image"), str)
                and Path(line["image"]).name == line["image"]
            ):
                lines[line["image"]] = line
    return list(lines.values())


def _intact(folder: Path, line: dict[str, Any]) -> bool:
    file = folder / line["image"]
    return file.is_file() and _sha256(file) == line.get("sha256")


def _line(file: Path, row: PromptRow) -> str:
    """Return an image's line of the manifest."""
    told = {key: value for key, value in asdict(row).items() if key == "prompt" or value not in ("", None)}
    return json.dumps({"image": file.name, "sha256": _sha256(file), **told}, ensure_ascii=False) + "\n"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
