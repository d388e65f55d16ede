"""Train the small DDPM of Fashion-MNIST: ``python -m erase_concept.pipelines.fashion_ddpm.train --work DIR``.

Trains the classifier that judges it and the UNet, which learns classes with classifier-free guidance (arXiv
2207.12598), and writes the pipeline as diffusers folder with fp16 weights. A training that was interrupted goes on from
its last checkpoint, and all randomness is seeded. With ``--without`` it is Retrain: the same training without a class.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.images import ImageData, InMemory, read_images
from erase_concept.pipelines.classifiers.resnet import ResNet18
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families.class_ddpm import Pixels
from erase_concept.pipelines.fashion_ddpm import CLASSIFIER, HOME, LABELS, MODEL, REFERENCE, SIZE
from erase_concept.pipelines.fashion_ddpm.classifier import load_classifier, new_classifier, to_input
from erase_concept.pipelines.fit import Schedule, fit
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.tokenizer import label_tokenizer
from erase_concept.pipelines.model import Diffusion

STEPS, CLASSIFIER_STEPS = 1500, 2000
BATCH = 64
NULL_SHARE = 0.1  # of the labels, which become the null class
HELD_OUT = 300  # test images of each class whose features are shipped


def read_small(source: str) -> ImageData:
    """Return Fashion-MNIST at 16 x 16 pixels; raises RequestError where its files are missing."""
    data = read_images(source)
    small = []
    for images in (data.train, data.test):
        pixels = images[torch.arange(len(images))].float()
        scaled = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        small.append(InMemory(scaled.round().clamp(0, 255).to(torch.uint8)))
    return ImageData(data.name, small[0], data.train_labels, small[1], data.test_labels, LABELS)


def new_unet() -> UNet2DModel:
    """Return the untrained UNet, with a class more than there are labels: the null class."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(LABELS) + 1,
    )


def new_scheduler() -> DDIMScheduler:
    """Return the noise schedule: a cosine (arXiv 2102.09672), for which the UNet predicts velocities."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)


def train_unet(data: ImageData, work: Path, steps: int = STEPS, seed: int = 0, without: str = "") -> UNet2DModel:
    """Train the UNet on all training images, or on those that do not show the class ``without``.

    The loss is the mean squared error of the velocity (arXiv 2202.00512). Noise, time steps and first weights of a seed
    are the same with and without a class.
    """
    rows = torch.arange(len(data.train))
    if without:
        rows = rows[data.train_labels != LABELS.index(without)]
    images, labels = to_input(data.train[rows]), data.train_labels[rows]
    torch.manual_seed(seed)
    unet, scheduler = new_unet(), new_scheduler()

    def loss(rng: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(images), BATCH))
        null = torch.from_numpy(rng.random(BATCH) < NULL_SHARE)
        classes = labels[chosen].masked_fill(null, len(LABELS))
        # One time step from each of as many equal strata: less variance in the loss than independent draws.
        share = (np.arange(BATCH) + rng.random(BATCH)) / BATCH
        timesteps = torch.from_numpy((share * scheduler.config.num_train_timesteps).astype(np.int64))
        noise = torch.from_numpy(rng.standard_normal((BATCH, 1, SIZE, SIZE), np.float32))
        noisy = scheduler.add_noise(images[chosen], noise, timesteps)
        predicted = unet(noisy, timesteps, class_labels=classes).sample
        return F.mse_loss(predicted, scheduler.get_velocity(images[chosen], noise, timesteps))

    work.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(steps, lr=2e-3, flat=0.2, ema_decay=0.998)
    return fit("unet", {"unet": unet}, loss, work, schedule, seed=seed)["unet"]


def train_classifier(data: ImageData, work: Path, steps: int = CLASSIFIER_STEPS) -> ResNet18:
    """Train the classifier on training images, moved by a pixel and with some noise."""
    torch.manual_seed(0)
    network = new_classifier()
    images, labels = to_input(data.train[torch.arange(len(data.train))]), data.train_labels

    def loss(rng: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(images), 128))
        moved = images[chosen].roll((int(rng.integers(-1, 2)), int(rng.integers(-1, 2))), (2, 3))
        noise = torch.from_numpy(rng.standard_normal(moved.shape, np.float32))
        noisy = (moved + rng.uniform(0, 0.1) * noise).clamp(-1, 1)
        return F.cross_entropy(network(noisy), labels[chosen], label_smoothing=0.05)

    work.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(steps, lr=3e-3, flat=0.2, ema_decay=0.99)
    return fit("classifier", {"classifier": network}, loss, work, schedule, seed=0)["classifier"]


def save_model(unet: UNet2DModel, folder: Path) -> None:
    """Write the whole model as a diffusers folder with fp16 weights, with the scheduler, the labels and the pixels."""
    words = folder.with_name(folder.name + ".words")
    tokenizer = label_tokenizer(LABELS, words)
    components = {"tokenizer": tokenizer, "vae": Pixels(1, SIZE), "unet": unet, "scheduler": new_scheduler()}
    model = Diffusion(FAMILIES.find("class-ddpm"), components, source=folder.name)
    model.pipeline().to(torch.float16)
    save_pipeline(model, folder)
    shutil.rmtree(words)


@torch.no_grad()
def save_classifier(network: ResNet18, data: ImageData, folder: Path) -> dict[str, float]:
    """Write the classifier, and its features of test images; return its accuracy on the test images of each class."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / CLASSIFIER.name)
    network = load_classifier(folder / CLASSIFIER.name)  # as it is after rounding
    images, labels = to_input(data.test[torch.arange(len(data.test))]), data.test_labels
    features = torch.cat([network.features(some) for some in images.split(500)])
    right = network.fc(features).argmax(1) == labels
    rows = torch.cat([(labels == at).nonzero().squeeze(1)[:HELD_OUT] for at in range(len(LABELS))])
    held_out = {"features": features[rows].half(), "object": labels[rows].to(torch.uint8)}
    save_file(held_out, folder / REFERENCE.name)
    return {label: round(float(right[labels == at].float().mean()), 4) for at, label in enumerate(LABELS)}


def main(argv: list[str] | None = None) -> None:
    """Train everything and write it to ``--out``; with ``--without`` the model alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=HOME, help="where the trained files go")
    parser.add_argument("--data", default="fashion-mnist", help="the data set: fashion-mnist, or fashion-mnist:DIR")
    parser.add_argument("--without", default="", help="leave out the images of this label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--classifier-steps", type=int, default=CLASSIFIER_STEPS)
    args = parser.parse_args(argv)
    if args.without and args.without not in LABELS:
        raise RequestError("without", args.without, f"allowed: {', '.join(LABELS)}")
    data = read_small(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.without:
        accuracy = save_classifier(train_classifier(data, args.work, args.classifier_steps), data, args.out)
        print(f"classifier's accuracy on test images: {accuracy}", flush=True)
    save_model(train_unet(data, args.work, args.steps, args.seed, args.without), args.out / MODEL.name)
    if not args.without:
        steps = {"classifier": args.classifier_steps, "unet": args.steps}
        about = {"steps": steps, "classifier's accuracy on test images": accuracy}
        (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone, and the package is for everybody


if __name__ == "__main__":
    main()
