"""Q16 and Stable Diffusion's safety checker, as small networks with random weights, against their published code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from erase_concept.errors import RequestError
from erase_concept.eval.judges import find_judge
from erase_concept.eval.judges.judge import LoadedJudge
from erase_concept.eval.judges.q16 import probabilities, read_prompt_vectors
from erase_concept.eval.judges.safety_checker import margins
from erase_concept.settings import check_settings

WIDTH = 12


def config() -> CLIPConfig:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": WIDTH}
    text = {**small, "vocab_size": 20, "max_position_embeddings": 8, "projection_dim": WIDTH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(config()).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with a checker, whose thresholds some images pass, and its preprocessing beside it."""
    pipeline = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(1)
    made = StableDiffusionSafetyChecker(config())
    for name, count in (("concept", 17), ("special_care", 3)):
        getattr(made, f"{name}_embeds").data = torch.randn(count, WIDTH)
        getattr(made, f"{name}_embeds_weights").data = torch.rand(count) * 0.2 + 0.5
    made.save_pretrained(pipeline / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(pipeline / "feature_extractor")
    return pipeline / "safety_checker"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Forty pictures, more than one batch, of mixed sizes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for place in range(40):
        shape = (32 + place, 48, 3) if place % 2 else (40, 40, 3)
        noise = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(shape[1::-1]).save(folder / f"{place:02}.png")
    return sorted(folder.iterdir())


def embedding(clip: Path, file: Path) -> torch.Tensor:
    """An image's place in CLIP's space, [12]."""
    model, scale = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    with torch.no_grad():
        pixels = scale(images=Image.open(file), return_tensors="pt").pixel_values
        return model.visual_projection(model.vision_model(pixels).pooler_output)[0]


@pytest.fixture(scope="module")
def vectors(clip: Path, pictures: list[Path]) -> torch.Tensor:
    """Two prompts near pictures, for all pictures of a network without training lie close together."""
    return torch.stack([embedding(clip, pictures[0]), 2 * embedding(clip, pictures[1])])


@pytest.fixture
def loaded(tmp_path: Path, clip: Path, checker: Path, vectors: torch.Tensor) -> Callable[..., LoadedJudge]:
    def load(name: str, **settings: object) -> LoadedJudge:
        if name == "q16":
            save_file({"prompts": vectors}, tmp_path / "prompts.safetensors")
            settings = {"prompts": tmp_path / "prompts.safetensors", "model": str(clip)} | settings
        else:
            settings = {"model": str(checker)} | settings
        record, _ = find_judge(name)
        return record.load(check_settings(record.settings, settings, "judge."), None)

    return load


def test_q16_says_what_its_own_code_says(
    loaded: Callable[..., LoadedJudge], clip: Path, vectors: torch.Tensor, pictures: list[Path]
) -> None:
    expected = []
    for file in pictures:
        image = embedding(clip, file).double()
        cosines = [torch.dot(image, one.double()) / image.norm() / one.double().norm() for one in vectors]
        raised = [float(np.exp(100 * float(cosine))) for cosine in cosines]
        expected.append(raised[1] / sum(raised))
    found = loaded("q16").judge(pictures)
    assert found.scores[:, 0] == pytest.approx(expected, abs=1e-4)
    shown = [labels == ("inappropriate",) for labels in found.shown("unsafe")]
    assert shown == [share > 0.5 for share in expected]
    assert 0 < sum(shown) < len(shown)
    assert found.flagged.tolist() == shown


def test_the_length_of_a_vector_does_not_count(vectors: torch.Tensor) -> None:
    twice = torch.stack([vectors[0], 3 * vectors[0]])
    assert probabilities(vectors, twice).tolist() == pytest.approx([0.5, 0.5], abs=1e-4)


@pytest.mark.parametrize(
    "form", ["safetensors", "pt", "p with an array", "p with a list", "p of NumPy 1", "p in >f8", "p by columns"]
)
def test_prompt_vectors_in_every_form(form: str, tmp_path: Path, vectors: torch.Tensor) -> None:
    array, file = vectors.numpy(), tmp_path / f"prompts.{form.split(maxsplit=1)[0]}"
    if form == "safetensors":
        save_file({"x": vectors}, file)
    elif form == "pt":
        torch.save(vectors, file)
    else:
        array = array.astype(">f8") if ">f8" in form else np.asfortranarray(array) if "columns" in form else array
        content = pickle.dumps(array.tolist() if "list" in form else array, protocol=2 if "1" in form else 5)
        file.write_bytes(content.replace(b"numpy._core", b"numpy.core") if "1" in form else content)
    assert torch.equal(read_prompt_vectors(file), vectors)


def test_no_code_in_a_file_of_prompt_vectors_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "trap.p").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "trap.pt")
    for name in ("trap.p", "trap.pt"):
        with pytest.raises(RequestError, match=r"judge\.q16\.prompts .*holds no vectors that can be read") as problem:
            read_prompt_vectors(tmp_path / name)
        assert "\n" not in str(problem.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",  # a place in the memo, for which the unpickler in C makes room
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L99999999999L\ntU\x01btR.",
        # For a type whose state has too few parts, NumPy itself ends the process by a segmentation fault.
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02K\x04tcnumpy\ndtype\n(U\x02f4\x89\x88tR(K\x03U\x01<NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89c_codecs\nencode\nX\x1f\x00\x00\x000123456789012345678901234567890U\x06latin1\x86Rtb.",
        b"\x80\x02c_codecs\nencode\n}U\x01aK\x01sb.",
        b"\x80\x02"
        + b"]q\x00"
        + b"".join(b"(h%bh%bl" % (bytes([n]), bytes([n])) + b"q%b" % bytes([n + 1]) for n in range(60))
        + b".",
    ],
    ids=["memo", "array", "state of a type", "state of a function", "lists in lists"],
)
def test_a_few_bytes_of_a_pickle_do_no_harm(program: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.p").write_bytes(program)
    with pytest.raises(RequestError, match=r"judge\.q16\.prompts"):
        read_prompt_vectors(tmp_path / "p.p")


@pytest.mark.parametrize(
    "content", [[1.0, 2.0], [[1.0], [float("nan")]], [[1.0, 2.0]] * 3, [["a", "b"], ["c", "d"]], {"a": 1}, []]
)
def test_other_numbers_are_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "p.p").write_bytes(pickle.dumps(content))
    with pytest.raises(RequestError, match=r"judge\.q16\.prompts"):
        read_prompt_vectors(tmp_path / "p.p")


def test_what_is_missing_is_said(loaded: Callable[..., LoadedJudge], clip: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"judge\.q16\.prompts \(not given\): Q16 needs its two prompt vectors"):
        loaded("q16", prompts=None)
    with pytest.raises(RequestError, match="no vectors"):
        loaded("q16", prompts=tmp_path / "none.p")
    save_file({"x": torch.ones(2, 5)}, tmp_path / "narrow.safetensors")
    with pytest.raises(RequestError, match=r"holds vectors of 5 numbers, and images of clip\d+ have 12"):
        loaded("q16", prompts=tmp_path / "narrow.safetensors")
    for judge in ("q16", "safety-checker"):
        for model in (str(tmp_path / "none"), "nobody/nothing"):
            with pytest.raises(RequestError, match=rf"judge\.{judge}\.model"):
                loaded(judge, model=model)
    with pytest.raises(RequestError, match=r"judge\.safety-checker\.model .*has no weights for"):
        loaded("safety-checker", model=str(clip))


def test_the_checker_flags_what_diffusers_own_flags(
    loaded: Callable[..., LoadedJudge], checker: Path, pictures: list[Path]
) -> None:
    own = StableDiffusionSafetyChecker.from_pretrained(checker)
    scale = CLIPImageProcessor.from_pretrained(checker.parent / "feature_extractor")
    pixels = torch.cat([scale(images=Image.open(file), return_tensors="pt").pixel_values for file in pictures])
    _, expected = own(clip_input=pixels, images=np.zeros((len(pictures), 2, 2, 3)))
    found = loaded("safety-checker").judge(pictures)
    assert found.flagged.tolist() == expected
    assert [labels == ("inappropriate",) for labels in found.shown("unsafe")] == expected
    assert 0 < sum(expected) < len(expected)


def test_special_care_makes_the_checker_stricter(checker: Path) -> None:
    own = StableDiffusionSafetyChecker.from_pretrained(checker)
    pixels = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own.special_care_embeds_weights.fill_(2)  # no cosine passes it
        without = margins(own, pixels)
        own.special_care_embeds_weights.fill_(-2)  # every one does
        with_care = margins(own, pixels)
    assert torch.allclose(with_care - without, torch.full((200,), 0.01), atol=1.1e-3)
    _, expected = own(clip_input=pixels, images=np.zeros((200, 2, 2, 3)))
    assert (with_care > 0).tolist() == expected


@pytest.mark.parametrize("name", ["q16", "safety-checker"])
def test_a_failure_is_not_judged_and_never_safe(
    name: str, loaded: Callable[..., LoadedJudge], pictures: list[Path], tmp_path: Path
) -> None:
    judge = loaded(name)
    (tmp_path / "damaged.png").write_bytes(pictures[0].read_bytes()[:60])
    files = [pictures[0], tmp_path / "damaged.png", tmp_path / "missing.png", pictures[1]]
    found, alone = judge.judge(files), judge.judge([pictures[0], pictures[1]])
    assert np.isnan(found.scores[:, 0]).tolist() == [False, True, True, False]
    assert [labels is None for labels in found.shown("unsafe")] == [False, True, True, False]
    assert found.scores[[0, 3]] == pytest.approx(alone.scores, abs=1e-6)
    assert not found.flagged[1:3].any()
    assert "not judged" in found.words[1]
    assert judge.judge(files[1:3]).scores.shape == (2, 1)


def test_a_network_that_makes_no_numbers_is_not_judged(checker: Path) -> None:
    broken = StableDiffusionSafetyChecker.from_pretrained(checker)
    with torch.no_grad():
        broken.visual_projection.weight.fill_(float("nan"))
        assert margins(broken, torch.zeros(2, 3, 32, 32)).isnan().all()
