"""Where a model keeps its states, and a slot for each running sequence.

A state is what a layer needs of all tokens before: its size does not grow with them. Most models keep theirs in the
layers of Transformers' cache. Others hand them out of the forward pass and take them back as an argument, keep them in
a cache class of their own, or on their modules; these are found by running a few tokens and looking at what changes
with the number of sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from shardwright.adapt.probe import accepts, cache_argument
from shardwright.errors import UnsupportedModelError

_KINDS = ("conv", "recurrent")

Path = tuple[str | int, ...]
"""To a tensor inside lists and mappings."""


class States(Protocol):
    """States of all rows, and how a forward pass gets and leaves them."""

    @property
    def bytes_per_row(self) -> int:
        """Known once a sequence has run."""
        ...

    def allocate(self, num_rows: int) -> None:
        """Make room for as many sequences; what was kept is lost."""
        ...

    def fresh(self) -> dict[str, Any]:
        """Arguments of a forward pass of a sequence that begins."""
        ...

    def gather(self, rows: Tensor) -> dict[str, Any]:
        """Arguments of a forward pass of sequences that go on; `rows` is [S] int64."""
        ...

    def put(self, options: dict[str, Any], rows: Tensor) -> None:
        """Keep what a forward pass with these arguments left, in the order of `rows`."""
        ...


class _PassingCache:
    """Keys and values pass through to paged attention."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never asked for to any effect: positions are given, masks are not built."""
        return 0


class StateCache(_PassingCache, DynamicCache):
    """The cache that the module sees in one forward: states are ours to fill in."""


def find_states(module: nn.Module, *, vocab_size: int, agree: Callable[[bool], bool] = bool) -> States:
    """Where a model keeps its states.

    Args:
        module: weights loaded; a few tokens are run if Transformers' cache has no place for states.
        vocab_size: number of token ids to draw the tokens from.
        agree: whether all ranks that share the model say yes; the layers of some may have no states.

    Raises: UnsupportedModelError if there are none, or they are not one slot a sequence.
    """
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        in_cache = CacheLayerStates(module, config.get_text_config(decoder=True))
        if in_cache.has_states and not agree(not in_cache.are_used(module)):
            return in_cache
    return FoundStates(module, vocab_size=vocab_size)


class CacheLayerStates:
    """States in the layers of Transformers' cache, a tensor per layer and state; made when first put away.

    Args:
        module: the model.
        config: of its text part.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._config = config
        self._argument = cache_argument(module)
        self._slots: dict[tuple[int, str, int], Tensor] = {}
        self._kernel_sizes: dict[tuple[int, int], Any] = {}
        self._num_rows = 0
        layers = StateCache(config=config).layers
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)

    @property
    def bytes_per_row(self) -> int:
        return sum(slots[0].nbytes for slots in self._slots.values())

    def allocate(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._slots = {
            key: torch.zeros(num_rows, *slots.shape[1:], dtype=slots.dtype, device=slots.device)
            for key, slots in self._slots.items()
        }

    def fresh(self) -> dict[str, Any]:
        return {self._argument: StateCache(config=self._config), "use_cache": True}

    @torch.inference_mode()
    def are_used(self, module: nn.Module) -> bool:
        """Whether the model's code puts states there; it may have the layers and use another place."""
        options = self.fresh()
        try:
            module(torch.zeros(1, 3, dtype=torch.int64, device=next(module.parameters()).device), **options)
        except Exception:  # code refuses a cache that is not of its own class in any way
            return False
        layers = [x for x in options[self._argument].layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        return any(v is not None for x in layers for kind in _KINDS for v in getattr(x, f"{kind}_states").values())

    def gather(self, rows: Tensor) -> dict[str, Any]:
        options = self.fresh()
        for (index, kind, state), slots in self._slots.items():
            layer: Any = options[self._argument].layers[index]
            getattr(layer, f"{kind}_states")[state] = slots.index_select(0, rows)
            getattr(layer, f"is_{kind}_states_initialized")[state] = True
            layer.has_previous_state[state] = True
            layer.conv_kernel_size[state] = self._kernel_sizes.get((index, state))
        return options

    def put(self, options: dict[str, Any], rows: Tensor) -> None:
        for index, layer in enumerate(options[self._argument].layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                continue
            for kind in _KINDS:
                for state, value in getattr(layer, f"{kind}_states").items():
                    if value is None:
                        continue
                    key = (index, kind, state)
                    if key not in self._slots:
                        self._slots[key] = value.new_zeros(self._num_rows, *value.shape[1:])
                    self._slots[key].index_copy_(0, rows, value)
                    self._kernel_sizes[index, state] = layer.conv_kernel_size[state]


@dataclass(frozen=True, slots=True)
class _Holder:
    """Something that holds states: a value that the forward hands out and takes back, or an attribute."""

    kind: str
    """`argument` of the forward, `cache` for an attribute of its cache, `module` for one of a module."""
    owner: str
    """Qualified name of the module; empty for the others."""
    name: str


class FoundStates:
    """States that are not in Transformers' cache layers.

    Args:
        module: weights loaded.
        vocab_size: number of token ids to draw tokens from.

    Raises: UnsupportedModelError if nothing is found, or it is not one slot a sequence.
    """

    def __init__(self, module: nn.Module, *, vocab_size: int) -> None:
        self._module = module
        self._modules = dict(module.named_modules())
        self._argument = cache_argument(module) if accepts(module, cache_argument(module)) else None
        self._use_cache = {"use_cache": True} if accepts(module, "use_cache") else {}
        self._attributes = {name: dict(vars(owner)) for name, owner in self._modules.items()}
        """As the modules had them before anything ran."""
        self._output: Any = None
        self._listener: RemovableHandle | None = None
        self._cache_class: type[Cache] | None = StateCache if self._argument and hasattr(module, "config") else None
        runs = [self._look(batch, length, vocab_size) for batch, length in ((2, 4), (3, 4), (2, 7))]
        self._templates = {holder: value for holder, value, _ in runs[0]}
        leaves = [{(holder, path): tensor.shape for holder, _, found in run for path, tensor in found} for run in runs]
        if not leaves[0]:
            raise UnsupportedModelError("it keeps no states between tokens")
        self._dims = {key: _batch_dim(key[0].name, [run.get(key) for run in leaves]) for key in leaves[0]}
        self._slots: dict[_Holder, dict[Path, Tensor]] = {holder: {} for holder in self._templates}
        self._num_rows = 0

    @property
    def bytes_per_row(self) -> int:
        return sum(t.nbytes for slots in self._slots.values() for t in slots.values()) // max(self._num_rows, 1)

    def allocate(self, num_rows: int) -> None:
        self._num_rows = num_rows
        for holder, slots in self._slots.items():
            for path, old in slots.items():
                slots[path] = old.new_zeros(_with(old.shape, self._dims[holder, path], num_rows))

    def fresh(self) -> dict[str, Any]:
        self._restore(self._templates)
        self._listen()
        options = dict(self._use_cache)
        if self._argument is not None and self._cache_class is not None:
            options[self._argument] = self._new_cache()
        return options

    def gather(self, rows: Tensor) -> dict[str, Any]:
        options = self.fresh()
        for holder, template in self._templates.items():
            if not (slots := self._slots[holder]):  # no forward pass wrote it: of a layer of another pipeline stage
                continue
            values = {path: kept.index_select(self._dims[holder, path], rows) for path, kept in slots.items()}
            value = _rebuilt(template, values)
            if holder.kind == "argument":
                options[holder.name] = value
            else:
                setattr(self._owner(holder, options), holder.name, value)
        return options

    def put(self, options: dict[str, Any], rows: Tensor) -> None:
        for holder in self._templates:
            slots = self._slots[holder]
            for path, value in _tensors(self._held(holder, self._output, options)):
                dim = self._dims[holder, path]
                if path not in slots:
                    slots[path] = value.new_zeros(_with(value.shape, dim, self._num_rows))
                slots[path].index_copy_(dim, rows, value)
        self._stop_listening()

    def _listen(self) -> None:
        """Keep what the next forward pass returns, until `put` has read it."""
        self._stop_listening()
        if any(holder.kind == "argument" for holder in self._templates):
            self._listener = self._module.register_forward_hook(self._keep_output)

    def _stop_listening(self) -> None:
        self._output = None
        if self._listener is not None:
            self._listener.remove()
            self._listener = None

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output

    def _restore(self, holders: Iterable[_Holder]) -> None:
        """Give attributes of modules back what they were before anything ran."""
        for holder in holders:
            if holder.kind == "module":
                setattr(self._modules[holder.owner], holder.name, self._attributes[holder.owner].get(holder.name))

    def _owner(self, holder: _Holder, options: dict[str, Any]) -> Any:
        """What has the holder as its attribute."""
        return options[cache_argument(self._module)] if holder.kind == "cache" else self._modules[holder.owner]

    def _held(self, holder: _Holder, output: Any, options: dict[str, Any]) -> Any:
        if holder.kind == "argument":
            return output.get(holder.name) if isinstance(output, dict) else getattr(output, holder.name, None)
        return getattr(self._owner(holder, options), holder.name)

    def _new_cache(self) -> Any:
        assert self._cache_class is not None
        try:
            return self._cache_class(config=self._module.config.get_text_config(decoder=True))  # type: ignore
        except TypeError:
            return self._cache_class()

    @torch.inference_mode()
    def _look(self, batch: int, length: int, vocab_size: int) -> list[tuple[_Holder, Any, list[tuple[Path, Tensor]]]]:
        """What holds tensors after a forward pass: each with its value and the tensors in it."""
        device = next(self._module.parameters()).device
        tokens = (torch.arange(batch * length, device=device) % vocab_size).view(batch, length)
        output = self._module(tokens, **self._use_cache)
        holders, options = [], {}
        if isinstance(output, dict):
            taken = [name for name in output if name != "logits" and accepts(self._module, name)]
            holders += [_Holder("argument", "", name) for name in taken if not isinstance(output[name], Cache)]
        cache = output.get(self._argument) if isinstance(output, dict) and self._argument else None
        if cache is not None and not isinstance(cache, Cache):
            self._cache_class = None
        if isinstance(cache, Cache):
            self._cache_class = type("PassingCache", (_PassingCache, type(cache)), {})
            holders += [_Holder("cache", "", name) for name in vars(cache) if name != "layers"]
            options[cache_argument(self._module)] = cache
        for owner_name, owner in self._modules.items():
            holders += [
                _Holder("module", owner_name, name)
                for name, value in vars(owner).items()
                if not name.startswith("_") and value is not self._attributes[owner_name].get(name)
            ]
        found = [(holder, self._held(holder, output, options)) for holder in holders]
        looked = [(holder, value, list(_tensors(value))) for holder, value in found]
        self._restore(holders)
        return [entry for entry in looked if entry[2]]


def _batch_dim(name: str, shapes: list[torch.Size | None]) -> int:
    """The dimension of a state that counts sequences, from shapes with 2, 3, and 2 sequences of another length."""
    two, three, longer = shapes
    if two is None or three is None or two != longer or len(two) != len(three):
        raise UnsupportedModelError(f"its {name} grows with the prompt: it is no state")
    dims = [dim for dim, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(dims) != 1 or (two[dims[0]], three[dims[0]]) != (2, 3):
        raise UnsupportedModelError(f"its {name} has shape {tuple(two)} for two sequences: not a slot for each")
    return dims[0]


def _with(shape: torch.Size, dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Tensors in lists, tuples and mappings, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))


def _rebuilt(template: Any, values: dict[Path, Tensor], path: Path = ()) -> Any:
    """A structure like the template with other tensors in it."""
    if isinstance(template, Tensor):
        return values[path]
    if isinstance(template, list | tuple):
        return type(template)(_rebuilt(item, values, (*path, index)) for index, item in enumerate(template))
    if isinstance(template, dict):
        return {key: _rebuilt(item, values, (*path, key)) for key, item in template.items()}
    return template
