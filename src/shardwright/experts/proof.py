"""From a block as it is written to a program that gives the same, shown by numbers; or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from shardwright.errors import UnsupportedModelError
from shardwright.experts.body import Body, GroupedBody, body_of, run_chosen
from shardwright.experts.families import Family, ParameterPlaces, Slot
from shardwright.experts.program import Outline, Program, Watched, outline_of
from shardwright.experts.region import Region, tokens_first
from shardwright.experts.routing import TOLERANCE, Routing, find_routing, mix, pick, relative_difference
from shardwright.experts.watch import BlockMode, Interference, Key, watch_block
from shardwright.layers.packed_linear import PackedLinear

LENGTHS = (11, 13, 19)
"""Tokens of the passes that are compared."""
ODD_LENGTH = 29
"""Of a pass that none of them was like."""
CROWD = 512
"""Tokens that are all alike, so that the same experts get them all: code may have a limit to how many they take."""
CROWDS = 3
BATCH = (2, 5)
"""Sequences, and tokens of each."""


class NoExpertsError(UnsupportedModelError):
    """What looked like experts is something else."""


Run = Callable[[Tensor], Any]
"""The block's own code."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about all blocks of a kind."""

    slots: frozenset[Slot]
    body: Body
    outline: Outline

    def program(self, block: nn.Module, family: Family) -> Program:
        """The program of a block of this kind."""
        packed = {held.weight.data_ptr(): held.packed for held in block.modules() if isinstance(held, PackedLinear)}
        parameters = {slot: family.parameters[slot] for slot in sorted(self.slots)}
        grouped = GroupedBody(self.body, parameters, packed)
        return Program(self.outline, block, grouped, num_experts=family.num_experts)


class Samples:
    """Inputs of a block, made up.

    Args:
        like: an input of it that a model gave.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._generator = torch.Generator().manual_seed(0)
        self._scale = float(like.float().std().nan_to_num(1.0)) or 1.0

    def tokens(self, *shape: int) -> Tensor:
        """[..., width] random numbers; one leading 1 is added, or taken away, for as many dimensions as are usual."""
        shape = (1, *shape) if len(shape) + 1 < self._like.ndim else shape
        made = torch.randn(*shape, self._like.shape[-1], generator=self._generator) * self._scale
        return made.to(self._like)

    @property
    def has_batches(self) -> bool:
        """Whether inputs are of several sequences."""
        return self._like.ndim == 3


def prove(block: nn.Module, run: Run, family: Family, samples: Samples) -> Proof:
    """Find out what a block does with its experts.

    Args:
        block: with its weights.
        run: its own code.
        family: of its experts.
        samples: of its input.

    Raises: UnsupportedModelError if it does something that cannot be done all at once; what its code raises.
    """
    places = family.places
    first = samples.tokens(LENGTHS[0])
    slots = frozenset(watch_block(block, run, first.clone(), places).used)
    if not slots:
        raise NoExpertsError("none of them runs on its own")
    if sum(family.parameters[slot][0].ndim > 1 for slot in slots) < 2:
        raise NoExpertsError("they are no chain of matrices")
    places = ParameterPlaces({slot: family.parameters[slot] for slot in slots})
    watch = partial(_watch, block, run, places=places, slots=slots)
    modes = [watch(tokens) for tokens in (first, *(samples.tokens(length) for length in LENGTHS[1:]))]
    body = body_of(modes)
    grouped = GroupedBody(body, {slot: family.parameters[slot] for slot in sorted(slots)}, None)
    regions = [Region(mode) for mode in modes]
    number, routing, added_to = _find(watch, first, modes[0], regions[0], grouped, family.num_experts)
    if (call := regions[0].looks_at_numbers(routing.chosen)) is not None:
        raise UnsupportedModelError(f"its code looks at numbers ({call.function}) before it chooses experts")
    passes = []
    for mode, region in zip(modes, regions, strict=True):
        cuts = region.cuts()
        if number >= len(cuts):
            raise UnsupportedModelError("its code does not do the same for every number of tokens")
        passes.append(Watched(mode, region, cuts[number]))
    _check_every_expert(watch, samples, number, routing, grouped, family.num_experts)
    proof = Proof(slots, body, outline_of(block, passes, routing, added_to))
    program = Program(proof.outline, block, grouped, num_experts=family.num_experts)
    check(program, run, samples.tokens(ODD_LENGTH))
    check(program, run, samples.tokens(1))
    check(program, run, samples.tokens(1).expand_as(samples.tokens(CROWD)))
    if samples.has_batches:
        check(program, run, samples.tokens(*BATCH))
    return proof


def check(program: Program, run: Run, tokens: Tensor) -> None:
    """Compare a program with the block's own code. Raises UnsupportedModelError."""
    expected, spec = _pytree.tree_flatten(run(tokens.clone()))
    actual, actual_spec = _pytree.tree_flatten(program.run(tokens.clone()))
    if spec != actual_spec:
        raise UnsupportedModelError("all at once, it would return something else")
    for one, other in zip(expected, actual, strict=True):
        if not isinstance(one, Tensor):
            is_same = type(one) is type(other) and one == other
        elif one.shape != other.shape or one.dtype is not other.dtype:
            is_same = False
        elif one.is_floating_point():
            is_same = one.numel() == 0 or relative_difference(other, one) <= TOLERANCE[tokens.dtype]
        else:
            is_same = torch.equal(one, other)
        if not is_same:
            sizes = "x".join(map(str, tokens.shape[:-1]))
            raise UnsupportedModelError(f"all at once, it would not give the same for {sizes} tokens")


def depends_on_others(run: Run, samples: Samples) -> bool:
    """Whether what a block gives a token depends on how many others are computed with it, as with a limit to how many
    an expert takes.

    One token alone is compared with many that are all like it: several times, as rounding may turn a choice around.
    """
    for _ in range(CROWDS):
        token = samples.tokens(1)
        (alone, *_), (crowd, *_) = (
            [leaf for leaf in _pytree.tree_leaves(run(tokens)) if isinstance(leaf, Tensor)]
            for tokens in (token.clone(), token.expand_as(samples.tokens(CROWD)).clone())
        )
        if relative_difference(crowd, alone.expand_as(crowd)) <= TOLERANCE[token.dtype]:
            return False
    return True


def _watch(
    block: nn.Module,
    run: Run,
    tokens: Tensor,
    interference: Interference | None = None,
    *,
    places: ParameterPlaces,
    slots: frozenset[Slot],
) -> BlockMode:
    return watch_block(block, run, tokens.clone(), places, slots, interference)


Watch = Callable[..., BlockMode]


def _given(watch: Watch, tokens: Tensor, region: Region, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """At each cut, what is in the tensor that carries what experts gave, with them and without them."""
    after = {cut.after: cut.storage for cut in region.cuts()}
    kept = []
    for silences in (False, True):
        mode = watch(tokens, Interference(silences=silences, kept_after=after, **options))
        if len(mode.trace.calls) != len(region.calls):
            raise UnsupportedModelError("what it does depends on what its experts give")
        kept.append(mode.kept)
    return [(kept[0][number], kept[1][number]) for number in after]


def _find(
    watch: Watch, tokens: Tensor, mode: BlockMode, region: Region, body: GroupedBody, num_experts: int
) -> tuple[int, Routing, Key | None]:
    """The first cut where a routing adds experts up: its number, the routing, and what else is in the tensor."""
    num_tokens = mode.trace.num_tokens
    for number, (cut, (full, empty)) in enumerate(zip(region.cuts(), _given(watch, tokens, region), strict=True)):
        if not tokens_first(full, num_tokens) or full.numel() != num_tokens * body.out_features:
            continue
        expected = (full - empty).view(num_tokens, -1)
        difference, routing = find_routing(mode, region, body, num_experts=num_experts, expected=expected)
        if difference > TOLERANCE[tokens.dtype]:
            continue
        if cut.is_added or not empty.any():
            return number, routing, None
        for key in region.made_before(cut.after):
            if torch.equal(mode.tensor(key).flatten(), empty.flatten()):
                return number, routing, key
    raise UnsupportedModelError("what they give is not added up for each token, with weights of its own")


def _check_every_expert(
    watch: Watch, samples: Samples, number: int, routing: Routing, body: GroupedBody, num_experts: int
) -> None:
    """Let every expert be chosen in turn, whatever the router says, and compare. Raises UnsupportedModelError."""
    tokens = samples.tokens(max(2 * num_experts, LENGTHS[0]))
    num_tokens = tokens.shape[:-1].numel()
    usual = watch(tokens).tensor(routing.chosen).reshape(num_tokens, -1)
    numbers = torch.arange(num_tokens)[:, None] + torch.arange(usual.shape[1])
    chosen = (numbers % num_experts).to(usual)
    forced = routing.chosen, chosen
    mode = watch(tokens, Interference(forced=forced))
    region = Region(mode)
    given = _given(watch, tokens, region, forced=forced)
    if number >= len(given) or {visit.expert for visit in mode.visits} != set(range(num_experts)):
        raise UnsupportedModelError("its choice of experts does not decide alone which of them run")
    full, empty = given[number]
    rows, weights = (None if key is None else mode.tensor(key) for key in (routing.rows, routing.weights))
    assert rows is not None
    if weights is not None:
        weights = pick(chosen, weights.reshape(num_tokens, -1), routing.weighting)
    found = mix(*run_chosen(body, rows.reshape(num_tokens, -1), chosen, num_experts), weights)
    if not relative_difference(found, (full - empty).view_as(found)) <= TOLERANCE[tokens.dtype]:
        raise UnsupportedModelError("its choice of experts does not decide alone what they give")
