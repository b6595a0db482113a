"""Find the modules whose attention cannot be ours, and how they are called.

A few tokens are run with the model's own attention and cache: once, going on from there, and as a batch of two. What a
module hands to the cache is what it has to keep; which sizes differ between the passes shows what they count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from shardwright.adapt.dispatch import PROBE, eager_masks
from shardwright.adapt.own_calls import OwnCall, Part, Path, Role, Write
from shardwright.adapt.own_recording import CallRecorder, SeenCall, SeenValue, WatchedCache
from shardwright.adapt.probe import (
    NUM_PROBE_TOKENS,
    ProbeHandler,
    accepts,
    cache_argument,
    run_probe,
    set_attention,
    values_for,
)
from shardwright.adapt.token_rows import TokenTensor
from shardwright.adapt.visibility import SeenMasks
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described

NUM_MORE_TOKENS = 5
"""Of the pass that goes on."""
NUM_SEQUENCES = 2
"""Of the pass of a batch."""


@torch.inference_mode()
def find_own_calls(model: nn.Module, *, num_positions: int, has_states: bool) -> list[OwnCall]:
    """The calls of modules that have to run their own attention.

    Args:
        model: a Transformers model in eval mode; its attention implementation is changed.
        num_positions: longest sequence that will be served.
        has_states: whether other layers may carry states.

    Raises: UnsupportedModelError if there are none, or they cannot be called a request at a time.
    """
    handler = _TolerantProbe(model, num_positions)
    set_attention(model, PROBE)
    run_probe(model, handler, num_tokens=NUM_PROBE_TOKENS)
    set_attention(model, "eager")
    passes = _passes(model, num_positions)
    first = passes[0]
    if first.has_states and not has_states:
        raise UnsupportedModelError("its layers carry states")
    if any([call.module for call in other.calls] != [call.module for call in first.calls] for other in passes):
        raise UnsupportedModelError("its code takes another path when it goes on than at first")
    places = _own_places(first, refused=list(handler.refused), captured=[call.module for call in handler.calls])
    if not places:
        raise UnsupportedModelError("no module of it is given a cache to keep what its own attention needs")
    names = {id(module): name for name, module in model.named_modules()}
    calls = [[seen.calls[place] for seen in passes] for place in places]
    return [_own_call(names[id(seen[0].module)], seen) for seen in calls]


class _TolerantProbe(ProbeHandler):
    """Goes on where an attention call cannot be captured."""

    def __init__(self, model: nn.Module, num_positions: int) -> None:
        super().__init__(model, num_positions)
        self.refused: dict[nn.Module, UnsupportedModelError] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        try:
            return super().attend(module, query, key, value, mask, options)
        except UnsupportedModelError as exc:
            self.refused[module] = exc
            return values_for(query, value)


def _passes(model: nn.Module, num_positions: int) -> list[CallRecorder]:
    """A prompt, tokens that go on from it, and a batch of two prompts."""
    masks = SeenMasks(num_positions)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not accepts(model, cache_argument(model), or_any=True):
        raise UnsupportedModelError("its code is not given a cache of Transformers' kind")
    text_config = config.get_text_config(decoder=True)

    def make_mask(**options: Any) -> Tensor:
        return masks.note(eager_mask(**options), options["mask_function"], options.get("local_size"))

    def run(num_sequences: int, start: int, num_tokens: int, cache: WatchedCache | None) -> WatchedCache:
        recorder = CallRecorder(masks.find)
        cache = cache or WatchedCache(text_config, recorder)
        cache.recorder = recorder
        device = next(model.parameters()).device
        positions = torch.arange(start, start + num_tokens, device=device).expand(num_sequences, -1)
        inputs = {"input_ids": torch.zeros_like(positions), cache_argument(model): cache, "use_cache": True}
        if accepts(model, "position_ids", or_any=True):
            inputs["position_ids"] = positions
        with eager_masks(make_mask), recorder.watching(model):
            model(**inputs)
        recorders.append(recorder)
        return cache

    recorders: list[CallRecorder] = []
    try:
        begun = run(1, 0, NUM_PROBE_TOKENS, None)
        run(1, NUM_PROBE_TOKENS, NUM_MORE_TOKENS, begun)
        run(NUM_SEQUENCES, 0, NUM_PROBE_TOKENS, None)
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"a few tokens with its own cache fail: {described(exc)}") from exc
    return recorders


def _own_places(seen: CallRecorder, *, refused: Sequence[nn.Module], captured: Sequence[nn.Module]) -> list[int]:
    """Which calls are of modules that have to run their own attention.

    Of each layer of the cache, it is the innermost module that contains all that is handed to it, and the attention.
    """
    keepers: dict[int, list[SeenCall]] = {}
    for write in seen.writes:
        chain = write.call.chain()
        known = keepers.setdefault(write.layer, chain)
        keepers[write.layer] = [a for a, b in zip(known, chain, strict=False) if a is b]
    own: dict[SeenCall, None] = {}
    for chain in keepers.values():
        keeper = chain[-1] if chain else None
        if keeper is None:
            raise UnsupportedModelError("several modules share a layer of its cache")
        attending = [call for call in chain if call.module in refused]
        is_refused = bool(attending) or any(_contains(keeper.module, module) for module in refused)
        is_captured = any(_related(keeper.module, module) for module in captured)
        is_plain = [write.method for write in keeper.writes] == ["update"]
        if is_refused or not is_captured or not is_plain:
            own[attending[0] if attending else keeper] = None
    for call in own:
        if len({write.layer for write in call.writes}) > 1:
            raise UnsupportedModelError(f"{type(call.module).__name__} keeps what several layers of the cache hold")
    return [place for place, call in enumerate(seen.calls) if call in own]


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _related(one: nn.Module, other: nn.Module) -> bool:
    return _contains(one, other) or _contains(other, one)


def _own_call(name: str, seen: Sequence[SeenCall]) -> OwnCall:
    """What is known of a call from what was seen of it in the passes."""
    first, more, batch = seen
    writes = []
    for one, two, both in zip(first.writes, more.writes, batch.writes, strict=True):
        tensors = zip(one.tensors, two.tensors, both.tensors, strict=True)
        writes.append(Write(one.method, tuple(_kept(name, *seen_tensor) for seen_tensor in tensors)))
    return OwnCall(
        first.module,
        name,
        _parts(name, first.arguments, more.arguments, batch.arguments, is_given=True),
        _parts(name, first.results, more.results, batch.results, is_given=False),
        tuple(writes),
    )


def _parts(
    name: str,
    first: Mapping[Path, SeenValue],
    more: Mapping[Path, SeenValue],
    batch: Mapping[Path, SeenValue],
    *,
    is_given: bool,
) -> dict[Path, Part]:
    if not first.keys() == more.keys() == batch.keys():
        raise UnsupportedModelError(f"{name} is called in another way when it goes on than at first")
    return {path: _part(name, value, more[path], batch[path], is_given) for path, value in first.items()}


def _part(name: str, first: SeenValue, more: SeenValue, batch: SeenValue, is_given: bool) -> Part:
    if first.is_cache:
        return Part(Role.CACHE)
    if first.number != more.number and is_given:
        raise UnsupportedModelError(f"{name} is given a number that differs from step to step")
    if first.shape is None or more.shape is None or batch.shape is None:
        return Part(Role.ITSELF)
    if first.visibility is not None and is_given:
        return Part(Role.MASK, visibility=first.visibility)
    if not len(first.shape) == len(more.shape) == len(batch.shape):
        raise UnsupportedModelError(f"{name}: the dimensions of what it is given or returns differ from time to time")
    changed = _changed(first.shape, more.shape)
    batch_dim = _batch_dim(first.shape, batch.shape)
    tokens = [dim for dim in changed if (first.shape[dim], more.shape[dim]) == (NUM_PROBE_TOKENS, NUM_MORE_TOKENS)]
    if not changed:
        return Part(Role.ITSELF, batch_dim=batch_dim)
    if len(tokens) == 1:
        return Part(Role.TOKENS, tokens[0], batch_dim, depends_on_context=len(changed) > 1)
    if not is_given:
        return Part(Role.TOKENS, depends_on_context=True)
    whole = (NUM_PROBE_TOKENS, NUM_PROBE_TOKENS + NUM_MORE_TOKENS)
    if len(changed) == 1 and (first.shape[changed[0]], more.shape[changed[0]]) == whole:
        assert first.dtype is not None
        kept = TokenTensor(first.shape, changed[0], first.dtype, batch_dim)
        return Part(Role.CONTEXT, changed[0], batch_dim, kept=kept)
    raise UnsupportedModelError(f"{name} is given something as long as neither its tokens nor the context")


def _kept(name: str, first: SeenValue, more: SeenValue, batch: SeenValue) -> TokenTensor:
    """What is handed to the cache."""
    if first.shape is None or more.shape is None or len(first.shape) != len(more.shape):
        raise UnsupportedModelError(f"{name} keeps something that is no tensor of its tokens")
    changed = _changed(first.shape, more.shape)
    if len(changed) != 1 or (first.shape[changed[0]], more.shape[changed[0]]) != (NUM_PROBE_TOKENS, NUM_MORE_TOKENS):
        raise UnsupportedModelError(f"{name} keeps no row of numbers for each token")
    assert first.dtype is not None
    batch_dim = None if batch.shape is None else _batch_dim(first.shape, batch.shape)
    return TokenTensor(first.shape, changed[0], first.dtype, batch_dim)


def _batch_dim(one: Sequence[int], several: Sequence[int]) -> int | None:
    """The dimension that counts sequences; None if there is none, or more than one."""
    changed = _changed(one, several)
    if len(changed) != 1 or (one[changed[0]], several[changed[0]]) != (1, NUM_SEQUENCES):
        return None
    return changed[0]


def _changed(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
