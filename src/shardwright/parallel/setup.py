"""What ranks in other processes are told first."""

from __future__ import annotations

import logging
import pickle
from multiprocessing import spawn

from shardwright.config import EngineConfig
from shardwright.models.registry import portable
from shardwright.parallel.messages import Setup
from shardwright.worker.placement import Placement


def make_setup(config: EngineConfig, placements: list[Placement], *, host: str) -> Setup:
    """The first message to ranks.

    Args:
        config: of the engine.
        placements: by rank.
        host: address at which they meet.

    Raises: ConfigError if the model is registered with a function that other processes cannot find.
    """
    registration = portable(config.model.model)
    main: dict[str, str] = {}
    if registration is not None:
        told = spawn.get_preparation_data("rank")
        main = {key: value for key, value in told.items() if key in ("init_main_from_name", "init_main_from_path")}
    return Setup(
        placements=placements,
        host=host,
        log_level=logging.getLogger("shardwright").getEffectiveLevel(),
        main=main,
        registration=None if registration is None else pickle.dumps(registration),
    )
