from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
from tests.pooling.models import roberta_config, save
from torch import nn
from transformers import RobertaForMaskedLM

from shardwright.cli.structure import joined_name, structure_tree

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"


def make_module() -> nn.Module:
    """Layers 0, 1 and 3 alike; layer 2 wider; two projections of one shape; a tied head."""
    with torch.device("meta"):
        module = nn.Module()
        module.embed = nn.Embedding(10, 4)
        sizes = (4, 4, 8, 4)
        module.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, n), "k": nn.Linear(4, n)}) for n in sizes)
        module.head = nn.Linear(4, 10, bias=False)
        module.head.weight = module.embed.weight
    return module


def test_layers_built_alike_become_one_node() -> None:
    tree = structure_tree(make_module())
    layers = next(child for child in tree.children if child.name == "layers")
    assert [(node.name, node.count) for node in layers.children] == [("0-1, 3", 3), ("2", 1)]
    assert [child.name for child in layers.children[0].children] == ["q", "k"]
    assert layers.children[0].children[0].members == ["layers.0.q", "layers.1.q", "layers.3.q"]


def test_tied_parameters_count_once() -> None:
    tree = structure_tree(make_module())
    assert tree.num_parameters == 40 + 3 * 2 * 20 + 2 * 40
    assert tree.num_bytes == 4 * tree.num_parameters


def test_json_stops_at_the_depth_asked_for() -> None:
    document = structure_tree(make_module()).as_json(depth=1, params=True)
    assert [child["name"] for child in document["children"]] == ["embed", "layers", "head"]
    assert "children" not in document["children"][1]
    assert document["children"][2]["weights"] == [{"name": "weight", "shape": [10, 4], "dtype": "float32"}]


def test_numbers_in_names_are_joined_as_ranges() -> None:
    assert joined_name(["0", "1", "2", "5"]) == "0-2, 5"
    assert joined_name(["block_7", "block_8"]) == "block_7-8"
    assert joined_name(["norm"]) == "norm"


def test_inspect_says_what_serving_would_do(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("inspect", str(tiny_llama), "--json", "--max-model-len", "100").json
    assert document["architecture"] == "LlamaForCausalLM"
    assert document["num_layers"] == 2
    assert document["attention"]["rung"] == "interface"
    [group] = document["cache_groups"]
    assert (group["kind"], group["layers"]) == ("full", [0, 1])
    assert group["bytes_per_token"] == 2 * 2 * (16 + 16) * 4
    assert group["bytes_per_request"] == 100 * group["bytes_per_token"]
    assert document["tree"]["parameters"] == document["parameters"]
    assert [entry["module"] for entry in document["replaced"]] == [f"model.layers.{i}.self_attn" for i in range(2)]


def test_inspect_draws_the_tree(shardwright: Shardwright, tiny_llama: Path) -> None:
    text = shardwright("inspect", str(tiny_llama), "--params").stdout
    assert "0-1 (2 alike): LlamaDecoderLayer" in text
    assert "paged attention, full" in text
    assert "attention: interface: " in text


def test_inspect_says_why_a_model_gets_a_lower_rung(shardwright: Shardwright, tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, architectures=["BloomForCausalLM"])
    config.save_pretrained(tmp_path)
    result = shardwright("inspect", str(tmp_path), "--json")
    assert result.code == 0
    assert result.json["attention"]["rung"] in {"sdpa", "dataflow", "per-request", "recompute"}
    assert "attention interface" in result.json["attention"]["reason"]


def test_inspect_counts_states_by_request(shardwright: Shardwright, tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    document = shardwright("inspect", str(tmp_path), "--json").json
    assert document["attention"]["rung"] == "state"
    [group] = document["cache_groups"]
    assert (group["kind"], group["layers"], group["bytes_per_token"]) == ("state", [0, 1], 0)
    assert group["bytes_per_request"] > 0


@pytest.mark.parametrize("depth", ["-1", "x"])
def test_depth_is_a_whole_number(shardwright: Shardwright, depth: str) -> None:
    assert shardwright("inspect", "m", "--depth", depth).code == 2


def test_inspect_shows_an_encoder_as_it_would_be_served(shardwright: Shardwright, tmp_path: Path) -> None:
    save(RobertaForMaskedLM, roberta_config(), tmp_path)
    document = shardwright("inspect", str(tmp_path), "--json").json
    assert (document["task"], document["architecture"], document["max_model_len"]) == ("embed", "RobertaModel", 62)
    assert document["attention"] == {"rung": "none", "reason": "texts are read whole, without a cache"}
    assert [group["kind"] for group in document["cache_groups"]] == ["none"]
    assert "attention: none: texts are read whole" in shardwright("inspect", str(tmp_path)).stdout
