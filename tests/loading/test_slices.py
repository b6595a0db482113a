"""A rank loads its slices, reads little else, and finds what is wrong with a checkpoint as a whole load does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

import shardwright.loading.load as loading
from shardwright.errors import CheckpointError
from shardwright.layers.collectives import Collectives
from shardwright.loading.lazy import lazy
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import build_module
from shardwright.plans.choose import choose_plan
from shardwright.plans.cut import cut
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import resolve
from shardwright.plans.slices import ShardSlice
from shardwright.plans.table import ShardTable
from shardwright.plans.units import unit_groups

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "tie_word_embeddings": True},
    "gpt2": {},
    "qwen2": {},
    "phi3": {},
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8, "n_group": 2},
}
"""Tied embeddings, linears the other way round, biases, projections that lie in one, experts that lie apart."""

QUICK = ("llama", "mixtral")


class Counted:
    """A tensor of a file that counts what is read of it."""

    def __init__(self, stored: Any, count: list[int]) -> None:
        self._stored, self._count = stored, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, index: Any) -> Tensor:
        read: Tensor = self._stored[index]
        self._count[0] += read.nbytes
        return read


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number: of all files that are loaded."""
    count, open_checkpoint = [0], loading.open_checkpoint

    @contextmanager
    def counting(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        with open_checkpoint(*args, **kwargs) as tensors:
            yield {name: Counted(stored, count) for name, stored in tensors.items()}

    monkeypatch.setattr(loading, "open_checkpoint", counting)
    return count


def build(config: PretrainedConfig) -> nn.Module:
    model = build_module(config, torch.float32, trust_remote_code=False)
    model.tie_weights(recompute_mapping=False)
    return model


class Somewhere:
    """Collectives of a rank that loads, and runs nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        raise NotImplementedError


def ranks_of(table: ShardTable) -> Iterator[tuple[ShardSlice, Collectives]]:
    for stage, rank in table.ranks():
        yield ShardSlice(table, stage, rank), Somewhere(rank, table.tp)


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    found, wanted = (dict(m.named_parameters(remove_duplicate=False)) for m in (module, expected))
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_ranks_get_the_parts_of_a_whole_load_and_read_little_more(
    model_type: str, tmp_path: Path, bytes_read: list[int]
) -> None:
    config = make_config(model_type, MODELS[model_type])
    with torch.no_grad():
        draw(config, seed=0).save_pretrained(tmp_path)
    model = build(config)
    table = resolve(model, plan := choose_plan(model, tp=2, pp=2), unit_groups(model, plan), tp=2, pp=2)
    load_weights(model, tmp_path, torch.float32)
    whole = sum(p.nbytes for p in model.parameters())
    for part, collectives in ranks_of(table):
        expected, module = build(config), build(config)
        load_weights(expected, tmp_path, torch.float32)
        cut(expected, table, stage=part.stage, collectives=collectives)
        cut(module, table, stage=part.stage, collectives=collectives)
        bytes_read[0] = 0
        load_weights(module, tmp_path, torch.float32, part=part)
        assert_same(module, expected)
        share = sum(p.nbytes for p in module.parameters())
        assert bytes_read[0] <= 1.01 * share < 0.6 * whole


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_random_weights_are_parts_of_those_of_one_rank(model_type: str) -> None:
    config = make_config(model_type, MODELS[model_type])
    model = build(config)
    table = resolve(model, plan := choose_plan(model, tp=3, pp=2), unit_groups(model, plan), tp=3, pp=2)
    for part, collectives in ranks_of(table):
        expected, module = build(config), build(config)
        load_dummy_weights(expected)
        cut(expected, table, stage=part.stage, collectives=collectives)
        cut(module, table, stage=part.stage, collectives=collectives)
        load_dummy_weights(module, part=part)
        assert_same(module, expected)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.again = self.down
        self.register_buffer("steps", torch.arange(3))


PLAIN_PLAN = ParallelPlan(tp={"up": "colwise", "down": "rowwise", "again": "rowwise"})


def plain_parts() -> Iterator[tuple[Plain, ShardSlice, Collectives]]:
    table = resolve(Plain(), PLAIN_PLAN, [], tp=3)
    for part, collectives in ranks_of(table):
        with torch.device("meta"):
            module = Plain()
        module.steps = torch.zeros(3, dtype=torch.int64)
        cut(module, table, stage=0, collectives=collectives)
        yield module, part, collectives


@pytest.mark.parametrize("kind", ["safetensors", "torch", "merged"])
def test_plain_modules_get_their_parts(kind: str, tmp_path: Path) -> None:
    whole = Plain()
    state = {name: value.clone() for name, value in whole.state_dict().items() if not name.startswith("again")}
    if kind == "torch":
        torch.save({"model": state}, tmp_path / "pytorch_model.bin")
    else:
        if kind == "merged":
            state["a.weight"], state["b.weight"] = (half.clone() for half in state.pop("up.weight").split([3, 5]))
            (tmp_path / "rename.json").write_text(json.dumps({"merge": {"up.weight": ["a.weight", "b.weight"]}}))
        save_file(state, tmp_path / "model.safetensors")
    for module, part, collectives in plain_parts():
        expected = Plain()
        expected.load_state_dict(whole.state_dict())
        cut(expected, part.table, stage=0, collectives=collectives)
        load_weights(module, tmp_path, torch.float32, part=part)
        assert_same(module, expected)
        assert module.again.weight is module.down.weight
        assert module.steps.tolist() == [0, 1, 2]
        assert bool(module.down.bias.any()) == (part.rank == 0)


def misshaped(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 144)


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]


def unexpected(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.r_proj.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misshaped, r"layers\.0\.self_attn\.q_proj\.weight is 32x144, expected 144x144"),
        (missing, r"lacks 1 weights .*layers\.0\.self_attn\.q_proj\.weight"),
        (unexpected, r"has 1 weights .*layers\.0\.self_attn\.r_proj\.weight"),
    ],
)
@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_wrong_with_a_checkpoint_is_said_on_every_stage(
    stage: int, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    config = make_config("llama", MODELS["llama"])
    with torch.no_grad():
        draw(config, seed=0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = build(config)
    table = resolve(model, plan := choose_plan(model, tp=2, pp=2), unit_groups(model, plan), tp=2, pp=2)
    part, collectives = next(found for found in ranks_of(table) if found[0].stage == stage)
    cut(model, table, stage=stage, collectives=collectives)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path, torch.float32, part=part)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "cat": lambda a, b: torch.cat([a, b], dim=0),
    "cat last": lambda a, b: torch.cat([a, b], dim=-1),
    "stack": lambda a, b: torch.stack([a, b], dim=0),
    "stack last": lambda a, b: torch.stack([a, b, a], dim=a.ndim),
    "transpose": lambda a, b: torch.transpose(a, dim0=0, dim1=-1),
    "contiguous": lambda a, b: a.transpose(0, 1).contiguous(),
    "chunk": lambda a, b: torch.chunk(a, 2, dim=0)[-1],
    "split": lambda a, b: torch.split(a, [1, a.shape[-1] - 1], dim=-1)[1],
    "reshape": lambda a, b: a.reshape(a.shape[-1], -1),
    "cast": lambda a, b: a.to(device="cpu", dtype=torch.float64),
    "add": lambda a, b: torch.add(a, 1),
    "permute": lambda a, b: a.permute(*reversed(range(a.ndim))),
}
"""Written down, and carried out at once."""


@given(
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    names=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=5),
    data=st.data(),
)
def test_parts_of_what_is_written_down_are_parts_of_what_is_carried_out(
    shape: tuple[int, int], names: list[str], data: st.DataObject
) -> None:
    eager_a, eager_b = torch.randn(shape), torch.randn(shape)
    lazy_a, lazy_b = lazy(eager_a), lazy(eager_b)
    for name in names:
        if min(eager_a.shape) < 2 or eager_a.ndim > 4:
            break
        lazy_a, lazy_b = (OPERATIONS[name](x, y) for x, y in ((lazy_a, lazy_b), (lazy_b, lazy_a)))
        eager_a, eager_b = (OPERATIONS[name](x, y) for x, y in ((eager_a, eager_b), (eager_b, eager_a)))
    assert tuple(lazy_a.shape) == tuple(eager_a.shape)
    if isinstance(lazy_a, Tensor):  # an operation that cannot be written down came last
        lazy_a = lazy(lazy_a)
    dim = data.draw(st.integers(0, eager_a.ndim - 1))
    ends = data.draw(st.lists(st.integers(0, eager_a.shape[dim]), min_size=4, max_size=4).map(sorted))
    ranges = [(ends[0], ends[1]), (ends[2], ends[3])]
    expected = torch.cat([eager_a.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    assert torch.equal(lazy_a.part(dim, ranges), expected)


MEASURE = """
import json, re, sys, threading
from pathlib import Path
from types import SimpleNamespace
import torch
from shardwright.loading.load import load_weights
from shardwright.models.build import build_module, load_config
from shardwright.plans.cut import cut
from shardwright.plans.plan import plan_of
from shardwright.plans.resolve import resolve
from shardwright.plans.slices import ShardSlice
from shardwright.plans.units import unit_groups

def own_bytes():  # without pages of the mapped file, which the system takes back when it likes
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load(path):
    model = build_module(load_config(path, trust_remote_code=False), torch.bfloat16, trust_remote_code=False)
    plan = plan_of(model)
    table = resolve(model, plan, unit_groups(model, plan), tp=4)
    cut(model, table, stage=0, collectives=SimpleNamespace(rank=1, size=4))
    before, seen, done = own_bytes(), [], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_weights(model, path, torch.bfloat16, part=ShardSlice(table, 0, 1))
    done.set()
    watcher.join()
    return max(seen) - before, table.weight_bytes(0, 1)

load(Path(sys.argv[2]))  # imports and first uses are not what is measured
print(json.dumps(load(Path(sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_rank_is_its_share(tmp_path: Path) -> None:
    sizes = {"small": (64, 128, 1), "large": (1024, 4096, 6)}
    for name, (hidden, inner, layers) in sizes.items():
        config = LlamaConfig(
            vocab_size=16000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16",
        )  # fmt: skip
        config.save_pretrained(tmp_path / name)
        module = build_module(config, torch.bfloat16, trust_remote_code=False)
        weights = {name: torch.randn(p.shape, dtype=torch.bfloat16) for name, p in module.named_parameters()}
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    del weights
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    growth, share = json.loads(run.stdout)
    assert 0.9 * share <= growth <= 1.2 * share + (16 << 20), (growth, share)
