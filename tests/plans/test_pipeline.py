"""A model cut into pipeline stages gives the logits of the whole."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from tests.plans.staged import MemoryLink, make_stages, run_stages, table_of, whole
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shardwright.errors import PlanError
from shardwright.plans.dataflow import trace_dataflow
from shardwright.plans.handover import uncuttable
from shardwright.plans.links import StageFailedError, StageFinishedError
from shardwright.plans.pipeline import HandedOver, plan_pipeline
from shardwright.plans.plan import ParallelPlan, PipelineEntry
from shardwright.plans.stack import find_stack

TOKENS = torch.tensor([[5, 9, 77, 3, 12, 41, 8, 8, 100, 2]])
WIDTH = 16

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "biases, positions, tied": ("gpt2", {}),
    "learned positions, projections": ("opt", {"word_embed_proj_dim": 32}),
    "embedding scale, two masks": ("gemma3_text", {}),
    "parallel blocks": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "alibi": ("bloom", {}),
    "experts": ("mixtral", {}),
    "sliding windows": ("mistral", {"sliding_window": 4}),
    "shared keys and values, inputs per layer": (
        "gemma3n_text",
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 2,
         "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "states": ("mamba", {}),
    "a recurrence beside attention": ("recurrent_gemma", {"lru_width": 64, "block_types": ["recurrent", "attention"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pp", [2, 3])
def test_stages_give_the_logits_of_the_whole(name: str, pp: int) -> None:
    model_type, fields = ARCHITECTURES[name]
    counts = {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4}
    known = make_config(model_type, {}).to_dict()
    module = draw(make_config(model_type, {k: v for k, v in counts.items() if k in known} | fields), seed=1)
    expected = whole(module, TOKENS)
    stages = make_stages(module, table_of(module, pp))
    for _ in range(2):  # nothing stays behind from the first pass
        assert torch.equal(run_stages(stages, TOKENS), expected)
    longer = torch.cat([TOKENS, TOKENS], dim=1)
    torch.testing.assert_close(run_stages(stages, longer), whole(module, longer), rtol=0, atol=1e-5)


def test_a_stage_holds_its_own_parameters_alone() -> None:
    module = draw(make_config("llama", {"num_hidden_layers": 3}), seed=0)
    table = table_of(module, 3)
    held = [{name for name, _ in part.named_parameters()} for part, _ in make_stages(module, table)]
    assert not held[0] & held[1]
    assert not held[1] & held[2]
    assert set.union(*held) == {name for name, _ in module.named_parameters()}
    assert "model.embed_tokens.weight" in held[0]
    assert {"model.norm.weight", "lm_head.weight"} <= held[2]


class Block(nn.Module):
    """Attention and a product, without a residual of its own if told so."""

    def __init__(self, *, is_residual: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + y if self.is_residual else y


class Model(nn.Module):
    """Embedding, blocks, norm, head; how the blocks are called is up to subclasses."""

    def __init__(self, num_layers: int = 4, *, is_residual: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList([Block(is_residual=is_residual) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.through(x)))

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class InPlaceResidual(Model):
    """The residual stream is outside of the layers, and written to in place."""

    def __init__(self) -> None:
        super().__init__(is_residual=False)

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x += layer(x)
        return x


class FirstEmbedding(Model):
    """Every layer also gets the first embedding, by way of the code around it."""

    def through(self, x: Tensor) -> Tensor:
        first = F.layer_norm(x, (WIDTH,))
        for i, layer in enumerate(self.layers):
            x = layer(x + 0.1 * i * first)
        return x


class Tuples(Model):
    """Layers take and give two tensors, and something else."""

    class Layer(Block):
        def forward(self, x: Tensor, *, first: tuple[Tensor, Tensor]) -> tuple[Tensor, None, tuple[Tensor, Tensor]]:  # type: ignore[override]
            return super().forward(x + first[0]), None, (first[0] * 0.5 + x, first[1])

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Tuples.Layer() for _ in range(4)])

    def through(self, x: Tensor) -> Tensor:
        pair = (torch.zeros_like(x), torch.ones(1))
        for layer in self.layers:
            x, nothing, pair = layer(x, first=pair)
            assert nothing is None
        return x


class Named(Model):
    """Layers in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer_{i}": Block() for i in range(4)})  # type: ignore[assignment]

    def through(self, x: Tensor) -> Tensor:
        for name in self.layers:  # type: ignore[attr-defined]
            x = self.layers[name](x)
        return x


class Sequence(Model):
    """Layers in a Sequential, which calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(4)))  # type: ignore[assignment]

    def through(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[operator, no-any-return]


class Numbered(Model):
    """Layers in attributes with numbers."""

    def __init__(self) -> None:
        super().__init__(num_layers=0)
        for i in range(4):
            setattr(self, f"block_{i}", Block())

    def through(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(self, f"block_{i}")(x)
        return x


class LastAlone(Model):
    """Logits of the last token only."""

    def through(self, x: Tensor) -> Tensor:
        return super().through(x)[:, -1:]


@pytest.mark.parametrize("kind", [Model, InPlaceResidual, FirstEmbedding, Tuples, Named, Sequence, Numbered, LastAlone])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_code_of_any_kind(kind: type[Model], pp: int) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    expected = whole(module, TOKENS)
    assert torch.equal(run_stages(make_stages(module, table_of(module, pp)), TOKENS), expected)


def test_an_early_stage_says_that_it_handed_over() -> None:
    for kind, last_alone in ((Model, False), (LastAlone, True)):
        module = kind().eval()
        (first, _), _ = make_stages(module, table_of(module, 2))
        handed = first(TOKENS)
        assert isinstance(handed, HandedOver)
        assert handed.gives_last_alone is last_alone
        assert [(name, value.shape) for name, value in handed.given.items()] == [("x", (*TOKENS.shape, WIDTH))]


class Watched(Tensor):
    """Does everything twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        super().__torch_function__(func, types, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})


class Watching(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **kwargs or {})


class PlainLink(MemoryLink):
    """Refuses tensors that may watch what is done to them."""

    def send(self, tensors: list[Tensor]) -> None:
        assert all(type(tensor) is Tensor for tensor in tensors)
        super().send(tensors)

    def recv(self) -> list[Tensor]:
        return [tensor.positive() for tensor in super().recv()]


def test_who_watches_a_forward_pass_does_not_take_part_in_handing_over() -> None:
    """What is sent twice is received as something else."""
    model = Model().eval()
    stages = make_stages(model, table_of(model, 2), links=[PlainLink()])
    first = stages[0][0].get_submodule(find_stack(model).layers[0])  # type: ignore[union-attr]
    forward = first.forward
    first.forward = lambda *args, **kwargs: forward(*args, **kwargs).as_subclass(Watched)
    tokens = torch.arange(5)[None]
    with Watching() as watching:
        output = run_stages(stages, tokens)
    assert not watching.seen & {Tensor.clone, Tensor.positive}
    assert torch.equal(output, whole(model, tokens))


class Skips(Model):
    """The last layers get what the first ones gave, as in a U-net."""

    def through(self, x: Tensor) -> Tensor:
        x = first = self.layers[0](x)
        x = self.layers[1](x)
        x = self.layers[2](x)
        return self.layers[3](x + first)  # type: ignore[no-any-return]


class Hidden(Model):
    """A layer uses what another left on itself."""

    class Layer(Block):
        other: Hidden.Layer | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.left = super().forward(x)
            return self.left if self.other is None else self.left + self.other.left

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Hidden.Layer() for _ in range(4)])
        object.__setattr__(self.layers[2], "other", self.layers[1])


@pytest.mark.parametrize("kind", [Skips, Hidden])
def test_no_stage_begins_where_it_would_miss_something(kind: type[Model]) -> None:
    module = kind().eval()
    stack = find_stack(module)
    assert stack is not None
    assert uncuttable(trace_dataflow(module, stack.layers)) == {2}  # elsewhere all that is missing is an argument
    table = table_of(module, 2)
    assert len(table.stages[0].layers) != 2
    assert torch.equal(run_stages(make_stages(module, table), TOKENS), whole(module, TOKENS))


def test_a_split_that_the_code_does_not_let_happen_is_refused() -> None:
    module = Hidden().eval()
    with pytest.raises(PlanError, match=r"layers\.2 uses what layers\.1 made.*no stage may begin before layers\.2"):
        plan_pipeline(module, table_of(module, 2, split=[2, 2]))


class Twice(Model):
    """The first layer runs again at the end."""

    def through(self, x: Tensor) -> Tensor:
        return self.layers[0](super().through(x))  # type: ignore[no-any-return]


class Backwards(Model):
    def through(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class Unused(Model):
    def through(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[0](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, r"layers\.0 runs 2 times"),
        (Backwards, r"layers\.3 runs before layers that stand before it"),
        (Unused, r"layers\.1 never runs"),
    ],
)
def test_layers_run_once_each_and_in_order(kind: type[Model], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        table_of(kind().eval(), 2)


def test_a_module_on_the_wrong_stage_is_named() -> None:
    plan = ParallelPlan(pp={"norm": PipelineEntry(("x",), ("x",)), "layers": PipelineEntry(("x",), ("x",))})
    module = Model().eval()
    with pytest.raises(PlanError, match=r"norm\.weight, which its pipeline stage does not hold: leave norm out"):
        plan_pipeline(module, table_of(module, 2, plan=plan))


class WaitingLink:
    """A link between threads."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[list[Tensor]] = SimpleQueue()

    def send(self, tensors: list[Tensor]) -> None:
        self._messages.put([tensor.clone() for tensor in tensors])

    def recv(self) -> list[Tensor]:
        return self._messages.get(timeout=30)


def _fail(*args: Any) -> None:
    raise RuntimeError("out of order")


def _run_in_threads(stages: list[Any], passes: list[int]) -> list[list[str]]:
    """Every stage runs so many forward passes, settles, and runs one more. Returns what each pass came to."""
    results: list[list[str]] = [[] for _ in stages]

    def run(index: int) -> None:
        module, stage = stages[index]
        for count in (passes[index], 1):
            for _ in range(count):
                try:
                    with torch.inference_mode():
                        module(TOKENS)
                    results[index].append("done")
                except (RuntimeError, StageFailedError, StageFinishedError) as exc:
                    results[index].append(f"{type(exc).__name__}: {exc}")
            stage.settle()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(stages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_a_failing_stage_does_not_hang_the_others() -> None:
    module = Model().eval()
    stages = make_stages(module, table_of(module, 3), links=[WaitingLink(), WaitingLink()])
    hook = stages[1][0].layers[1].out.register_forward_pre_hook(_fail)  # type: ignore[union-attr, index]
    if not list(stages[1][0].layers[1].out.parameters()):  # type: ignore[union-attr, index]
        hook.remove()
        stages[1][0].layers[2].out.register_forward_pre_hook(_fail)  # type: ignore[union-attr, index]
    first, second, third = _run_in_threads(stages, [1, 1, 1])
    assert first == ["done", "done"]
    assert second == ["RuntimeError: out of order"] * 2
    assert all(result.startswith("StageFailedError: RuntimeError: out of order") for result in third)


def test_stages_that_ran_differently_often_begin_anew_together() -> None:
    module = Model().eval()
    stages = make_stages(module, table_of(module, 3), links=[WaitingLink(), WaitingLink()])
    first, second, third = _run_in_threads(stages, [3, 1, 2])
    assert first == ["done"] * 4
    assert second == ["done"] * 2
    assert third == ["done", "StageFinishedError: an earlier pipeline stage has stopped", "done"]
