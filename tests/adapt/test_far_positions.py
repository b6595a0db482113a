"""Rotary embeddings that depend on the longest sequence of a forward pass are found, and keep requests apart."""

from __future__ import annotations

import pytest
import torch
from tests.adapt.models import make_model
from transformers import PreTrainedModel

from shardwright.adapt.far_positions import far_position_turns_others
from shardwright.adapt.rungs import AttentionRung
from shardwright.worker.ladder import climb

ORIGINAL = 32
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
CPU = torch.device("cpu")


def rotated(rope_parameters: dict[str, object], **config: object) -> PreTrainedModel:
    model = make_model("llama", rope_parameters=rope_parameters, initializer_range=0.2, **config)
    model.set_attn_implementation("eager")
    return model


def test_frequencies_for_long_sequences_turn_short_ones() -> None:
    assert far_position_turns_others(rotated(LONGROPE), num_positions=256)
    assert not far_position_turns_others(rotated(LONGROPE), num_positions=ORIGINAL)


def test_dynamic_frequencies_turn_others_past_the_original_length() -> None:
    model = rotated(DYNAMIC, max_position_embeddings=ORIGINAL)
    assert far_position_turns_others(model, num_positions=256)
    assert not far_position_turns_others(model, num_positions=ORIGINAL)


@pytest.mark.parametrize("rope_parameters", [YARN, {"rope_type": "default", "rope_theta": 10000.0}])
def test_fixed_frequencies_turn_nobody(rope_parameters: dict[str, object]) -> None:
    assert not far_position_turns_others(rotated(rope_parameters), num_positions=256)


@pytest.mark.parametrize(("num_positions", "rung"), [(256, AttentionRung.PER_REQUEST), (32, AttentionRung.INTERFACE)])
def test_requests_are_packed_up_to_the_original_length_only(num_positions: int, rung: AttentionRung) -> None:
    model = climb(
        rotated(LONGROPE), num_positions=num_positions, vocab_size=128, block_size=4, dtype=torch.float32,
        compute_dtype=torch.float32, device=CPU,
    )  # fmt: skip
    assert model.rung is rung
    assert ("--max-model-len" in model.rung_reason) == (rung is AttentionRung.PER_REQUEST)
