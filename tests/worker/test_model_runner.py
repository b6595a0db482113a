"""A rank carries out batches: what it samples is what the module's own forward pass says, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tests.models.custom_models import greedy_by_recompute, make_tale
from torch import Tensor
from transformers import PreTrainedModel

from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, NewRow, StepResult, TableUpdate
from shardwright.worker.ladder import climb
from shardwright.worker.model_runner import ModelRunner, RunnerLimits
from shardwright.worker.step import StepTables

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 40
GREEDY = SamplingParams(temperature=0)
FIRST, SECOND = [5, 9, 40, 77, 3, 120, 11, 64, 23], [90, 8, 8, 31, 100]


@dataclass
class Rank:
    """A runner, and the same model by itself."""

    max_model_len: int = 64
    samples: bool = True
    plain: PreTrainedModel = field(default_factory=make_tale)
    served: PreTrainedModel = field(default_factory=make_tale)
    runner: ModelRunner = field(init=False)

    def __post_init__(self) -> None:
        model = climb(
            self.served, num_positions=256, vocab_size=128, block_size=BLOCK_SIZE, dtype=torch.float32,
            compute_dtype=torch.float32, device=CPU,
        )  # fmt: skip
        model.allocate(num_rows=4, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        limits = RunnerLimits(
            max_num_seqs=4, max_model_len=self.max_model_len, vocab_size=128, block_size=BLOCK_SIZE
        )  # fmt: skip
        self.runner = ModelRunner(model, limits, device=CPU, seed=0, samples=self.samples)

    def step(
        self,
        work: list[tuple[int, int, int]],
        *,
        new: dict[int, list[int]] | None = None,
        blocks: dict[int, list[int]] | None = None,
        params: SamplingParams = GREEDY,
        num_prompt_tokens: int | None = None,
        **told: object,
    ) -> StepResult:
        """One step of (row, tokens computed before, tokens now); `new` and `blocks` are by row."""
        new_rows = [
            NewRow(row, tokens, num_prompt_tokens or len(tokens), params, []) for row, tokens in (new or {}).items()
        ]
        updates = [TableUpdate(row, 0, 0, own) for row, own in (blocks or {}).items()]
        rows, num_computed, num_tokens = (list(column) for column in zip(*work, strict=True))
        return self.runner.execute(
            Batch(
                rows=rows,
                num_computed=num_computed,
                num_tokens=num_tokens,
                new_rows=new_rows,
                table_updates=updates,
                **told,
            )
        )


@pytest.fixture
def rank() -> Rank:
    return Rank()


def own_logits(module: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = module(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def test_sampled_tokens_are_remembered_from_step_to_step(rank: Rank) -> None:
    result = rank.step([(0, 0, 9), (2, 0, 5)], new={0: FIRST, 2: SECOND}, blocks={0: [7, 3, 21, 9], 2: [4, 30, 1]})
    first, second = [result.token_ids[0]], [result.token_ids[1]]
    for i in range(5):
        result = rank.step([(2, 5 + i, 1), (0, 9 + i, 1)])  # in any order
        second.append(result.token_ids[0])
        first.append(result.token_ids[1])
    assert first == greedy_by_recompute(rank.plain, FIRST, 6)
    assert second == greedy_by_recompute(rank.plain, SECOND, 6)


def test_a_prompt_in_chunks_samples_at_its_end_only(rank: Rank) -> None:
    assert rank.step([(1, 0, 4)], new={1: FIRST}, blocks={1: [5, 6, 7]}).token_ids == [None]
    result = rank.step([(1, 4, 2), (3, 0, 5)], new={3: SECOND}, blocks={3: [8, 9]})
    assert result.token_ids == [None, *greedy_by_recompute(rank.plain, SECOND, 1)]
    assert rank.step([(1, 6, 3)]).token_ids == greedy_by_recompute(rank.plain, FIRST, 1)


def test_a_prefix_in_other_blocks_is_not_computed_again(rank: Rank) -> None:
    rank.step([(0, 0, 9)], new={0: FIRST}, blocks={0: [11, 12, 13]})
    prompt = [*FIRST[:8], 50, 51]
    result = rank.step([(1, 8, 2)], new={1: prompt}, blocks={1: [11, 12, 14]})
    assert result.token_ids == greedy_by_recompute(rank.plain, prompt, 1)


def test_a_preempted_sequence_goes_on_where_it_was(rank: Rank) -> None:
    expected = greedy_by_recompute(rank.plain, FIRST, 4)
    known = FIRST + expected[:3]
    result = rank.step([(3, 0, 12)], new={3: known}, blocks={3: [2, 4, 6]}, num_prompt_tokens=9)
    assert result.token_ids == expected[3:]


def test_a_row_forgets_whose_it_was(rank: Rank) -> None:
    rank.step([(0, 0, 9)], new={0: FIRST}, blocks={0: [7, 3, 21]}, params=SamplingParams(temperature=0, logprobs=3))
    result = rank.step([(0, 0, 5)], new={0: SECOND}, blocks={0: [5, 3]})
    assert result.token_ids == greedy_by_recompute(rank.plain, SECOND, 1)
    assert result.logprobs == {}


def test_logprobs_are_the_model_s(rank: Rank) -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    result = rank.step([(0, 0, 9)], new={0: FIRST}, blocks={0: [7, 3, 21]}, params=params)
    expected = own_logits(rank.plain, FIRST)[-1].log_softmax(-1)
    top = expected.topk(2)
    (found,) = result.logprobs[0]
    assert found.token_ids == [result.token_ids[0], *top.indices.tolist()]
    assert found.logprobs == pytest.approx([float(top.values[0]), *top.values.tolist()], abs=1e-4)
    assert found.rank == 1


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1, 7, 1]])
def test_prompt_logprobs_come_with_the_chunks(rank: Rank, chunks: list[int]) -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=1)
    found, start = [], 0
    for i, count in enumerate(chunks):
        result = rank.step(
            [(0, start, count), (1, 0, 5)],
            new={0: FIRST, 1: SECOND} if i == 0 else {1: SECOND},
            blocks={0: [7, 3, 21], 1: [9, 10]},
            params=params if i == 0 else GREEDY,
        )
        found += result.prompt_logprobs.get(0, [])
        start += count
    expected = own_logits(rank.plain, FIRST).log_softmax(-1)
    assert [entry.token_ids[0] for entry in found] == FIRST[1:]
    assert [entry.logprobs[0] for entry in found] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(FIRST[1:])], abs=1e-4
    )
    assert result.token_ids[0] == greedy_by_recompute(rank.plain, FIRST, 1)[0]


def test_logits_that_are_not_numbers_spoil_one_request_only(rank: Rank) -> None:
    poison = 99
    rank.served.words.weight.data[poison] = float("nan")
    spoilt = [7, poison, 8, 9, 10, 11, 12, 13]
    result = rank.step([(0, 0, 8), (1, 0, 5)], new={0: spoilt, 1: SECOND}, blocks={0: [7, 3], 1: [5, 6]})
    assert list(result.errors) == [0]
    assert "NaN" in result.errors[0]
    expected = greedy_by_recompute(rank.plain, SECOND, 2)
    assert result.token_ids[1] == expected[0]
    heir = rank.step([(0, 0, 5)], new={0: SECOND}, blocks={0: [7, 3]})  # fewer tokens than its blocks held before
    assert heir.token_ids == expected[:1]
    assert rank.step([(0, 5, 1)]).token_ids == expected[1:]


def test_a_step_that_was_planned_before_a_row_was_spoilt_leaves_nothing_behind(rank: Rank) -> None:
    stale = int(rank.runner._token_rows[0, 9])  # what stands where the token would, had there been one
    for poison in (99, stale):
        rank.served.words.weight.data[poison] = float("nan")
    spoilt = [7, 99, 8, 9, 10, 11, 12, 13, 14]
    blocks = {0: [7, 3, 12], 1: [5, 6]}
    assert list(rank.step([(0, 0, 9), (1, 0, 5)], new={0: spoilt, 1: SECOND}, blocks=blocks).errors) == [0]
    expected = greedy_by_recompute(rank.plain, SECOND, 2)
    result = rank.step([(0, 9, 1), (1, 5, 1)])
    assert (result.token_ids, result.errors) == ([None, expected[1]], {})
    for layer in rank.runner._model._cache.layers:
        assert all(part.isfinite().all() for part in layer.gather(torch.tensor(blocks[0])))


@pytest.fixture
def follower() -> tuple[Rank, list[list[int]]]:
    """A rank that does not sample, and the likeliest tokens by what it computed in each step."""
    rank, seen = Rank(samples=False), []
    compute = rank.runner._model.compute

    def watched(step: StepTables) -> Tensor:
        logits = compute(step)
        seen.append(logits.argmax(-1).tolist())
        return logits

    rank.runner._model.compute = watched
    return rank, seen


def test_a_rank_that_does_not_sample_learns_tokens_from_batches(follower: tuple[Rank, list[list[int]]]) -> None:
    rank, seen = follower
    first, second = greedy_by_recompute(rank.plain, FIRST, 3), greedy_by_recompute(rank.plain, SECOND, 2)
    assert rank.step([(0, 0, 9), (2, 0, 5)], new={0: FIRST, 2: SECOND}, blocks={0: [7, 3, 21], 2: [4, 30]}) is None
    told = {"sampled_rows": [2, 0], "sampled_token_ids": [second[0], first[0]]}
    assert rank.step([(0, 9, 1)], **told) is None
    # Row 2 has got another sequence: its last token is of no use any more.
    told = {"sampled_rows": [0, 2], "sampled_token_ids": [first[1], 17]}
    rank.step([(0, 10, 1), (2, 0, 5)], new={2: SECOND}, blocks={2: [4, 30]}, **told)
    rank.step([(2, 5, 1)], sampled_rows=[2], sampled_token_ids=[second[0]])
    assert seen == [[first[0], second[0]], [first[1]], [first[2], second[0]], [second[1]]]


def test_a_rank_that_does_not_sample_is_told_of_spoiled_rows(follower: tuple[Rank, list[list[int]]]) -> None:
    rank, seen = follower
    rank.served.words.weight.data[99] = float("nan")
    rank.step([(0, 0, 8)], new={0: [7, 99, 8, 9, 10, 11, 12, 13]}, blocks={0: [7, 3]})
    rank.step([(0, 0, 5)], new={0: SECOND}, blocks={0: [7, 3]}, spoiled_rows=[0])
    assert seen[1:] == [greedy_by_recompute(rank.plain, SECOND, 1)]


def test_blocks_of_groups_that_a_rank_has_no_layer_of_are_passed_over(rank: Rank) -> None:
    rank.runner._block_tables._places = [None, 0]
    batch = Batch(
        rows=[0], num_computed=[0], num_tokens=[5], new_rows=[NewRow(0, SECOND, 5, GREEDY, [])],
        table_updates=[TableUpdate(0, 0, 0, [1, 1]), TableUpdate(0, 1, 0, [8, 9])],
    )  # fmt: skip
    assert rank.runner.execute(batch).token_ids == greedy_by_recompute(rank.plain, SECOND, 1)
    assert rank.runner._block_tables.tables[0][0, :2].tolist() == [8, 9]


def test_the_last_token_may_fill_the_row() -> None:
    rank = Rank(max_model_len=9)
    expected = greedy_by_recompute(rank.plain, FIRST[:8], 2)
    assert rank.step([(0, 0, 8)], new={0: FIRST[:8]}, blocks={0: [7, 3, 21]}).token_ids == expected[:1]
    assert rank.step([(0, 8, 1)]).token_ids == expected[1:]


def test_right_proposals_bring_all_their_tokens_in_one_step(rank: Rank) -> None:
    first, second = greedy_by_recompute(rank.plain, FIRST, 6), greedy_by_recompute(rank.plain, SECOND, 3)
    rank.step([(0, 0, 9), (2, 0, 5)], new={0: FIRST, 2: SECOND}, blocks={0: [7, 3, 21, 9], 2: [4, 30, 1]})
    result = rank.step([(2, 5, 1), (0, 9, 4)], proposed={1: first[1:4]})
    assert result.token_ids == [second[1], first[4]]
    assert result.num_accepted == {1: 3}
    result = rank.step([(0, 13, 1), (2, 6, 1)])
    assert result.token_ids == [first[5], second[2]]


@pytest.mark.parametrize("right", [0, 1, 2])
def test_a_wrong_proposal_leaves_nothing_behind(rank: Rank, right: int) -> None:
    expected = greedy_by_recompute(rank.plain, FIRST, 8)
    rank.step([(1, 0, 9)], new={1: FIRST}, blocks={1: [7, 3, 21, 9, 2]})
    wrong = [(token + 1) % 128 for token in expected[1 + right : 4]]
    result = rank.step([(1, 9, 4)], proposed={0: expected[1 : 1 + right] + wrong})
    assert result.num_accepted == ({0: right} if right else {})
    tokens = expected[: 1 + right] + result.token_ids
    while len(tokens) < 8:
        tokens += rank.step([(1, 8 + len(tokens), 1)]).token_ids
    assert tokens == expected


def test_log_probabilities_of_proposals_are_those_of_single_tokens(rank: Rank) -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    tokens = greedy_by_recompute(rank.plain, FIRST, 4)
    rank.step([(0, 0, 9), (2, 0, 5)], new={0: FIRST, 2: SECOND}, blocks={0: [7, 3, 21, 9], 2: [4, 30]}, params=params)
    result = rank.step([(2, 5, 1), (0, 9, 3)], proposed={1: tokens[1:3]})
    assert {place: len(found) for place, found in result.logprobs.items()} == {0: 1, 1: 3}
    expected = own_logits(rank.plain, FIRST + tokens).log_softmax(-1)[9:12]
    for entry, scores in zip(result.logprobs[1], expected, strict=True):
        assert entry.logprobs == pytest.approx([float(scores.max()), *scores.topk(2).values.tolist()], abs=1e-4)


def test_prompt_logprobs_come_beside_proposals(rank: Rank) -> None:
    tokens = greedy_by_recompute(rank.plain, FIRST, 3)
    rank.step([(0, 0, 9)], new={0: FIRST}, blocks={0: [7, 3, 21]})
    scored = SamplingParams(temperature=0, prompt_logprobs=0)
    result = rank.step(
        [(0, 9, 3), (1, 0, 5)], new={1: SECOND}, blocks={1: [9, 10]}, params=scored, proposed={0: tokens[1:3]}
    )
    assert result.num_accepted == {0: 2}
    expected = own_logits(rank.plain, SECOND).log_softmax(-1)
    assert [entry.logprobs[0] for entry in result.prompt_logprobs[1]] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(SECOND[1:])], abs=1e-4
    )


def test_a_proposal_whose_logits_are_not_numbers_spoils_nothing(rank: Rank) -> None:
    """Its keys lie in a block with others' that see it behind a mask, and zero times not-a-number is not zero."""
    rank.served.words.weight.data[99] = float("nan")
    expected = greedy_by_recompute(rank.plain, FIRST[:3], 3)
    rank.step([(0, 0, 3)], new={0: FIRST[:3]}, blocks={0: [7, 3]})
    result = rank.step([(0, 3, 4), (1, 0, 5)], new={1: SECOND}, blocks={1: [5, 6]}, proposed={0: [expected[1], 99, 5]})
    accepted = result.num_accepted.get(0, 0)
    assert result.token_ids == [None, *greedy_by_recompute(rank.plain, SECOND, 1)]
    assert list(result.errors) == [0]
    for layer in rank.runner._model._cache.layers:
        assert layer.keys_NKD.isfinite().all()
        assert layer.values_NKV.isfinite().all()
    tokens = expected[: 1 + accepted]
    while len(tokens) < 3:
        tokens += rank.step([(0, 2 + len(tokens), 1)]).token_ids
    assert tokens == expected


def test_a_rank_that_does_not_sample_learns_which_proposals_came_true(
    follower: tuple[Rank, list[list[int]]],
) -> None:
    rank, seen = follower
    expected = greedy_by_recompute(rank.plain, FIRST, 5)
    rank.step([(0, 0, 9)], new={0: FIRST}, blocks={0: [7, 3, 21, 9]})
    told = {"sampled_rows": [0], "sampled_token_ids": expected[:1]}
    rank.step([(0, 9, 4)], proposed={0: [*expected[1:3], 5]}, **told)
    told = {"sampled_rows": [0, 0, 0], "sampled_token_ids": expected[1:4]}
    rank.step([(0, 12, 1)], **told)
    assert seen[1][:3] == expected[1:4]
    assert seen[2] == expected[4:]
