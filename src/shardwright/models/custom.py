"""Models that a factory makes: any `nn.Module`, from code that the user named, registered, or put beside the weights.

Where there is a checkpoint, the factory is called with parameters on "meta", as other models are built, and they are
filled by name. Where there is none, what the factory returns is the model, weights and all. It also keeps its weights
if it loads them itself: calls `load_state_dict` for all that it returns, or says `has_weights`. A checkpoint that the
user names goes before that.

Code that cannot run on "meta", or keeps tensors there that are no parameters, is called a second time for real.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from shardwright.config import DType, ModelConfig
from shardwright.errors import ModelSourceError, UnsupportedModelError
from shardwright.loading.checkpoint import checkpoint_dtype, checkpoint_path, has_checkpoint
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import parameters_on_meta
from shardwright.models.factory import INFO_KEYS, Factory, Made, folder_factory, named_factory
from shardwright.models.registry import Registration, registered
from shardwright.models.resolve import FACTORY_FILE, has_factory, has_no_directory, resolve_model

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomModel:
    """A factory, and where its weights come from."""

    factory: Factory
    options: ModelConfig
    weights: Path | None
    """Folder or file of the checkpoint; None: the module comes with its weights."""
    is_chosen: bool
    """The user named the checkpoint: it goes before what the factory loads itself."""
    weight_map: str | Path | None
    registration: Registration | None = None
    _seen: list[Made] = field(default_factory=list)
    """What was made to be looked at, and is still as it was made."""

    def look(self, *, dummy: bool = False) -> Made:
        """What the factory makes, to look at: the next `make` gives the same, so that it is called once."""
        if not self._seen:
            self._seen.append(self.make(dummy=dummy))
        return self._seen[0]

    def make(self, *, dummy: bool = False) -> Made:
        """Call the factory. Parameters that are to be filled are on "meta" where its code allows it; buffers are real.

        Args:
            dummy: they are to be filled at random, whatever checkpoint there is.

        Raises: ModelSourceError if it takes other arguments; UnsupportedModelError if it fails or returns no module.
        """
        if self._seen:
            return self._seen.pop()
        if self.weights is None and not dummy:
            return replace(self.factory(), is_filled=True)
        may_keep_weights = not self.is_chosen and not dummy
        try:
            made, loads_itself = self._call(on_meta=True)
        except UnsupportedModelError as exc:
            logger.debug("not built on meta: %s", exc)
        else:
            if not (loads_itself and may_keep_weights) and not has_strays(made.module):
                return made
        made, loads_itself = self._call(on_meta=False)
        if loads_itself and may_keep_weights:
            logger.info("%s loads weights itself: they are kept, and %s is not read", self.factory.label, self.weights)
            return replace(made, is_filled=True)
        return made

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The type to serve in: as asked, else the checkpoint's, else that of the module's own parameters."""
        if self.options.dtype != "auto":
            return _named_dtype(self.options.dtype)
        found = None if self.weights is None else checkpoint_dtype(self.weights, self.options.load_format)
        own = (p.dtype for p in module.parameters() if p.is_floating_point())
        found = found or next(own, torch.float32)
        return found if found in _DTYPES else torch.float32

    def load(
        self, dtype: torch.dtype, *, dummy: bool = False, cut: Callable[[nn.Module], ShardSlice] | None = None
    ) -> nn.Module:
        """The module with its weights, or with random ones where it has none, for inference.

        Buffers are cast along, as `module.to(dtype)` does; complex ones and whole numbers are left alone.

        Args:
            dtype: of floating-point parameters and buffers.
            dummy: random weights.
            cut: makes the whole module one rank's part of it, in place, and says what that is.

        Raises: what `make` raises; CheckpointError if the checkpoint does not fit; what `cut` raises.
        """
        made = self.make(dummy=dummy)
        module = cast_floats(made.module, dtype)
        part = None if cut is None else cut(module)
        if dummy:
            load_dummy_weights(module, part=part)
        elif not made.is_filled:
            assert self.weights is not None
            load_weights(
                module,
                self.weights,
                dtype,
                load_format=self.options.load_format,
                weight_map=self.weight_map,
                part=part,
            )
        return module.eval().requires_grad_(False)

    def facts(self, made: Made) -> dict[str, Any]:
        """What was said of the module, by its registration or beside it, for `adapt.describe`."""
        names = [name for name in INFO_KEYS if name != "has_weights"]
        told = {} if self.registration is None else {name: getattr(self.registration, name) for name in names}
        return {name: told.get(name) or made.info.get(name) for name in names}

    def _call(self, *, on_meta: bool) -> tuple[Made, bool]:
        """Call the factory. Returns: what it made, and whether it loaded weights into all of it."""
        with ExitStack() as stack:
            loaded = stack.enter_context(_noting_loads(skip=on_meta))
            if on_meta:
                stack.enter_context(parameters_on_meta())
            made = self.factory()
        covered = {id(parameter) for module in loaded for parameter in module.parameters()}
        loads_itself = bool(covered) and all(id(parameter) in covered for parameter in made.module.parameters())
        return made, loads_itself or bool(made.info.get("has_weights"))


def find_custom(model: ModelConfig) -> CustomModel | None:
    """The model that the options name, if a factory makes it; its code is imported, not called.

    Raises: ModelSourceError if there is no such model, it cannot be imported, or its folder is not trusted.
    """
    weights = None if model.weights is None else checkpoint_path(model.weights)
    weight_map: str | Path | None = model.weight_map
    is_chosen = True
    if (registration := registered(model.model)) is not None:
        if weights is None and registration.weights is not None:
            weights = checkpoint_path(registration.weights)
        weight_map = model.weight_map or registration.weight_map
        label = f"the factory of {model.model!r}"
        factory = Factory(label=label, function=registration.factory, folder=_folder_of(weights))
    elif has_no_directory(model):
        factory = named_factory(model.model, _folder_of(weights))
    else:
        folder = resolve_model(model.model, revision=model.revision)
        if not has_factory(folder):
            return None
        if not model.trust_remote_code:
            raise ModelSourceError(
                f"{folder} brings its own code ({FACTORY_FILE}), which would run on this machine: "
                "read it, then pass --trust-remote-code (trust_remote_code=True) if you trust it"
            )
        if weights is None and has_checkpoint(folder, model.load_format):
            weights, is_chosen = folder, False
        factory = folder_factory(folder)
    return CustomModel(
        factory=factory,
        options=model,
        weights=weights,
        is_chosen=is_chosen,
        weight_map=weight_map,
        registration=registration,
    )


def has_strays(module: nn.Module) -> bool:
    """Whether a module keeps tensors on "meta" that are no parameters in their places: loading does not reach them."""
    return any(
        tensor.is_meta
        for owner in module.modules()
        for name, value in vars(owner).items()
        if name not in ("_parameters", "_modules")
        for tensor in _tensors(value)
    )


def cast_floats(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating-point parameters and buffers in place; what is shared stays shared."""
    cast: dict[int, Tensor] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype is not dtype:
                owner._buffers[name] = cast.setdefault(id(buffer), buffer.to(dtype))
    return module


def _folder_of(weights: Path | None) -> Path | None:
    return weights.parent if weights is not None and weights.is_file() else weights


def _named_dtype(name: DType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


@contextmanager
def _noting_loads(*, skip: bool) -> Iterator[list[nn.Module]]:
    """While open, modules whose `load_state_dict` is called are noted, and with `skip` nothing is loaded."""
    loaded: list[nn.Module] = []
    load_state_dict = nn.Module.load_state_dict

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loaded.append(self)
        return _IncompatibleKeys([], []) if skip else load_state_dict(self, *args, **kwargs)

    nn.Module.load_state_dict = noted  # type: ignore[method-assign]
    try:
        yield loaded
    finally:
        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
