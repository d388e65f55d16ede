"""Emoji artwork to labelled 64 x 64 renderings: 20 objects in 4 styles.

``python -m erase_concept.pipelines.emojinette.artwork DIR`` fetches the artwork. It comes from npm packages by name and
version, all under permissive licences; none of it is shipped with erase-concept, only what a model learnt from it.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from erase_concept.pipelines.emojinette import CATALOG

SIZE = 64
_CANVAS = 256  # artwork is drawn large, moved about, and reduced last

PACKAGES = {
    # npm package: (version, licence, attribution)
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "@iconify-json/noto": ("1.2.9", "Apache-2.0", "Noto Emoji, Google Inc."),
    "@iconify-json/twemoji": ("1.2.5", "CC-BY-4.0", "Twemoji, Twitter, Inc. and other contributors"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "@iconify-json/fluent-emoji-high-contrast": ("1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "@expo-google-fonts/noto-emoji": ("0.4.7", "OFL-1.1 and MIT", "Noto Emoji font, Google Inc."),
}

CODEPOINTS = {
    "fish": "1f41f",
    "dog": "1f415",
    "radio": "1f4fb",
    "saw": "1fa9a",
    "church": "26ea",
    "horn": "1f4ef",
    "truck": "1f69a",
    "gas pump": "26fd",
    "golf": "26f3",
    "parachute": "1fa82",
    "cat": "1f431",
    "house": "1f3e0",
    "tree": "1f333",
    "flower": "1f33b",
    "car": "1f697",
    "bicycle": "1f6b2",
    "guitar": "1f3b8",
    "umbrella": "2602",
    "cake": "1f382",
    "rocket": "1f680",
}

# Which packages draw which style. Pixel art is coloured artwork reduced to 16 x 16 blocks.
SOURCES = {
    "3d": ("@lobehub/fluent-emoji-3d", "@iconify-json/noto"),
    "flat": ("@iconify-json/twemoji", "@iconify-json/fluent-emoji-flat"),
    "sketch": ("@iconify-json/fluent-emoji-high-contrast", "@expo-google-fonts/noto-emoji"),
    "pixel": ("@iconify-json/noto", "@iconify-json/twemoji", "@iconify-json/fluent-emoji-flat"),
}

_PASTELS = ((255, 221, 210), (214, 236, 255), (222, 245, 214), (255, 243, 199), (235, 222, 250), (238, 238, 238))


def download(folder: Path) -> None:
    """Fetch and unpack the artwork packages with npm into ``folder/<package name>``; skips those already there.

    Raises RuntimeError when npm is missing or cannot fetch a package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed to fetch the artwork packages: install Node.js")
    for package, (version, _, _) in PACKAGES.items():
        home = folder / package
        if home.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), f"{package}@{version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"npm could not fetch {package}@{version}: {done.stderr.strip()[-300:]}")
        archive = folder / done.stdout.strip().splitlines()[-1]
        partial = folder / "unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        home.parent.mkdir(parents=True, exist_ok=True)
        (partial / "package").rename(home)
        archive.unlink()


@cache
def load(folder: Path) -> dict[tuple[str, str], list[Image.Image]]:
    """Return ``{(object, style): [artwork, ...]}``, each an RGBA image of 256 x 256."""
    return {
        (label, style): [_draw(folder, package, CODEPOINTS[label]) for package in SOURCES[style]]
        for label in CATALOG.labels
        for style in CATALOG.styles
    }


def _draw(folder: Path, package: str, codepoint: str) -> Image.Image:
    """Draw one emoji of one package, fitted into the middle of the canvas."""
    home = folder / package
    if package.startswith("@lobehub"):
        file = next(f for f in (home / f"assets/{codepoint}{end}.webp" for end in ("", "-fe0f")) if f.exists())
        art = Image.open(file).convert("RGBA")
    elif package.startswith("@expo"):
        font = ImageFont.truetype(home / "400Regular/NotoEmoji_400Regular.ttf", 200)
        ink = Image.new("L", (320, 320))
        ImageDraw.Draw(ink).text((160, 160), chr(int(codepoint, 16)), 255, font, anchor="mm")
        art = Image.merge("RGBA", [Image.new("L", ink.size)] * 3 + [ink])
    else:
        art = _draw_svg(home, codepoint)
    art = art.crop(art.getchannel("A").getbbox())
    art.thumbnail((_CANVAS * 7 // 8, _CANVAS * 7 // 8), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (_CANVAS, _CANVAS))
    canvas.paste(art, ((_CANVAS - art.width) // 2, (_CANVAS - art.height) // 2))
    return canvas


def _draw_svg(home: Path, codepoint: str) -> Image.Image:
    import resvg_py

    characters = json.loads((home / "chars.json").read_text(encoding="utf-8"))
    icons = json.loads((home / "icons.json").read_text(encoding="utf-8"))
    name = characters[codepoint]
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" color="black">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_CANVAS)))).convert("RGBA")


def render(art: Image.Image, style: str, rng: np.random.Generator) -> Image.Image:
    """Render one artwork in a style with random placement and background; returns RGB of 64 x 64."""
    if rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    art = art.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    side = round(_CANVAS * rng.uniform(0.84, 1.04))
    art = art.resize((side, side), Image.Resampling.LANCZOS)
    placed = Image.new("RGBA", (_CANVAS, _CANVAS))
    free = abs(_CANVAS - side) // 2 + 6
    middle = (_CANVAS - side) // 2
    x, y = (middle + int(rng.integers(-free, free + 1)) for _ in "xy")
    placed.paste(art, (x, y))
    return _FINISH[style](placed, rng)


def _finish_3d(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    top = np.array([rng.integers(150, 215) for _ in "rgb"], float)
    ramp = np.linspace(0, 1, _CANVAS)[:, None, None]
    sky = np.broadcast_to(top + (248 - top) * ramp, (_CANVAS, _CANVAS, 3))
    back = Image.fromarray(sky.round().astype(np.uint8))
    shadow = ImageChops.offset(art.getchannel("A"), 8, 14).filter(ImageFilter.GaussianBlur(9)).point(lambda a: a * 0.4)
    back.paste((40, 40, 60), mask=shadow)
    back.paste(art, mask=art)
    return back.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _finish_flat(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    back = Image.new("RGB", art.size, _PASTELS[int(rng.integers(len(_PASTELS)))])
    back.paste(art, mask=art)
    return back.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _finish_sketch(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    paper = int(rng.integers(240, 253))
    ink = int(rng.integers(20, 60))
    back = Image.new("RGB", art.size, (paper, paper, paper - 8))
    back.paste((ink, ink, ink + 6), mask=art.getchannel("A"))
    return back.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _finish_pixel(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    back = Image.new("RGB", art.size, tuple(int(rng.integers(16, 46)) for _ in "rgb"))
    back.paste(art, mask=art)
    blocks = back.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX).quantize(12, Image.Quantize.MEDIANCUT)
    return blocks.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)


_FINISH = {"3d": _finish_3d, "flat": _finish_flat, "sketch": _finish_sketch, "pixel": _finish_pixel}


def build(folder: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render ``count`` images spread evenly over the 80 object x style pairs; image i depends on (seed, i) alone.

    Returns images uint8 [count, 64, 64, 3], object indices and style indices, both int64 [count].
    """
    index = np.arange(count)
    objects, styles = index % len(CATALOG.objects), index // len(CATALOG.objects) % len(CATALOG.styles)
    with ProcessPoolExecutor() as pool:
        rows = [part.tolist() for part in np.array_split(index, 64)]
        parts = pool.map(render_rows, repeat(folder), repeat(seed), rows)
        return np.concatenate(list(parts)), objects, styles


def render_rows(folder: Path, seed: int, index: Sequence[int]) -> np.ndarray:
    """Render the images of these numbers, uint8 [n, 64, 64, 3]; image i depends on (seed, i) alone."""
    art = load(folder)
    images = np.empty((len(index), SIZE, SIZE, 3), np.uint8)
    for row, i in enumerate(index):
        label, style = (
            CATALOG.labels[i % len(CATALOG.objects)],
            CATALOG.styles[i // len(CATALOG.objects) % len(CATALOG.styles)],
        )
        variants = art[label, style]
        variant = variants[i // (len(CATALOG.objects) * len(CATALOG.styles)) % len(variants)]
        images[row] = np.asarray(render(variant, style, np.random.default_rng((seed, i))))
    return images


if __name__ == "__main__":
    download(Path(sys.argv[1]))
