"""What is proved: a model with weights, the tokens that it is run on, and copies of it for ranks to cut."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import PlanError
from shardwright.foreign_errors import described
from shardwright.plans.prove.random_weights import fill_randomly
from shardwright.plans.prove.record import Call, Recorder
from shardwright.plans.prove.shrink import shrink

NUM_TOKENS = 24
"""Of the sequence: more than the windows and chunks of tiny models, few enough to be quick."""

_TOKEN_ID = re.compile(r"\w*token_(?:id|index)")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in float32, on the CPU, for inference."""

    module: nn.Module
    input_ids: Tensor
    """[1, T] int64."""
    calls: tuple[Call, ...]
    """Of its own, unsharded forward pass."""
    notes: tuple[str, ...]

    def run(self, module: nn.Module) -> Any:
        """The forward pass of a module in place of this one."""
        return module(self.input_ids, **_without_cache(module))

    def copy(self) -> nn.Module:
        """A copy that shares the parameters: whoever cuts them must replace them."""
        return copy_sharing_parameters(self.module)


def prepare(
    model: nn.Module | Callable[[], nn.Module],
    *,
    tp: int,
    pp: int,
    names: Collection[str],
    own_weights: bool,
    seed: int,
    keep_layers: bool = False,
) -> Subject:
    """Make what is proved of a model, which is left as it is.

    Args:
        model: a module, on "meta" or not, or a function that returns one.
        tp, pp: numbers of ranks and stages, to which a smaller model must be alike.
        names: of the plan.
        own_weights: prove it with the weights that it has.
        seed: of random weights and tokens.
        keep_layers: a smaller model has as many layers.

    Raises: PlanError if it cannot be run: it has no weights of its own, is too large, or its code fails.
    """
    is_module = isinstance(model, nn.Module)
    module = copy_sharing_parameters(model) if isinstance(model, nn.Module) else model()
    notes: tuple[str, ...] = ()
    if own_weights:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise PlanError("the model has no weights: its parameters are on 'meta'; load them, or use random ones")
        if is_module:
            module = copy.deepcopy(module)
    else:
        smaller = shrink(module, tp=tp, pp=pp, names=names, keep_layers=keep_layers)
        module, notes = smaller.module, smaller.notes
        fill_randomly(module, seed=seed)
    if missing := next((name for name, buffer in module.named_buffers() if buffer.is_meta), None):
        raise PlanError(
            f"buffer {missing} has no values: build the model on the CPU, with only its parameters on 'meta'"
        )
    module = module.float().cpu().eval()
    input_ids = _tokens(module, seed)
    with torch.no_grad(), Recorder(module) as recorder:
        try:
            module(input_ids, **_without_cache(module))
        except Exception as exc:  # the code is the user's
            raise PlanError(f"the model's own forward pass fails, at {recorder.running!r}: {described(exc)}") from exc
    if not all(bool(output.isfinite().all()) for output in recorder.calls[-1].outputs[:1]):
        raise PlanError("the model's own forward pass gives numbers that are not finite: there is nothing to compare")
    return Subject(module, input_ids, tuple(recorder.calls), notes)


def copy_sharing_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module's structure and buffers that holds the same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _without_cache(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes and hasattr(module, "config") else {}


def _tokens(module: nn.Module, seed: int) -> Tensor:
    """Random token ids, none of them special. [1, T] int64."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or next(
        (held.num_embeddings for held in module.modules() if isinstance(held, nn.Embedding)), None
    )
    if not isinstance(size, int):
        raise PlanError("the number of tokens that the model knows cannot be told: it has no embedding")
    special = {
        value
        for part in (config, text)
        for name, value in (vars(part).items() if hasattr(part, "__dict__") else ())
        if _TOKEN_ID.fullmatch(name) and isinstance(value, int)
    }
    plain = torch.tensor([token for token in range(size) if token not in special] or list(range(size)))
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "block_size"))
    length = min([NUM_TOKENS, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(len(plain), (1, length), generator=generator)]
