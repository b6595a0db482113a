import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.worker import sampling_reference as reference

from shardwright.worker.candidates import Filters, draw, likeliest
from shardwright.worker.sampling_noise import sequence_keys, split_keys

CPU = torch.device("cpu")


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=200), st.data())
def test_likeliest_ranks_by_score_then_by_id(numbers, data):
    num = data.draw(st.integers(1, len(numbers)))
    values, ids = likeliest(torch.tensor([numbers, numbers[::-1]], dtype=torch.bfloat16), num)
    for row, scores in enumerate((numbers, numbers[::-1])):
        wanted = reference.ranking(scores)[:num]
        assert ids[row].tolist() == wanted
        assert values[row].tolist() == [scores[token_id] for token_id in wanted]


@pytest.mark.parametrize("num", [1, 40, 200, 1500])
def test_likeliest_finds_all_ties_at_its_border(num):
    torch.manual_seed(3)
    scores = torch.randn(3, 20_000).mul(3).round()  # some twenty different values
    wanted, order = scores.sort(dim=-1, descending=True, stable=True)
    values, ids = likeliest(scores, num)
    assert torch.equal(values, wanted[:, :num])
    assert torch.equal(ids, order[:, :num])


def make_filters(num_rows: int, vocab: int, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Filters:
    return Filters(
        np.full(num_rows, top_k or vocab),
        np.full(num_rows, top_p, np.float32),
        np.full(num_rows, min_p, np.float32),
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.3), (900, 0.95, 0.0), (20, 0.8, 0.1), (1, 1.0, 0.0), (0, 1.0, 1.0)],
)
def test_only_tokens_that_the_filters_keep_are_drawn_and_all_of_those(top_k, top_p, min_p):
    torch.manual_seed(5)
    vocab, num_draws = 1000, 4000
    scores = torch.randn(vocab) * 2
    ranked = reference.ranking(scores.tolist())
    probabilities = scores[ranked].double()[: top_k or vocab].softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (before < top_p) & (probabilities >= min_p * probabilities[0])
    expected = torch.where(keep, probabilities, 0) / probabilities[keep].sum()

    keys = split_keys(sequence_keys(np.arange(num_draws), np.zeros(num_draws, np.int64)), CPU)
    filters = make_filters(num_draws, vocab, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draw(scores.expand(num_draws, vocab), filters, keys).tolist()

    assert set(drawn) <= {ranked[i] for i in keep.nonzero().flatten().tolist()}
    often = [ranked[i] for i in (expected > 20 / num_draws).nonzero().flatten().tolist()]
    assert set(often) <= set(drawn)


def test_a_wide_nucleus_is_found_beyond_the_first_candidates():
    vocab, num_draws = 3000, 300
    scores = torch.linspace(0.01, 0, vocab).expand(num_draws, vocab)  # nearly uniform: half the mass is half the tokens
    keys = split_keys(sequence_keys(np.arange(num_draws), np.zeros(num_draws, np.int64)), CPU)
    drawn = draw(scores, make_filters(num_draws, vocab, top_p=0.5), keys)
    assert drawn.max() < 1500
    assert drawn.max() > 1400
    assert drawn.min() < 100


def test_a_row_draws_the_same_token_beside_rows_with_wider_filters():
    torch.manual_seed(7)
    vocab, num_rows = 4000, 12
    scores = (torch.randn(num_rows, vocab) * 2).bfloat16().float()
    keys = split_keys(sequence_keys(np.arange(num_rows), np.zeros(num_rows, np.int64)), CPU)
    filters = Filters(
        np.array([3, vocab, 500, 40, vocab, vocab, 1, 10, vocab, 3999, vocab, 2]),
        np.array([1, 0.999, 0.5, 0.9, 1, 0.1, 1, 1, 1, 0.99, 0.7, 0.5], np.float32),
        np.array([0, 0, 0, 0.01, 0, 0, 0, 0.5, 0.2, 0, 0.001, 0], np.float32),
    )
    together = draw(scores, filters, keys).tolist()
    alone = [
        int(draw(scores[row : row + 1], filters.take(np.array([row])), keys[row : row + 1])) for row in range(num_rows)
    ]
    assert together == alone
