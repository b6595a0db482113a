"""Tokens chosen for all rows at once are those that torch's operators choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels.triton import sample as launcher
from shardwright.sampling_params import SamplingParams
from shardwright.worker.candidates import likeliest
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_noise import gumbel, sequence_keys, split_keys
from shardwright.worker.sampling_state import SamplingState

CPU = torch.device("cpu")

parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 12]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 1000),
    logit_bias=st.sampled_from([None, {3: 2.0, 0: -5.0}]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
)


def state_of(rows: list[SamplingParams], vocab: int) -> SamplingState:
    state = SamplingState(len(rows), vocab, CPU)
    for row, params in enumerate(rows):
        prompt = np.array([1, 2, 3]) % vocab
        state.set_row(row, params, prompt_token_ids=prompt, output_token_ids=prompt[:1], stop_token_ids=[])
    return state


def is_close_call(scores: torch.Tensor, one: int, other: int, key: torch.Tensor) -> bool:
    """Whether two tokens were as good as equal, noise and temperature counted in."""
    ids = torch.tensor([[one, other]], dtype=torch.int32)
    noisy = scores[[one, other]] + gumbel(key, ids)[0]
    return bool((noisy[0] - noisy[1]).abs() < 1e-4)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(parameters, min_size=1, max_size=4),
    vocab=st.integers(4, 150),
    spread=st.sampled_from([0.1, 2.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_candidates=st.sampled_from([4, 16, 512]),
    seed=st.integers(0, 1000),
)
def test_tokens_are_those_of_torch(
    rows: list[SamplingParams], vocab: int, spread: float, dtype: torch.dtype, num_candidates: int, seed: int
) -> None:
    """Ties are many in bfloat16, and few candidates mean that filters reach beyond them."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(len(rows), vocab + 3, generator=generator)).to(dtype)[:, :vocab]
    state, places = state_of(rows, vocab), np.arange(len(rows))
    expected = Sampler()(logits, state, places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "CANDIDATES", num_candidates)
        patch.setattr(launcher, "NUMBERS", 16)
        patch.setattr(launcher, "PER_SPLIT", 32)
        before = logits.clone()
        actual = Sampler(has_kernels=True)(logits, state, places)
        assert torch.equal(before, logits)
    assert not actual.is_nan.any()
    for row in np.flatnonzero(actual.token_ids != expected.token_ids).tolist():
        params = rows[row]
        assert params.temperature > 0
        assert params.logit_bias is None
        assert params.repetition_penalty == 1
        key = split_keys(sequence_keys(state.seed[[row]], state.num_tokens[[row]]), CPU)
        scores = logits[row].float() / params.temperature
        assert is_close_call(scores, int(actual.token_ids[row]), int(expected.token_ids[row]), key)


def test_a_row_of_a_large_vocabulary_is_read_by_several_programs() -> None:
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    rows = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.9, top_k=100)]
    state = state_of(rows, 20_000)
    expected = Sampler()(logits, state, np.arange(3))
    assert Sampler(has_kernels=True)(logits, state, np.arange(3)).token_ids.tolist() == expected.token_ids.tolist()


def test_filters_that_reach_beyond_the_candidates_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "CANDIDATES", 8)
    logits = torch.arange(40.0).flip(0).repeat(5, 1)
    logits[3, 7:12] = logits[3, 7]  # equal ones at the border, of which the first is within
    top_k = torch.tensor([8, 7, 40, 8, 9], dtype=torch.int32)
    ones = torch.ones(5)
    top_p = torch.tensor([1, 1, 0.9, 1, 0.1])  # of what the ninth has a share in too
    keys = torch.zeros(5, 2, dtype=torch.int32)
    chosen = launcher.sample(logits, ones, top_k, top_p, ones * 0, keys, is_filtered=True)
    assert chosen[:, 1].tolist() == [launcher.IS_OPEN, 0, 0, launcher.IS_OPEN, launcher.IS_OPEN]
    assert likeliest(logits[1:2], 7)[1].tolist()[0] == list(range(7))
    assert int(chosen[1, 0]) < 7


@pytest.mark.parametrize("place", [0, 37, 99])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 3}])
def test_rows_without_numbers_are_named(place: int, params: dict[str, float]) -> None:
    logits = torch.randn(3, 100)
    logits[1, place] = float("nan")
    chosen = Sampler(has_kernels=True)(logits, state_of([SamplingParams(**params)] * 3, 100), np.arange(3))
    assert chosen.is_nan.tolist() == [False, True, False]
    assert 0 <= chosen.token_ids.min() <= chosen.token_ids.max() < 100


def test_impossible_tokens_are_not_chosen() -> None:
    logits = torch.full((3, 50), float("-inf"))
    logits[:, [7, 31]] = torch.tensor([1.0, 2.0])
    rows = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=1, top_k=5)]
    for seed in range(8):
        rows = [SamplingParams(temperature=params.temperature, top_k=params.top_k, seed=seed) for params in rows]
        chosen = Sampler(has_kernels=True)(logits, state_of(rows, 50), np.arange(3))
        assert chosen.token_ids[0] == 31
        assert set(chosen.token_ids.tolist()) <= {7, 31}


def test_equal_logits_give_the_lowest_id() -> None:
    logits = torch.zeros(2, 9000)
    logits[0, [40, 8500]] = 1.0
    chosen = Sampler(has_kernels=True)(logits, state_of([SamplingParams(temperature=0)] * 2, 9000), np.arange(2))
    assert chosen.token_ids.tolist() == [40, 0]


def test_no_rows_are_no_tokens() -> None:
    chosen = Sampler(has_kernels=True)(torch.zeros(0, 9), state_of([], 9), np.arange(0))
    assert len(chosen.token_ids) == 0


def test_noise_is_that_of_the_host() -> None:
    """Among tokens of one logit the one with most noise is chosen."""
    seeds = np.arange(6)
    keys = split_keys(sequence_keys(seeds, seeds), CPU)
    ones = torch.ones(6)
    logits = torch.zeros(6, 3000)
    chosen = launcher.sample(logits, ones, ones.int(), ones, ones * 0, keys, is_filtered=False)
    noise = gumbel(keys, torch.arange(3000, dtype=torch.int32)[None])
    most = noise.amax(-1)
    torch.testing.assert_close(noise.gather(1, chosen[:, :1].long())[:, 0], most, atol=1e-5, rtol=0)


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, and of whatever kinds."""
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.5),
        SamplingParams(top_k=4),
    ]
    state, logits, num_waits = state_of(2 * rows, 200), torch.randn(8, 200), 0
    cpu = torch.Tensor.cpu

    def wait(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_waits
        num_waits += 1
        return cpu(tensor)

    def refuse(*_: object) -> None:
        pytest.fail("a number of the device was looked at")

    monkeypatch.setattr(torch.Tensor, "cpu", wait)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    Sampler(has_kernels=True)(logits, state, np.arange(8))
    assert num_waits == 1
