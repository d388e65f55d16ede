"""LoRA files: nothing of their rank comes nearer, and diffusers loads them as what they say they are."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from erase_concept.errors import EraseError
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats import lora
from erase_concept.pipelines.formats.lora import Fit, Style, factors, save_lora
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.model import Diffusion

STYLES: tuple[Style, ...] = get_args(Style)
ALL = 1000  # more than any layer's rank


def erased_from(unet: nn.Module) -> nn.Module:
    """A copy in which every other weight of every parameter has moved."""
    generator = torch.Generator().manual_seed(3)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for p in other.parameters():
            moves = torch.randn(p.shape, generator=generator) * 1e-2
            p.add_(moves * (torch.rand(p.shape, generator=generator) < 0.5))
    return other


def save(
    model: Diffusion, erased: nn.Module, file: Path, *, rank: int, style: Style = "kohya", dtype: Any = torch.float32
) -> Fit:
    return save_lora(model, erased, file, rank=rank, style=style, dtype=dtype, about={"concept": "x"})


def fused(model: Diffusion, file: Path) -> nn.Module:
    """The UNet after diffusers has loaded a LoRA file of its own accord and put it into the weights."""
    with silence_hub_logs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        pipeline = copy.deepcopy(model).pipeline()
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline.unet


def carried(unet: nn.Module) -> dict[str, Tensor]:
    layers = ((name, m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return {f"{name}.weight": layer.weight for name, layer in layers}


def nearest(change: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, from the singular value decomposition."""
    u, s, v = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view(change.shape)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_factors_are_the_nearest_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down, squares = factors(change, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert torch.allclose(up @ down, nearest(change, rank), atol=1e-12)
    assert torch.allclose(squares, torch.linalg.svdvals(change) ** 2)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1))


def of_spectrum(shape: tuple[int, int], values: Tensor) -> Tensor:
    """A matrix in float32 with these singular values, between random orthogonal ones."""
    generator = torch.Generator().manual_seed(1)
    bases = (torch.linalg.qr(torch.randn(side, len(values), generator=generator).double())[0] for side in shape)
    left, right = bases
    return ((left * values) @ right.T).float()


SPECTRA = {
    "geometric": 0.9 ** torch.arange(300.0),
    "slow": 1 / (1 + torch.arange(300.0)),
    "flat": torch.linspace(1, 0.5, 300),  # the hardest: the first are hardly larger than the rest
    "low rank": torch.cat([torch.ones(8), torch.zeros(292)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 340), (340, 300), (300, 300)])
def test_large_factors_at_random_miss_hardly_more_than_the_nearest(shape: tuple[int, int], spectrum: str) -> None:
    values = SPECTRA[spectrum].double()
    change, rank = of_spectrum(shape, values), 16
    before = torch.get_rng_state()
    up, down, squares = factors(change, rank)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip((up, down, squares), factors(change, rank), strict=True))
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    missed = (change.double() - up.double() @ down.double()).norm() / values.norm()
    least = values[rank:].norm() / values.norm()
    assert least - 1e-6 <= missed <= 1.005 * least + 1e-6
    assert bool((squares[:rank] <= values[:rank] ** 2 * (1 + 1e-5) + 1e-9).all())  # never more than there is
    assert bool((squares[:-1] >= squares[1:]).all())


@pytest.mark.parametrize("shape", [(300, 340), (340, 300), (300, 300)])
@pytest.mark.parametrize("rank", [140, 299, 300, 320])
def test_large_factors_of_a_high_rank_are_exact(shape: tuple[int, int], rank: int) -> None:
    change = of_spectrum(shape, SPECTRA["flat"])
    up, down, _ = factors(change, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert torch.allclose(up @ down, nearest(change, rank), atol=1e-6)


def test_large_layers_of_every_kind_get_the_nearest_change(tmp_path: Path) -> None:
    kinds = {"linear": nn.Linear(340, 300), "one": nn.Conv2d(300, 340, 1), "three": nn.Conv2d(34, 300, 3, padding=1)}
    base = nn.ModuleDict(kinds).requires_grad_(False)
    erased = erased_from(base)
    model = Diffusion(FAMILIES.find("sd1"), {"unet": base, "scheduler": DDIMScheduler()}, source="layers")
    for rank in (8, 300):
        file = tmp_path / f"{rank}.safetensors"
        fit = save_lora(model, erased, file, rank=rank, style="kohya", dtype=torch.float32, about={})
        tensors, missed = load_file(file), 0.0
        for name in kinds:
            change = erased.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
            up, down = (tensors[f"lora_unet_{name}.lora_{side}.weight"] for side in ("up", "down"))
            found = (up.flatten(1) @ down.flatten(1)).view(change.shape)
            least = (change - nearest(change, rank)).norm()
            assert (change - found).norm() <= 1.005 * least + 1e-5, name
            missed += float((change - found).double().square().sum())
            if change.ndim == 4:  # as programs apply it without merging: one convolution after the other
                x, padding = torch.randn(1, change.shape[1], 5, 5), change.shape[2] // 2
                both = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=padding), up)
                assert torch.allclose(both, nn.functional.conv2d(x, found, padding=padding), atol=1e-5)
        moved = [
            (n, float((e - b).double().square().sum()))
            for (n, b), e in zip(base.named_parameters(), erased.parameters(), strict=True)
        ]
        left_out, every = sum(size for name, size in moved if name.endswith("bias")), sum(size for _, size in moved)
        assert fit.errors[max(fit.errors)] == pytest.approx(((missed + left_out) / every) ** 0.5, rel=1e-4)
        assert fit.layers == 3


def test_factors_of_little_and_of_nothing_are_finite() -> None:
    one = torch.outer(torch.arange(5.0), torch.arange(8.0)).double()
    for change in (torch.zeros(4, 6).double(), one, one * 1e-150):
        up, down, squares = factors(change, 3)
        assert bool(torch.cat([up.flatten(), down.flatten(), squares]).isfinite().all())
        assert torch.allclose(up @ down, change, rtol=1e-9, atol=0)


@pytest.mark.parametrize("style", STYLES)
def test_at_full_rank_diffusers_gives_the_erased_layers(family: Diffusion, tmp_path: Path, style: Style) -> None:
    erased = erased_from(family.unet)
    fit = save(family, erased, tmp_path / "l.safetensors", rank=ALL, style=style)
    unet = fused(family, tmp_path / "l.safetensors")
    layers = carried(erased)
    for name, p in unet.named_parameters():
        goal = erased if name in layers else family.unet
        assert torch.allclose(p, goal.get_parameter(name), rtol=0, atol=1e-6), name
    left = [(erased.get_parameter(n) - p).square().sum() for n, p in family.unet.named_parameters() if n not in layers]
    every = sum((erased.get_parameter(n) - p).square().sum() for n, p in family.unet.named_parameters())
    assert fit.left_out == pytest.approx(float(sum(left) / every) ** 0.5, rel=1e-5)
    assert fit.errors[max(fit.errors)] == pytest.approx(fit.left_out, rel=1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_gives_the_nearest_change_and_the_error_that_was_told(
    tiny: Diffusion, tmp_path: Path, style: Style, dtype: torch.dtype
) -> None:
    erased, file = erased_from(tiny.unet), tmp_path / "l.safetensors"
    fit = save(tiny, erased, file, rank=5, style=style, dtype=dtype)
    assert {value.dtype for key, value in load_file(file).items() if not key.endswith(".alpha")} == {dtype}
    unet, layers = fused(tiny, file), carried(tiny.unet)
    missed = whole = 0.0
    for name, p in unet.named_parameters():
        before, after = tiny.unet.get_parameter(name), erased.get_parameter(name)
        if name in layers:
            goal = before + nearest(after - before, 5)
            assert torch.allclose(p.double(), goal, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 1e-3)), name
        missed += float((after - p).double().square().sum())
        whole += float((after - before).double().square().sum())
    assert fit.errors[5] == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    assert about["concept"] == "x"
    assert float(about["relative_error"]) == pytest.approx(fit.errors[5], abs=1e-6)
    assert float(about["left_out"]) == pytest.approx(fit.left_out, abs=1e-6)
    assert about["ss_network_dim"] == "5"


def test_errors_by_rank_fall_and_are_those_of_the_files_of_these_ranks(tiny: Diffusion, tmp_path: Path) -> None:
    erased = erased_from(tiny.unet)
    errors = save(tiny, erased, tmp_path / "l.safetensors", rank=6).errors
    assert list(errors) == [1, 2, 4, 6]
    assert sorted(errors.values(), reverse=True) == list(errors.values())
    for rank in (1, 2, 4):
        own = save(tiny, erased, tmp_path / f"{rank}.safetensors", rank=rank).errors
        assert own[rank] == pytest.approx(errors[rank], rel=1e-6)


def small_unet(family: str) -> UNet2DConditionModel:
    """A UNet with the levels, layers and attentions of SD 1.x or XL, and few channels."""
    if family == "sd1":
        return UNet2DConditionModel(
            block_out_channels=(4, 8, 12, 12), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2
        )
    return UNet2DConditionModel(
        block_out_channels=(4, 8, 12),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


# Keys of published LoRA files, as kohya's trainer names them.
KOHYA = {
    "sd1": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        "lora_unet_up_blocks_1_resnets_2_time_emb_proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
    ),
    "sdxl": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_output_blocks_8_0_emb_layers_1",
        "lora_unet_input_blocks_3_0_op",
    ),
}
BASES = {"sd1": ("sd_v1", "False"), "sd2": ("sd_v2_v", "True"), "sdxl": ("sdxl_base_v1-0", "False")}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_kohya_keys_are_the_published_ones_and_diffusers_finds_every_layer(family: Any, tmp_path: Path) -> None:
    unet = small_unet(family)
    file = tmp_path / "l.safetensors"
    base = Diffusion(FAMILIES.find(family), {"unet": unet, "scheduler": DDIMScheduler()}, source="small")
    save_lora(base, erased_from(unet), file, rank=2, style="kohya", dtype=torch.float16, about={})
    tensors = load_file(file)
    modules = {key.partition(".")[0] for key in tensors}
    assert modules >= set(KOHYA[family])
    assert all(tensors[f"{name}.alpha"] == len(tensors[f"{name}.lora_down.weight"]) for name in modules)
    config = unet.config if family == "sdxl" else None
    found, _ = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=config)
    assert len(found) == 2 * len(carried(unet)) == 2 * len(modules)


def test_the_metadata_tells_a1111_the_base_model(family: Diffusion, tmp_path: Path) -> None:
    save(family, erased_from(family.unet), tmp_path / "l.safetensors", rank=1)
    with safe_open(tmp_path / "l.safetensors", "pt") as stored:
        about = stored.metadata()
    assert (about["ss_base_model_version"], about["ss_v2"]) == BASES[family.family.name]


def test_what_no_lora_can_carry_makes_no_file(tiny: Diffusion, tmp_path: Path) -> None:
    erased = copy.deepcopy(tiny.unet)
    for _ in range(2):  # no change at all, then one of a bias
        with pytest.raises(EraseError, match="nothing that a LoRA could carry"):
            save(tiny, erased, tmp_path / "l.safetensors", rank=4)
        with torch.no_grad():
            erased.conv_out.bias += 1
    with torch.no_grad():
        erased.conv_in.weight[0] = float("nan")
    with pytest.raises(EraseError, match=r"conv_in.weight changed .* no numbers"):
        save(tiny, erased, tmp_path / "l.safetensors", rank=4)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        erased.conv_in.weight[0] = 1
    save(tiny, erased, tmp_path / "l.safetensors", rank=4)  # and layers that did not change take no room
    assert {key.partition(".")[0] for key in load_file(tmp_path / "l.safetensors")} == {"lora_unet_conv_in"}


def test_a_file_that_was_not_written_as_it_is_is_removed(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = lora.save_tensors

    def faulty(tensors: dict[str, Tensor], *rest: Any) -> None:
        first = next(iter(tensors))
        written(tensors | {first: -tensors[first]}, *rest)

    monkeypatch.setattr(lora, "save_tensors", faulty)
    with pytest.raises(EraseError, match="was not written as it is"):
        save(tiny, erased_from(tiny.unet), tmp_path / "l.safetensors", rank=4)
    assert not list(tmp_path.iterdir())
