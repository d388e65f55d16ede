"""Families: told apart by what a folder or a file holds, and named nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import erase_concept
from erase_concept import eval as evaluation
from erase_concept import pipelines
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.families import FAMILIES, family_of_file, find_family
from erase_concept.pipelines.families.family import OTHERS, TRANSFORMER
from erase_concept.pipelines.formats.folder import read_configs
from erase_concept.pipelines.model import Diffusion

# Words by which code outside the families would tell one from another, or look into a UNet.
OWN_WORDS = re.compile("text_encoder_2|attn2|alphas_cumprod|addition_embed_type")


def sources() -> list[Path]:
    """All files of the package, wherever its folders are."""
    folders = (*erase_concept.__path__, *pipelines.__path__, *evaluation.__path__)
    return sorted({file for folder in folders for file in Path(folder).rglob("*.py")})


def test_only_the_families_use_the_words_that_tell_them_apart() -> None:
    files = [file for file in sources() if "families" not in file.parts]
    assert len(files) > 60
    assert [file for file in files if OWN_WORDS.search(file.read_text(encoding="utf-8"))] == []


def test_a_family_is_told_by_its_configurations_and_by_its_file(family: Diffusion) -> None:
    record = family.family
    configs = {name: dict(family.components[name].config.to_dict()) for name in family.text_encoders}
    assert find_family(type(family.pipeline()).__name__, configs) is record
    assert family_of_file(key for layout in record.single_file.layouts.values() for key in [layout.prefix]) is record
    assert find_family("FluxPipeline", configs) is None
    assert family_of_file(["model.diffusion_model.out.0.weight"]) is None


def test_the_built_in_model_has_the_configurations_of_its_family() -> None:
    folder = builtin_models()["emojinette"].folder
    configs = read_configs(folder, FAMILIES.find("sd1"))
    assert find_family("StableDiffusionPipeline", configs) is FAMILIES.find("sd1")


def test_every_parameter_has_a_group_and_the_groups_are_where_they_should_be(family: Diffusion) -> None:
    layers = family.family.layers
    groups = {name: layers.group(name) for name, _ in family.unet.named_parameters()}
    assert set(groups.values()) == {*TRANSFORMER, *OTHERS}
    inside = {
        f"{name}.{inner}"
        for name, module in family.unet.named_modules()
        if layers.is_cross_attention(name)
        for inner, _ in module.named_parameters()
    }
    assert inside == {name for name, group in groups.items() if group == "cross-attention"}
    chosen = {name: p for name, p in family.unet.named_parameters() if layers.is_key_or_value(name)}
    width = family.unet.config.cross_attention_dim
    assert chosen.keys() == {name for name in inside if family.unet.get_parameter(name).shape[-1] == width} & {
        name for name in inside if re.search(r"to_[kv]\.", name)
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_configurations_of_single_files_are_new_each_time(name: str) -> None:
    layout = FAMILIES.find(name).single_file
    layout.configs({})["unet"]["block_out_channels"][0] = 1
    layout.configs({})["vae"]["sample_size"] = 1
    assert layout.configs({})["unet"]["block_out_channels"][0] == 320
    assert layout.configs({})["vae"]["sample_size"] > 1
