from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.usefixtures("quick_machine")
def test_growth_is_measured_and_written(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import growth

    image = tmp_path / "images/growth.svg"
    command = [str(tiny_llama), "--quick", "--dtype", "float32", "--results", str(tmp_path), "--image", str(image)]
    growth.main(command)
    out, err = capsys.readouterr()
    assert "| requests | tokens/s | bound | of bound |" in out
    (file,) = tmp_path.glob("*-growth-tiny-llama-float32.json")
    document = json.loads(file.read_text())
    assert [row["requests"] for row in document["requests"]] == [1, 2]
    assert [row["context"] for row in document["context"]] == [128]
    (size,) = document["size"]
    assert size["tokens_per_s"] > 0
    assert size["prefill_tokens_per_s"] > 0
    assert file.with_suffix(".md").read_text() == out
    if find_spec("matplotlib"):
        assert image.read_text().lstrip().startswith("<?xml")
    else:
        assert "matplotlib is missing: pip install -r benchmarks/requirements.txt" in err
