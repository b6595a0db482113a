"""What every handler of one server shares."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from time import time
from typing import Literal

from shardwright.engine.tasks import ServedTask, check_task
from shardwright.server.config import ServerConfig
from shardwright.server.engine import ServedEngine
from shardwright.server.errors import APIError
from shardwright.server.lifecycle import Lifecycle
from shardwright.server.metrics import Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerContext:
    """One engine, and how it is served."""

    engine: ServedEngine
    config: ServerConfig
    lifecycle: Lifecycle
    metrics: Metrics
    model_name: str
    """The model's id in the API."""
    chat_template: str | None
    """Replaces the tokenizer's own."""
    version: str
    started_at: float = field(default_factory=time)
    """Seconds since the epoch."""

    @property
    def has_chat(self) -> bool:
        """Whether messages can become a prompt."""
        return self.chat_template is not None or self.engine.tokenizer.has_chat_template

    def check_model(self, name: str | None, *, task: ServedTask | Literal["score"] | None = None) -> None:
        """Raise APIError 404 unless this is the served model, for which None stands, and RequestError unless it is
        served for the task.
        """
        if name is None or name == self.model_name:
            if task is not None:
                check_task(self.engine.info, task)
            return
        hint = "did you mean" if difflib.get_close_matches(name, [self.model_name]) else "this server has"
        raise APIError(
            f"there is no model {name!r}: {hint} {self.model_name!r}", status=404, param="model", code="model_not_found"
        )
