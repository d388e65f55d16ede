"""Open what a rehearsal made in another program, and draw an image of one step with it.

    python rehearsal_open.py FAMILY SIZE diffusers|stable-diffusion.cpp NAME

Runs in the rehearsal's folder, with the Python of the other program's environment, and without this package. NAME
begins the names of the pictures. Ends with an error when a file cannot be opened, exports of the same weights draw
different images, or the erased model draws the base's.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

PROMPT = "a portrait of a dancer, oil painting"


def check(holds: bool, said: str) -> None:
    """End with an error unless something holds."""
    if not holds:
        sys.exit(said)


def in_diffusers(family: str, size: int, name: str) -> None:
    """Draw with diffusers: each export by its own way of loading, whose latents are compared."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from safetensors.torch import load_file

    # XL's weights in fp32 would need 14 GB, twice while they are loaded.
    dtype = torch.float32 if family == "sd1" else torch.bfloat16
    kind = StableDiffusionPipeline if family == "sd1" else StableDiffusionXLPipeline
    config = f"{family}-run/pipeline"

    def from_file(file: str) -> Any:
        return kind.from_single_file(file, config=config, torch_dtype=dtype, local_files_only=True)

    def with_unet(file: str) -> Any:
        pipe = from_file(f"{family}.safetensors")
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(f"{config}/unet"))
        unet.load_state_dict(load_file(file))
        pipe.unet = unet.to(dtype)
        return pipe

    def with_lora(file: str) -> Any:
        pipe = from_file(f"{family}.safetensors")
        pipe.load_lora_weights(file)
        return pipe

    def from_folder(folder: str) -> Any:
        return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)

    opened: dict[str, Callable[[], Any]] = {
        "base": lambda: from_file(f"{family}.safetensors"),
        "single-file": lambda: from_file(f"{family}-erased.safetensors"),
        "diffusers-fp16": lambda: from_folder(f"{family}-folder"),
        "unet-fp16": lambda: with_unet(f"{family}-unet-fp16.safetensors"),
        "unet": lambda: with_unet(f"{family}-unet.safetensors"),
        "delta": lambda: from_folder(f"{family}-applied"),
    }
    if family == "sd1" or not name.startswith("oldest"):  # which refuses XL's LoRA for its layers of the time step
        opened["lora"] = lambda: with_lora(f"{family}-lora.safetensors")
    drawn = {}
    for form, load in opened.items():
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        pipe.safety_checker = None
        asked = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": size, "width": size}
        generator = torch.Generator().manual_seed(0)
        drawn[form] = pipe(PROMPT, generator=generator, output_type="latent", **asked).images.float()
        check(bool(drawn[form].isfinite().all()), f"{form} draws no finite image in {name}")
        if form == "single-file":
            pipe(PROMPT, generator=generator.manual_seed(0), **asked).images[0].save(f"{family}-{name}.png")
        del pipe
        gc.collect()
    for one, other in (("single-file", "diffusers-fp16"), ("single-file", "unet-fp16"), ("unet", "delta")):
        check(torch.equal(drawn[one], drawn[other]), f"{one} and {other} draw different images in {name}")
    for form in drawn.keys() & {"single-file", "unet", "lora"}:
        check(not torch.equal(drawn["base"], drawn[form]), f"{form} draws the base's image in {name}")


def in_stable_diffusion_cpp(family: str, size: int, name: str) -> None:
    """Draw with stable-diffusion.cpp: the base, the erased file, and the base with the LoRA."""
    from PIL import Image
    from stable_diffusion_cpp import StableDiffusion

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for form, file, prompt in (
            ("base", f"{family}.safetensors", PROMPT),
            ("single-file", f"{family}-erased.safetensors", PROMPT),
            ("lora", f"{family}.safetensors", f"{PROMPT} <lora:{family}-lora:1>"),
        ):
            model = StableDiffusion(model_path=file, lora_model_dir=".", n_threads=2, verbose=False)
            asked = {"sample_steps": 1, "cfg_scale": 1.0, "seed": 0, "width": size, "height": size}
            yield form, model.generate_image(prompt=prompt, **asked)[0]
            model.close()

    drawn = dict(pictures())
    for form, image in drawn.items():
        image.save(f"{family}-{name}-{form}.png")
        check(image.size == (size, size), f"{form} has {image.size} in {name}")
        check(any(low < high for low, high in image.convert("RGB").getextrema()), f"{form} is one colour in {name}")
        check(form == "base" or image.tobytes() != drawn["base"].tobytes(), f"{form} draws the base's image in {name}")


if __name__ == "__main__":
    _, family, size, program, name = sys.argv
    {"diffusers": in_diffusers, "stable-diffusion.cpp": in_stable_diffusion_cpp}[program](family, int(size), name)
