"""Find out whether the keys and values of an attention call are made of one small latent per token.

The code of such models projects a latent up to keys and values of all heads, and hands these to its attention. Nothing
is looked for by name: in one pass of a few tokens it is followed where the elements of keys and values come from
(adapt/origins.py, adapt/linears.py). If all values, and a part of every head's key, are outputs of linear maps of one
input, and the rest of the keys is the same for all heads, then that input and that rest are all that has to be cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shardwright.adapt.linears import LinearUse, LinearWatch, Source
from shardwright.adapt.origins import OriginsMode
from shardwright.attention.latent import LatentProjection
from shardwright.cache.spec import LayerSpec
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described

LARGEST_SHARE = 0.5
"""A latent is cached if it takes less than this share of what keys and values would: attending to it costs more."""

TOLERANCE = 2e-3
"""Largest difference, relative to the largest number, between what the code makes of a latent and what we make."""

ROUNDINGS = 4
"""So many times a number may have been rounded to the type of the model, on top of that."""


class NotLatentError(Exception):
    """Keys and values have to be cached as they are, with the reason."""


@dataclass(frozen=True, slots=True)
class Latent:
    """What makes the keys and values of one attention call."""

    source: Source
    """The latent goes into it."""
    projection: LatentProjection

    def spec(self, expanded: LayerSpec) -> LayerSpec:
        """What is cached, in place of keys and values."""
        return replace(
            expanded,
            num_kv_heads=1,
            key_dim=self.projection.row_dim,
            value_dim=self.projection.latent_dim,
            values_in_keys=True,
        )


@dataclass(frozen=True, slots=True)
class LatentSearch:
    """What was found of all calls."""

    by_call: list[Latent | None]
    reason: str = ""
    """Of the first call with none that might have had one."""

    def cached(self, specs: Sequence[LayerSpec]) -> list[LayerSpec]:
        """What is cached of the calls, whose keys and values are these."""
        pairs = zip(self.by_call, specs, strict=True)
        return [spec if latent is None else latent.spec(spec) for latent, spec in pairs]

    def describe(self) -> str:
        """What of it a reader of the rung's reason wants to know."""
        found = [latent for latent in self.by_call if latent is not None]
        said = []
        if found:
            sizes = " or ".join(str(size) for size in sorted({latent.projection.row_dim for latent in found}))
            said.append(f"{len(found)} cache one latent of {sizes} numbers a token for all heads")
        if self.reason:
            said.append(f"keys and values are cached as they are: {self.reason}")
        return "".join(f"; {part}" for part in said)


def no_latents(specs: Sequence[LayerSpec], reason: str = "") -> LatentSearch:
    """None of the calls has one, or may use it."""
    return LatentSearch([None] * len(specs), reason)


def might_have_latents(model: nn.Module, specs: Sequence[LayerSpec]) -> bool:
    """Whether some weight takes inputs small enough for a call, and makes as many outputs as the call has values."""
    sizes: set[tuple[int, int]] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear) and parameter.ndim == 2:
                sizes.add((parameter.shape[1], parameter.shape[0]))
            elif not isinstance(module, nn.Embedding) and parameter.ndim > 1:
                sizes |= {(size, parameter.numel() // size) for size in parameter.shape if size}
    return any(
        taken < LARGEST_SHARE * spec.elements_per_token and made >= spec.num_kv_heads * spec.value_dim
        for spec in specs
        for taken, made in sizes
    )


class LatentFinder:
    """Looks at the keys and values of the attention calls of one forward pass; open while it runs.

    Args:
        model: that runs, in inference mode; on "meta" nothing is checked by numbers.
        specs: of the calls, as they are cached without latents.
    """

    def __init__(self, model: nn.Module, specs: Sequence[LayerSpec]) -> None:
        self._specs = specs
        self._latents: dict[int, Latent] = {}
        self._reasons: dict[int, str] = {}
        self._origins = OriginsMode()
        self._uses: list[_Use] = []
        self._watch = LinearWatch(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a pass."""
        with self._origins, self._watch.open(self._note):
            yield

    def look(self, number: int, key_KTD: Tensor, value_KTV: Tensor) -> None:
        """Look at a call.

        Args:
            number: of the call.
            key_KTD: [K, T, D], heads as they are cached.
            value_KTV: [K, T, V].
        """
        try:
            self._latents[number] = self._found(self._specs[number], key_KTD, value_KTV)
        except NotLatentError as exc:
            self._reasons[number] = f"{self._specs[number].name}: {exc}"
        self._uses.clear()
        self._origins.forget()

    @property
    def result(self) -> LatentSearch:
        latents = [self._latents.get(number) for number in range(len(self._specs))]
        return LatentSearch(latents, next(iter(self._reasons.values()), ""))

    def _note(self, use: LinearUse, output: Tensor) -> None:
        """Remember what a linear map made of what."""
        tags = self._origins.renew(output)
        self._uses.append(_Use(use, output, int(tags.flatten()[0])))

    def _found(self, spec: LayerSpec, key: Tensor, value: Tensor) -> Latent:
        key_tags, value_tags = self._origins.of(key), self._origins.of(value)
        of_value = self._use_of(value_tags[0, 0, 0])
        if of_value is None:
            raise NotLatentError("its values are no outputs of a linear map")
        inputs = self._origins.of(of_value.use.input)
        own, of_key = [], None
        for dim, tag in enumerate(key_tags[0, 0]):
            made_by = self._use_of(tag)
            if made_by is not None and torch.equal(self._origins.of(made_by.use.input), inputs):
                own.append(dim)
                of_key = made_by
        if of_key is None:
            raise NotLatentError("no part of its keys is made by a linear map of what its values are made of")
        shared = [dim for dim in range(key.shape[2]) if dim not in own]
        if not torch.equal(key_tags[..., shared], key_tags[:1, :, shared].expand(len(key), -1, -1)):
            raise NotLatentError("what its keys have beside outputs of a linear map is not the same for all heads")
        if own not in (list(range(len(own))), list(range(len(shared), key.shape[2]))):
            raise NotLatentError("the numbers of its keys that heads share lie among the others")
        if of_value.use.has_bias or of_key.use.has_bias:
            raise NotLatentError("a bias is added to its keys or values")
        latent = of_value.use.input.flatten(0, -2)
        if len(latent) != key.shape[1]:
            raise NotLatentError(f"its keys and values are made of {tuple(of_value.use.input.shape)}")
        begin = 0 if own[0] else len(own)
        projection = LatentProjection(
            of_key.weight(key_tags[..., own]), of_value.weight(value_tags), slice(begin, begin + len(shared))
        )
        if projection.row_dim >= LARGEST_SHARE * spec.elements_per_token:
            sizes = f"{projection.row_dim} numbers a token are not much less than {spec.elements_per_token}"
            raise NotLatentError(f"its latent would save little: {sizes}")
        if not latent.is_meta:
            _check(projection, latent, key, value)
        return Latent(of_value.use.source, projection)

    def _use_of(self, tag: Tensor) -> _Use | None:
        """The use of a linear map that made an element."""
        return next((use for use in self._uses if use.first <= int(tag) < use.first + use.output.numel()), None)


@dataclass(frozen=True, slots=True)
class _Use:
    """A use of a linear map, and the tags of its output."""

    use: LinearUse
    output: Tensor
    first: int
    """Tag of its first number."""

    def weight(self, tags: Tensor) -> Tensor:
        """The rows of the matrix that make the elements with these tags.

        Args:
            tags: [K, T, N], of elements of keys or values; those of a token have to be made of its own input.

        Returns: [K, N, R].
        Raises: NotLatentError.
        """
        matrix = self.use.matrix(self.output)
        if matrix is None:
            raise NotLatentError("it cannot be told which numbers its latent is multiplied by")
        weight, token_dim = matrix
        num_tokens, inner = self.output.shape[token_dim], self.output.shape[token_dim + 1 :].numel()
        places = tags - self.first
        tokens = places // inner % num_tokens
        rows = places // (inner * num_tokens) * inner + places % inner
        is_own = bool(((places >= 0) & (places < self.output.numel())).all())
        is_own = is_own and torch.equal(tokens, torch.arange(tags.shape[1])[:, None].expand_as(tokens))
        if not is_own or not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise NotLatentError("its keys or values are not all made by one linear map, each token's of its own input")
        return _rows(weight, rows[:, 0])


class LatentTaps:
    """Takes the latents of a forward pass where the code hands them on.

    Args:
        model: that runs.
        latents: by attention call.
    """

    def __init__(self, model: nn.Module, latents: Sequence[Latent | None]) -> None:
        self._latents = latents
        self._sources = {latent.source for latent in latents if latent is not None}
        self._watch = LinearWatch(model, self._sources)
        self._taken: dict[Source, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Take the latents of the pass inside."""
        try:
            with self._watch.open(self._take):
                yield
        finally:
            self._taken.clear()

    def take(self, number: int) -> tuple[Tensor, LatentProjection] | None:
        """The latents of the tokens of a call, [T, R], and what makes keys and values of them; None if it has none.

        Raises: UnsupportedModelError if the code has made none.
        """
        latent = self._latents[number]
        if latent is None:
            return None
        taken = self._taken.pop(latent.source, None)
        if taken is None:
            raise UnsupportedModelError("its code makes keys and values in another way than when it was looked at")
        return taken.flatten(0, -2), latent.projection

    def _take(self, use: LinearUse, output: Tensor) -> None:
        if use.source in self._sources:
            self._taken[use.source] = use.input


def find_latents(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    run: Callable[[LatentFinder], None],
    *,
    agree: Callable[[bool], bool],
) -> LatentSearch:
    """What the attention calls of a model can cache in place of keys and values.

    Args:
        model: in eval mode.
        specs: of the calls, as they are cached without.
        run: runs a pass of a few tokens in which a finder watches and looks at the calls.
        agree: whether all ranks that share the model say yes; they run the pass together.
    """
    if agree(not might_have_latents(model, specs)):
        return no_latents(specs)
    finder = LatentFinder(model, specs)
    try:
        run(finder)
    except Exception as exc:  # the pass has gone well before: it is our looking at it that fails
        return no_latents(specs, f"what they are made of cannot be followed: {described(exc)}")
    return finder.result


def _rows(weight: Tensor, rows_KN: Tensor) -> Tensor:
    """Rows of a weight: [K, N, R]; a view of it if they lie evenly, which they do unless code shuffles them."""
    first = int(rows_KN[0, 0])
    by_head = int(rows_KN[1, 0]) - first if len(rows_KN) > 1 else 0
    by_row = int(rows_KN[0, 1]) - first if rows_KN.shape[1] > 1 else 0
    even = first + by_head * torch.arange(len(rows_KN))[:, None] + by_row * torch.arange(rows_KN.shape[1])
    if not torch.equal(even, rows_KN) or by_head < 0 or by_row < 0:
        return weight[rows_KN.to(weight.device)]
    across, along = weight.stride()
    return weight.as_strided(
        (*rows_KN.shape, weight.shape[1]),
        (by_head * across, by_row * across, along),
        weight.storage_offset() + first * across,
    )


def _check(projection: LatentProjection, latent: Tensor, key_KTD: Tensor, value_KTV: Tensor) -> None:
    """Make sure by numbers that keys and values are made so. Raises NotLatentError."""
    key, value = key_KTD.transpose(0, 1).float(), value_KTV.transpose(0, 1).float()
    wide = LatentProjection(projection.up_key_KNR.float(), projection.up_value_KVR.float(), projection.shared)
    bound = TOLERANCE + ROUNDINGS * torch.finfo(projection.up_key_KNR.dtype).eps
    for made, given in zip(wide.expanded(wide.rows(latent.float(), key)), (key, value), strict=True):
        if not float((made - given).abs().max()) <= bound * float(given.abs().max()):
            raise NotLatentError("its keys and values are not the linear function of its latent that they seem to be")
