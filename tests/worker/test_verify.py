"""Verification changes when tokens come, never which: tokens are those that the sampler alone would have chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.worker import sampling_reference as reference
from tests.worker.test_sampler import PARAMS, VOCAB, assert_distributed, make_state

from shardwright.sampling_params import SamplingParams
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.verify import Verified, verify

Model = Callable[[Sequence[int]], torch.Tensor]
"""Logits [vocab] after some tokens."""


def language(seed: int, *, vocab: int = VOCAB, spread: float = 2.0) -> Model:
    """A small model whose logits depend on the last two tokens."""

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + hash(tuple(tokens[-2:])) % 997)
        return torch.randn(vocab, generator=generator) * spread

    return logits


class Sequences:
    """Sequences of one model, which a worker would have in its rows."""

    def __init__(self, model: Model, params: Sequence[SamplingParams], *, same_prompt: bool = False) -> None:
        self.model = model
        self.tokens = [[1] if same_prompt else [1 + row, 2 + row, 3 + row] for row in range(len(params))]
        self.state: SamplingState = make_state(params, prompts=self.tokens)
        self.sampler = Sampler(0)

    def step(self, proposals: Sequence[Sequence[int]]) -> Verified:
        logits = [
            self.model(tokens + list(own[:count]))
            for tokens, own in zip(self.tokens, proposals, strict=True)
            for count in range(len(own) + 1)
        ]
        return verify(
            torch.stack(logits),
            np.arange(len(self.tokens)),
            {place: own for place, own in enumerate(proposals) if own},
            sampler=self.sampler,
            state=self.state,
            take=self.take,
        )

    def take(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        self.state.append(rows, token_ids)
        for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
            self.tokens[row].append(token)

    def draft(self, model: Model, num: int) -> list[list[int]]:
        """Proposals of another model for each sequence, by the noise that the sampler will use."""
        rows = np.arange(len(self.tokens))
        proposals: list[list[int]] = [[] for _ in rows]
        for ahead in range(num):
            logits = torch.stack([model(self.tokens[row] + proposals[row]) for row in rows])
            for row, token in enumerate(self.sampler.choose(logits, self.state, rows, ahead=ahead).token_ids.tolist()):
                proposals[row].append(token)
        return proposals


def alone(model: Model, params: Sequence[SamplingParams], num: int) -> list[list[int]]:
    """Tokens without proposals."""
    sequences = Sequences(model, params)
    for _ in range(num):
        sequences.step([[]] * len(params))
    return sequences.tokens


@settings(deadline=None, max_examples=25)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=4),
    model_seed=st.integers(0, 50),
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    right=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_seeded_and_greedy_sequences_get_the_tokens_that_they_get_without_proposals(
    params: list[SamplingParams], model_seed: int, steps: list[int], right: list[bool]
) -> None:
    model = language(model_seed)
    expected = alone(model, params, 24)
    sequences = Sequences(model, params)
    guesses = iter(right)
    for count in steps:
        before = [len(tokens) for tokens in sequences.tokens]
        proposals = [
            [(token + (not next(guesses, True))) % VOCAB for token in whole[start : start + count]]
            for whole, start in zip(expected, before, strict=True)
        ]
        got = sequences.step(proposals)
        for row, (own, start) in enumerate(zip(proposals, before, strict=True)):
            accepted = got.num_accepted.get(row, 0)
            new = sequences.tokens[row][start:]
            assert new == [*own[:accepted], int(got.token_ids[row])]
            assert len(new) == len(own) + 1 or new[-1] != own[accepted]
    for found, whole in zip(sequences.tokens, expected, strict=True):
        assert found == whole[: len(found)]


FILTERS = {
    "none": {},
    "cold": {"temperature": 0.5},
    "all": {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": -0.4},
}
NUM_SEQUENCES = 5000
SMALL = 6
"""Tokens of the models whose pairs of tokens are counted."""


def narrow(model: Model) -> Model:
    """The model, of whose tokens only the first few are possible."""

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        wide = model(tokens).clone()
        wide[SMALL:] = -torch.inf
        return wide

    return logits


def pairs(params: SamplingParams, propose: Callable[[Sequences], list[list[int]]]) -> np.ndarray:
    """The first two tokens of many sequences that begin alike, as one number each."""
    target = remembered(narrow(language(5)))
    sequences = Sequences(target, [params] * NUM_SEQUENCES, same_prompt=True)
    sequences.step(propose(sequences))
    while short := [row for row, tokens in enumerate(sequences.tokens) if len(tokens) < 3]:
        logits = torch.stack([target(sequences.tokens[row]) for row in short])
        rows = np.array(short)
        sequences.take(rows, sequences.sampler.choose(logits, sequences.state, rows).token_ids)
    return np.array([tokens[1] * SMALL + tokens[2] for tokens in sequences.tokens])


def remembered(model: Model) -> Model:
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        key = tuple(tokens[-2:])
        if key not in known:
            known[key] = model(tokens)
        return known[key]

    return logits


def exact(params: SamplingParams) -> torch.Tensor:
    """Probabilities of all pairs, by one step of the sampler's own processing after the other."""
    model, probabilities = narrow(language(5)), torch.zeros(SMALL, SMALL).double()

    def distribution(output: list[int]) -> torch.Tensor:
        raw = [float(x) for x in model([1, *output])[:SMALL]]
        scores = reference.process(raw, params, prompt=[1], output=output, stop_token_ids=[])
        scores = [score / params.temperature for score in scores]
        keep, closest = reference.kept(scores, params)
        assert closest > 1e-4
        result = torch.zeros(SMALL).double()
        result[keep] = torch.tensor([scores[token] for token in keep]).double().softmax(-1)
        return result

    first = distribution([])
    for token in range(SMALL):
        if first[token]:
            probabilities[token] = first[token] * distribution([token])
    return probabilities.flatten()


PROPOSERS: dict[str, Callable[[Sequences], list[list[int]]]] = {
    "given": lambda sequences: [[2, 3]] * len(sequences.tokens),
    "draft": lambda sequences: sequences.draft(remembered(narrow(language(6))), 2),
    "itself": lambda sequences: sequences.draft(sequences.model, 2),
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("proposer", PROPOSERS.values(), ids=PROPOSERS)
def test_pairs_of_tokens_have_the_model_s_distribution(
    filters: dict[str, float], proposer: Callable[[Sequences], list[list[int]]]
) -> None:
    params = SamplingParams(**filters)  # type: ignore[arg-type]
    assert_distributed(pairs(params, proposer), exact(params))


def test_a_draft_s_own_choices_would_not_have_it() -> None:
    """The test above can fail: this is what taking proposals without verifying them gives."""
    params = SamplingParams()
    drafted = []

    def propose(sequences: Sequences) -> list[list[int]]:
        drafted.extend(sequences.draft(remembered(narrow(language(6))), 2))
        return drafted

    pairs(params, propose)
    with pytest.raises(AssertionError):
        assert_distributed(np.array([a * SMALL + b for a, b in drafted]), exact(params))


def test_a_draft_agrees_as_often_as_the_noise_in_common_promises() -> None:
    """At least (1 - d) / (1 + d) of the time at total variation d, and always with itself."""
    target, other = language(7, spread=1.0), language(8, spread=1.0)
    close: Model = lambda tokens: target(tokens) + other(tokens)  # noqa: E731
    params = [SamplingParams(seed=row) for row in range(4000)]
    for model in (target, close):
        sequences = Sequences(remembered(target), params, same_prompt=True)
        got = sequences.step(sequences.draft(remembered(model), 1))
        distance = float((target([1]).softmax(-1) - model([1]).softmax(-1)).abs().sum() / 2)
        assert len(got.num_accepted) / len(params) >= (1 - distance) / (1 + distance) - 0.02
    assert 0.1 < distance < 0.4
    assert len(got.num_accepted) / len(params) <= 1 - distance + 0.02


def test_log_probabilities_come_for_every_token() -> None:
    model, params = language(3), [SamplingParams(temperature=0, logprobs=1), SamplingParams(temperature=0)]
    expected = alone(model, params, 4)
    sequences = Sequences(model, params)
    got = sequences.step([expected[0][3:6], expected[1][3:5]])
    assert got.num_accepted == {0: 3, 1: 2}
    assert [entry.token_ids[0] for entry in got.logprobs[0]] == expected[0][3:7]
    wanted = [float(model(expected[0][:end]).log_softmax(-1).max()) for end in range(3, 7)]
    assert [entry.logprobs[0] for entry in got.logprobs[0]] == pytest.approx(wanted, abs=1e-5)
    assert list(got.logprobs) == [0]


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_a_sequence_stops_at_logits_that_are_not_numbers(spoiled: int) -> None:
    model, params = language(3), [SamplingParams(temperature=0)] * 2
    expected = alone(model, params, 3)

    def with_nan(tokens: Sequence[int]) -> torch.Tensor:
        logits = model(tokens).clone()
        if list(tokens) == expected[0][: 3 + spoiled]:
            logits[4] = torch.nan
        return logits

    sequences = Sequences(with_nan, params)
    got = sequences.step([expected[0][3:5], expected[1][3:5]])
    assert got.failed == [0]
    assert got.num_accepted == ({0: spoiled, 1: 2} if spoiled else {1: 2})
