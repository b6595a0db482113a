"""Modules that run their own attention are found, with what they keep of each token and how they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapt.models import make_model
from tests.zoo.architectures import OVER_PAGES, STATES
from tests.zoo.builder import make_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from shardwright.adapt import dispatch
from shardwright.adapt.own_calls import OwnCall, Part, Role
from shardwright.adapt.own_probe import find_own_calls
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError


def zoo_model(model_type: str) -> PreTrainedModel:
    config = make_config(model_type, (OVER_PAGES | STATES)[model_type])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def found(model: PreTrainedModel, *, has_states: bool = False) -> list[OwnCall]:
    dispatch.register()
    return find_own_calls(model, num_positions=256, has_states=has_states)


def part(call: OwnCall, name: str) -> Part:
    """What is known of a keyword argument, or of the first tensor in it."""
    return next(part for path, part in call.arguments.items() if name in str(path))


def test_an_index_is_kept_beside_keys_and_values() -> None:
    full, shared, _ = found(zoo_model("glm_moe_dsa"))
    assert [write.method for write in full.writes] == ["update", "update_indexer"]
    assert full.spec(torch.float32).elements_per_token == 16 + 8 + 16
    assert full.spec(torch.bfloat16).elements_per_token == 2 * (16 + 8 + 16)
    assert [write.method for write in shared.writes] == ["update"]


def test_arguments_are_taken_apart_by_what_their_sizes_count() -> None:
    _, shared, _ = found(zoo_model("glm_moe_dsa"))
    assert part(shared, "hidden_states") == Part(Role.TOKENS, token_dim=1, batch_dim=0)
    assert part(shared, "past_key_values") == Part(Role.CACHE)
    assert part(shared, "attention_mask") == Part(Role.MASK, visibility=Visibility())
    assert part(shared, "position_embeddings").token_dim == 1
    assert part(shared, "use_cache").role is Role.ITSELF


def test_attention_that_can_be_captured_is_left_out() -> None:
    calls = found(zoo_model("dots3_note_text"))
    assert [call.name for call in calls] == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def test_what_is_needed_of_the_whole_context_is_kept() -> None:
    """Cosines and sines of all positions: the index turns the means of blocks of keys."""
    [call] = found(zoo_model("qwen4_exp_text"), has_states=True)
    positions = [known for known in call.arguments.values() if known.role is Role.CONTEXT]
    assert len(positions) == 2
    assert call.kept[:2] == [known.kept for known in positions]
    assert call.spec(torch.float32).elements_per_token == sum(kept.width(torch.float32) for kept in call.kept)


def test_keys_and_values_alone_are_kept_for_a_window() -> None:
    sliding, full = found(zoo_model("inkling2_text"), has_states=True)
    assert sliding.visibility == Visibility(VisibilityKind.SLIDING, 16)
    assert full.visibility == Visibility()


def test_states_are_nothing_to_keep_in_rows() -> None:
    with pytest.raises(UnsupportedModelError, match="its layers carry states"):
        found(zoo_model("inkling2_text"))


def test_nothing_is_found_where_all_can_be_captured() -> None:
    with pytest.raises(UnsupportedModelError, match="no module of it is given a cache"):
        found(make_model("llama"))


def test_what_is_no_row_a_token_is_refused() -> None:
    model = zoo_model("doge")

    class Keeps(nn.Module):
        """Something more than there are tokens."""

        def forward(self, states: Tensor, past_key_values: Cache | None) -> None:
            if past_key_values is not None:
                more = torch.cat([states, states[:, :, :1]], dim=2)
                past_key_values.update(more, more, 0)

    attention = model.model.layers[0].self_attn
    attention.keeps, forward = Keeps(), attention.forward

    def forward_and_keep(hidden_states: Tensor, **kwargs: Any) -> Any:
        output = forward(hidden_states=hidden_states, **kwargs | {"past_key_values": None})
        attention.keeps(hidden_states[:, None], past_key_values=kwargs["past_key_values"])
        return output

    attention.forward = forward_and_keep
    with pytest.raises(UnsupportedModelError, match="no row of numbers for each token"):
        found(model)
