"""The type Family: everything in which one kind of model differs from another.

A family is one file that adds its record to ``FAMILIES``. ``Components`` are a model's parts by diffusers' names, and
``Configs`` their configurations, as they stand in a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Components = Mapping[str, Any]
Configs = dict[str, dict[str, Any]]
State = Mapping[str, Tensor]  # tensors by name


@dataclass(frozen=True)
class Component:
    """A part of a model: the files of its folder, of which one is enough, and what makes it from a configuration.

    ``make`` is None for what has no weights: tokenizers and the scheduler.
    """

    files: tuple[str, ...]
    make: Callable[[Mapping[str, Any]], nn.Module] | None = None


@dataclass(frozen=True)
class Noise:
    """The noise schedule: how noise is added, and what the model is trained to predict.

    Both take components, latents and noise [n, c, h, w] and time steps int64 [n], and return [n, c, h, w].
    """

    add: Callable[[Components, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Components, Tensor, Tensor, Tensor], Tensor]


# Groups of layers: those of transformers, and the others.
TRANSFORMER = ("cross-attention", "self-attention", "other transformer")
OTHERS = ("resnet", "other")


@dataclass(frozen=True)
class Layers:
    """The layers of the denoiser by their names.

    ``group`` gives the group of a parameter, one of ``TRANSFORMER`` or ``OTHERS``. ``is_cross_attention`` tells whether
    a module is one whole cross-attention, and ``is_key_or_value`` whether a parameter is the weight of a
    cross-attention's keys or values. ``is_time_or_output`` tells whether a parameter embeds the time step or is of the
    last layers, which the scope noxattn leaves out.
    """

    group: Callable[[str], str]
    is_cross_attention: Callable[[str], bool]
    is_key_or_value: Callable[[str], bool]
    is_time_or_output: Callable[[str], bool] = lambda name: False


def _rename(names: Mapping[str, str], state: State) -> dict[str, Tensor]:
    return {original: state[name] for name, original in names.items()}


def _as_it_is(name: str, original: str, value: Tensor, like: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Layout:
    """Where a single file has the tensors of a component.

    ``names`` gives each tensor's name in the file, and raises ValueError for one that has no place there. Where the
    file holds more than renamed tensors, ``pack`` makes them from (names, state dict), and ``unpack`` takes from (name,
    name in the file, tensor in the file, tensor of the shape that is needed) the component's own tensor.
    """

    prefix: str
    names: Callable[[Iterable[str]], dict[str, str]]
    pack: Callable[[Mapping[str, str], State], dict[str, Tensor]] = _rename
    unpack: Callable[[str, str, Tensor, Tensor], Tensor] = _as_it_is


@dataclass(frozen=True)
class SingleFile:
    """The single-file layout of a family, as AUTOMATIC1111 and ComfyUI load it."""

    mark: str  # the prefix of keys that tells this family's files from others'
    layouts: Mapping[str, Layout]  # by component
    configs: Callable[[Mapping[str, str]], Configs]  # from the file's metadata: a file holds no configurations
    widths: Callable[[State], Configs]  # values of configurations that the file's tensors show
    pad_tokens: Mapping[str, str] = field(default_factory=dict)  # by tokenizer, where not CLIP's own
    architectures: Mapping[str, str] = field(default_factory=dict)  # ModelSpec's name by prediction type; "": any
    # Given the loaded components and the metadata, settle what only the weights show. The scheduler may be replaced.
    settle: Callable[[dict[str, Any], Mapping[str, str]], None] | None = None
    # What A1111 reads in a LoRA's metadata to tell its base model, and whether LoRAs count blocks as this file does.
    lora_metadata: Mapping[str, str] = field(default_factory=dict)
    lora_names: bool = False


@dataclass(frozen=True)
class Family:
    """The record of a model family.

    Embeddings are one tensor [n, tokens, width] for each batch of prompts. A family whose model also takes an embedding
    of the whole prompt appends it as ``extra_tokens`` more, filled up with zeros.
    """

    name: str
    title: str
    summary: str
    pipeline: type[Any]  # diffusers' pipeline class, whose name is in a folder's model_index.json
    components: Mapping[str, Component]
    matches: Callable[[Configs], bool]  # tells families apart that share the pipeline class
    check_fit: Callable[[Components], None]  # raises ValueError when components do not make a model together
    encode: Callable[[Components, Sequence[Tensor]], Tensor]  # token ids of each text encoder -> embeddings
    uncond: Callable[
        [Tensor, Mapping[str, Any]], Tensor
    ]  # the empty prompt's embedding, settings -> what to guide from
    predict: Callable[
        [Components, Tensor, Tensor, Tensor], Tensor
    ]  # noisy latents, time steps, embeddings -> prediction
    noise: Noise
    layers: Layers
    extra_tokens: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline class, with their defaults
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)  # fixed arguments of the pipeline class
    single_file: SingleFile | None = None
