import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.worker import sampling_reference as reference

from shardwright.sampling_params import SamplingParams
from shardwright.worker.sampler import Sampler, SamplerOutput, SamplingState, process

VOCAB = 24
CPU = torch.device("cpu")
STOP = [0, 5]


def make_state(
    params: Sequence[SamplingParams],
    *,
    vocab: int = VOCAB,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
) -> SamplingState:
    """State with a row for each of the parameters."""
    state = SamplingState(len(params), vocab, CPU)
    for row, row_params in enumerate(params):
        state.set_row(
            row,
            row_params,
            prompt_token_ids=np.array(prompts[row] if prompts else [1, 2, 3]),
            output_token_ids=np.array(outputs[row] if outputs else [], np.int64),
            stop_token_ids=STOP,
        )
    return state


def sample(logits: torch.Tensor, state: SamplingState, sampler: Sampler | None = None) -> SamplerOutput:
    return (sampler or Sampler(0))(logits, state, np.arange(len(logits)))


def chi_square_limit(degrees: int) -> float:
    """Exceeded by chance once in ten thousand times (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 3.72 * math.sqrt(part)) ** 3


def assert_distributed(tokens: np.ndarray, probabilities: torch.Tensor) -> None:
    """Pool rare tokens, then Pearson's test."""
    counts = torch.bincount(torch.from_numpy(tokens), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    common = expected >= 10
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    if wanted[-1] == 0:
        observed.pop(), wanted.pop()
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    assert statistic < chi_square_limit(len(wanted) - 1)


LOGIT = st.integers(-20, 20).map(lambda quarters: quarters / 4)  # coarse, so that ties are common
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, -1, 1, 3, 10, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.7]),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.9, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.25]), max_size=4),
)
ROW = st.tuples(PARAMS, TOKENS.filter(bool), TOKENS, st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB))


@settings(deadline=None, max_examples=200)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_every_row_of_a_batch_gets_what_the_plain_reference_chooses(rows):
    params, prompts, outputs, logits = zip(*rows, strict=True)
    state = make_state(params, prompts=prompts, outputs=outputs)
    given_logits = torch.tensor(logits)
    kept = given_logits.clone()
    wanted = []
    for row_params, prompt, output, row_logits in rows:
        scores = reference.process(row_logits, row_params, prompt=prompt, output=output, stop_token_ids=STOP)
        token_id, closest = reference.choose(scores, row_params, num_tokens=len(prompt) + len(output))
        assume(closest > 1e-4)
        wanted.append(token_id)
    assert sample(given_logits, state).token_ids.tolist() == wanted
    assert torch.equal(given_logits, kept)


@settings(deadline=None, max_examples=100)
@given(st.lists(ROW, min_size=1, max_size=4), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
def test_logits_are_processed_as_by_the_reference_while_tokens_are_appended(rows, appended):
    params, prompts, outputs, logits = zip(*rows, strict=True)
    state = make_state(params, prompts=prompts, outputs=outputs)
    every_row = np.arange(len(rows))
    for token_id in appended:
        state.append(every_row, np.array([(token_id + row) % VOCAB for row in every_row]))
    scores = torch.tensor(logits)
    process(scores, state, every_row)
    for row, (row_params, prompt, output, row_logits) in enumerate(rows):
        known = [*output, *((token_id + row) % VOCAB for token_id in appended)]
        wanted = reference.process(row_logits, row_params, prompt=prompt, output=known, stop_token_ids=STOP)
        torch.testing.assert_close(scores[row], torch.tensor(wanted))


def test_a_row_that_is_set_anew_forgets_the_sequence_before():
    heavy = SamplingParams(
        temperature=0, repetition_penalty=2.0, frequency_penalty=2.0, logit_bias={7: 50}, min_tokens=3, logprobs=2
    )
    state = make_state([heavy], outputs=[[4, 4, 4]])
    state.append(np.array([0]), np.array([6]))
    logits = torch.arange(VOCAB).float()[None]
    state.set_row(
        0,
        SamplingParams(temperature=0, presence_penalty=0.5),
        prompt_token_ids=[1],
        output_token_ids=[23],
        stop_token_ids=STOP,
    )
    scores = logits.clone()
    process(scores, state, np.array([0]))
    assert (scores - logits).nonzero().tolist() == [[0, 23]]
    assert sample(logits, state).logprobs == {}


def test_penalties_hold_after_more_distinct_tokens_than_the_first_tables_hold():
    vocab = 2000
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5, max_tokens=None)
    state = make_state([params] * 2, vocab=vocab, prompts=[[9], list(range(300))])
    for token_id in range(700):
        state.append(np.array([0]), np.array([token_id]))
    scores = torch.ones(2, vocab)
    process(scores, state, np.arange(2))
    wanted = torch.ones(2, vocab)
    wanted[0, :700] = 1 / 1.5 - 0.5
    wanted[1, :300] = 1 / 1.5
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_id_of_equal_logits(dtype):
    logits = torch.zeros(2, VOCAB, dtype=dtype)
    logits[0, [7, 11, 20]] = 3.0
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={9: 1.0, 4: 1.0})]
    assert sample(logits, make_state(params)).token_ids.tolist() == [7, 4]
    assert sample(logits, make_state(params[:1] * 2)).token_ids.tolist() == [7, 0]


def test_top_k_of_one_is_greedy_even_among_ties():
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(1)).mul(2).round()
    params = [SamplingParams(temperature=1.5, top_k=1, seed=row) for row in range(16)]
    tokens = sample(logits, make_state(params, vocab=500)).token_ids
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()


def test_a_tiny_temperature_is_nearly_greedy_and_never_overflows():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)) * 1000
    params = [SamplingParams(temperature=temperature, seed=1) for temperature in (1e-300, 1e-30, 1e-9, 1e-3)]
    assert sample(logits, make_state(params)).token_ids.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(seed=3),
        SamplingParams(top_k=4, seed=3),
        SamplingParams(top_p=0.5, min_p=0.1, seed=3),
        SamplingParams(temperature=0, repetition_penalty=1.2),
    ],
)
def test_a_logit_that_is_not_a_number_is_chosen_so_that_the_runner_sees_it(params):
    logits = torch.zeros(1, 300)
    logits[0, 123] = torch.nan
    assert sample(logits, make_state([params], vocab=300)).token_ids.tolist() == [123]


def test_stop_tokens_are_suppressed_until_min_tokens_exist():
    params = SamplingParams(temperature=0, min_tokens=2)
    state = make_state([params, SamplingParams(temperature=0)])
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 8] = 9.0, 4.0
    chosen = []
    for _ in range(4):
        tokens = sample(logits, state).token_ids
        state.append(np.arange(2), tokens)
        chosen.append(tokens.tolist())
    assert chosen == [[8, 5], [8, 5], [5, 5], [5, 5]]


def test_end_tokens_beyond_the_vocabulary_are_ignored():
    state = SamplingState(1, VOCAB, CPU)
    params = SamplingParams(temperature=0, min_tokens=2)
    state.set_row(0, params, prompt_token_ids=[1], output_token_ids=[], stop_token_ids=[VOCAB + 3])
    assert sample(torch.arange(VOCAB).float()[None], state).token_ids.tolist() == [VOCAB - 1]


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("source", ["engine", "seeds", "positions"])
def test_tokens_have_the_distribution_of_the_filtered_softmax(filters, source):
    num_rows, num_steps = 500, 40
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    params = SamplingParams(**filters)
    scores = (logits / params.temperature).tolist()
    keep, closest = reference.kept(scores, params)
    assert closest > 1e-3
    probabilities = torch.zeros(VOCAB).double()
    probabilities[keep] = torch.tensor([scores[token_id] for token_id in keep]).double().softmax(dim=-1)

    seeds = {"engine": [None] * num_rows, "seeds": list(range(num_rows)), "positions": [11] * num_rows}[source]
    prompts = [[1] * (1 + (row * num_steps if source == "positions" else 0)) for row in range(num_rows)]
    state = make_state([SamplingParams(**filters, seed=seed) for seed in seeds], prompts=prompts)
    sampler, rows, drawn = Sampler(4), np.arange(num_rows), []
    for _ in range(num_steps):
        tokens = sampler(logits.expand(num_rows, VOCAB), state, rows).token_ids
        state.append(rows, tokens)
        drawn.append(tokens)
    assert_distributed(np.concatenate(drawn), probabilities)


def step_logits(history: Sequence[int], vocab: int = 300) -> torch.Tensor:
    """A small language model: logits that depend on the last two tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(history[-2:])))
    return torch.randn(vocab, generator=generator) * 2


def generate(params: SamplingParams, prompt: list[int], num: int, *, output: Sequence[int] = ()) -> list[int]:
    """Tokens of a sequence that runs alone, or resumes with some output."""
    state, tokens = make_state([params], vocab=300, prompts=[prompt], outputs=[output]), list(output)
    while len(tokens) < num:
        chosen = sample(step_logits([*prompt, *tokens])[None], state).token_ids
        state.append(np.array([0]), chosen)
        tokens.append(int(chosen[0]))
    return tokens


SEEDED = {
    "plain": SamplingParams(seed=8),
    "top_p": SamplingParams(seed=8, top_p=0.9, temperature=1.3),
    "penalties": SamplingParams(seed=8, top_k=20, repetition_penalty=1.4, frequency_penalty=0.3),
}


@pytest.mark.parametrize("params", SEEDED.values(), ids=SEEDED)
@pytest.mark.parametrize("resumed_after", [0, 1, 7])
def test_a_seeded_sequence_is_the_same_after_preemption(params, resumed_after):
    tokens = generate(params, [3, 4], 12)
    assert generate(params, [3, 4], 12, output=tokens[:resumed_after]) == tokens
    assert len(set(tokens)) > 4


@pytest.mark.parametrize("params", SEEDED.values(), ids=SEEDED)
def test_a_seeded_sequence_is_the_same_in_any_row_beside_any_others(params):
    alone = generate(params, [3, 4], 10)
    others = [SamplingParams(), SamplingParams(seed=9), SamplingParams(temperature=0), SamplingParams(top_p=0.99)]
    state = make_state([*others, params], vocab=300, prompts=[[1]] * 4 + [[3, 4]])
    sampler, tokens = Sampler(77), []
    for step in range(10):
        rows = np.array([4, 0, 2, 1, 3])[: 1 + step % 5]
        logits = torch.stack([step_logits([3, 4, *tokens]), *(step_logits([step, row]) for row in rows[1:])])
        chosen = sampler(logits, state, rows).token_ids
        state.append(rows, chosen)
        tokens.append(int(chosen[0]))
    assert tokens == alone


def test_other_seeds_give_other_tokens_and_the_engine_seed_repeats_a_run():
    def run(sampler: Sampler, seed: int | None) -> list[int]:
        state = make_state([SamplingParams(seed=seed)] * 8, vocab=300)
        return sample(torch.zeros(8, 300), state, sampler).token_ids.tolist()

    assert len(set(run(Sampler(1), 5))) == 1
    assert run(Sampler(1), 5) == run(Sampler(2), 5) != run(Sampler(1), 6)
    assert len(set(run(Sampler(1), None))) > 1
    assert run(Sampler(1), None) == run(Sampler(1), None) != run(Sampler(2), None)
    sampler = Sampler(-3)
    assert run(sampler, None) != run(sampler, None)


def test_logprobs_are_of_the_raw_logits_and_only_for_rows_that_ask():
    params = [
        SamplingParams(temperature=0.2, top_k=1, logit_bias={6: 100}, logprobs=2),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=0),
    ]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    result = sample(logits.bfloat16(), make_state(params))
    wanted = logits.bfloat16().float().log_softmax(dim=-1)
    best = wanted[0].argsort(descending=True)
    assert list(result.logprobs) == [0, 2]
    first, third = result.logprobs.values()
    assert result.token_ids[0] == 6
    assert first.token_ids == [6, *best[:2].tolist()]
    assert first.logprobs == pytest.approx([wanted[0, 6].item(), *wanted[0, best[:2]].tolist()], abs=1e-5)
    assert first.rank == 1 + best.tolist().index(6)
    assert third.token_ids == [int(wanted[2].argmax())]
    assert third.rank == 1
