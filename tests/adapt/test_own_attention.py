"""A module that runs its own attention is called once a request, and the code around it does not notice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from shardwright.adapt.own_attention import OwnAttention
from shardwright.adapt.own_calls import OwnCall, Part, PerTurn, Role, Write, leaves_of
from shardwright.adapt.own_requests import LonePrompt, OwnRequest, OwnTurn, PagedRequests, make_mask
from shardwright.adapt.paged import ForwardInputs, PagedStep
from shardwright.adapt.token_rows import TokenTensor
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import StepLayout
from shardwright.cache.spec import Visibility, VisibilityKind, group_layers
from shardwright.errors import UnsupportedModelError

BLOCK_SIZE, WIDTH = 4, 8
CPU = torch.device("cpu")


class Attends(nn.Module):
    """Sums what it sees of the values, by scores that it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.config._attn_implementation = "around"
        self.seen: list[str] = []

    def forward(
        self, x: Tensor, mask: Tensor | None, before: Tensor | None = None, past: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        self.seen.append(self.config._attn_implementation)
        keys, values = x[:, None], x[:, None] * 2
        if past is not None:
            keys, values = past.update(keys, values, 0)
        scores = x[:, None] @ keys.mT + (0 if mask is None else mask)
        if before is not None:
            scores = scores + before[:, None]
        return (scores.softmax(-1) @ values)[:, 0], scores[:, 0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attends(), Attends()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, masks: Any = None, past: Any = (None, None)) -> Tensor:
        x, scores = self.first(x, masks, past=past[0])
        x, _ = self.second(x * self.scale, masks, before=scores, past=past[1])
        return x


def paths_of(*args: Any, **kwargs: Any) -> list[Any]:
    return [path for path, _ in leaves_of((args, kwargs))]


def own_attention(model: Model, *, depends_on_context: bool = True) -> OwnAttention:
    x = torch.zeros(1, 2, WIDTH)
    tokens, opaque = Part(Role.TOKENS, 1, 0), Part(Role.TOKENS, 1, 0, depends_on_context=depends_on_context)
    mask, cache = Part(Role.MASK, visibility=Visibility()), Part(Role.CACHE)
    kept = TokenTensor((1, 1, 2, WIDTH), 2, torch.float32, batch_dim=0)
    results = dict(zip(paths_of(x, x), [tokens, opaque], strict=True))
    results = {path[1:]: known for path, known in results.items()}  # paths inside what is returned
    writes = (Write("update", (kept, kept)),)
    first = dict(zip(paths_of(x, None, past=None), [tokens, mask, cache], strict=True))
    second = dict(zip(paths_of(x, None, before=x, past=None), [tokens, mask, opaque, cache], strict=True))
    calls = [
        OwnCall(model.first, "first", first, results, writes),
        OwnCall(model.second, "second", second, results, writes),
    ]
    return OwnAttention(model, calls, dtype=torch.float32)


class Served:
    """Steps of the model on a paged cache."""

    def __init__(
        self, model: Model, num_requests: int, *, together: bool = False, depends_on_context: bool = True
    ) -> None:
        self.model, self.together = model, together
        self.own = own_attention(model, depends_on_context=depends_on_context)
        groups = group_layers(self.own.layers)
        self.cache = KVCache(
            self.own.layers, groups, num_blocks=6 * num_requests, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
        )
        self.tables = 1 + np.random.default_rng(0).permutation(6 * num_requests).reshape(num_requests, 6)
        self.computed = np.zeros(num_requests, dtype=np.int64)
        self.backend = BatchedBackend(block_size=BLOCK_SIZE, device=CPU, compute_dtype=torch.float32)

    def step(self, pieces: list[Tensor], *, in_batch: bool = False) -> list[Tensor]:
        counts = np.array([len(piece) for piece in pieces])
        layout = StepLayout(self.computed.copy(), counts, np.concatenate([[0], np.cumsum(counts)]))
        nothing = torch.zeros(int(counts.sum()), dtype=torch.int64)
        inputs = ForwardInputs(nothing, nothing, [nothing], [None], nothing, layout, [self.tables])
        requests = PagedRequests(PagedStep(inputs, self.cache, self.backend), in_batch=in_batch, together=self.together)
        packed = torch.cat(pieces)
        with self.own.serving(requests, 0):
            output = self.model(packed[:, None] if in_batch else packed[None])
        self.computed += counts
        return list(output.reshape(-1, WIDTH).split(counts.tolist()))


def expected(model: Model, pieces: list[Tensor]) -> list[Tensor]:
    """The same of one request alone, by Transformers' cache."""
    caches, outputs, start = (DynamicCache(), DynamicCache()), [], 0
    for piece in pieces:
        turn = OwnTurn(0, (OwnRequest(0, 0, len(piece), start),))
        mask = make_mask(Visibility(), turn, 0, implementation="eager", dtype=torch.float32, device=CPU)
        outputs.append(model(piece[None], mask, caches)[0])
        start += len(piece)
    return outputs


@pytest.mark.parametrize("together", [False, True])
def test_requests_do_not_see_each_other(together: bool) -> None:
    """Prompts of different lengths, goings on, tokens packed and tokens in a batch."""
    model, generator = Model(), torch.Generator().manual_seed(0)
    counts = [(5, 3), (2, 6), (1, 1), (1, 1)]
    steps = [[torch.randn(n, WIDTH, generator=generator) for n in step] for step in counts]
    served = Served(model, 2, together=together)
    actual = [served.step(pieces, in_batch=number == 3) for number, pieces in enumerate(steps)]
    for request in range(2):
        alone = expected(model, [step[request] for step in steps])
        for step, output in zip(actual, alone, strict=True):
            torch.testing.assert_close(step[request], output)


def test_what_requests_cannot_share_travels_apart() -> None:
    model = Model()
    given: list[Any] = []
    model.second.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["before"]), with_kwargs=True)
    Served(model, 2).step([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    assert isinstance(given[0], PerTurn)
    assert [tuple(value.shape) for value in given[0].values] == [(1, 3, 3), (1, 5, 5)]


def test_what_only_some_steps_cannot_share_travels_apart_too() -> None:
    """Scores of the few tokens that are best: fewer, where there are no more; decodes as a batch beside a prompt."""
    model = Model()
    given: list[Any] = []
    model.second.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["before"]), with_kwargs=True)
    served = Served(model, 3, together=True, depends_on_context=False)
    served.step([torch.randn(count, WIDTH) for count in (3, 5, 1)])
    served.step([torch.randn(count, WIDTH) for count in (1, 1, 2)])
    assert [tuple(value.shape) for value in given[1].values] == [(2, 1, 6), (1, 2, 3)]


def test_modules_and_configs_are_left_as_they_were() -> None:
    model = Model()
    served = own_attention(model).serving(LonePrompt(3), 0)
    with pytest.raises(TypeError), served:
        model(None)
    assert model.first.seen == ["eager"]
    assert model.first.config._attn_implementation == "around"
    assert "forward" not in vars(model.first)


def test_another_order_of_layers_is_refused() -> None:
    model = Model()
    with (
        own_attention(model).serving(LonePrompt(3), 0),
        pytest.raises(UnsupportedModelError, match="run in another order"),
    ):
        model.second(torch.randn(1, 3, WIDTH), None, past=None)


def test_what_is_made_of_all_contexts_outside_is_refused() -> None:
    model = Model()
    served = Served(model, 2)
    model.first.register_forward_hook(lambda *_: (torch.zeros(1, 8, WIDTH), torch.zeros(1, 8, 8)))
    with pytest.raises(UnsupportedModelError, match="cannot be taken apart into those of several requests"):
        served.step([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])


@pytest.mark.parametrize("kind", VisibilityKind)
def test_masks_show_what_may_be_seen(kind: VisibilityKind) -> None:
    visibility = Visibility(kind, None if kind is VisibilityKind.FULL else 4)
    turn = OwnTurn(0, (OwnRequest(0, 0, 3, 6),))
    first = turn.first(visibility)
    mask = make_mask(visibility, turn, first, implementation="sdpa", dtype=torch.float32, device=CPU)
    assert first == visibility.first_visible(6)
    visible = [[visibility.first_visible(q) <= k <= q for k in range(first, 9)] for q in range(6, 9)]
    assert mask[0, 0].tolist() == visible


def test_masks_of_several_end_together() -> None:
    turn = OwnTurn(0, (OwnRequest(0, 0, 1, 5), OwnRequest(1, 1, 1, 2)))
    window = Visibility(VisibilityKind.SLIDING, 4)
    masks = [
        make_mask(visibility, turn, turn.first(visibility), implementation="eager", dtype=torch.float32, device=CPU)
        for visibility in (Visibility(), window)
    ]
    assert [mask.shape for mask in masks] == [(2, 1, 1, 6), (2, 1, 1, 4)]
    assert (masks[0][:, 0, 0] == 0).tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    assert (masks[1][:, 0, 0] == 0).tolist() == [[True] * 4, [False] + [True] * 3]


def turns_of(num_tokens: list[int], num_computed: list[int], *, in_batch: bool = False) -> list[list[int]]:
    """Which requests take their turn together."""
    counts = np.array(num_tokens)
    layout = StepLayout(np.array(num_computed), counts, np.concatenate([[0], np.cumsum(counts)]))
    nothing = torch.zeros(int(counts.sum()), dtype=torch.int64)
    inputs = ForwardInputs(nothing, nothing, [], [], nothing, layout, [])
    step = PagedStep(inputs, None, None)  # type: ignore[arg-type]
    turns = PagedRequests(step, in_batch=in_batch, together=True).turns
    return [[request.index for request in turn.requests] for turn in turns]


def test_decodes_of_about_one_length_take_their_turn_together() -> None:
    assert turns_of([1, 1, 1, 1], [100, 500, 130, 900]) == [[0, 2], [1, 3]]
    assert turns_of([1, 7, 1, 1], [8, 20, 30, 0]) == [[0, 2], [1], [3]]


def test_many_long_decodes_are_several_turns() -> None:
    assert turns_of([1] * 5, [4000] * 5) == [[0, 1], [2, 3], [4]]
    assert turns_of([1] * 3, [4000] * 3, in_batch=True) == [[0], [1], [2]]
    assert turns_of([1] * 3, [400, 4, 40], in_batch=True) == [[0, 1, 2]]
