"""Inferred plans as they are written: for Transformers and vLLM as well."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tests.custom.builder import MODELS, save_weights
from tests.plans.in_transformers import RANKS, compare
from tests.plans.test_infer import Attention, Chosen, Raw, Wide, on_meta
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn

from shardwright.cli.main import run_command
from shardwright.models.build import build_module
from shardwright.plans.infer import infer_plan
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.portable import portable
from shardwright.plans.units import unit_groups


def as_written(module: nn.Module) -> ParallelPlan:
    plan = infer_plan(module)
    return portable(plan, module, unit_groups(module, plan))


def of_zoo(model_type: str) -> nn.Module:
    module = build_module(make_config(model_type, {}), torch.float32, trust_remote_code=False)
    module.tie_weights(recompute_mapping=False)
    return module


class Asking(nn.Module):
    """Attention that views what it computed in head counts that it asks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        self.q, self.k, self.v, self.out = (nn.Linear(48, 48) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part(x).view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(made.transpose(1, 2).reshape(b, t, c))


class Stacked(nn.Sequential):
    """Transformers calls both of its linears `stacked.*`."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))


class Confusable(nn.Module):
    """The name of a linear that cannot be cut begins with that of one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_scale, self.down = nn.Linear(48, 96), nn.Linear(48, 1), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * self.up_scale(x)


def of_layer(plan: ParallelPlan) -> dict[str, str]:
    return {name.removeprefix("layer_0.parts."): word for name, word in plan.tp.items() if "layer_0.parts." in name}


def test_what_all_can_cut_is_written_as_it_is() -> None:
    for model_type in ("llama", "qwen3_moe", "bloom"):
        module = of_zoo(model_type)
        assert as_written(module) == infer_plan(module)


def test_parts_of_one_weight_are_put_together() -> None:
    assert of_layer(as_written(on_meta(Attention))) == {
        "attention.qkv": "colwise_gather_output",
        "attention.out": "rowwise_split_input",
    }


def test_code_that_asks_for_head_counts_is_given_all_heads() -> None:
    module = on_meta(Asking)
    assert of_layer(infer_plan(module))["asking.q"] == "colwise"
    words = of_layer(as_written(module))
    assert words == dict.fromkeys(("asking.q", "asking.k", "asking.v"), "colwise_gather_output") | {
        "asking.out": "rowwise_split_input"
    }


def test_bare_parameters_and_their_sums_are_left_out() -> None:
    module = on_meta(Raw, Wide)
    assert of_layer(as_written(module)) == {
        name: word for name, word in of_layer(infer_plan(module)).items() if name.startswith("wide")
    }
    gpt2 = as_written(of_zoo("gpt2"))
    assert set(gpt2.tp) == {"transformer.wte", "lm_head"}, "its weights are [inputs, outputs]"


def test_what_transformers_calls_by_one_name_is_left_out() -> None:
    module = on_meta(Stacked, Chosen)
    inferred = of_layer(infer_plan(module))
    assert (inferred["stacked.0"], inferred["stacked.2"]) == ("colwise", "rowwise")
    assert of_layer(as_written(module)) == {"chosen.experts.*.0": "colwise", "chosen.experts.*.2": "rowwise"}


def test_the_first_entry_that_a_name_begins_with_is_its_own() -> None:
    module = on_meta(Confusable)
    plan = as_written(module)
    words = {}
    for name, held in module.named_modules():
        if isinstance(held, nn.Linear):
            words[name] = next((w for p, w in plan.tp.items() if re.match(p, name)), "replicate")
    assert words["layer_0.parts.confusable.up"] == "colwise"
    assert words["layer_0.parts.confusable.up_scale"] == "replicate"
    assert words["layer_1.parts.confusable.down"] == "rowwise"


def test_what_shares_its_weight_with_what_is_held_whole_is_held_whole() -> None:
    words = infer_plan(module := of_zoo("bert")).tp
    assert words["bert.embeddings.word_embeddings"] == "embedding_rowwise"
    shares_a_bias = "cls.predictions.decoder"
    assert words[shares_a_bias] == "colwise_gather_output"
    assert not {"bert.embeddings.word_embeddings", shares_a_bias} & as_written(module).tp.keys()


@pytest.mark.slow
def test_transformers_runs_what_is_written(tmp_path: Path) -> None:
    custom, zoo, file = tmp_path / "custom", tmp_path / "zoo", tmp_path / "plan.json"
    shutil.copytree(MODELS / "tiled_heads", custom)
    save_weights(custom, 0)
    draw(make_config("bloom", {}), 0).save_pretrained(zoo)
    for model, target in ((custom, file), (zoo, zoo / "config.json")):
        assert run_command(["plan", "infer", str(model), "--write", str(target), "--trust-remote-code"]) == 0
    mp.spawn(compare, ([(custom, file), (zoo, None)], tmp_path), nprocs=RANKS)
    for rank in range(RANKS):
        for difference, held in json.loads((tmp_path / f"logits-{rank}.json").read_text()):
            assert difference < 1e-4
            assert held < 0.7, "tables of positions are held whole"
