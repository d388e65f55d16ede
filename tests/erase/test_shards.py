"""What of Accelerate's engines a masked training refuses; tests/processes holds what shards do."""

from __future__ import annotations

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import check_shards, recipe_for
from erase_concept.run import check
from erase_concept.training.shards import sharding

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment as ``accelerate launch`` makes it for FSDP2."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_without_an_engine_nothing_is_sharded() -> None:
    assert sharding() is None


def test_one_process_has_nothing_to_share(launched: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="num_processes 1: FSDP has nothing to share"):
        sharding()


def test_a_closed_form_needs_no_engine_and_refuses_none(launched: pytest.MonkeyPatch, square: Concept) -> None:
    check_shards(recipe_for("emojinette", square, method="uce"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type DEEPSPEED: ZeRO keeps weights in flat buffers"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type MEGATRON_LM: it has models and an optimizer"),
        ("FSDP_VERSION", "1", "fsdp_version 1: must be 2"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy SIZE_BASED_WRAP: cannot wrap the lists"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading true: must be false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params true: must be false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing true: must be false"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config true: must be false"),
    ],
)
@pytest.mark.filterwarnings("ignore:sync_module_states")
def test_what_a_mask_cannot_hold_is_refused_by_its_name(
    launched: pytest.MonkeyPatch, square: Concept, name: str, value: str, said: str
) -> None:
    launched.setenv(name, value)
    with pytest.raises(RequestError) as refused:
        check(recipe_for("emojinette", square, method="salun"))
    assert str(refused.value).startswith(said)
