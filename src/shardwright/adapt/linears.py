"""The linear maps in a forward pass: what goes in, and by which numbers it is multiplied.

A map is a module like nn.Linear, or a product in the code with a parameter, spelled in any way. A module is known again
in a later pass by itself; a product by its parameter, and by how many products with it came before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Source = nn.Module | tuple[int, int]
"""A module, or the storage of a parameter and the number of the product with it in a pass."""

PRODUCTS = {
    F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinearUse:
    """One use of a linear map in a pass."""

    source: Source
    input: Tensor
    """[..., in]; all dimensions but the last together count tokens."""
    apply: Callable[[Tensor], Tensor]
    """Computes the output of such an input, of any number of tokens."""
    has_bias: bool

    def matrix(self, output: Tensor) -> tuple[Tensor, int] | None:
        """The map as a matrix.

        Args:
            output: of the pass.

        Returns: [out, in], a view of the weight for modules, and which dimension of the output counts tokens; the
            others, in order, count the rows of the matrix. None if that cannot be told.
        """
        if isinstance(self.source, nn.Linear):
            return self.source.weight.detach(), output.ndim - 2
        num_tokens, size = self.input.shape[:-1].numel(), self.input.shape[-1]
        eye = torch.eye(size, dtype=self.input.dtype, device=self.input.device)
        with torch._C.DisableTorchFunction():
            columns = self.apply(eye.view(*[1] * (self.input.ndim - 2), size, size))
        for dim in range(output.ndim):
            expected = list(output.shape)
            if expected[dim] == num_tokens:
                expected[dim] = size
                if list(columns.shape) == expected:
                    return columns.movedim(dim, 0).reshape(size, -1).T, dim
        return None


Seen = Callable[[LinearUse, Tensor], None]
"""Is given a use, and its output."""


class LinearWatch:
    """Shows the linear maps of a model's forward passes.

    Args:
        model: that runs; later changes of what its parameters are in are not known.
        sources: which of them are wanted; None: all. There may be more.
    """

    def __init__(self, model: nn.Module, sources: Collection[Source] | None = None) -> None:
        modules = model.modules() if sources is None else [s for s in sources if isinstance(s, nn.Module)]
        self._modules = list({id(module): module for module in modules if isinstance(module, nn.Linear)}.values())
        self._storages: set[int] = set()
        if sources is None or len(self._modules) < len(set(sources)):
            self._storages = {p.untyped_storage()._cdata for p in model.parameters() if p.ndim > 1}

    @contextmanager
    def open(self, seen: Seen) -> Iterator[None]:
        """Show the maps of the pass inside, once each has been computed."""

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            assert isinstance(module, nn.Linear)
            if len(args) == 1 and isinstance(output, Tensor) and output.shape[-1] == len(module.weight):
                seen(LinearUse(module, args[0], module, module.bias is not None), output)

        with ExitStack() as stack:
            for module in self._modules:
                hook = module.register_forward_hook(see)
                stack.callback(hook.remove)
            if self._storages:
                stack.enter_context(_ProductMode(self._storages, seen))
            yield


class _ProductMode(TorchFunctionMode):
    """Shows products of an activation with a parameter, or with a view of one."""

    def __init__(self, storages: set[int], seen: Seen) -> None:
        super().__init__()
        self._storages = storages
        self._seen = seen
        self._numbers: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and not kwargs:
            self._see(func, args, result)
        return result

    def _see(self, func: Any, args: tuple[Any, ...], result: Tensor) -> None:
        if func is torch.einsum and len(args) == 2:
            args = (args[0], *args[1])
        first = 1 if func is torch.einsum else 0
        operands = args[first : first + 2]
        if len(args) < first + 2 or not all(isinstance(operand, Tensor) for operand in operands):
            return
        storages = [operand.untyped_storage()._cdata for operand in operands]
        [*places] = (place for place, storage in enumerate(storages) if storage in self._storages)
        if len(places) != 1 or len(args) > first + 2 + (func is F.linear):
            return
        given, storage = first + 1 - places[0], storages[places[0]]
        source = storage, self._numbers[storage]
        self._numbers[storage] += 1
        bias = args[2] if func is F.linear and len(args) > 2 else None

        def apply(input: Tensor) -> Tensor:
            output: Tensor = func(*args[:given], input, *args[given + 1 :])
            return output

        self._seen(LinearUse(source, args[given], apply, bias is not None), result)
