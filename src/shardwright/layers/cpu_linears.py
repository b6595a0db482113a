"""The linears of a module on the CPU, with the fastest products that there are here."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from torch import nn

from shardwright.kernels.background import give_way
from shardwright.kernels.huge_pages import release
from shardwright.kernels.packed_linear import is_available
from shardwright.kernels.quantized_weight import QuantizedWeight
from shardwright.layers.packed_linear import PackedLinear, pack_linears
from shardwright.layers.quantized_linear import Quantized
from shardwright.layers.upcast_linear import UpcastLinear, has_fast_half_products, upcast_linears


def replace_linears(module: nn.Module) -> None:
    """Replace linears in place: packed ones, or where there is no compiler or no memory for them, widened ones."""
    if is_available():
        for held in module.modules():
            if isinstance(held, Quantized) and isinstance(held.quantized_weight, QuantizedWeight):
                held.pack()
    is_packed = is_available() and pack_linears(module) > 0
    release()  # what was reserved for more than there was to pack
    if not is_packed and not has_fast_half_products():
        upcast_linears(module)


def keep_unpacked(module: nn.Module) -> Thread:
    """Have linears keep their weights unpacked too, for steps of several tokens, where there is memory for that.

    It is done in the background, a weight after another, while the model is looked at or serves. Returns the thread
    that does it; it ends early if Python does, or if nobody holds the module.
    """
    linears = [weakref.ref(linear) for linear in module.modules() if isinstance(linear, PackedLinear)]

    def keep() -> None:
        give_way()
        for reference in linears:
            if (linear := reference()) is not None and threading.main_thread().is_alive():
                linear.keep_unpacked()

    # No daemon: it may be the last to hold a linear, and Python, when it ends, ends daemons wherever they are, in the
    # destructor of a tensor too. From there C++ lets no thread end without ending the process (std::terminate).
    thread = Thread(target=keep, name="unpack")
    thread.start()
    return thread


@contextmanager
def plain_linears(module: nn.Module) -> Iterator[None]:
    """While open, products are torch's own, with the weights that code knows, for those who watch what it does."""
    held = [linear for linear in module.modules() if isinstance(linear, PackedLinear | UpcastLinear)]
    for linear in held:
        linear.is_plain = True
    try:
        yield
    finally:
        for linear in held:
            linear.is_plain = False
