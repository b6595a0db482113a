import math

import pytest
import torch

from shardwright.worker import logprobs
from shardwright.worker.logprobs import prompt_logprobs, token_logprobs


def test_chosen_token_first_then_the_likeliest_with_ranks():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    (entry,) = token_logprobs(logits, torch.tensor([2]), [2])
    wanted = logits[0].log_softmax(dim=-1)
    assert entry.token_ids == [2, 1, 3]
    assert entry.rank == 3
    assert entry.logprobs == pytest.approx([wanted[i].item() for i in (2, 1, 3)], abs=1e-6)


def test_rows_may_ask_for_different_numbers():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    entries = token_logprobs(logits, torch.tensor([4, 5, 6]), [0, 3, 30])
    assert [len(entry.token_ids) for entry in entries] == [1, 4, 31]
    assert math.isclose(sum(math.exp(value) for value in entries[2].logprobs[1:]), 1, rel_tol=1e-5)


def test_more_alternatives_than_tokens_gives_all_tokens():
    (entry,) = token_logprobs(torch.zeros(1, 5), torch.tensor([3]), [100])
    assert entry.token_ids == [3, 0, 1, 2, 3, 4]
    assert entry.rank == 1


def test_prompt_logprobs_do_not_depend_on_chunks(monkeypatch):
    logits = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    token_ids = torch.arange(10)
    whole = prompt_logprobs(logits, token_ids, 3)
    monkeypatch.setattr(logprobs, "_CHUNK", 120)
    assert prompt_logprobs(logits, token_ids, 3) == whole
    assert [entry.token_ids[0] for entry in whole] == list(range(10))
    assert prompt_logprobs(logits[:0], token_ids[:0], 3) == []
