"""Before serving: does the served model give the logits of the model as its author wrote it?

Two short random sequences run through the module's own plain forward pass, one by one, and through ours, together in
a few steps (parts of the prompts, or whole ones, then decodes, together and alone). What the module assumes
silently, such as positions counted by itself, a mask of its own, layers that mix tokens of a batch, or a cache that is
not what the plain pass computes, shows here instead of in a user's text.

Code of which nothing is known beforehand is compared in a long sequence too, since it may do something else there:
frequencies that change with the length of the prompt, experts that take so many tokens and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.adapt.logits import own_logits
from shardwright.adapt.sample import Sample
from shardwright.adapt.special_ids import ordinary_ids
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.worker.step import Ints, StepModel, StepTables

logger = logging.getLogger(__name__)

LENGTHS = (9, 6)
STEPS = ((5, 4), (7, 5), (8, 6), LENGTHS)
"""Up to where the sequences are computed, step by step: parts of prompts, one beside a single token, a token of each,
and a token alone, which code may treat in a way of its own."""

WHOLE_STEPS = ((7, 5), (8, 6), LENGTHS)
"""For models that take prompts whole."""

MOST_SPECIAL_IDS = 8
"""So many ids that the code seems to treat differently are tried; any more are taken to be treated so."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Root mean square of the differences between logits, against the logits' standard deviation. Half-precision types
differ by the order of rounding alone (0.05 was seen in bfloat16 over 30 layers); a wrong position or mask shows as 1 or
so."""


@torch.inference_mode()
def plain_logits(module: nn.Module, *, vocab_size: int) -> Tensor:
    """Logits of the check's sequences, one after another, by the module's own forward pass: [sum(LENGTHS), vocab].

    Raises: UnsupportedModelError if it fails.
    """
    device = next(module.parameters()).device
    sequences = [torch.from_numpy(tokens)[None].to(device) for tokens in _sequences(vocab_size)]
    try:
        logits = torch.cat([own_logits(module, tokens).float() for tokens in sequences])
        again = own_logits(module, sequences[0]).float()
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"its forward pass fails: {described(exc)}") from exc
    if 0 < logits.shape[1] < vocab_size:  # a pipeline stage before the last has none
        raise UnsupportedModelError(
            f"its forward returns {logits.shape[1]:,} numbers for a token, but its config has a vocabulary of "
            f"{vocab_size:,}: are these the logits?"
        )
    if logits.numel() and bool(logits.isnan().all()):
        raise UnsupportedModelError("the logits of its own forward pass are not numbers (NaN)")
    if logits.numel() and not bool(
        (again - logits[: LENGTHS[0]]).abs().max() <= TOLERANCE[torch.float32] * logits.std()
    ):
        logger.warning("the model's code gives other logits each time for the same tokens: is dropout left on?")
    return logits


@torch.inference_mode()
def check_logits(model: StepModel, expected: Tensor, *, vocab_size: int, block_size: int, dtype: torch.dtype) -> float:
    """Compare a model, without a cache yet, with the module's own logits.

    Args:
        model: to check; it gets a small cache, to be replaced afterwards.
        expected: from `plain_logits`.
        vocab_size, block_size: of the engine.
        dtype: of the model's weights.

    Returns: root mean square of the differences between logits, relative to the logits' standard deviation.
    Raises: UnsupportedModelError if it is over the tolerance of the dtype, or a step fails.
    """
    try:
        actual = stepwise_logits(model, vocab_size=vocab_size, block_size=block_size)
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"its code fails in a step of two requests: {described(exc)}") from exc
    difference = compare_logits(expected[1:], actual, dtype=dtype)
    logger.debug("%s: logits differ by %.2g of their spread from the module's own", model.rung, difference)
    return difference


def compare_logits(expected: Tensor, actual: Tensor, *, dtype: torch.dtype) -> float:
    """How much logits differ from the module's own, as of `check_logits`. Raises UnsupportedModelError if too much."""
    if not expected.numel():  # of a pipeline stage before the last
        return 0.0
    difference = float((expected - actual).square().mean().sqrt() / expected.std().clamp_min(1e-6))
    if not difference <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"logits differ from those of its own forward pass by {difference:.2g} of their spread, in {dtype}"
        )
    return difference


@torch.inference_mode()
def stepwise_logits(model: StepModel, *, vocab_size: int, block_size: int) -> Tensor:
    """What a model gives for the check's sequences; its cache is to be allocated anew afterwards."""
    return _stepwise_logits(model, _sequences(vocab_size), STEPS if model.takes_chunks else WHOLE_STEPS, block_size)


@torch.inference_mode()
def check_sample(model: StepModel, sample: Sample, *, block_size: int, dtype: torch.dtype) -> None:
    """Compare a model, without a cache yet, with what the module's own forward pass gave in a long sequence.

    The sequence is computed in two parts and a last token, beside its own beginning as another sequence, as short as
    it can be without being the whole: code whose numbers depend on how many tokens it gets gives others here.

    Args:
        model: to check; it gets a small cache, to be replaced afterwards.
        sample: what to compare with.
        block_size: of the engine.
        dtype: of the model's weights.

    Raises: UnsupportedModelError if the logits differ by more than the dtype explains, or a step fails.
    """
    length = len(sample.tokens)
    if length <= sum(LENGTHS):
        return
    part, beginning = length // 2, length // 4
    sequences = [sample.tokens, sample.tokens[:beginning]]
    steps = [(part, beginning // 2), (length - 1, beginning - 1), (length, beginning)]
    places = [sample.places, [place for place in sample.places if place < beginning]]
    if not model.takes_chunks:
        steps = steps[1:]
    where = f"in a sequence of {length:,} tokens"
    try:
        actual = _stepwise_logits(model, sequences, steps, block_size, places=places)
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"its code fails {where}: {described(exc)}") from exc
    expected = sample.logits.float()[[*range(len(places[0])), *range(len(places[1]))]].to(actual.device)
    if not expected.numel():  # of a pipeline stage before the last
        return
    by_place = (expected - actual).square().mean(-1).sqrt() / expected.std().clamp_min(1e-6)
    # Rounding to half precision may send a token to another expert: few places differ by that, and not those of most.
    difference = float(by_place.square().mean().sqrt() if dtype is torch.float32 else by_place.median())
    logger.debug("%s: logits differ by %.2g of their spread from the module's own %s", model.rung, difference, where)
    if not difference <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"logits differ from those of its own forward pass by {difference:.2g} of their spread, in {dtype}, {where}"
        )


@torch.inference_mode()
def treats_alike(
    model: StepModel, module: nn.Module, special_ids: list[int], *, vocab_size: int, block_size: int, dtype: torch.dtype
) -> bool:
    """Whether a model gives the module's own logits in a sequence with ids that its code seems to treat differently.

    Args:
        model: to check; it gets a small cache, to be replaced afterwards.
        module: that it serves.
        special_ids: to try; if they are too many to be tried, the answer is no.
        vocab_size, block_size: of the engine.
        dtype: of the model's weights.
    """
    if len(special_ids) > MOST_SPECIAL_IDS:
        return False
    ordinary = ordinary_ids(vocab_size, special_ids).numpy()
    apart = np.random.default_rng(0).choice(ordinary, 2 * len(special_ids) + LENGTHS[0])
    apart[2 : 2 + 2 * len(special_ids) : 2] = special_ids
    tokens = np.concatenate([apart, special_ids, ordinary[:1], special_ids[::-1], ordinary[:1]])
    expected = own_logits(module, torch.from_numpy(tokens)[None].to(next(module.parameters()).device)).float()
    try:
        actual = _stepwise_logits(model, [tokens], [[len(tokens)]], block_size)
    except Exception:  # of the model's code, which does with these ids what it did not do before
        return False
    difference = (expected[1:] - actual).square().mean().sqrt() / expected.std().clamp_min(1e-6)
    return bool(difference <= TOLERANCE[dtype])


@torch.inference_mode()
def run_largest_step(model: StepModel, *, num_tokens: int, max_model_len: int, block_size: int) -> None:
    """Run `num_tokens` tokens of fresh prompts, so that the device's peak memory can be read off afterwards."""
    lengths = [max_model_len] * (num_tokens // max_model_len) + [num_tokens % max_model_len]
    sequences: list[Ints] = [np.zeros(length, dtype=np.int64) for length in lengths if length]
    _stepwise_logits(model, sequences, [[len(s) for s in sequences]], block_size, last_only=True)


def _sequences(vocab_size: int) -> list[Ints]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length) for length in LENGTHS]


def _stepwise_logits(
    model: StepModel,
    sequences: list[Ints],
    steps: Sequence[Sequence[int]],
    block_size: int,
    *,
    last_only: bool = False,
    places: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Logits of all sequences, one after another, computed together in steps up to the lengths that `steps` gives.

    Those of the very first token are left out: a model must not mind that fewer are wanted than there are tokens.

    Args:
        last_only: of each step, only those of the last token of each sequence.
        places: of each sequence, only those of these tokens, in order.
    """
    num_rows, longest = len(sequences), max(map(len, sequences))
    blocks_per_row = -(-longest // block_size)
    table = np.arange(num_rows * blocks_per_row, 0, -1, dtype=np.int32).reshape(num_rows, blocks_per_row)
    model.allocate(num_rows=num_rows, num_blocks=table.size * len(model.groups), block_size=block_size)
    token_rows = np.zeros((num_rows, longest), dtype=np.int32)
    for row, tokens in enumerate(sequences):
        token_rows[row, : len(tokens)] = tokens
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    starts = np.zeros(num_rows, dtype=np.int64)
    for number, lengths in enumerate(steps):
        ends = np.array(lengths, dtype=np.int64)
        rows = np.flatnonzero(ends > starts)
        counts = (ends - starts)[rows]
        step_ends = np.cumsum(counts)
        wanted = step_ends - 1 if last_only else np.arange(int(number == 0), counts.sum())
        if places is not None:
            wanted = np.concatenate(
                [
                    [
                        place - int(starts[row]) + end - count
                        for place in places[row]
                        if starts[row] <= place < ends[row]
                    ]
                    for row, count, end in zip(rows.tolist(), counts.tolist(), step_ends.tolist(), strict=True)
                ]
            ).astype(np.int64)
        step = StepTables(
            token_rows=token_rows,
            block_tables=[table + group * table.size for group in range(len(model.groups))],  # groups share lanes
            rows=rows,
            num_computed=starts[rows],
            num_tokens=counts,
            logits_rows=wanted,
        )
        logits = model.compute(step).float()
        owners = torch.from_numpy(rows[np.searchsorted(step_ends, wanted, side="right")]).to(logits.device)
        for row in rows.tolist():
            pieces[row].append(logits[owners == row])
        starts = ends
    model.release(list(range(num_rows)))
    return torch.cat([torch.cat(row) for row in pieces])
