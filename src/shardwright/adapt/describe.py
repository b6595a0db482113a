"""What has to be known of a module before it can be served: vocabulary, longest sequence, number of layers.

Transformers models say so in their config. A plain module may say it anywhere, or nowhere, so it is looked for in what
was said beside it, then in a pass on "meta" (a copy without weights runs there, and costs next to nothing), then among
attributes and tables. The result has the form of a Transformers config, and becomes the module's `config` if it has
none.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.adapt.logits import logits_of, without_cache
from shardwright.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Modules that take as many are not asked for their limit."""

FEW_TOKENS = 13
"""A number that is unlikely to be a size of the model."""

_HOLDERS = ("config", "cfg", "args", "hparams", "params", "model_args", "model_config")
_VOCAB = ("vocab_size", "n_vocab", "num_tokens", "vocabulary_size", "padded_vocab_size")
_POSITIONS = (
    "max_position_embeddings", "n_positions", "block_size", "max_seq_len", "max_sequence_length", "context_length",
    "n_ctx", "ctx_len", "sequence_length", "seq_length", "seq_len", "max_length", "max_len", "context_size",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


class CustomConfig(PretrainedConfig):
    """What is known of a module without a config of its own."""

    model_type = "custom"


def describe(
    module: nn.Module,
    *,
    vocab_size: int | None = None,
    max_model_len: int | None = None,
    num_layers: int | None = None,
    eos_token_ids: int | Iterable[int] | None = None,
) -> PretrainedConfig:
    """The module's config, or one made of what can be found out; arguments are what is known already.

    Raises: UnsupportedModelError if its vocabulary cannot be told, or is not the one given.
    """
    if isinstance(module, PreTrainedModel):
        return module.config
    seen = observe(module, FEW_TOKENS)
    found = seen.vocab_size if isinstance(seen, Observation) else None
    if vocab_size is not None and found is not None and found != vocab_size:
        raise UnsupportedModelError(
            f"its vocabulary is said to be {vocab_size:,}, but its forward gives {found:,} logits for a token"
        )
    vocab_size = vocab_size or found or _attribute(module, _VOCAB) or _vocab_of_tables(module)
    if vocab_size is None:
        raise UnsupportedModelError(
            f"the vocabulary of {type(module).__name__} cannot be told, for its forward fails on {FEW_TOKENS} token ids "
            f"without values ({type(seen).__name__}: {seen}): if it takes token ids, give it an attribute vocab_size"
        )
    eos = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or ())
    facts: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": _limit(module, max_model_len or _attribute(module, _POSITIONS), seen),
        "num_hidden_layers": num_layers or _attribute(module, _LAYERS) or _count_layers(module),
        "eos_token_id": eos or None,
    }
    config = CustomConfig(**facts)
    if getattr(module, "config", None) is None:
        module.config = config  # type: ignore[assignment]  # any attribute may be set
    return config


class Observation(TorchFunctionMode):
    """Watches a forward pass for the tables that positions are looked up in.

    Positions are what code computes from counting or from tables of whole numbers, and not from the tokens.
    """

    def __init__(self, module: nn.Module, input_ids: Tensor) -> None:
        super().__init__()
        self.vocab_size: int | None = None
        self.position_rows: list[int] = []
        """Lengths of those tables."""
        self._num_tokens = input_ids.numel()
        self._tokens = {id(input_ids): input_ids}
        self._counts = {id(buffer): buffer for buffer in module.buffers() if _is_whole(buffer)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _is_whole(result):
            is_made = func is torch.arange or func.__name__.endswith("_like")
            kinds = [self._counts] if is_made else [kind for value in args if (kind := self._kind(value)) is not None]
            if kinds:  # what it is computed from first decides
                kinds[0][id(result)] = result
        elif (lookup := _lookup(func, args, kwargs)) is not None:
            table, index = lookup
            if id(index) in self._counts and table.shape[0] >= index.numel() == self._num_tokens:
                self.position_rows.append(table.shape[0])
        return result

    def _kind(self, value: Any) -> dict[int, Tensor] | None:
        return next((kind for kind in (self._tokens, self._counts) if id(value) in kind), None)


def observe(module: nn.Module, num_tokens: int) -> Observation | Exception:
    """Run so many tokens through a copy of the module on "meta". Returns what was seen, or why it fails."""
    try:
        with torch.inference_mode(), torch.device("meta"):
            input_ids = torch.zeros(1, num_tokens, dtype=torch.int64)
            skeleton = _on_meta(module)
            observation = Observation(skeleton, input_ids)
            with observation:
                output = skeleton(input_ids, **without_cache(module))
            observation.vocab_size = logits_of(output).shape[-1]
    except Exception as exc:  # code that looks at values cannot run there, and it may be too many tokens
        logger.debug("%d tokens on meta: %s: %s", num_tokens, type(exc).__name__, exc)
        return exc
    return observation


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it and has no values."""
    held: dict[int, Any] = {}
    for owner in module.modules():
        for tensor in _tensors(vars(owner)):
            moved: Tensor = tensor.detach().to("meta")
            held[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(module, held)


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _lookup(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """Table and index of a call that looks rows up."""
    if func is F.embedding:
        index, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    elif func is Tensor.__getitem__:
        table, index = args[0], args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    elif func in (torch.index_select, Tensor.index_select) and len(args) == 3 and args[1] == 0:
        table, index = args[0], args[2]
    else:
        return None
    return (table, index) if _is_whole(index) and table.ndim > 1 else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def _limit(module: nn.Module, known: int | None, seen: Observation | Exception) -> int | None:
    """Most tokens that the module takes: what is known, what its tables have room for, what runs on "meta"."""
    if isinstance(seen, Exception):
        return known or _rows_of_position_tables(module)
    limit = min([*([known] if known else []), *seen.position_rows], default=None)
    high = limit or MOST_TOKENS
    if isinstance(observe(module, high), Observation):
        return limit
    low = FEW_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if isinstance(observe(module, middle), Observation) else (low, middle)
    return low


def _attribute(module: nn.Module, names: Iterable[str]) -> int | None:
    """The first of these attributes that is a positive number, of the module or a record of settings that it holds."""
    records = [module, *(record for name in _HOLDERS if (record := getattr(module, name, None)) is not None)]
    for name in names:
        for record in records:
            value = record.get(name) if isinstance(record, dict) else getattr(record, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _vocab_of_tables(module: nn.Module) -> int | None:
    """Rows of the embedding that some linear gives as many outputs as, or of the first embedding."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    widths = {m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
    return next((n for n in rows if n in widths), rows[0] if rows else None)


def _rows_of_position_tables(module: nn.Module) -> int | None:
    """Rows of the shortest embedding that is as wide as the first and is not the vocabulary's."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    vocab_size = _vocab_of_tables(module)
    rows = [t.num_embeddings for t in tables if t.embedding_dim == tables[0].embedding_dim]
    return min((n for n in rows if n != vocab_size), default=None)


def _count_layers(module: nn.Module) -> int | None:
    """How many blocks of one class stand side by side, where there are the most of them nearest to the top."""
    level = [module]
    while level:
        counts = []
        for owner in level:
            kinds = [type(child) for child in owner.children() if next(child.children(), None) is not None]
            counts += [kinds.count(kind) for kind in set(kinds)]
        if max(counts, default=0) > 1:
            return max(counts)
        level = [child for owner in level for child in owner.children()]
    return None
