"""What a model directory says of ending a generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def eos_token_ids(path: str | Path) -> list[int]:
    """End-of-sequence ids of a directory's generation config, else of its config; empty if neither names one.

    An empty path stands for a model without a directory.
    """
    if not str(path):
        return []
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        config = _read(file)
        ids = config.get("eos_token_id")
        if ids is None:
            ids = (config.get("text_config") or {}).get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else [int(token_id) for token_id in ids]
    return []


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file has none, as a config.json that is not one of Transformers may."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
