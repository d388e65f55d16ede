"""CLIP score: does an image show what its prompt says? The cosine of both in CLIP's space (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.features import read_image
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import (
    JudgedImages,
    Metric,
    MetricContext,
    MetricInput,
    MetricResult,
    PreparedMetric,
)
from erase_concept.eval.score import Score, bootstrap
from erase_concept.settings import described, settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL = "openai/clip-vit-base-patch32"  # the paper's
SEED = 0


@dataclass(frozen=True, eq=False)
class Clip:
    """A whole CLIP model: ``name`` as it was asked for, ``weights`` the SHA-256 of its weights."""

    name: str
    weights: str
    model: Any
    tokenizer: Any
    image_processor: Any

    @property
    def tokens(self) -> int:
        """How many tokens of a prompt the model reads, the first and the last one included."""
        return int(self.model.config.text_config.max_position_embeddings)


def load_clip(name: str = MODEL) -> Clip:
    """Load a CLIP model of transformers from a folder, the hub's cache or the hub, whole or not at all.

    Raises RequestError that says what is wrong: no such model, none of CLIP, or files that are missing; with
    HF_HUB_OFFLINE it asks no network, and what is in the cache needs none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from safetensors import SafetensorError

    from erase_concept.pipelines.hub import silence_hub_logs
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    with silence_hub_logs():
        try:
            parts, missing = _load(name, local=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
            if Path(name).is_dir():
                raise RequestError("metric.clip", name, f"holds no CLIP model: {_first_line(problem)}") from problem
            if HF_HUB_OFFLINE:
                what = "no folder and not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
                raise RequestError("metric.clip", name, f"{what}: name its folder") from problem
            try:
                HfApi().model_info(name)  # says at once what transformers finds out in a minute of trying again
                parts, missing = _load(name, local=False)
            except Exception as gone:  # among them those of the HTTP library, which is another one in each version
                what = f"no folder, not in the hub's cache, and could not be downloaded: {_first_line(gone)}"
                raise RequestError("metric.clip", name, what) from gone
    if missing:
        raise RequestError(
            "metric.clip", name, f"holds no whole CLIP model: {len(missing)} weights missing, {missing[0]}"
        )
    words, asked = len(parts[1]), parts[0].config.text_config.vocab_size
    if words != asked:  # of a folder without one, transformers makes a tokenizer that knows nothing
        raise RequestError("metric.clip", name, f"its tokenizer knows {words} tokens, its model asks for {asked}")
    model = parts[0].to(processes().device).eval().requires_grad_(False)
    return Clip(name, weights_hash(model), model, *parts[1:])


def _load(name: str, *, local: bool) -> tuple[tuple[Any, Any, Any], list[str]]:
    """Return model, tokenizer and image processor, and the names of weights that were not there or did not fit."""
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, info = CLIPModel.from_pretrained(
        name, local_files_only=local, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    readers = (some.from_pretrained(name, local_files_only=local) for some in (CLIPTokenizer, CLIPImageProcessor))
    return (model, *readers), missing


def clip_values(
    files: Sequence[Path], prompts: Sequence[str], clip: Clip, *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return 100 max(cos, 0) of each image file and its prompt, float32 [n].

    Each different prompt is encoded once; of one with too many tokens CLIP reads the first. Raises RequestError for an
    image that cannot be read, and ValueError unless there is one prompt for each.
    """
    import torch
    from torch.nn import functional as F

    if len(files) != len(prompts):
        raise ValueError(f"{len(files)} images, but {len(prompts)} prompts")
    model = clip.model
    different = list(dict.fromkeys(prompts))
    places = {prompt: place for place, prompt in enumerate(different)}
    texts, values = [], []
    with torch.inference_mode():
        for start in range(0, len(different), batch_size):
            some = different[start : start + batch_size]
            tokens = clip.tokenizer(some, padding=True, truncation=True, max_length=clip.tokens, return_tensors="pt")
            inputs = {key: tokens[key].to(model.device) for key in ("input_ids", "attention_mask")}
            texts.append(F.normalize(model.text_projection(model.text_model(**inputs).pooler_output)))
        for start in range(0, len(files), batch_size):
            batch = slice(start, start + batch_size)
            pixels = clip.image_processor([read_image(file) for file in files[batch]], return_tensors="pt")
            seen = model.vision_model(pixel_values=pixels["pixel_values"].to(model.device)).pooler_output
            image = F.normalize(model.visual_projection(seen))
            asked = torch.cat(texts)[[places[prompt] for prompt in prompts[batch]]]
            values.append((100 * (image * asked).sum(1).clamp(min=0)).cpu().numpy())
    return np.concatenate(values) if values else np.zeros(0, np.float32)


def clip_score(values: NDArray[np.float32], prompts: Sequence[str], clip: Clip, *, target: str) -> Score:
    """Return the mean of ``clip_values`` [n] with a bootstrap interval; the protocol counts the prompts cut short.

    Raises RequestError when there are none.
    """
    if len(values) == 0:
        raise RequestError("images", "(empty)", "no images")
    values = values.astype(np.float64)
    lengths = clip.tokenizer(list(prompts), truncation=True, max_length=clip.tokens + 1)["input_ids"]
    cut = sum(len(tokens) > clip.tokens for tokens in lengths)
    short = f"; {cut} prompts cut after {clip.tokens} tokens" if cut else ""
    interval = bootstrap(lambda places: float(values[places].mean()), len(values), np.random.default_rng(SEED))
    protocol = f"{clip.name} (weights {clip.weights[:12]}), mean of 100 max(cos, 0){short}; bootstrap; higher is better"
    return Score("clip_score", target, float(values.mean()), len(values), interval, "100 cos", protocol)


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


@settings
class ClipSettings:
    """Which CLIP model."""

    clip: Annotated[str, described("A folder or a hub id.", source="Hessel et al. 2021")] = MODEL


def _prepare(context: MetricContext) -> PreparedMetric:
    clip = load_clip(context.settings.clip)

    def compute(data: MetricInput) -> MetricResult:
        prompts = [row.prompt for row, keep in zip(data.erased.images.rows, data.retain, strict=True) if keep]

        def of(side: JudgedImages) -> Score:
            return clip_score(
                clip_values(data.files(side, data.retain), prompts, clip), prompts, clip, target=data.concept
            )

        return MetricResult(
            (data.with_baseline(of),), provenance={"clip": {"name": clip.name, "weights": clip.weights}}
        )

    return PreparedMetric(("clip_score",), compute)


METRICS.add(
    Metric(
        "clip_score",
        "CLIP score",
        "How well the retained images show their prompts, by CLIP.",
        "retain",
        "higher",
        "100 cos",
        settings=ClipSettings,
        prepare=_prepare,
    )
)
