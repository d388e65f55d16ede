"""Forget and retain data: from the model itself and from folders of images."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from erase_concept.data import ForgetRetain, draw, draw_evenly
from erase_concept.errors import RequestError
from erase_concept.image_folders import image_files
from erase_concept.make_data import make_data
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.catalog import catalog
from erase_concept.prompts.concept import Concept, combine
from erase_concept.prompts.find import find_concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_seed

SMALL = {"forget": 5, "retain": 3, "steps": 2, "guidance": 2.0}


def test_draw_repeats_only_when_it_must() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw(5, 5, generator).tolist()) == [0, 1, 2, 3, 4]
    counts = draw(3, 8, generator).bincount(minlength=3)
    assert counts.sum() == 8
    assert counts.max() - counts.min() <= 1


def test_same_seed_same_data_and_comes_back_from_its_file(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    first, again = (make_data(tiny, square, DataRecipe(**SMALL), seed=1) for _ in range(2))
    other = make_data(tiny, square, DataRecipe(**SMALL), seed=2)
    assert first.forget_latents.shape == (5, 4, 8, 8)
    assert first.remap.shape[:2] == (2, 2)  # circle, the anchor, and line; two prompts
    assert not torch.equal(first.forget_latents, other.forget_latents)
    first.save(tmp_path / "data.safetensors", "abc")
    back = ForgetRetain.load(tmp_path / "data.safetensors", "abc")
    for field in fields(ForgetRetain):
        value = getattr(first, field.name)
        assert torch.equal(value, getattr(again, field.name))
        assert torch.equal(value, getattr(back, field.name))
    assert ForgetRetain.load(tmp_path / "data.safetensors", "other") is None
    assert ForgetRetain.load(tmp_path / "absent.safetensors", "abc") is None


def test_images_of_a_folder_are_encoded_in_the_order_of_their_names(
    tiny: Diffusion, square: Concept, tmp_path: Path
) -> None:
    for name, colour in (("b.png", 255), ("a.png", 0), ("c.jpg", 128)):
        Image.fromarray(np.full((20, 30, 3), colour, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = make_data(tiny, square, DataRecipe(**SMALL, forget_images=tmp_path), seed=1)
    assert data.forget_latents.shape == (3, 4, 8, 8)
    posterior = tiny.vae.encode(torch.full((1, 3, 16, 16), -1.0)).latent_dist
    away = (data.forget_latents[0] / tiny.vae.config.scaling_factor - posterior.mean[0]).abs() / posterior.std[0]
    assert float(away.max()) < 6  # the black image first, drawn from its own posterior


def test_images_to_retain_are_captioned_by_their_folder(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    for name, count in (("line", 3), ("circle", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    data = make_data(tiny, square, DataRecipe(**SMALL, retain_images=tmp_path), seed=1)
    captions = [square.retain_prompts[i] for i in data.retain_which]
    assert captions[0] in square.prompts_for("circle")
    assert set(captions[1:]) == set(square.prompts_for("line"))
    (tmp_path / "dot").mkdir()
    with pytest.raises(RequestError, match=r"has a folder 'dot'; needed: a folder each for circle, line"):
        make_data(tiny, square, DataRecipe(**SMALL, retain_images=tmp_path), seed=1)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "loose.png")
    (tmp_path / "dot").rmdir()
    with pytest.raises(RequestError, match=r"images outside of such folders"):
        make_data(tiny, square, DataRecipe(**SMALL, retain_images=tmp_path), seed=1)


def test_bad_folders_are_named(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data.retain_images .*: no such folder"):
        make_data(tiny, square, DataRecipe(**SMALL, retain_images=tmp_path / "absent"), seed=1)
    with pytest.raises(RequestError, match=r"data.forget_images .*: holds no image"):
        make_data(tiny, square, DataRecipe(**SMALL, forget_images=tmp_path), seed=1)
    (tmp_path / "x.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(RequestError, match=r"x\.png: no readable image"):
        make_data(tiny, square, DataRecipe(**SMALL, forget_images=tmp_path), seed=1)


def test_data_of_another_size(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    data = make_data(
        tiny, square, DataRecipe(forget=2, retain=3, steps=1, guidance=2.0, size=8, forget_images=tmp_path), seed=1
    )
    assert (data.forget_latents.shape, data.retain_latents.shape) == ((1, 4, 4, 4), (3, 4, 4, 4))
    with pytest.raises(RequestError, match=r"data.size 10: must be a multiple of 4"):
        make_data(tiny, square, DataRecipe(forget=2, retain=3, steps=1, guidance=2.0, size=10), seed=1)


def test_spans_are_where_a_prompt_names_what_it_is_about(tiny: Diffusion, square: Concept) -> None:
    """The tiny tokenizer has a token for each letter, so the places can be counted."""
    data = make_data(tiny, square, DataRecipe(**SMALL), seed=1)
    # "a square" is <start> a s q u a r e <end>, "one square" <start> o n e s q u a r e <end>.
    assert data.forget_spans.tolist() == [[2, 8], [4, 10]]
    assert data.anchor_spans.tolist() == [[2, 8], [4, 10]]  # "a circle", "one circle"


def test_a_name_that_is_not_found_stands_for_all_words(tiny: Diffusion) -> None:
    joined = Concept("square", "object", "circle", ("a {O}s", "{O} {O}"), retain=("line",))
    spans = make_data(tiny, joined, DataRecipe(**SMALL), seed=1).forget_spans.tolist()
    assert spans == [[1, 9], [7, 13]]  # "squares" is one word; of two, the last


def test_no_rows_are_made_of_what_is_not_needed(tiny: Diffusion, square: Concept) -> None:
    data = make_data(tiny, square, DataRecipe(retain=3, steps=1, guidance=2.0), seed=1, parts=("retain",))
    assert len(data.forget_latents) == len(data.forget_which) == 0
    assert len(data.forget) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 40])
def test_draws_are_even_among_concepts(size: int) -> None:
    parts = torch.tensor([0] * 9 + [2] * 4 + [1] * 2)
    drawn = draw_evenly(parts, size, torch.Generator().manual_seed(size))
    counts = parts[drawn].bincount(minlength=3)
    assert counts.sum() == size
    assert counts.max() - counts.min() <= 1
    for part, own in ((0, 9), (1, 2), (2, 4)):
        rows = drawn[parts[drawn] == part].bincount(minlength=15)[parts == part]
        assert rows.max() <= -(-int(counts[part]) // own)  # without repetition as far as there are enough
    # The remainder falls on each of them now and then; a single concept draws as ever.
    extra = {int(parts[draw_evenly(parts, 1, torch.Generator().manual_seed(seed))]) for seed in range(20)}
    assert extra == {0, 1, 2}
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(draw_evenly(torch.full((6,), 3), 4, one), draw(6, 4, other))


@pytest.fixture
def shapes(square: Concept) -> Concept:
    star = Concept("star", "custom", "dot", ("a {O}", "one {O}", "{O}"), ("dot", "line", "arc"), synonyms=("sun",))
    return combine([square, star])


def test_each_of_several_concepts_has_rows_of_its_own(tiny: Diffusion, shapes: Concept) -> None:
    data = make_data(tiny, shapes, DataRecipe(**SMALL, anchor=2), seed=1)
    square, star = shapes.combined
    assert data.forget_parts.tolist() == [0] * 2 + [1] * 6
    assert data.parts_of_rows.tolist() == [0] * 5 + [1] * 5 + [0] * 2 + [1] * 2
    assert len(data.retain_latents) == len(data.retain_which) == 3
    prompts = [shapes.retain_prompts[i] for i in data.retain_which]
    assert all(prompt in part.retain_prompts for prompt, part in zip(prompts, (square, square, star), strict=True))
    assert len(data.retain) == len(shapes.retain_prompts)
    # What each prompt becomes: the anchor, and as many of its own retained names as all concepts have.
    assert data.remap.shape[:2] == (2, 8)
    assert data.anchor_spans.shape == data.forget_spans.shape == (8, 2)
    embedded = {name: tiny.encode_prompts(star.prompts_for(name)) for name in ("star", "dot", "line")}
    assert torch.allclose(data.forget[2:5], embedded["star"], atol=1e-6)
    assert torch.allclose(data.remap[0, 5:], embedded["dot"], atol=1e-6)
    assert torch.allclose(data.remap[1, 2:5], embedded["line"], atol=1e-6)
    # Another concept beside it changes nothing of its rows.
    other = combine([shapes.combined[1], Concept("cube", "custom", "dot", ("a {O}",), ("dot",))])
    again = make_data(tiny, other, DataRecipe(**SMALL), seed=1)
    assert torch.equal(again.forget_latents[:5], data.forget_latents[5:])
    generator = torch.Generator().manual_seed(0)
    for of, low, high in (("both", 0, 14), ("forget", 0, 10), ("anchor", 10, 14)):
        rows = data.draw_forget(4, generator, of)
        assert data.parts_of_rows[rows].bincount().tolist() == [2, 2]
        assert low <= int(rows.min()) <= int(rows.max()) < high


def test_images_of_several_concepts_lie_in_folders_of_their_names(
    tiny: Diffusion, shapes: Concept, tmp_path: Path
) -> None:
    for name, count in (("star", 3), ("square", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((16, 16, 3), 50 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    data = make_data(tiny, shapes, DataRecipe(**SMALL, forget_images=tmp_path), seed=1)
    assert data.parts_of_rows.tolist() == [0, 1, 1, 1]
    assert all(shapes.forget_prompts[i] in shapes.combined[1].prompts_for("star") for i in data.forget_which[1:])
    (tmp_path / "square" / "0.png").unlink()
    with pytest.raises(RequestError, match=r"data.forget_images .*has no image of square"):
        make_data(tiny, shapes, DataRecipe(**SMALL, forget_images=tmp_path), seed=1)


def test_prompts_as_they_stand_become_the_empty_prompt(tiny: Diffusion) -> None:
    asked = Concept("file", "custom", prompts=("file it", "two dots"), others=("", "a line"))
    data = make_data(tiny, asked, DataRecipe(**SMALL, anchor=2), seed=1)
    assert torch.allclose(data.forget, tiny.encode_prompts(asked.prompts), atol=1e-6)
    assert data.remap.shape[:2] == (1, 2)
    assert torch.allclose(data.remap[0], tiny.encode_uncond().expand(2, -1, -1), atol=1e-6)
    assert data.forget_spans.tolist() == [[1, 7], [1, 8]]  # all words, though "file" is the concept's name
    assert len(data.anchor_latents) == 2


def test_a_concepts_own_images_are_its_forget_rows(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    seen = Concept("star", "custom", "", ("a {O}",), ("dot",), images=str(tmp_path))
    data = make_data(tiny, combine([square, seen]), DataRecipe(**SMALL), seed=1)
    assert data.parts_of_rows.tolist() == [0] * 5 + [1] * 3
    alone = make_data(tiny, seen, DataRecipe(**SMALL), seed=1)
    given = make_data(tiny, replace(seen, images=""), DataRecipe(**SMALL, forget_images=tmp_path), seed=1)
    assert torch.equal(alone.forget_latents, given.forget_latents)
    (tmp_path / "none").mkdir()
    with pytest.raises(RequestError, match=r"concept .*: holds no image"):
        make_data(tiny, replace(seen, images=str(tmp_path / "none")), DataRecipe(**SMALL), seed=1)


def test_rows_are_sampled_as_the_settings_say(tiny: Diffusion, square: Concept) -> None:
    """DDIM without noise is diffusers' own; with noise it is another image."""
    ddim = {"scheduler": "DDIMScheduler"}
    made = [make_data(tiny, square, DataRecipe(**SMALL, **more), seed=1) for more in ({}, ddim, {**ddim, "eta": 1.0})]
    plain, quiet, noisy = (data.forget_latents for data in made)
    assert not torch.allclose(plain, quiet)
    assert not torch.allclose(quiet, noisy)
    seed, prompt = stage_seed(1, "forget", 0), made[1].forget[made[1].forget_which[:1]]
    scheduler = DDIMScheduler.from_config(tiny.scheduler.config)
    scheduler.set_timesteps(2)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = [tiny.unet(latents, t, embedding).sample for embedding in (made[1].uncond, prompt)]
            latents = scheduler.step(both[0] + 2.0 * (both[1] - both[0]), t, latents).prev_sample
    torch.testing.assert_close(quiet[:1], latents, rtol=1e-3, atol=1e-3)


def test_flipped_rows_are_themselves_or_their_mirror_images(tiny: Diffusion, square: Concept) -> None:
    data = make_data(tiny, square, DataRecipe(**SMALL, flip=True), seed=1)
    generator, rows = torch.Generator().manual_seed(0), torch.arange(3).repeat(40)
    found = data.forget_batch(tiny, rows, generator).latents, data.retain_batch(tiny, rows, generator).latents
    for latents, own in zip(found, (data.forget_latents[rows], data.retain_latents[rows]), strict=True):
        same, mirrored = ((latents == other).all(-1).all(-1).all(-1) for other in (own, own.flip(-1)))
        assert (same ^ mirrored).all()
        assert 40 < int(same.sum()) < 80
    plain = replace(data, flip=torch.tensor(False)).forget_batch(tiny, rows, generator).latents
    assert torch.equal(plain, data.forget_latents[rows])


def _data_set(folder: Path, *names: str) -> Path:
    """Lay one image of each name into a folder of that name."""
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / name / f"{name}_1.JPEG")
    return folder


def test_imagenettes_own_folders_are_known(tmp_path: Path) -> None:
    """A run takes the folders that it needs, from the data set or from its train images."""
    classes = catalog("imagenette").folders
    root = _data_set(tmp_path / "imagenette2" / "train", *classes).parent
    _data_set(root / "val", *classes)
    tench = find_concept("tench")
    for folder in (root, root / "train"):
        assert image_files(folder, tench, part="forget") == {root / "train/n01440764/n01440764_1.JPEG": "tench"}
        retained = image_files(folder, tench, part="retain")
        assert set(retained.values()) == {*tench.retain}
        assert all(classes[file.parent.name] == name for file, name in retained.items())
    few = tench.changed({"retain": ["church", "golf ball"]})
    assert set(image_files(root, few, part="retain").values()) == {"church", "golf ball"}


def test_folders_of_classes_in_any_spelling(tmp_path: Path) -> None:
    pump = find_concept("gas pump")
    root = _data_set(tmp_path, "gas_pump", "golf_ball", "English-springer", "church")
    assert {*image_files(root, pump, part="forget").values()} == {"gas pump"}
    assert {*image_files(root, pump, part="retain").values()} == {"golf ball", "English springer", "church"}
    artist = find_concept("Vincent van Gogh")
    assert {*image_files(_data_set(tmp_path / "styles", "Van_Gogh"), artist, part="forget").values()} == {artist.name}
    (tmp_path / "chruch").mkdir()  # what nobody knows is a slip of the keyboard
    with pytest.raises(RequestError, match=r"data.retain_images .*has a folder 'chruch'; needed: a folder each for"):
        image_files(root, pump, part="retain")


def test_what_the_prompts_become_may_be_other_sentences(tiny: Diffusion) -> None:
    style = Concept(
        "ink", "style", "", ("a {O} dot", "{O}"), ("wax",), synonyms=("pen",), anchor_templates=("a dot", "")
    )
    data = make_data(tiny, style, DataRecipe(**SMALL, anchor=4), seed=1)
    assert torch.allclose(data.remap[0], tiny.encode_prompts(["a dot", "", "a dot", ""]), atol=1e-6)
    assert torch.allclose(data.remap[1], tiny.encode_prompts(["a wax dot", "wax"] * 2), atol=1e-6)
    assert len(data.anchor_latents) == 4
