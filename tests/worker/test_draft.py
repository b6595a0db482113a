"""A model that drafts proposes what it would say itself, whatever it has computed before and wherever."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tests.models.custom_models import greedy_by_recompute, make_tale
from transformers import PreTrainedModel

from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, NewRow, TableUpdate
from shardwright.worker.draft import Draft, DraftModel
from shardwright.worker.ladder import climb
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.step import StepTables

BLOCK_SIZE = 4
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)
FIRST, SECOND = [5, 9, 40, 77, 3, 120, 11, 64, 23], [90, 8, 8, 31, 100]


@dataclass
class Drafter:
    """A model that drafts, and the tables that a runner would keep for it."""

    most_tokens: int = 64
    max_model_len: int = 256
    plain: PreTrainedModel = field(default_factory=make_tale)
    served: PreTrainedModel = field(default_factory=make_tale)

    def __post_init__(self) -> None:
        model = climb(
            self.served, num_positions=256, vocab_size=128, block_size=BLOCK_SIZE, dtype=torch.float32,
            compute_dtype=torch.float32, device=CPU,
        )  # fmt: skip
        model.allocate(num_rows=4, num_blocks=40, block_size=BLOCK_SIZE)
        self.steps: list[tuple[list[int], list[int]]] = []
        compute = model.compute

        def watched(step: StepTables) -> torch.Tensor:
            self.steps.append((step.num_computed.tolist(), step.num_tokens.tolist()))
            return compute(step)

        model.compute = watched  # type: ignore[method-assign]
        self.token_rows = np.zeros((4, 64), dtype=np.int32)
        self.num_known = np.zeros(4, dtype=np.int64)
        self.state = SamplingState(4, 128, CPU)
        self.draft = DraftModel(
            Draft(model=model, max_model_len=self.max_model_len), self.token_rows, num_blocks=40,
            block_size=BLOCK_SIZE, most_tokens=self.most_tokens,
        )  # fmt: skip

    def start(self, row: int, tokens: list[int], blocks: list[int], *, num_cached: int = 0) -> None:
        """A sequence takes a row; its first tokens may be in blocks of others."""
        self.token_rows[row, : len(tokens)] = tokens
        self.num_known[row] = len(tokens)
        self.state.set_row(row, GREEDY, prompt_token_ids=tokens, output_token_ids=[], stop_token_ids=[])
        self.draft.take_in(
            Batch(
                rows=[row], num_computed=[num_cached], num_tokens=[len(tokens) - num_cached],
                new_rows=[NewRow(row, tokens, len(tokens), GREEDY, [])],
                table_updates=[TableUpdate(row, 0, 0, blocks)],
            )
        )  # fmt: skip

    def append(self, row: int, tokens: list[int]) -> None:
        """What the served model has made of the proposals."""
        start = self.num_known[row]
        self.token_rows[row, start : start + len(tokens)] = tokens
        self.num_known[row] += len(tokens)

    def propose(self, counts: dict[int, int]) -> list[list[int]]:
        """Proposals by row, and the steps that it took."""
        self.steps.clear()
        rows = np.array(list(counts))
        return self.draft.propose(rows, np.array(list(counts.values())), self.num_known[rows], Sampler(0), self.state)


@pytest.fixture
def drafter() -> Drafter:
    return Drafter()


def test_it_proposes_what_it_would_say(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21, 9])
    drafter.start(2, SECOND, [4, 30, 1])
    assert drafter.propose({2: 2, 0: 4}) == [
        greedy_by_recompute(drafter.plain, SECOND, 2),
        greedy_by_recompute(drafter.plain, FIRST, 4),
    ]
    assert drafter.steps == [([0, 0], [5, 9]), ([5, 9], [1, 1]), ([10], [1]), ([11], [1])]


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_what_came_true_is_not_computed_again(drafter: Drafter, right: int) -> None:
    drafter.start(0, FIRST, [7, 3, 21, 9, 2])
    (proposed,) = drafter.propose({0: 3})
    drafter.append(0, [*proposed[:right], 99])
    assert drafter.propose({0: 2}) == [greedy_by_recompute(drafter.plain, [*FIRST, *proposed[:right], 99], 2)]
    kept = min(right, 2)  # of the third proposal nothing was computed
    assert drafter.steps[0] == ([9 + kept], [right + 1 - kept])


def test_a_last_proposal_is_computed_again_for_what_follows_it(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21, 9, 2])
    (proposed,) = drafter.propose({0: 3})
    drafter.append(0, proposed[:2])  # only one was verified, and the other one came after it by itself
    assert drafter.propose({0: 1}) == [greedy_by_recompute(drafter.plain, [*FIRST, *proposed[:2]], 1)]
    assert drafter.steps == [([10], [1])]


def test_what_it_was_not_asked_for_is_made_up_for(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21, 9, 2])
    drafter.propose({0: 3})
    drafter.append(0, [50, 51, 52, 53])
    assert drafter.propose({0: 2}) == [greedy_by_recompute(drafter.plain, [*FIRST, 50, 51, 52, 53], 2)]


def test_long_sequences_are_computed_in_steps_of_the_budget() -> None:
    drafter = Drafter(most_tokens=6)
    drafter.start(0, FIRST, [7, 3, 21, 9])
    drafter.start(2, SECOND, [4, 30, 1])
    assert drafter.propose({0: 2, 2: 2}) == [
        greedy_by_recompute(drafter.plain, FIRST, 2),
        greedy_by_recompute(drafter.plain, SECOND, 2),
    ]
    assert all(sum(counts) <= 6 for _, counts in drafter.steps)
    assert sum(sum(counts) for _, counts in drafter.steps) == 9 + 5 + 2


def test_blocks_of_a_prefix_are_computed_once_and_made_up_for_if_they_were_not(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21])
    drafter.propose({0: 1})
    longer = [*FIRST[:8], 60, 61, 62]
    drafter.start(1, longer, [7, 3, 22], num_cached=8)
    assert drafter.propose({1: 1}) == [greedy_by_recompute(drafter.plain, longer, 1)]
    assert drafter.steps == [([8], [3])]
    drafter.start(2, SECOND[:4] + FIRST[:4], [30, 31])  # nobody asks for proposals
    longest = [*SECOND[:4], *FIRST[:4], 70]
    drafter.start(3, longest, [30, 31, 32], num_cached=8)
    assert drafter.propose({3: 1}) == [greedy_by_recompute(drafter.plain, longest, 1)]
    assert drafter.steps == [([0], [9])]


def test_a_block_that_changed_hands_is_computed_anew(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21])
    drafter.propose({0: 1})
    drafter.start(1, SECOND, [7, 5])  # its first block was given up and taken
    drafter.start(2, [*SECOND[:4], 44, 45], [7, 6], num_cached=4)
    assert drafter.propose({2: 1}) == [greedy_by_recompute(drafter.plain, [*SECOND[:4], 44, 45], 1)]
    assert drafter.steps == [([0], [6])]


def test_it_says_nothing_beyond_the_sequences_that_it_reads() -> None:
    drafter = Drafter(max_model_len=11)
    drafter.start(0, FIRST, [7, 3, 21])
    drafter.start(1, [*FIRST, 1, 2], [8, 9, 10])
    assert drafter.propose({0: 4, 1: 4}) == [greedy_by_recompute(drafter.plain, FIRST, 2), []]


def test_logits_that_are_not_numbers_propose_nothing_and_spoil_nobody(drafter: Drafter) -> None:
    drafter.served.words.weight.data[99] = float("nan")
    drafter.start(0, [*FIRST[:5], 99], [7, 3])
    drafter.start(1, SECOND, [5, 6])
    assert drafter.propose({0: 3, 1: 2}) == [[], greedy_by_recompute(drafter.plain, SECOND, 2)]
    assert drafter.draft._model._cache.layers  # zero times not-a-number is not zero, wherever a mask hides it
    for layer in drafter.draft._model._cache.layers:
        assert layer.keys_NKD.isfinite().all()
        assert layer.values_NKV.isfinite().all()


def test_sampled_proposals_use_the_noise_of_the_positions_they_are_for(drafter: Drafter) -> None:
    drafter.start(0, FIRST, [7, 3, 21, 9])
    params = SamplingParams(temperature=1.2, seed=5)
    drafter.state.set_row(0, params, prompt_token_ids=FIRST, output_token_ids=[], stop_token_ids=[])
    (proposed,) = drafter.propose({0: 4})
    tokens, state, sampler = list(FIRST), SamplingState(1, 128, CPU), Sampler(1)
    state.set_row(0, params, prompt_token_ids=FIRST, output_token_ids=[], stop_token_ids=[])
    for _ in range(4):
        with torch.inference_mode():
            logits = drafter.plain(input_ids=torch.tensor([tokens])).logits[0, -1:]
        chosen = sampler.choose(logits, state, np.array([0])).token_ids
        state.append(np.array([0]), chosen)
        tokens.append(int(chosen[0]))
    assert proposed == tokens[len(FIRST) :]
