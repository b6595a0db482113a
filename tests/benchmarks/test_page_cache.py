from __future__ import annotations

from pathlib import Path


def test_what_was_let_go_is_not_in_memory_until_it_is_read(tmp_path: Path) -> None:
    from page_cache import evict, resident_share

    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 5000)
    assert resident_share([file]) == 1.0
    evict([file, tmp_path / "missing"])
    assert resident_share([file]) == 0.0
    file.read_bytes()
    assert resident_share([file, tmp_path / "missing"]) == 1.0
