from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest


def make_document() -> dict:
    engines = {"shardwright": 100.0, "shardwright int4": 150.0, "vllm": 50.0, "llama.cpp q4_0": 120.0}
    start = {"ready_s": 1.0, "first_token_s": 1.5, "peak_rss_mib": 300.0}
    row = {
        "name": "decode-1",
        "headline": "output",
        "tokens_per_s": engines,
        "ratio": {"vllm": 2.0, "llama.cpp q4_0": 1.25},
        "bound_tokens_per_s": 125.0,
        "fraction_of_bound": 0.8,
    }
    machine = {"cpu": "C", "cores": 2, "threads": 2, "read_gb_per_s": 1.0, "gemm_gflop_per_s": 1.0, "gemm_dtype": "f"}
    return {
        "model": "m",
        "dtype": "bfloat16",
        "date": "today",
        "rounds": 2,
        "machine": machine,
        "versions": {"python": "3"},
        "workloads": [row],
        "starts": dict.fromkeys(engines, start),
        "peak_rss_mib": dict.fromkeys(engines, 400.0),
    }


def test_peers_are_compared_with_weights_of_as_many_bits() -> None:
    from report import as_markdown

    lines = as_markdown(make_document()).splitlines()
    header = next(line for line in lines if line.startswith("| workload"))
    assert header.split(" | ")[1:7] == [
        "shardwright",
        "shardwright int4",
        "vLLM",
        "llama.cpp q4_0",
        "ratio to vLLM",
        "ratio to llama.cpp q4_0",
    ]
    assert "| decode-1 | 100.0 | 150.0 | 50.0 | 120.0 | 2.00 | 1.25 | 125.0 | 80% |" in lines


def test_starts_alone_make_a_table_too() -> None:
    from report import as_markdown

    lines = as_markdown(make_document() | {"workloads": []}).splitlines()
    assert not any(line.startswith("| workload") for line in lines)
    assert "| process start to ready, s | 1.0 | 1.0 | 1.0 | 1.0 |" in lines


def test_who_is_compared_with_whom(tmp_path: Path) -> None:
    from contestant import COUNTERPARTS, contestants

    engines = contestants(logs=tmp_path, hf=True, vllm=Path("run.sh"), quantized=True)
    assert {engine.name: engine.counterpart for engine in engines} == {
        "shardwright": None,
        "shardwright int8": None,
        "shardwright int4": None,
        "hf": "shardwright",
        "vllm": "shardwright",
    }
    assert set(COUNTERPARTS.values()) <= {engine.name for engine in engines}


def test_the_plot_is_drawn_or_says_what_it_needs(tmp_path: Path) -> None:
    import peers_plot

    results, image = tmp_path / "results.json", tmp_path / "images/peers.svg"
    results.write_text(json.dumps(make_document()))
    if find_spec("matplotlib"):
        peers_plot.main([str(results), str(image)])
        assert image.read_text().count("<svg") == 1
    else:
        with pytest.raises(SystemExit, match="matplotlib is missing: pip install -r benchmarks/requirements.txt"):
            peers_plot.main([str(results), str(image)])
