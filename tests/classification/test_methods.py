"""What holds for every method: it wears every mask, goes on from its checkpoint, and moves statistics as agreed."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.classification.data import ForgetRetainImages, cropped, mirrored
from erase_concept.classification.mask import ClassifierMask, make_mask
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.classifiers.classifier import Classifier, head_of
from erase_concept.training.loop import Record

METHODS = tuple(UNLEARNERS.all())
TRAINED = tuple(name for name in METHODS if name not in ("influence", "ssd"))
SMALL = {"epochs": 2, "batch_size": 11, "lr": 0.003, "checkpoint_every": 1, "samples": 5, "damping": 5.0}


def settings_of(name: str, **values: Any) -> Any:
    """A method's settings for a short run."""
    kind = UNLEARNERS.find(name).settings
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in (SMALL | values).items() if key in known})


def twin(model: Classifier) -> Classifier:
    return replace(model, network=copy.deepcopy(model.network))


def test_there_are_the_methods_of_the_papers() -> None:
    assert set(METHODS) >= {
        *("retrain", "fine-tune", "random-label", "gradient-ascent", "influence", "boundary-expand", "boundary-shrink"),
        *("l1-sparse", "salun", "salun-soft", "scrub", "ssd", "bad-teacher"),
    }


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_keep_every_bit(name: str, model: Classifier, data: ForgetRetainImages) -> None:
    after, mask = twin(model), masks.random(model.network, 0.4, seed=1)
    records = list(UNLEARNERS.find(name).run(after, data, mask, settings_of(name), seed=7))
    assert [record.step for record in records] == [*range(1, records[-1].steps + 1)]
    moved = 0
    for key, old in model.network.named_parameters():
        differs = old.view(torch.int32) != after.network.get_parameter(key).view(torch.int32)
        moved += int(differs.sum())
        assert not (differs & ~mask.dense(key)).any(), key
    assert moved
    assert not after.network.training


@pytest.mark.parametrize("name", TRAINED)
def test_a_killed_training_goes_on_to_the_same_bits(
    name: str, model: Classifier, data: ForgetRetainImages, tmp_path: Path
) -> None:
    data = replace(data, crop=1, flip=True)
    run, settings = UNLEARNERS.find(name).run, settings_of(name)
    whole, killed, again = (twin(model) for _ in range(3))
    total = len(list(run(whole, data, None, settings, seed=7)))
    file = tmp_path / "last.safetensors"
    running = run(killed, data, None, settings, seed=7, checkpoint=file)
    for event in running:
        if isinstance(event, Record) and event.step == 2:
            break
    running.close()
    records = list(run(again, data, None, settings, seed=7, checkpoint=file))
    assert [record.step for record in records] == [*range(2, total + 1)]
    state = again.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.network.state_dict().items())


@pytest.mark.parametrize("policy", ["update", "frozen"])
def test_the_statistics_of_batch_norm_move_as_the_policy_says(
    policy: str, model: Classifier, data: ForgetRetainImages
) -> None:
    """A mask freezes none of them; its affine weights are weights like any other, masked."""
    after, mask = twin(model), masks.random(model.network, 0.1, seed=1)
    settings = settings_of("fine-tune", batch_norm=policy)
    list(UNLEARNERS.find("fine-tune").run(after, data, mask, settings, seed=7))
    same = [torch.equal(value, after.network.get_buffer(key)) for key, value in model.network.named_buffers()]
    assert not any(same) if policy == "update" else all(same)
    assert mask.bits.keys() == dict(model.network.named_parameters()).keys()


def test_a_run_of_the_same_seed_has_the_same_bits_and_another_seed_others(
    model: Classifier, data: ForgetRetainImages
) -> None:
    run, settings = UNLEARNERS.find("random-label").run, settings_of("random-label")
    runs = [twin(model) for _ in range(3)]
    for one, seed in zip(runs, (1, 1, 2), strict=True):
        list(run(one, data, None, settings, seed=seed))
    first, second, other = (torch.cat([p.flatten() for p in one.network.parameters()]) for one in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["salient", "least-salient", "random"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_a_mask_has_exactly_its_share(
    kind: str, sparsity: float, model: Classifier, data: ForgetRetainImages, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.network.state_dict())
    mask = make_mask(ClassifierMask(kind, sparsity), model, data, seed=0)
    assert mask is not None
    assert mask.count == round((1 - sparsity) * mask.total)
    assert mask.total == sum(p.numel() for p in model.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    mask.save(tmp_path / "mask.safetensors")
    again = make_mask(ClassifierMask(str(tmp_path / "mask.safetensors")), model, data, seed=9)
    assert again is not None
    assert again.sha256() == mask.sha256()


def test_the_most_and_the_least_salient_half_are_disjoint(model: Classifier, data: ForgetRetainImages) -> None:
    most, least = (make_mask(ClassifierMask(kind), model, data, seed=0) for kind in ("salient", "least-salient"))
    assert most is not None
    assert least is not None
    assert (most & least).count == 0


def test_training_does_not_compute_activations_anew(model: Classifier) -> None:
    with pytest.raises(ValueError, match="not computed anew"), model.in_training(recompute=True):
        pass


def test_a_step_that_is_too_large_is_an_error(model: Classifier, data: ForgetRetainImages) -> None:
    with pytest.raises(EraseError, match="not finite after the step of size"):
        list(UNLEARNERS.find("influence").run(model, data, None, settings_of("influence", alpha=1e39), seed=1))


def test_a_loss_that_is_no_number_names_no_setting_that_a_classifier_lacks(
    model: Classifier, data: ForgetRetainImages, tmp_path: Path
) -> None:
    """It is in a folder that another lr is given another one, and no checkpoint is promised before there is one."""
    run, settings = UNLEARNERS.find("random-label").run, settings_of("random-label", lr=1e30, checkpoint_every=9)
    for checkpoint, more in ((None, ""), (tmp_path / "last.safetensors", ", and choose another folder")):
        with pytest.raises(EraseError, match=rf"the loss is (nan|inf) at step \d: lower lr{more}$"):
            list(run(twin(model), data, None, settings, seed=1, checkpoint=checkpoint))


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_that_changes_no_weight_stops_early(
    name: str, model: Classifier, data: ForgetRetainImages, tmp_path: Path
) -> None:
    """BatchNorm's statistics move all the same, and new weights to begin with are no change of the training's."""
    settings = settings_of(name, lr=0.0, epochs=20)
    with pytest.raises(EraseError, match=r"no weight has changed from step 1 to step 20: raise lr, or .* depends on$"):
        list(UNLEARNERS.find(name).run(twin(model), data, None, settings, seed=7))
    with pytest.raises(EraseError, match=r"to step 20: .* depends on, and choose another folder$"):
        list(UNLEARNERS.find(name).run(twin(model), data, None, settings, seed=7, checkpoint=tmp_path / "last"))
    assert list(UNLEARNERS.find(name).run(model, data, None, replace(settings, lr=1e-6), seed=7))


def test_the_head_is_the_last_linear_layer(model: Classifier) -> None:
    assert head_of(model) == "fc"
    with pytest.raises(RequestError, match="has a last linear layer of 3 outputs; one of 2 outputs is needed"):
        head_of(replace(model, labels=("a", "b")))


def test_crops_and_mirrors_move_whole_images() -> None:
    """Each crop is a window of the padded image, each mirrored image one of the two, and both come about."""
    images = torch.arange(1, 1 + 40 * 2 * 5 * 5).view(40, 2, 5, 5)
    found = cropped(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = {(y, x): padded[:, :, y : y + 5, x : x + 5] for y in range(5) for x in range(5)}
    places = set()
    for row in range(40):
        matching = [place for place, window in windows.items() if torch.equal(window[row], found[row])]
        assert len(matching) == 1
        places.add(matching[0])
    assert len(places) > 10
    turned = mirrored(images, torch.Generator().manual_seed(0))
    flipped = [torch.equal(one, image.flip(-1)) for one, image in zip(turned, images, strict=True)]
    assert all(flip or torch.equal(one, image) for flip, one, image in zip(flipped, turned, images, strict=True))
    assert 5 < sum(flipped) < 35
