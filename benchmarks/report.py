"""The table of a comparison, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = {"hf": "HF generate", "vllm": "vLLM"}


def as_markdown(document: dict[str, Any]) -> str:
    """Heading, machine and one table of throughput, one of starts and memory."""
    engines = list(document["starts"])
    peers = list(document["workloads"][0]["ratio"]) if document["workloads"] else []
    machine = document["machine"]
    header = ["workload", *map(title, engines), *(f"ratio to {title(p)}" for p in peers), "bound", "of bound"]
    rows = [
        [
            row["name"] + (" (total)" if row["headline"] == "total" else ""),
            *(f"{row['tokens_per_s'][engine]:.1f}" for engine in engines),
            *(f"{row['ratio'][peer]:.2f}" for peer in peers),
            f"{row['bound_tokens_per_s']:.1f}",
            f"{row['fraction_of_bound']:.0%}",
        ]
        for row in document["workloads"]
    ]
    starts = [
        [what, *(f"{document['starts'][engine][key]:.1f}" for engine in engines)]
        for what, key in (
            ("process start to ready, s", "ready_s"),
            ("process start to first token, s", "first_token_s"),
            ("peak memory at the first token, MiB", "peak_rss_mib"),
        )
    ]
    starts.append(["peak memory after all workloads, MiB", *(f"{document['peak_rss_mib'][e]:.0f}" for e in engines)])
    return "\n".join(
        [
            f"# {document['model']}, {document['dtype']}, {document['date']}",
            "",
            f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; measured:"
            f" reads {machine['read_gb_per_s']} GB/s, multiplies {machine['gemm_gflop_per_s']} GFLOP/s"
            f" ({machine['gemm_dtype']}).",
            ", ".join(f"{name} {version}" for name, version in document["versions"].items()) + ".",
            f"Output tokens per second (total: prompt and output), best of {document['rounds']} alternating rounds."
            " Ratios are to shardwright with weights of as many bits; the bound is that of unquantized ones.",
            "",
            *((*table(header, rows), "") if rows else ()),
            *table(["start and memory", *map(title, engines)], starts),
        ]
    )


def title(engine: str) -> str:
    """An engine as people call it."""
    return NAMES.get(engine, engine)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
