"""The loops over experts in a model: found, proved, put in the place of the author's, and taken back if need be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import UnsupportedModelError
from shardwright.experts.block import BlockCall, group, own_class, ungroup
from shardwright.experts.families import Family, find_families
from shardwright.experts.proof import ODD_LENGTH, NoExpertsError, Proof, Samples, check, depends_on_others, prove
from shardwright.foreign_errors import described
from shardwright.layers.collectives import Collectives
from shardwright.layers.grouped_linear import multiplies_grouped
from shardwright.layers.parallel_module import Parallel, SummedOutput

logger = logging.getLogger(__name__)

MOST_ANCESTORS = 2
"""How far above its experts a block may be."""


@dataclass(frozen=True, slots=True)
class ExpertLoop:
    """Experts in a model's code, and what became of them."""

    name: str
    """Of the block."""
    num_experts: int
    reason: str
    """Why they run as written; empty if they run all at once."""


class ExpertLoops:
    """What may be loops over experts in a model.

    Args:
        model: with its weights, on its device.
        unless: why none of them may change; None: they may.
    """

    def __init__(self, model: nn.Module, *, unless: str | None = None) -> None:
        self._model = model
        self._unless = unless
        self._families = find_families(model)
        self._seen: dict[str, tuple[BlockCall, Tensor]] = {}
        """How modules are called that may be blocks, and with what tokens."""
        self._grouped: list[nn.Module] = []
        self.found: list[ExpertLoop] = []
        """Those that are loops over experts."""
        self.crowded: list[str] = []
        """Blocks, one of a kind, that give a token something else if others are computed with it."""

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self._families)

    @property
    def grouped(self) -> list[str]:
        """Names of the blocks whose experts run all at once."""
        return [loop.name for loop in self.found if not loop.reason]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, passes of the model show how it calls its blocks."""
        names = {name for family in self._families for name in _ancestors(family.name)}
        with ExitStack() as stack:
            for name in names:
                module = self._model.get_submodule(name)
                hook = module.register_forward_pre_hook(self._noting(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    @torch.inference_mode()
    def group(self, agree: Callable[[bool], bool] = bool) -> None:
        """Let experts run all at once where it is proved to be the same.

        Args:
            agree: whether all ranks that share the model say yes; each asks once.
        """
        proofs: dict[Any, Proof | UnsupportedModelError] = {}
        is_same_everywhere = True
        for family in self._families:
            loop = self._outcome(family, proofs)
            if loop is not None:
                self.found.append(loop)
                block = self._model.get_submodule(loop.name)
                is_same_everywhere = is_same_everywhere and not (loop.reason and _summing(block, family))
        if not agree(is_same_everywhere):  # ranks have to add up the same number of times
            self.undo("on another rank they run as written")

    def undo(self, reason: str) -> None:
        """Let all experts run as written again."""
        for block in self._grouped:
            ungroup(block)
        self._grouped.clear()
        self.found = [ExpertLoop(loop.name, loop.num_experts, loop.reason or reason) for loop in self.found]

    def log(self) -> None:
        """Say once what became of them."""
        if self.grouped:
            logger.info("the experts of %d blocks run all at once, not one by one as written", len(self.grouped))
        for reason in dict.fromkeys(loop.reason for loop in self.found if loop.reason):
            names = [loop.name for loop in self.found if loop.reason == reason]
            logger.info("the experts of %s run one by one, as written: %s", ", ".join(names), reason)

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                call = BlockCall.of(args, kwargs)
            except UnsupportedModelError:
                return
            tokens = [*args, *kwargs.values()][call.place]
            self._seen[name] = call, tokens.detach()

        return note

    def _outcome(self, family: Family, proofs: dict[Any, Proof | UnsupportedModelError]) -> ExpertLoop | None:
        """What becomes of a family, in the innermost block where it is understood; None if these are no experts."""
        names = [name for name in _ancestors(family.name) if name in self._seen]
        reasons = [] if self._unless is None else [self._unless]
        for name in names if self._unless is None else ():
            try:
                self._try(name, family, proofs, is_innermost=name == names[0])
            except NoExpertsError:
                return None
            except UnsupportedModelError as exc:
                reasons.append(str(exc))
            else:
                return ExpertLoop(name, family.num_experts, "")
        return ExpertLoop(names[0], family.num_experts, reasons[0]) if names else None

    def _try(
        self, name: str, family: Family, proofs: dict[Any, Proof | UnsupportedModelError], *, is_innermost: bool
    ) -> None:
        """Let the experts of a block run all at once. Raises UnsupportedModelError if they cannot."""
        block = self._model.get_submodule(name)
        run, samples = self._own(name)
        call, tokens = self._seen[name]
        shapes = tuple((key, p.shape) for key, p in block.named_parameters())
        kind = own_class(type(block)), call, tokens.dtype, family.num_experts, tuple(family.parameters), shapes
        with alone(block):
            if kind not in proofs:
                proofs[kind] = proof = _proved(block, run, family, samples)
                is_refused = isinstance(proof, UnsupportedModelError) and not isinstance(proof, NoExpertsError)
                if is_refused and is_innermost and _is_crowded(run, samples):
                    self.crowded.append(name)
            proof = proofs[kind]
            if isinstance(proof, UnsupportedModelError):
                raise proof
            if any(multiplies_grouped(family.parameters[slot][0]) for slot in proof.slots):
                family.bring_together()
            program = proof.program(block, family)
            check(program, run, samples.tokens(ODD_LENGTH))
        program.sums = _sums(block, family, proof)
        group(block, program, call, tokens.dtype)
        self._grouped.append(block)

    def _own(self, name: str) -> tuple[Callable[[Tensor], Any], Samples]:
        """A block's own code, and what to try it with."""
        call, tokens = self._seen[name]
        block = self._model.get_submodule(name)
        forward = partial(own_class(type(block)).forward, block)
        return partial(call.make, forward), Samples(tokens)


def _is_crowded(run: Callable[[Tensor], Any], samples: Samples) -> bool:
    try:
        return depends_on_others(run, samples)
    except Exception:  # of the block's code, which may take no such inputs
        return False


def _proved(
    block: nn.Module, run: Callable[[Tensor], Any], family: Family, samples: Samples
) -> Proof | UnsupportedModelError:
    try:
        return prove(block, run, family, samples)
    except UnsupportedModelError as exc:
        return exc
    except Exception as exc:  # of the block's code, or of ours about it, which nobody has tried on such code
        return UnsupportedModelError(f"they cannot be watched: {described(exc)}")


def _ancestors(name: str) -> list[str]:
    """A module's name, and those of modules around it that may be the block."""
    names = [name]
    while names[-1] and len(names) <= MOST_ANCESTORS:
        names.append(names[-1].rpartition(".")[0])
    return names


class _Alone:
    """Collectives of a rank that is looked at by itself: sums stay its own part."""

    def __init__(self, like: Collectives) -> None:
        self.rank, self.size = like.rank, like.size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        raise UnsupportedModelError("ranks put parts together before experts run")

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        raise UnsupportedModelError("ranks put parts together before experts run")


@contextmanager
def alone(block: nn.Module) -> Iterator[None]:
    """While open, a block runs on this rank without the others."""
    held = [module for module in block.modules() if isinstance(module, Parallel)]
    before = [module.collectives for module in held]
    for module in held:
        module.collectives = _Alone(module.collectives)
    try:
        yield
    finally:
        for module, collectives in zip(held, before, strict=True):
            module.collectives = collectives


def _summing(block: nn.Module, family: Family) -> list[SummedOutput]:
    """Modules inside a block that hold experts' parameters, and add up what they make over the ranks."""
    places = family.places
    return [
        module
        for module in block.modules()
        if module is not block
        and isinstance(module, SummedOutput)
        and any(places.begins(p.data_ptr()) for p in module.parameters())
    ]


def _sums(block: nn.Module, family: Family, proof: Proof) -> Collectives | None:
    """Who adds up what experts give, if ranks hold parts of them. Raises UnsupportedModelError if nobody can."""
    summing = _summing(block, family)
    if not summing:
        return None
    addresses = {p.data_ptr() for module in summing for p in module.parameters()}
    slots = {slot for slot in proof.slots if family.parameters[slot][0].data_ptr() in addresses}
    last = {slot for slot in proof.slots if slot in proof.body.last_slots}
    if slots not in (last, set(proof.slots)):
        raise UnsupportedModelError("ranks add up parts of what is inside its experts")
    return summing[0].collectives
