"""Adapters: where they stand, and that fusing them changes no prediction."""

from __future__ import annotations

import pytest
import torch

from erase_concept import masks
from erase_concept.closed_form import matrices
from erase_concept.errors import RequestError
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.adapters import Adapters, in_transformers


def test_adapters_stand_in_the_layers_only_while_attached(family: Diffusion) -> None:
    noisy, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    prompts = family.encode_prompts(["a square", "one circle"])
    base = family.predict(noisy, t, prompts)
    adapters = Adapters(family.unet, None, torch.Generator().manual_seed(0), in_transformers(family.family.layers))
    model = family.with_components(unet=adapters)
    for up in adapters.up.values():
        up.data.fill_(0.1)
    with adapters.attached():
        adapted = model.predict(noisy, t, prompts)
        with adapters.off():
            assert torch.equal(model.predict(noisy, t, prompts), base)
    assert not torch.allclose(adapted, base)
    assert torch.equal(family.predict(noisy, t, prompts), base)
    adapters.fuse()
    torch.testing.assert_close(family.predict(noisy, t, prompts), adapted.detach())


def test_a_mask_that_leaves_no_layer_for_an_adapter_is_refused(tiny: Diffusion) -> None:
    only = masks.expand_to(masks.all_ones({"conv_in.weight": tuple(tiny.unet.conv_in.weight.shape)}), tiny.unet)
    with pytest.raises(RequestError, match=r"mask\.kind .*adapter"):
        Adapters(tiny.unet, only, torch.Generator(), in_transformers(tiny.family.layers))


def test_adapters_can_be_of_keys_and_values_alone_and_tell_the_weights_they_make(family: Diffusion) -> None:
    adapters = Adapters(
        family.unet, None, torch.Generator().manual_seed(0), family.family.layers.is_key_or_value, down="normal"
    )
    assert adapters.weights().keys() == matrices(family.unet).keys()
    downs = torch.cat(list(adapters.down.values())).detach()
    assert float(downs.std()) == pytest.approx(1, abs=0.2)
    for up in adapters.up.values():
        up.data.fill_(0.5)
    made = adapters.weights()
    adapters.fuse()
    assert all(torch.equal(made[name], weight) for name, weight in matrices(family.unet).items())
