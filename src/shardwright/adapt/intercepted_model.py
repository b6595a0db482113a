"""A module that computes its attention itself, served packed: its own code runs, and ours answers where it attends.

While a step runs, calls that the trace knows are answered differently: scaled_dot_product_attention by paged attention;
a product that makes scores by a stand-in that computes nothing, whatever the code does to it (scale, mask, softmax,
cast); the product of its weights with the values by paged attention; counts of tokens, and the rows of position tables
that go with them, by the true positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.adapt.fit import FittedAttention, fit_attention
from shardwright.adapt.logits import logits_of
from shardwright.adapt.probe import accepts
from shardwright.adapt.products import as_product
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.served_model import ForwardInputs, output_head, rows_before_head
from shardwright.adapt.trace import CallCounter, ForwardTrace, TracingMode
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend
from shardwright.cache.spec import CacheGroup, LayerSpec, group_layers
from shardwright.errors import UnsupportedModelError

SHORT_TRACE = 13
"""Tokens of the trace that finds which calls count tokens: a number that is unlikely to be a size of the model."""

LONG_TRACE = 509
"""Tokens of the trace that is fitted, if the model takes as many: windows up to this long are seen."""


class InterceptedModel:
    """Serves a module that calls scaled_dot_product_attention, or multiplies, masks and sums by itself.

    Args:
        module: in eval mode, weights loaded.
        num_positions: longest sequence that will be served.

    Raises: UnsupportedModelError if its attention cannot be found or understood.
    """

    def __init__(self, module: nn.Module, *, num_positions: int) -> None:
        self.module = module
        self._takes_positions = accepts(module, "position_ids")
        self._options = {"use_cache": False} if accepts(module, "use_cache") else {}
        short = self._trace(min(SHORT_TRACE, num_positions))
        long = self._trace(min(LONG_TRACE, num_positions))
        if len(short.attentions) != len(long.attentions) or short.num_products != long.num_products:
            raise UnsupportedModelError("its code computes differently for prompts of different lengths")
        if not long.attentions:
            raise UnsupportedModelError("no attention was found in its forward pass")
        self._plan = short
        self._attentions = [fit_attention(trace, f"attention {i}") for i, trace in enumerate(long.attentions)]
        is_sdpa = all(trace.is_sdpa for trace in long.attentions)
        self.rung = AttentionRung.SDPA if is_sdpa else AttentionRung.DATAFLOW
        how = "calls of scaled_dot_product_attention" if is_sdpa else "softmaxes of products of queries and keys"
        self.rung_reason = f"{len(self._attentions)} {how} in its own code are answered by paged attention"
        self.layers: list[LayerSpec] = [attention.spec for attention in self._attentions]
        self.groups: list[CacheGroup] = group_layers(self.layers)
        self.head = output_head(module)
        self._mode = _ServingMode(module, short, self._attentions)

    def forward(self, inputs: ForwardInputs, cache: KVCache, backend: AttentionBackend) -> Tensor:
        """Run one step. Returns [R, vocab_size] logits, model dtype, for the rows asked for."""
        options: dict[str, Any] = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = inputs.position_ids[None]
        self._mode.begin(inputs, cache, backend)
        with rows_before_head(self.head, inputs.logits_rows), self._mode:
            output = self.module(inputs.input_ids[None], **options)
        self._mode.end()
        logits = logits_of(output)[0]
        return logits if len(logits) == len(inputs.logits_rows) else logits[inputs.logits_rows]

    @torch.inference_mode()
    def _trace(self, num_tokens: int) -> ForwardTrace:
        device = next(self.module.parameters()).device
        generator = torch.Generator().manual_seed(0)
        vocab_size = _vocab_size(self.module)
        tokens = torch.randint(vocab_size, (1, num_tokens), generator=generator).to(device)
        options: dict[str, Any] = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = torch.arange(num_tokens, device=device)[None]
        mode = TracingMode(self.module, num_tokens)
        with mode:
            self.module(tokens, **options)
        return mode.trace


class _ServingMode(TorchFunctionMode):
    """Answers the known calls of one forward pass after another."""

    def __init__(self, module: nn.Module, trace: ForwardTrace, attentions: list[FittedAttention]) -> None:
        super().__init__()
        self._trace = trace
        self._attentions = attentions
        self._counter = CallCounter(module)
        self._sdpa = {a.place: i for i, a in enumerate(trace.attentions) if a.is_sdpa}
        self._scores = {a.place: i for i, a in enumerate(trace.attentions) if not a.is_sdpa}
        self._values = {a.value_place: i for i, a in enumerate(trace.attentions) if a.value_place is not None}
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, inputs: ForwardInputs, cache: KVCache, backend: AttentionBackend) -> None:
        self._inputs, self._cache, self._backend = inputs, cache, backend
        self._counter.restart()
        self._pending.clear()

    def end(self) -> None:
        if self._counter.num_products != self._trace.num_products or self._counter.num_sdpa != len(self._sdpa):
            raise UnsupportedModelError("its code took another path than when it was traced")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counter = self._counter
        if func is F.scaled_dot_product_attention:
            index, counter.num_sdpa = self._sdpa[counter.num_sdpa], counter.num_sdpa + 1
            query, key, value = (tensor.flatten(0, -3) for tensor in args[:3])
            return self._attend(index, query, key, value).view(*args[0].shape[:-1], -1)
        if func is torch.arange:
            place, counter.num_aranges = counter.num_aranges, counter.num_aranges + 1
            if place in self._trace.counting_aranges:
                positions = self._inputs.position_ids
                return positions.to(dtype=kwargs.get("dtype") or positions.dtype, copy=True)
        elif counter.is_table_slice(func, args):
            place, counter.num_slices = counter.num_slices, counter.num_slices + 1
            if place in self._trace.counting_slices:
                rest = args[1][1:] if isinstance(args[1], tuple) else ()
                rows = args[0].index_select(0, self._inputs.position_ids)
                return rows[(slice(None), *rest)] if rest else rows
        elif (product := as_product(func, args, kwargs)) is not None:
            place, counter.num_products = counter.num_products, counter.num_products + 1
            if place in self._scores:
                self._pending[self._scores[place]] = (product.left, product.right.transpose(1, 2))
                shape = (product.left.shape[0], product.left.shape[1], product.right.shape[2])
                return StandIn.like(product.restore(product.left.new_empty(shape, device="meta")))
            if place in self._values:
                index = self._values[place]
                query, key = self._pending.pop(index)
                return product.restore(self._attend(index, query, key, product.right))
        return func(*args, **kwargs)

    def _attend(self, index: int, query_HTD: Tensor, key_HTD: Tensor, value_HTV: Tensor) -> Tensor:
        """Paged attention of one call; returns [H, T, V]."""
        attention, group = self._attentions[index], self._cache.group_of_layer[index]
        key_TKD = key_HTD[:: attention.repeats].transpose(0, 1)
        value_TKV = value_HTV[:: attention.repeats].transpose(0, 1)
        layer = self._cache.layers[index]
        layer.write(self._inputs.slot_mappings[group], key_TKD, value_TKV)
        output = self._backend.forward(
            query_HTD.transpose(0, 1), key_TKD, value_TKV, layer, self._inputs.plans[group], attention.params
        )
        return output.transpose(0, 1)


class StandIn(Tensor):
    """In place of scores and weights that nobody computes: it has their shape and type, and no memory."""

    @classmethod
    def like(cls, meta: Tensor) -> StandIn:
        """A stand-in with the shape and dtype of a tensor on "meta"."""
        return meta.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:  # wherever it is sent, there is nothing to send
            args = (args[0], *(a.dtype if isinstance(a, Tensor) else a for a in args[1:] if not _is_device(a)))
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            if len(args) == 1 and not kwargs:
                return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*(_on_meta(a) for a in args), **{name: _on_meta(a) for name, a in kwargs.items()})
        return cls.like(result) if isinstance(result, Tensor) else result


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.device.type != "meta" else value


def _vocab_size(module: nn.Module) -> int:
    """Token ids to draw from: rows of the table that looks them up."""
    config = getattr(module, "config", None)
    if config is not None and isinstance(getattr(config, "vocab_size", None), int):
        return int(config.vocab_size)
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    return max(tables, default=1)
