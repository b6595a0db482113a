"""Ask a model only for what it is served for."""

from __future__ import annotations

from typing import Literal, TypeAlias

from shardwright.engine.messages import EngineInfo
from shardwright.errors import RequestError

ServedTask: TypeAlias = Literal["generate", "embed", "classify"]

_DOES = {"generate": "generates text", "embed": "embeds texts", "classify": "classifies texts"}

_CALLS = {
    "generate": "LLM.generate and LLM.chat, or /v1/completions and /v1/chat/completions of a server",
    "embed": "LLM.embed and LLM.score, or /v1/embeddings, /score and /rerank of a server",
    "classify": "LLM.classify and LLM.score, or /classify, /score and /rerank of a server",
}


def check_task(info: EngineInfo, task: ServedTask | Literal["score"]) -> None:
    """Raise RequestError if the model is served for something else."""
    if info.task == task or (task == "score" and info.task != "generate"):
        return
    restart = " (or start it with --task embed)" if info.task == "generate" and task != "classify" else ""
    raise RequestError(
        f"{info.model} ({info.architecture}) {_DOES[info.task]}, it does not {task}: ask {_CALLS[info.task]}{restart}",
        param="model",
    )
