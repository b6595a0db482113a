"""Modules that run their own attention over paged rows, while requests take turns.

Some code does more in its attention than attend to keys and values: it chooses tokens with an index of its own, or
makes a bias or a mask of its data. Such a module is left as it is. All around it is computed for the packed tokens of
all requests; when it is called, requests take turns instead, one that has a prompt or a few that decode, each with
its part of the arguments, the mask that Transformers would have made, and a cache that keeps rows in blocks
(adapt/own_cache.py). The results are put together again. What cannot be, because its size goes with the context,
travels as one value per turn to the next such module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from shardwright.adapt.own_cache import OwnCache, states_of_one
from shardwright.adapt.own_calls import OwnCall, Part, Path, PerTurn, Role, leaves_of
from shardwright.adapt.own_requests import OwnRequests, OwnTurn, make_mask
from shardwright.cache.spec import LayerSpec
from shardwright.errors import UnsupportedModelError

_ITSELF = Part(Role.ITSELF)


class OwnAttention:
    """Calls such modules in the forward passes of a model.

    Args:
        model: whose modules they are.
        calls: of its forward pass, in order.
        dtype: of the model, and of the cache's rows.
        together: whether requests that decode may be given to a module as a batch.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[OwnCall], *, dtype: torch.dtype, together: bool = True
    ) -> None:
        self._model = model
        self._calls = calls
        self._dtype = dtype
        self.together = together and all(call.takes_batches for call in calls)
        self._implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        self._configs = {call.module: _configs_of(call.module) for call in calls}

    @property
    def layers(self) -> list[LayerSpec]:
        """What is cached of the calls."""
        return [call.spec(self._dtype) for call in self._calls]

    def describe(self) -> str:
        """How they are served, for a reader of the rung's reason."""
        how = "decodes as a batch, prompts one by one" if self.together else "a request at a time"
        return f"{len(self._calls)} layers run their own attention over pages, {how}"

    @contextmanager
    def serving(self, requests: OwnRequests, first_layer: int) -> Iterator[None]:
        """While open, the modules are called once for each turn; one forward pass at most.

        Args:
            requests: of the pass.
            first_layer: of the cache that is theirs.
        """
        device = next(self._model.parameters()).device
        going = _Pass(self._calls, requests, first_layer, self._implementation, self._dtype, device)
        replaced = [(module, vars(module).get("forward")) for module in self._configs]
        for module in self._configs:
            module.forward = partial(self._call, going, module, module.forward)
        try:
            yield
        finally:
            for module, forward in replaced:
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _call(self, going: _Pass, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        # Modes that watch or answer calls of the code around it know nothing of how often this code runs.
        with _attention(self._configs[module], self._implementation), torch._C.DisableTorchFunction():
            return going.call(module, forward, args, kwargs)


class _Pass:
    """The calls of one forward pass."""

    def __init__(
        self,
        calls: Sequence[OwnCall],
        requests: OwnRequests,
        first_layer: int,
        implementation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._calls = calls
        self._requests = requests
        self._first_layer = first_layer
        self._make_mask = cache(partial(make_mask, implementation=implementation, dtype=dtype, device=device))
        self._device = device
        self._places = cache(self._find_places)
        self._caches: dict[tuple[int, int | None], OwnCache] = {}
        self._next = 0

    def call(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, self._next = self._next, self._next + 1
        call = self._calls[number] if number < len(self._calls) else None
        if call is None or call.module is not module:
            raise UnsupportedModelError("its layers run in another order than when they were looked at")
        given = leaves_of((args, kwargs))
        spec = _pytree.tree_structure((args, kwargs), is_leaf=lambda inner: isinstance(inner, Cache))
        results = []
        for turn in self._requests.turns:
            leaves, own_cache = self._arguments(call, number, turn, given)
            own_args, own_kwargs = _pytree.tree_unflatten(leaves, spec)
            results.append(forward(*own_args, **own_kwargs))
            if own_cache is not None:
                own_cache.end()
        return results[0] if self._is_as_given(self._requests.turns[0]) else self._joined(call, results)

    def _arguments(
        self, call: OwnCall, number: int, turn: OwnTurn, given: list[tuple[Path, Any]]
    ) -> tuple[list[Any], OwnCache | None]:
        """What a turn gives to a call, and its cache, if what it keeps is of use."""
        first = turn.first(call.visibility)
        rows = self._requests.rows(self._first_layer + number, turn, call.visibility)
        parts = [(call.arguments.get(path, _ITSELF), value, path) for path, value in given]
        inner = next((value for part, value, _ in parts if part.role is Role.CACHE), None)
        own_cache = None if rows is None else self._cache_of(turn, inner)
        leaves: list[Any] = []
        place = 0
        for part, value, path in parts:
            if part.role is Role.CACHE:
                leaves.append(value if own_cache is None else own_cache)
            elif part.role is Role.MASK:
                assert part.visibility is not None
                leaves.append(self._make_mask(part.visibility, turn, first))
            else:
                leaves.append(self._of_turn(call, part, value, path, turn))
            if part.kept is not None and rows is not None:
                leaves[-1] = rows.keep(leaves[-1], part.kept, place)
                place += rows.width(part.kept)
        if own_cache is not None and rows is not None:
            own_cache.begin(call, rows, place)
        return leaves, own_cache

    def _is_as_given(self, turn: OwnTurn) -> bool:
        """Whether a turn takes and returns tensors as they are: it is the only one, and in the same dimensions."""
        return len(self._requests.turns) == 1 and (self._requests.in_batch or len(turn.requests) == 1)

    def _of_turn(self, call: OwnCall, part: Part, value: Any, path: Path, turn: OwnTurn) -> Any:
        """A turn's part of an argument."""
        if isinstance(value, PerTurn):
            return value.values[turn.index]
        if not isinstance(value, Tensor) or self._is_as_given(turn):
            return value
        if part.role is Role.ITSELF and (part.batch_dim is None or not self._requests.in_batch):
            return value
        request, batch_dim = turn.requests[0], part.batch_dim
        if not part.depends_on_context:
            if len(turn.requests) == 1 and not self._requests.in_batch:
                return value.narrow(part.token_dim, request.start, request.num_tokens)
            if len(turn.requests) == 1 and batch_dim is not None:
                return value.narrow(batch_dim, request.index, 1)
            if batch_dim is not None:
                return value.index_select(part.token_dim, self._places(turn)).transpose(part.token_dim, batch_dim)
        where = _pytree.keystr(path)
        raise UnsupportedModelError(f"{call.name}: {where} cannot be taken apart into those of several requests")

    def _find_places(self, turn: OwnTurn) -> Tensor:
        """Of the one new token of each of several requests, among those of the pass: [S] int64."""
        return torch.tensor([request.start for request in turn.requests], device=self._device)

    def _cache_of(self, turn: OwnTurn, inner: Cache | None) -> OwnCache:
        key = (turn.index, None if inner is None else id(inner))
        if key not in self._caches:
            if inner is not None and not self._is_as_given(turn):
                inner = states_of_one(inner, turn.requests[0].index)
            self._caches[key] = OwnCache(inner, turn.num_computed)
        return self._caches[key]

    def _joined(self, call: OwnCall, results: list[Any]) -> Any:
        """The results of all turns as one."""
        spec = _pytree.tree_structure(results[0])
        flat = [leaves_of(result) for result in results]
        joined = []
        for leaves in zip(*flat, strict=True):
            values = [value for _, value in leaves]
            joined.append(self._join(call.results.get(leaves[0][0], _ITSELF), values))
        return _pytree.tree_unflatten(joined, spec)

    def _join(self, part: Part, values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        dim = part.batch_dim if self._requests.in_batch else part.token_dim
        if part.role is not Role.TOKENS or part.depends_on_context or dim is None:
            return PerTurn(tuple(values))
        pieces = values
        if not self._requests.in_batch:
            pairs = zip(values, self._requests.turns, strict=True)
            pieces = [v.transpose(dim, part.batch_dim or 0) if len(turn.requests) > 1 else v for v, turn in pairs]
        others = {(*piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in pieces}
        if len(others) > 1:
            return PerTurn(tuple(values))
        order = self._requests.order
        return torch.cat(pieces, dim) if order is None else torch.cat(pieces, dim).index_select(dim, order)


@contextmanager
def _attention(configs: list[PretrainedConfig], implementation: str) -> Iterator[None]:
    """While open, code that looks up its attention function by these configs finds this one."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


def _configs_of(module: nn.Module) -> list[PretrainedConfig]:
    """Configs that a module's code looks at."""
    found = {id(config): config for part in module.modules() for config in vars(part).values()}
    return [config for config in found.values() if isinstance(config, PretrainedConfig)]
