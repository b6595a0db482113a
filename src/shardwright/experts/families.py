"""Parameters that look like those of experts: several times the same shapes, side by side.

Names do not matter. Whether they are experts is found out by watching the code that uses them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_MATRICES = 3
"""Of one expert: gate, up and down. What has more in it is a layer, not an expert."""

Slot = tuple[str, str]
"""A parameter that every expert has one of: the container and the name in each child, or the name of the stack."""


@dataclass(frozen=True, slots=True)
class Family:
    """Parameters that may be those of experts."""

    name: str
    """Of the module that holds them all."""
    num_experts: int
    parameters: dict[Slot, list[Tensor]]
    """By slot, of each expert: parameters, or slices of a stack."""

    @property
    def places(self) -> ParameterPlaces:
        return ParameterPlaces(self.parameters)

    def bring_together(self) -> None:
        """Let matrices that are parameters of their own lie in one piece of memory, for all products in one call."""
        for tensors in self.parameters.values():
            if tensors[0].ndim > 1 and isinstance(tensors[0], nn.Parameter):
                for parameter, part in zip(tensors, torch.stack(tensors), strict=True):
                    parameter.data = part


class ParameterPlaces:
    """Tells by its address in memory which expert's parameter a tensor is a view of."""

    def __init__(self, parameters: dict[Slot, list[Tensor]]) -> None:
        entries = sorted(
            (tensor.data_ptr(), expert, slot, tensor.numel())
            for slot, tensors in parameters.items()
            for expert, tensor in enumerate(tensors)
        )
        self._starts = [entry[0] for entry in entries]
        self._entries = entries

    def begins(self, address: int) -> bool:
        """Whether an expert's parameter, or a stack of them, begins at an address."""
        place = bisect_right(self._starts, address) - 1
        return place >= 0 and self._starts[place] == address

    def find(self, address: int, numel: int) -> tuple[int, Slot] | None:
        """The expert and the slot whose parameter, as a whole, is viewed from an address on."""
        place = bisect_right(self._starts, address) - 1
        if not self.begins(address) or self._entries[place][3] != numel:
            return None
        _, expert, slot, _ = self._entries[place]
        return expert, slot


def find_families(model: nn.Module) -> list[Family]:
    """What may be experts in a model."""
    found = []
    for name, owner in model.named_modules():
        found += [*_in_containers(name, owner), *_in_stacks(name, owner)]
    return found


def _in_containers(owner_name: str, owner: nn.Module) -> Iterator[Family]:
    """Children of containers side by side: one container of experts, or one for each of their linears."""
    by_number: dict[int, dict[Slot, list[Tensor]]] = {}
    for name, container in owner.named_children():
        if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
            continue
        if isinstance(container, nn.ParameterList):
            experts = [{"": p} for p in container]
        else:
            experts = [dict(child.named_parameters()) for child in container.children()]
        shapes = [{leaf: p.shape for leaf, p in expert.items()} for expert in experts]
        if len(experts) < 2 or not shapes[0] or any(other != shapes[0] for other in shapes[1:]):
            continue
        slots = {(name, leaf): [expert[leaf] for expert in experts] for leaf in shapes[0]}
        by_number.setdefault(len(experts), {}).update(slots)
    for num_experts, slots in by_number.items():
        if _may_be_experts(slots):
            containers = {name for name, _ in slots}
            name = f"{owner_name}.{containers.pop()}".lstrip(".") if len(containers) == 1 else owner_name
            yield Family(name, num_experts, slots)


def _in_stacks(name: str, owner: nn.Module) -> Iterator[Family]:
    """Parameters with a dimension for the experts, and what else has as many rows: it may be their biases."""
    own = {name: p.detach() for name, p in owner.named_parameters(recurse=False)}
    for num_experts in sorted({len(p) for p in own.values() if p.ndim == 3}):
        slots: dict[Slot, list[Tensor]] = {
            ("", name): list(p) for name, p in own.items() if p.ndim in (2, 3) and len(p) == num_experts
        }
        if num_experts > 1 and not isinstance(owner, nn.ParameterList) and _may_be_experts(slots):
            yield Family(name, num_experts, slots)


def _may_be_experts(slots: dict[Slot, list[Tensor]]) -> bool:
    matrices = sum(tensors[0].ndim > 1 for tensors in slots.values())
    return 2 <= matrices <= MOST_MATRICES and all(t.numel() for tensors in slots.values() for t in tensors)
