"""Every error that shardwright raises on purpose.

    ShardwrightError
    ├── UsageError (ValueError)          bad input from a person or a client: exit code 2, HTTP 400
    │   ├── ConfigError                  an engine option is wrong, or two contradict each other
    │   ├── ModelSourceError             the model cannot be found or read, or needs a permission not given
    │   ├── CheckpointError              weights missing, unexpected, truncated or of the wrong shape
    │   ├── UnsupportedModelError        the model's code cannot be served; the message names what stands in the way
    │   ├── PlanError                    a parallel plan cannot be read or carried out
    │   └── RequestError                 a request that the engine refuses; `param` names the field at fault
    │       └── PromptTooLongError       prompt plus output do not fit; carries both numbers
    └── EngineError (RuntimeError)       the engine failed or cannot take more: exit code 1, HTTP 5xx
        ├── EngineDeadError              the engine process is gone
        ├── RanksLostError               a rank died or hangs; those left are started anew
        └── EngineBusyError              saturated or draining: try again later (HTTP 503)

A message gives the value, the rule and a way out, on one line.
"""

from __future__ import annotations


class ShardwrightError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(ShardwrightError, ValueError):
    """Bad input: mending it is up to the caller."""


class ConfigError(UsageError):
    """An engine option is out of range, unknown, or contradicts another."""


class ModelSourceError(UsageError):
    """The model's files cannot be found, fetched or trusted."""


class CheckpointError(UsageError):
    """The weights do not fit the model, or cannot be read."""


class UnsupportedModelError(UsageError):
    """The model's code does something that cannot be served correctly."""


class PlanError(UsageError):
    """A tensor- or pipeline-parallel plan cannot be read or carried out."""


class RequestError(UsageError):
    """A request is refused before it runs.

    Args:
        message: what is wrong and how to mend it.
        param: the request field at fault, in the API's spelling.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output."""


class EngineError(ShardwrightError, RuntimeError):
    """The engine failed while it ran."""


class EngineDeadError(EngineError):
    """The engine process is gone; its requests are lost."""


class RanksLostError(EngineError):
    """A rank died or hangs, and the steps in flight with it. The message says which and why."""


class StepFailedError(EngineError):
    """A batch could not be carried out, nor any after it that was in flight.

    Args:
        error: what it raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"a step failed: {type(error).__name__}: {error}")
        self.error = error


class EngineBusyError(EngineError):
    """The engine takes no more requests for now."""
