import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worker import sampling_reference as reference

from shardwright.worker.sampling_noise import gumbel, sequence_keys, split_keys, splitmix64

UINT64 = st.integers(0, 2**64 - 1)
CPU = torch.device("cpu")


@given(st.lists(UINT64, min_size=1, max_size=8))
def test_splitmix64_of_arrays_is_that_of_numbers(values):
    mixed = splitmix64(np.array(values, np.uint64))
    assert mixed.tolist() == [reference.mix(value) for value in values]


def test_splitmix64_gives_the_published_sequence():
    # The first outputs of the generator with state 0, whose state grows by the same constant.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8), st.integers(0, 2**40))
def test_keys_depend_on_seed_and_position(seeds, num_tokens):
    keys = sequence_keys(np.array(seeds), np.full(len(seeds), num_tokens))
    wanted = [reference.mix((reference.mix(seed % 2**64) + num_tokens) % 2**64) for seed in seeds]
    assert keys.tolist() == wanted


@given(st.lists(UINT64, min_size=1, max_size=4), st.lists(st.integers(0, 2**20), min_size=1, max_size=8))
def test_noise_is_the_documented_hash(keys, token_ids):
    noise = gumbel(split_keys(np.array(keys, np.uint64), CPU), torch.tensor([token_ids], dtype=torch.int32))
    wanted = [[reference.noise(key, token_id) for token_id in token_ids] for key in keys]
    torch.testing.assert_close(noise, torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_noise_has_the_gumbel_distribution():
    keys = split_keys(sequence_keys(np.arange(64), np.full(64, 5)), CPU)
    noise = gumbel(keys, torch.arange(50_000, dtype=torch.int32)[None]).flatten().double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772157) < 0.003
    assert abs(noise.var() - math.pi**2 / 6) < 0.006
    for value in (-1.5, 0.0, 1.0, 3.0, 8.0):
        share = (noise < value).double().mean()
        expected = math.exp(-math.exp(-value))
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(noise))


def test_noise_of_neighbouring_seeds_positions_and_tokens_is_uncorrelated():
    token_ids = torch.arange(100_000, dtype=torch.int32)[None]
    seeds, positions = np.array([1, 2, 1, 7]), np.array([9, 9, 10, 9])
    noise = gumbel(split_keys(sequence_keys(seeds, positions), CPU), token_ids).double()
    rows = torch.cat([noise, noise[:1].roll(1, dims=-1)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(token_ids.shape[1])
