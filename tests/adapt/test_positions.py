"""Code that counts its tokens to know their positions gets the true ones back."""

from __future__ import annotations

import torch

from shardwright.adapt.positions import CountingDetector, feed_positions

POSITIONS = torch.tensor([7, 0, 1, 2, 30])


def test_counting_is_detected() -> None:
    for call in (
        lambda: torch.arange(5),
        lambda: torch.arange(0, 5),
        lambda: torch.arange(end=5),
        lambda: torch.arange(start=0, end=5, device="cpu"),
    ):
        with CountingDetector(5) as detector:
            call()
        assert detector.found


def test_other_counts_are_not() -> None:
    with CountingDetector(5) as detector:
        torch.arange(4)
        torch.arange(1, 5)
        torch.arange(0, 5, 2)
        torch.arange(0.0, 1.0, 0.2)
        torch.zeros(5).cumsum(0)
    assert not detector.found


def test_counts_of_the_batch_become_positions() -> None:
    with feed_positions(POSITIONS):
        for count in (torch.arange(5), torch.arange(0, 5), torch.arange(start=0, end=5)):
            assert count.tolist() == POSITIONS.tolist()
        assert torch.arange(5, dtype=torch.float32).dtype is torch.float32
        assert torch.arange(4).tolist() == [0, 1, 2, 3]
        assert torch.arange(2, 5).tolist() == [2, 3, 4]
    assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_a_count_may_be_changed_in_place() -> None:
    with feed_positions(POSITIONS):
        torch.arange(5).add_(1)
        assert torch.arange(5).tolist() == POSITIONS.tolist()
