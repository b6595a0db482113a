"""A recorded step, ready to be carried out again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.adapt.paged import ForwardInputs
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.native import NativePlan
from shardwright.errors import UnsupportedModelError
from shardwright.kernels.jit import native_library
from shardwright.replay.affine import Affine, Call, Place, Recording, tensors_in
from shardwright.replay.arena import plan_arena
from shardwright.replay.compile_runs import FUNCTION, CompiledRuns
from shardwright.replay.fold import folded
from shardwright.replay.fuse import fused, needed_after, used_at_once
from shardwright.replay.instructions import (
    FLOATS,
    MOST_VALUES,
    Instruction,
    Operation,
    bits_of,
    encode,
    fields_of_tensors,
)
from shardwright.replay.join import gathered, joined
from shardwright.replay.lower import Lowering
from shardwright.replay.selection import find_selection
from shardwright.replay.trace import Attend, WriteCache, mapped

LISTS_KEPT = 16
"""Sizes of steps for which the list of instructions is kept, and calls that are left to PyTorch."""
MOST_BYTES = 1 << 29
"""Of memory for what a step computes, if smaller steps do with less."""
_GROUP_FIELDS = 7
"""Of a Group in native/replay.cpp."""


class OutOfRangeError(Exception):
    """Some index or shape in a step was another than those recorded: the code would have done something else."""


@dataclass(frozen=True, slots=True)
class _CacheUse:
    """An instruction that has to do with the KV cache."""

    row: int
    layer: int
    sinks: Tensor | None = None
    bias: Tensor | None = None
    """[H] and [H, N] float32, contiguous."""


class Program:
    """A step of T tokens, of which R are the ones whose logits are wanted.

    What is recorded is a step with as many of one as of the other. Where the code takes the wanted tokens out once,
    which is before its head, all that comes before is a function of T, and all after of R.

    Args:
        recording: of the step.
        most_tokens: largest T that it is to be carried out for; less if that takes too much memory.
        most_rows: largest R.

    Raises: UnsupportedModelError if it asks for something that cannot be repeated.
    """

    def __init__(self, recording: Recording, *, most_tokens: int, most_rows: int) -> None:
        library = native_library()
        if library is None:
            raise UnsupportedModelError("there is no C++ compiler")
        library.replay.restype = ctypes.c_int64
        self._replay = library.replay
        self._recording = recording
        self._calls: list[Call] = gathered(folded(recording), recording)
        self._uses: list[_CacheUse] = []
        self._host: dict[int, Call] = {}
        lowering = Lowering(recording)
        instructions = self._lowered(lowering)
        self.weights = lowering.weights()
        """Of products, by the address of what they are read as; packed by others before, they are not here."""
        self.num_host_calls = len(self._host)
        uses = self._used(instructions)
        instructions = fused(instructions, needed_after(uses, recording.output.storage))
        uses = used_at_once(instructions, uses)
        self._selection = find_selection(instructions, uses, recording)
        if self._selection is None:
            most_tokens = most_rows = min(most_tokens, most_rows)
        self._offsets, size = self._placed(uses, most_tokens, most_rows)
        while size > MOST_BYTES and most_tokens > most_rows:
            most_tokens = max(most_tokens // 2, most_rows)
            self._offsets, size = self._placed(uses, most_tokens, most_rows)
        self._most_tokens, self._most_rows = most_tokens, most_rows
        self._arena = torch.zeros(size, dtype=torch.uint8)
        self._start = self._arena.data_ptr()
        addresses = [
            recording.constants[number].untyped_storage().data_ptr()
            if number in recording.constants
            else self._start + self._offsets.get(number, 0)
            for number in range(len(recording.storage_bytes))
        ]
        self._base, self._slope = encode(instructions, addresses)
        self._compiled = CompiledRuns(instructions)
        self._list = lru_cache(LISTS_KEPT)(self._make_list)
        self._logits = lru_cache(LISTS_KEPT)(partial(self._view, recording.output))
        self._bound = lru_cache(LISTS_KEPT * len(self._host))(self._bind_call)
        self._groups: npt.NDArray[np.int64] = np.zeros((0, _GROUP_FIELDS), dtype=np.int64)

    def bind(self, cache: KVCache) -> None:
        """Let the program read and write a cache."""
        for use in self._uses:
            layer = cache.layers[use.layer]
            values = self._base[use.row, 1 : 1 + MOST_VALUES]
            values[0] = cache.group_of_layer[use.layer]
            values[1], values[2] = layer.keys_NKD.data_ptr(), layer.values_NKV.data_ptr()
            values[3], values[4] = layer.keys_NKD.stride(0), layer.values_NKV.stride(0)
            values[5], values[6] = layer.block_size, layer.keys_NKD.shape[1]
        self._list.cache_clear()
        self._groups = np.zeros((max(cache.group_of_layer, default=-1) + 1, _GROUP_FIELDS), dtype=np.int64)

    def takes(self, num_tokens: int, num_rows: int) -> bool:
        """Whether it can carry out a step of so many tokens, of which so many logits are wanted."""
        is_known = self._selection is not None or num_tokens == num_rows
        return is_known and num_tokens <= self._most_tokens and num_rows <= self._most_rows

    def run(self, inputs: ForwardInputs) -> Tensor:
        """Carry the step out.

        Args:
            inputs: of a step that it takes, its plans NativePlan.

        Returns: [R, vocab_size] logits, to be read before the next step.
        Raises: OutOfRangeError if some index is.
        """
        num_tokens, num_rows = len(inputs.input_ids), len(inputs.logits_rows)
        for name, number in self._recording.inputs.items():
            if number in self._offsets:
                value: Tensor = getattr(inputs, name).contiguous()
                ctypes.memmove(self._start + self._offsets[number], value.data_ptr(), value.nbytes)
        for group, (slots, plan) in enumerate(zip(inputs.slot_mappings, inputs.plans, strict=True)):
            if group < len(self._groups):
                assert isinstance(plan, NativePlan)
                self._groups[group] = (
                    slots.data_ptr(),
                    len(plan.starts) - 1,
                    plan.starts.ctypes.data,
                    plan.tables.ctypes.data,
                    plan.tables.strides[0] // plan.tables.itemsize,
                    plan.first.ctypes.data,
                    plan.last.ctypes.data,
                )
        self.take_compiled()
        instructions = self._list(num_tokens, num_rows)
        count, done = len(instructions), 0
        while True:
            done = self._replay(
                ctypes.c_void_p(instructions.ctypes.data),
                ctypes.c_int64(count),
                ctypes.c_int64(done),
                ctypes.c_void_p(self._groups.ctypes.data),
            )
            if done == count:
                return self._logits(num_rows)
            if done < 0:
                raise OutOfRangeError
            is_of_rows = self._selection is not None and done > self._selection
            self._bound(done, num_rows if is_of_rows else num_tokens)()
            done += 1

    def compile_runs(self) -> None:
        """Have runs compiled in the background, if they are enough of a step; `run` takes them when they are there."""
        self._compiled.begin()

    def take_compiled(self, *, waits: bool = False) -> None:
        """Carry out runs by functions of their own from now on, if these are compiled.

        Args:
            waits: whether to wait until they are.
        """
        for row, address in self._compiled.take(waits=waits).items():
            self._base[row, FUNCTION] = address
            self._list.cache_clear()

    def listed(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """The instructions of a step of so many tokens, all of whose logits are wanted; as `encode` has them."""
        return self._make_list(num_tokens, num_tokens)

    def _lowered(self, lowering: Lowering) -> list[Instruction]:
        instructions: list[Instruction] = []
        for call in self._calls:
            if isinstance(call.function, WriteCache | Attend):
                instructions.append(self._of_cache(call, len(instructions)))
                continue
            lowered = lowering.lower(call)
            if lowered is None:
                self._host[len(instructions)] = call
                lowered = [Instruction(Operation.HOST)]
            instructions += lowered
        return joined(instructions)

    def _of_cache(self, call: Call, row: int) -> Instruction:
        tensors = [place for place in (call.output, *call.args) if place is not None]
        if any(place.dtype not in FLOATS for place in tensors) or len({place.dtype for place in tensors}) > 1:
            raise UnsupportedModelError("its attention computes in a type that the cache does not have")
        if isinstance(call.function, WriteCache):
            self._uses.append(_CacheUse(row, call.function.layer))
            return Instruction(Operation.WRITE_CACHE, (None, *call.args))
        params = call.function.params
        sinks, bias = (None if t is None else t.float().contiguous() for t in (params.sinks_H, params.bias_HN))
        self._uses.append(_CacheUse(row, call.function.layer, sinks, bias))
        values = [0] * MOST_VALUES
        values[7], values[8] = bits_of(params.scale), bits_of(params.softcap or 0.0)
        values[9] = 0 if sinks is None else sinks.data_ptr()
        values[10], values[11] = (0, 0) if bias is None else (bias.data_ptr(), bias.shape[1])
        return Instruction(Operation.ATTENTION, (call.output, *call.args), tuple(values))

    def _used(self, instructions: list[Instruction]) -> list[frozenset[int]]:
        """Storages that each instruction reads or writes."""
        uses = []
        for row, instruction in enumerate(instructions):
            places = [place for place in instruction.tensors if place is not None]
            if row in self._host:
                call = self._host[row]
                places += tensors_in((call.args, call.kwargs, call.output), Place)
            uses.append(frozenset(place.storage for place in places))
        return uses

    def _placed(self, uses: list[frozenset[int]], most_tokens: int, most_rows: int) -> tuple[dict[int, int], int]:
        ends = frozenset({self._recording.output.storage})
        starts = frozenset(self._recording.inputs.values())
        of_tokens = starts.union(*uses[: self._selection])
        sizes = {
            number: size.at(most_tokens if number in of_tokens else most_rows)
            for number, size in enumerate(self._recording.storage_bytes)
            if number not in self._recording.constants
        }
        return plan_arena(sizes, [starts, *uses, ends])

    def _make_list(self, num_tokens: int, num_rows: int) -> npt.NDArray[np.int64]:
        made = self._base + num_tokens * self._slope
        if self._selection is not None and num_rows != num_tokens:
            of_rows = self._base[self._selection :] + num_rows * self._slope[self._selection :]
            taken_from = fields_of_tensors(made[self._selection])[1].copy()
            made[self._selection :] = of_rows
            fields_of_tensors(made[self._selection])[1] = taken_from
        return made

    def _bytes(self, number: int, size: int) -> Tensor:
        start = self._offsets[number]
        return self._arena[start : start + size]

    def _view(self, place: Place, num_tokens: int) -> Tensor:
        sizes, strides, offset = place.at(num_tokens)
        constant = self._recording.constants.get(place.storage)
        if constant is not None:
            return torch.empty(0, dtype=place.dtype).set_(constant.untyped_storage(), offset, sizes, strides)
        size = self._recording.storage_bytes[place.storage].at(num_tokens)
        return (
            self._bytes(place.storage, size)
            .view(place.dtype)
            .as_strided(sizes, strides, offset + self._offsets[place.storage] // place.dtype.itemsize)
        )

    def _bind_call(self, row: int, num_tokens: int) -> Callable[[], None]:
        """A call that is left to PyTorch, for a step of so many tokens."""
        call = self._host[row]
        args, kwargs = (
            mapped(mapped(t, Place, lambda p: self._view(p, num_tokens)), Affine, lambda a: a.at(num_tokens))
            for t in (call.args, call.kwargs)
        )
        given = {place.storage for place in tensors_in((call.args, call.kwargs), Place)}
        places: Sequence[Place] = tensors_in(call.output, Place)
        targets = [None if place.storage in given else self._view(place, num_tokens) for place in places]

        def run() -> None:
            results = tensors_in(call.function(*args, **kwargs), Tensor)
            for target, result in zip(targets, results, strict=True):
                if target is not None:
                    if target.shape != result.shape:
                        raise OutOfRangeError
                    target.copy_(result)

        return run
