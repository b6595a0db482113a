"""Compile every kernel for GPUs that are not here, as its launcher would: prints the shared memory that each takes.

A program of its own, since a process either interprets Triton's kernels or compiles them. Launchers are called with
small tensors on the CPU; instead of a launch there is a compilation for what they were called with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwright.kernels.gated import Activation
from shardwright.kernels.norm import NormKind
from shardwright.kernels.triton import attention, cache_rows, gated, norm, sample

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
WARP_SIZE = 32


class Compiler:
    """In the place of a kernel: what would launch it compiles it."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self._kernel = kernel
        self._capability = capability
        self.shared_bytes: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        names = self._kernel.arg_names
        signature = dict.fromkeys(names, "constexpr")
        attributes = {}
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                signature[names[place]] = POINTERS[argument.dtype]
            elif isinstance(argument, int) and argument == 1:  # as at a launch: strides of 1 are known
                named[names[place]] = argument
            else:
                signature[names[place]] = "fp32" if isinstance(argument, float) else "i32"
            if isinstance(argument, torch.Tensor) or argument % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constexprs=named, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", self._capability, WARP_SIZE), options=options)
        assert "cubin" in compiled.asm, "the assembler was not run"
        self.shared_bytes.append(compiled.metadata.shared)


def attend(
    dtype: torch.dtype,
    group: int,
    key_dim: int,
    value_dim: int,
    *,
    is_decode: bool,
    extras: bool,
    is_small: bool = False,
) -> None:
    """One layer's attention, its context in splits if it is a decode."""
    is_latent = key_dim > 512
    shape = attention.TileShape.of(
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        is_decode=is_decode,
        values_in_keys=is_latent,
    )
    stored = torch.float8_e4m3fn if is_small else dtype
    keys = torch.zeros(16, 1, key_dim, dtype=stored)
    values = keys[..., :value_dim] if is_latent else torch.zeros(16, 1, value_dim, dtype=stored)
    one, two = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    attention.paged_attention(
        torch.zeros(1, group, key_dim, dtype=dtype),
        keys,
        values,
        attention.Tiles(one[None], two, one, one, one, shape.num_queries),
        torch.zeros(1, group, value_dim, dtype=dtype),
        shape=shape,
        num_splits=16 if is_decode else 1,
        block_size=16,
        visibility="sliding" if extras else "full",
        window=128 if extras else None,
        scale=0.1,
        softcap=30.0 if extras else None,
        sinks_H=torch.zeros(group) if extras else None,
        bias_HN=torch.zeros(group, 8) if extras else None,
        values_in_keys=is_latent,
    )


def launch_all() -> None:
    """Every launcher, for several kinds of layers."""
    attend(torch.bfloat16, 4, 128, 128, is_decode=True, extras=True)
    attend(torch.bfloat16, 4, 128, 128, is_decode=False, extras=False)
    for is_decode in (True, False):
        attend(torch.float16, 3, 96, 80, is_decode=is_decode, extras=True)
        attend(torch.bfloat16, 1, 256, 256, is_decode=is_decode, extras=False)
    attend(torch.float32, 3, 64, 64, is_decode=True, extras=False)
    attend(torch.float32, 4, 128, 128, is_decode=False, extras=False)
    attend(torch.bfloat16, 128, 576, 512, is_decode=True, extras=False)
    for is_decode in (True, False):
        attend(torch.bfloat16, 4, 128, 128, is_decode=is_decode, extras=False, is_small=True)
        attend(torch.float16, 2, 96, 80, is_decode=is_decode, extras=True, is_small=True)
    rows, cache = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.zeros(8, 3, 64, dtype=torch.bfloat16)
    cache_rows.store_rows(torch.zeros(2, dtype=torch.int64), rows, rows, cache, cache)
    small = cache.to(torch.float8_e4m3fn)
    cache_rows.store_rows(torch.zeros(2, dtype=torch.int64), rows, rows, small, small)
    for dtype, size in ((torch.bfloat16, 4096), (torch.float16, 128), (torch.float32, 20_000)):
        weight, kind = torch.zeros(size, dtype=dtype), NormKind(True, 1e-5, 1.0, True)
        norm.norm(torch.zeros(3, size, dtype=dtype), weight, weight, kind)
        for activation in Activation:
            gated.gated(torch.zeros(3, size, dtype=dtype), activation)
    ones, keys = torch.ones(2), torch.zeros(2, 2, dtype=torch.int32)
    for dtype, is_filtered in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)):
        logits = torch.zeros(2, 128_256, dtype=dtype)
        sample.sample(logits, ones, ones.int(), ones, ones, keys, is_filtered=is_filtered)


def main() -> None:
    """For the capability that the command line names, such as 90."""
    capability = int(sys.argv[1])
    modules = (attention.programs, cache_rows.programs, norm.programs, gated.programs, sample.programs)
    compilers = {}
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction) and kernel.__module__ == module.__name__ and name[0] != "_":
                compilers[name] = Compiler(kernel, capability)
                setattr(module, name, compilers[name])
    launch_all()
    print(json.dumps({name: compiler.shared_bytes for name, compiler in compilers.items()}))


if __name__ == "__main__":
    main()
