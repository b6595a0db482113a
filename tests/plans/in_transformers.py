"""Plain Transformers on two processes, with nothing of ours but a file: for tests of plans that are written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

RANKS = 2
TOKENS = [[1, 5, 9, 17, 33, 2, 7]]


@torch.no_grad()
def compare(rank: int, models: Sequence[tuple[Path, Path | None]], folder: Path) -> None:
    """One rank: load each model as the plan says, and compare its logits with those of the whole.

    Args:
        rank: of `RANKS`.
        models: directories, and the plan file of each; None: its config has the plan.
        folder: for the meeting point of the ranks, and `logits-RANK.json`: for each model the largest difference in
            units of the largest logit, and the share of its parameters that this rank holds.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = []
    for directory, file in models:
        tp_plan = None if file is None else json.loads(file.read_text())["tp_plan"]
        options = {"trust_remote_code": True, "dtype": torch.float32}
        parallel = DistributedConfig(tp_size=RANKS, tp_plan=tp_plan)
        whole = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
        part = AutoModelForCausalLM.from_pretrained(directory, **options, distributed_config=parallel).eval()
        expected, logits = whole(torch.tensor(TOKENS)).logits, part(torch.tensor(TOKENS)).logits
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in part.parameters())
        found.append(
            (
                float((logits - expected).abs().max() / expected.abs().max()),
                held / sum(p.numel() for p in whole.parameters()),
            )
        )
    (folder / f"logits-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
