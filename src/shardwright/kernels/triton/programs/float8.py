"""Floating-point numbers of 8 bits (e4m3, without infinities) from and to their bits.

Not all GPUs convert them by themselves, and the interpreter does so inexactly.
"""

import triton
import triton.language as tl


@triton.jit
def decoded(codes):
    """Numbers of uint8 as float16, which has them all."""
    codes = codes.to(tl.uint16)
    # The exponent counts from 7, that of float16 from 15.
    halves = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
    values = halves.to(tl.float16, bitcast=True) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), values).to(tl.float16)


@triton.jit
def encoded(values):
    """Numbers of float32 as uint8: to the nearest, of two that are as near the even one; 448 for what is larger."""
    magnitude = tl.minimum(tl.abs(values), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 they are multiples of 2**-9, to which adding a large number rounds.
    multiple = (magnitude * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, multiple, normal)
    code = tl.where(values == values, code, 0x7F)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
