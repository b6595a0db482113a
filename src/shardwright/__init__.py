"""Serve the model you trained, from the code you trained it with.

LLM for offline generation, AsyncLLM for asyncio programs, SamplingParams for both, register_model for modules of your
own. Importing this package imports neither torch nor transformers; the names below do when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from shardwright.garbage import collection_paused

if TYPE_CHECKING:
    from shardwright.async_llm import AsyncLLM
    from shardwright.llm import LLM
    from shardwright.models.registry import register_model
    from shardwright.outputs import (
        ClassificationOutput,
        CompletionOutput,
        EmbeddingOutput,
        FinishReason,
        Logprob,
        RequestOutput,
        ScoreOutput,
    )
    from shardwright.sampling_params import SamplingParams

__version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "ClassificationOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "FinishReason",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "__version__",
    "register_model",
]

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "sampling_params",
    "register_model": "models.registry",
    "ClassificationOutput": "outputs",
    "CompletionOutput": "outputs",
    "EmbeddingOutput": "outputs",
    "FinishReason": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "ScoreOutput": "outputs",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # which reads the packages that are installed

        return version("shardwright")
    if name not in _HOME:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    with collection_paused():
        return getattr(import_module(f"shardwright.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
