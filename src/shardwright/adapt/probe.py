"""Find out by one short forward pass what attention a module asks for: every call, its heads, scale, window and extras.

The calls of a forward are numbered in order; call i is layer i of the cache. That holds for modules that run more than
once and for layers that reuse another's keys and values, whatever they are named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.agreement import agreed
from shardwright.adapt.count_calls import Count, CountCalls
from shardwright.adapt.counting import COUNTS_ONCE, CountFollower, CountingMode, Use
from shardwright.adapt.dispatch import PROBE, AttentionHandler, handling
from shardwright.adapt.latent import LatentFinder, LatentSearch, find_latents
from shardwright.adapt.visibility import SeenMasks
from shardwright.attention.layout import AttentionParams
from shardwright.cache.spec import LayerSpec, Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described

NUM_PROBE_TOKENS = 13
"""A number that is unlikely to be a size of the model, so that what is as long as the prompt stands out."""

NUM_COUNTED_TOKENS = 17
"""Another such number: code that remembers its counts has none for it yet."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of the forward, as it will come at every step."""

    module: nn.Module
    spec: LayerSpec
    params: AttentionParams


class ProbeHandler:
    """Records the attention calls of a forward pass and answers them with values of the right shape.

    Args:
        model: that runs.
        num_positions: longest sequence that will be served.
        finder: is shown the keys and values of each call.
    """

    def __init__(self, model: nn.Module, num_positions: int, finder: LatentFinder | None = None) -> None:
        self.calls: list[AttentionCall] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._finder = finder
        self._masks = SeenMasks(num_positions)

    def make_mask(self, mask_function: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        """A mask that lets everything through, and tells later which one it is."""
        shape = (1, 1, options.get("q_length", NUM_PROBE_TOKENS), options.get("kv_length", NUM_PROBE_TOKENS))
        mask = torch.zeros(shape, dtype=options.get("dtype", torch.float32), device=options.get("device"))
        return self._masks.note(mask, mask_function, options.get("local_size"))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        name = self._names.get(id(module), type(module).__name__)
        if query.ndim != 4 or query.shape[0] != 1 or not query.shape[2] == key.shape[2] == value.shape[2]:
            raise UnsupportedModelError(
                f"{name} attends from {tuple(query.shape)} to {tuple(key.shape)}: "
                "not causal self-attention over the same tokens"
            )
        if query.shape[1] % key.shape[1]:
            raise UnsupportedModelError(f"{name} has {query.shape[1]} query heads for {key.shape[1]} KV heads")
        if options.get("is_causal") is False or (mask is None and getattr(module, "is_causal", True) is False):
            raise UnsupportedModelError(f"{name} asks for attention that is not causal")
        for bias in ("position_bias", "attention_bias", "alibi"):
            if options.get(bias) is not None:
                raise UnsupportedModelError(f"{name} adds a {bias} to its attention scores")
        if options.get("indices") is not None:
            raise UnsupportedModelError(f"{name} chooses by its data which tokens it attends to")
        if self._finder is not None:
            self._finder.look(len(self.calls), key[0], value[0])
        scale = options.get("scaling")
        self.calls.append(
            AttentionCall(
                module,
                LayerSpec(
                    name=name,
                    num_heads=query.shape[1],
                    num_kv_heads=key.shape[1],
                    key_dim=key.shape[3],
                    value_dim=value.shape[3],
                    visibility=self._visibility(name, mask, options.get("sliding_window")),
                ),
                AttentionParams(
                    scale=float(scale) if scale is not None else query.shape[3] ** -0.5,
                    softcap=options.get("softcap"),
                    sinks_H=options.get("s_aux"),
                ),
            )
        )
        return values_for(query, value)

    def _visibility(self, name: str, mask: Tensor | None, sliding_window: int | None) -> Visibility:
        if mask is None:  # the code leaves the mask to the attention function
            return Visibility(VisibilityKind.SLIDING, sliding_window) if sliding_window else Visibility()
        try:
            visibility = self._masks.find(mask)
        except UnsupportedModelError as exc:
            raise UnsupportedModelError(f"{name}: {exc}") from exc
        if visibility is None:
            raise UnsupportedModelError(f"{name} uses an attention mask that its code builds itself")
        return visibility


class ValuesHandler:
    """Answers the attention calls of a forward pass with values of the right shape, as if it served."""

    def make_mask(self, mask_function: Callable[..., Any], options: dict[str, Any]) -> Tensor | None:
        """None: never needed."""
        return None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        return values_for(query, value)


def values_for(query: Tensor, value: Tensor) -> Tensor:
    """Numbers in the shape of attention's output, made of values: [1, T, H, V]."""
    return value.mean(1, keepdim=True).expand(-1, query.shape[1], -1, -1).transpose(1, 2).contiguous()


@torch.inference_mode()
def probe_attention(model: nn.Module, *, num_positions: int, needs_attention: bool = True) -> list[AttentionCall]:
    """Run a few tokens through the model, on the device it is on ("meta" too), and record its attention calls.

    Args:
        model: a Transformers model in eval mode; its attention implementation is changed.
        num_positions: longest sequence that will be served.
        needs_attention: whether a model that never attends is refused.

    Raises: UnsupportedModelError saying what stands in the way of serving it through the attention interface.
    """
    handler = ProbeHandler(model, num_positions)
    set_attention(model, PROBE)
    run_probe(model, handler, num_tokens=NUM_PROBE_TOKENS)
    if needs_attention and not handler.calls:
        raise UnsupportedModelError("its code never calls Transformers' attention interface")
    return handler.calls


@torch.inference_mode()
def probe_counts(model: nn.Module, agree: Callable[[bool], bool] = bool) -> dict[Count, Use]:
    """Run a few tokens through a model as it will be served, and see which of its calls of torch.arange count them.

    Slices of tables are not looked at: in layers with a state they are as often of a piece of a prompt as of positions.

    Args:
        model: a Transformers model in eval mode whose attention goes through the interface.
        agree: whether all ranks that share the model say yes; the layers of some may not count.

    Raises: UnsupportedModelError if its forward pass fails, or counts only once for each number of tokens.
    """

    def look() -> dict[Count, Use]:
        follower = CountFollower(CountCalls(), NUM_COUNTED_TOKENS)
        run_probe(model, ValuesHandler(), num_tokens=NUM_COUNTED_TOKENS, watching=CountingMode(follower))
        return follower.uses

    uses = agreed(look, agree)
    if not agree(not uses) and uses != agreed(look, agree):
        raise UnsupportedModelError(COUNTS_ONCE)
    return uses


def run_probe(
    model: nn.Module,
    handler: AttentionHandler,
    *,
    num_tokens: int,
    watching: AbstractContextManager[Any] | None = None,
) -> None:
    """Run a few tokens through a model whose attention calls go to a handler.

    Raises: UnsupportedModelError if its code fails.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device=device)}
    if device.type == "meta":  # with positions the mask code would look at their values
        inputs["attention_mask"] = torch.ones(1, num_tokens, dtype=torch.int64, device=device)
    elif accepts(model, "position_ids", or_any=True):
        inputs["position_ids"] = torch.arange(num_tokens, device=device)[None]
    try:
        with handling(handler), watching or nullcontext():
            model(**inputs, use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"a short forward pass failed: {described(exc)}") from exc


@torch.inference_mode()
def probe_latents(
    model: nn.Module, calls: list[AttentionCall], *, num_positions: int, agree: Callable[[bool], bool]
) -> LatentSearch:
    """Whether the attention calls can cache latents in place of keys and values.

    Args:
        model: as in `probe_attention`, after it.
        calls: that it found.
        num_positions: longest sequence that will be served.
        agree: whether all ranks that share the model say yes.
    """

    def run(finder: LatentFinder) -> None:
        handler = ProbeHandler(model, num_positions, finder)
        run_probe(model, handler, num_tokens=NUM_PROBE_TOKENS, watching=finder.watching())

    return find_latents(model, [call.spec for call in calls], run, agree=agree)


def set_attention(model: nn.Module, implementation: str) -> None:
    """Choose the attention function that the model's code will look up, if it looks one up.

    Raises: UnsupportedModelError if the model refuses.
    """
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        return
    try:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    except Exception as exc:
        raise UnsupportedModelError(f"its attention cannot be replaced: {described(exc)}") from exc


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache."""
    return "cache_params" if accepts(model, "cache_params") else "past_key_values"


def accepts(model: nn.Module, argument: str, *, or_any: bool = False) -> bool:
    """Whether the model's forward names an argument; with `or_any`, also whether it takes any keyword."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = or_any and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return argument in parameters or takes_any
