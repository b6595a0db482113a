"""What a process has held at most."""

import psutil

from shardwright.bench.memory import peak_rss_mib


def test_peak_memory_covers_what_is_resident() -> None:
    assert 0.9 * psutil.Process().memory_info().rss < peak_rss_mib() * 2**20 < psutil.virtual_memory().total
