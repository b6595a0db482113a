"""Numbers of a smaller type, to the nearest one. Devices do that by themselves; the interpreter cuts bfloat16 off."""

import triton
import triton.language as tl

from shardwright.kernels.triton.availability import is_interpreted

_CUTS_OFF = tl.constexpr(is_interpreted())


@triton.jit
def rounded(values, TYPE: tl.constexpr):
    """Numbers of float32 as TYPE; of two that are as near, the even one."""
    if _CUTS_OFF and tl.bfloat16 == TYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits & -0x10000).to(tl.float32, bitcast=True)
    return values.to(TYPE)
