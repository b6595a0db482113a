"""What a model directory says of ending a generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def eos_token_ids(path: str | Path) -> list[int]:
    """End-of-sequence ids of a directory's generation config, else of its config; empty if neither names one."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if not file.exists():
            continue
        config: dict[str, Any] = json.loads(file.read_text())
        ids = config.get("eos_token_id")
        if ids is None:
            ids = (config.get("text_config") or {}).get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else [int(token_id) for token_id in ids]
    return []
