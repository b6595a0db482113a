"""From logits to tokens, for all rows of a step at once.

Order: logit bias, penalties, suppressed stop tokens; temperature; top-k, top-p, min-p; one draw. Only rows that need a
stage pay for it: a step of greedy rows is one argmax. Logits that are not numbers (NaN) give tokens without meaning:
these are named, and the rest is the runner's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.attention.arrays import on_device
from shardwright.engine.messages import TokenLogprobs
from shardwright.kernels.greedy import greedy
from shardwright.worker.candidates import draw
from shardwright.worker.logprobs import prompt_logprobs, token_logprobs
from shardwright.worker.penalties import Ints
from shardwright.worker.sampling_noise import UInt64s, sequence_keys, split_keys
from shardwright.worker.sampling_state import SamplingState

__all__ = ["Sampler", "SamplerOutput", "SamplingState", "prompt_logprobs"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token per row of logits."""

    token_ids: npt.NDArray[np.int64]
    is_nan: npt.NDArray[np.bool_]
    """Rows whose logits are not numbers."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token per row of logits."""

    token_ids: npt.NDArray[np.int64]
    is_nan: npt.NDArray[np.bool_]
    """Rows whose logits are not numbers."""
    logprobs: dict[int, TokenLogprobs]
    """By row of logits, for those that asked."""


class Sampler:
    """Chooses tokens by the parameters of their rows.

    Args:
        seed: of the seeds for sequences that bring none; each gets one when it first samples.
        has_kernels: whether Triton's kernels run on the device of the logits, which choose for all rows in one go.
    """

    def __init__(self, seed: int = 0, *, has_kernels: bool = False) -> None:
        self._has_kernels = has_kernels
        self._seeds = np.random.Generator(np.random.PCG64(seed % 2**64))

    @torch.inference_mode()
    def __call__(self, logits: Tensor, state: SamplingState, rows: Ints) -> SamplerOutput:
        """Choose the next token of each row; of `state` only missing seeds are changed.

        Args:
            logits: [n, vocab], any float dtype; left as they are.
            state: on the device of `logits`.
            rows: [n]: the row of `state` that each row of logits belongs to.
        """
        chosen = self.choose(logits, state, rows)
        logprobs = _logprobs(logits, chosen.token_ids, state, rows)
        return SamplerOutput(chosen.token_ids, chosen.is_nan, logprobs)

    def choose(self, logits: Tensor, state: SamplingState, rows: Ints, *, ahead: int = 0) -> Chosen:
        """The tokens alone; arguments as above.

        Args:
            ahead: tokens that are taken to follow those that `state` knows, before the one to choose. The noise is that
                of the position behind them; penalties do not know of them.
        """
        if self._has_kernels:
            return self._choose_at_once(logits, state, rows, ahead)
        if not state.may_change[rows].any():
            return Chosen(*greedy(logits))
        is_changed = (state.temperature[rows] > 0) | state.needs_processing(rows)
        token_ids, is_nan = np.empty(len(rows), np.int64), np.empty(len(rows), np.bool_)
        if len(plain := np.flatnonzero(~is_changed)):
            token_ids[plain], is_nan[plain] = greedy(_take(logits, plain))
        if len(changed := np.flatnonzero(is_changed)):
            token_ids[changed] = self._choose(_take_floats(logits, changed), state, rows[changed], ahead)
            is_nan[changed] = _are_nan(logits, changed, token_ids[changed])
        return Chosen(token_ids, is_nan)

    def _choose_at_once(self, logits: Tensor, state: SamplingState, rows: Ints, ahead: int) -> Chosen:
        """By few launches, after which the device is waited for once; rows with very wide filters are chosen again."""
        from shardwright.kernels.triton.sample import IS_NAN, IS_OPEN, sample

        if state.needs_processing(rows).any():
            logits = logits.to(torch.float32, copy=True)
            process(logits, state, rows)
        filters, temperature = state.filters(rows), state.temperature[rows]
        is_random = temperature > 0
        keys = np.zeros((len(rows), 2), np.int32)
        keys[is_random] = self._noise_keys(state, rows[is_random], ahead).view(np.int32).reshape(-1, 2)
        arrays = [temperature, filters.top_k.astype(np.int32), filters.top_p, filters.min_p, keys]
        is_filtered = is_random & filters.are_narrow(state.vocab_size)
        given = on_device(arrays, logits.device)
        chosen = sample(logits, *given, is_filtered=bool(is_filtered.any())).cpu().numpy()
        token_ids, is_nan = chosen[:, 0].astype(np.int64), chosen[:, 1] & IS_NAN > 0
        if len(wide := np.flatnonzero((chosen[:, 1] & IS_OPEN > 0) & ~is_nan)):
            scores = _take_floats(logits, wide) / torch.from_numpy(temperature[wide, None]).to(logits.device)
            drawn = draw(scores, filters.take(wide), torch.from_numpy(keys[wide]).to(logits.device))
            token_ids[wide] = drawn.cpu().numpy()
        return Chosen(token_ids, is_nan)

    def _choose(self, scores: Tensor, state: SamplingState, rows: Ints, ahead: int) -> Ints:
        """Choose from logits that may be overwritten: [n, vocab], float32."""
        process(scores, state, rows)
        is_random = state.temperature[rows] > 0
        token_ids = np.empty(len(rows), np.int64)
        if len(largest := np.flatnonzero(~is_random)):
            token_ids[largest], _ = greedy(_take(scores, largest))
        if len(random := np.flatnonzero(is_random)):
            random_rows = rows[random]
            temperature = torch.from_numpy(state.temperature[random_rows, None]).to(scores.device)
            keys = split_keys(self._noise_keys(state, random_rows, ahead), scores.device)
            drawn = draw(_take(scores, random) / temperature, state.filters(random_rows), keys)
            token_ids[random] = drawn.cpu().numpy()
        return token_ids

    def _noise_keys(self, state: SamplingState, rows: Ints, ahead: int) -> UInt64s:
        if len(unseeded := rows[~state.has_seed[rows]]):
            state.seed[unseeded] = self._seeds.integers(-(2**63), 2**63, size=len(unseeded))
            state.has_seed[unseeded] = True
        return sequence_keys(state.seed[rows], state.num_tokens[rows] + ahead)


def process(scores: Tensor, state: SamplingState, rows: Ints) -> None:
    """Bias, penalize and suppress logits in place.

    Args:
        scores: [n, vocab], float32.
        state: on the device of `scores`.
        rows: [n].
    """
    for place in np.flatnonzero(state.has_bias[rows]):
        token_ids, bias = state.bias[int(rows[place])]
        scores[place, token_ids] += bias
    if len(places := np.flatnonzero(state.has_penalties[rows])):
        state.penalties.apply(scores, places, rows[places])
    for place in np.flatnonzero(state.needs_more_tokens(rows)):
        scores[place, state.stop_token_ids[int(rows[place])]] = -torch.inf


def _are_nan(logits: Tensor, places: Ints, token_ids: Ints) -> npt.NDArray[np.bool_]:
    """[n]. Not-a-number wins every choice, so it is enough to look at the chosen logits of n rows."""
    rows, chosen = torch.from_numpy(places).to(logits.device), torch.from_numpy(token_ids).to(logits.device)
    are_nan: npt.NDArray[np.bool_] = logits[rows, chosen].isnan().cpu().numpy()
    return are_nan


def _take(logits: Tensor, places: Ints) -> Tensor:
    """Rows of logits; the tensor itself if it is all of them."""
    return logits if len(places) == len(logits) else logits[torch.from_numpy(places).to(logits.device)]


def _take_floats(logits: Tensor, places: Ints) -> Tensor:
    """Rows of logits in float32, in memory of their own."""
    if len(places) == len(logits):
        return logits.to(torch.float32, copy=True)
    return _take(logits, places).float()


def _logprobs(logits: Tensor, token_ids: Ints, state: SamplingState, rows: Ints) -> dict[int, TokenLogprobs]:
    wanted = np.flatnonzero(state.wants_logprobs[rows])
    if not len(wanted):
        return {}
    chosen = torch.from_numpy(token_ids[wanted]).to(logits.device)
    listed = token_logprobs(_take(logits, wanted), chosen, state.num_logprobs[rows[wanted]].tolist())
    return dict(zip(wanted.tolist(), listed, strict=True))
