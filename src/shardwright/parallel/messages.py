"""What an executor and its ranks say to each other. Plain msgspec records."""

from __future__ import annotations

import msgspec

from shardwright.config import EngineConfig
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.placement import Placement
from shardwright.worker.report import Allocation, WorkerReport


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup", array_like=True):
    """The first message: who the ranks are. Rank 0 replies with Opened."""

    placements: list[Placement]
    """By rank."""
    host: str
    """Address at which the ranks meet: one of rank 0's machine."""
    log_level: int
    main: dict[str, str] = {}
    """How the program is found whose functions the registration names (`multiprocessing.spawn`)."""
    registration: bytes | None = None
    """Pickled Registration of a model that the program has registered."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", array_like=True):
    """Load a model, in place of the one before. Every rank replies with Loaded."""

    config: EngineConfig
    port: int
    """Of the store at rank 0."""


class Allocate(msgspec.Struct, frozen=True, tag="allocate", array_like=True):
    """Make room. Every rank replies with Allocated."""

    allocation: Allocation


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """Run a batch. The rank that samples replies with Stepped."""

    batch: Batch


class Stop(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    """End the process."""


Command = Setup | Load | Allocate | Step | Stop
"""What an executor sends to all ranks."""


class Opened(msgspec.Struct, frozen=True, tag="opened", array_like=True):
    """Rank 0 has a store where the others can meet it."""

    port: int


class Loaded(msgspec.Struct, frozen=True, tag="loaded", array_like=True):
    """The model is loaded and measured."""

    report: WorkerReport


class Allocated(msgspec.Struct, frozen=True, tag="allocated", array_like=True):
    """Ready for steps."""


class Stepped(msgspec.Struct, frozen=True, tag="stepped", array_like=True):
    """A step is done."""

    result: StepResult


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The rank cannot go on; its process ends."""

    kind: str
    """Name of the class in shardwright.errors to raise; of the exception, if it is none of ours."""
    message: str


Reply = Opened | Loaded | Allocated | Stepped | Failed
"""What ranks send back."""
