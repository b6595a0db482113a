"""Keys and values that are made of one latent per token (multi-head latent attention): the latent is what is cached.

Of every head's key, some numbers are a linear function of the latent, the others are shared by all heads (they carry
the positions); its value is a linear function of the latent too:

    key of head k    [ up_key[k] @ latent | shared ]          value of head k    up_value[k] @ latent
    cached row       [ latent | shared ]                      once, for all heads

Attention over such rows is done in one of two ways, which give the same:
  * absorbed: the query takes the projection, `q @ up_key[k]`, so that all heads attend to the rows as they are, and the
    sum of latents that comes out goes through `up_value[k]`: little memory is read, for much arithmetic (decodes);
  * expanded: keys and values of the context are made of its rows first (many queries over one context).

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1, for the absorption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_EXPANDED_BYTES = 1 << 28
"""Memory that the expanded keys and values of one context may take; a longer one is attended to as latents."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentProjection:
    """What makes keys and values of a layer's latents."""

    up_key_KNR: Tensor
    """[K, N, R]: N numbers of each head's key."""
    up_value_KVR: Tensor
    """[K, V, R]."""
    shared: slice
    """Numbers of a key that all heads share: the first of it, or the last; none if it is empty."""
    _cast: dict[torch.dtype, LatentProjection] = field(default_factory=dict)

    @property
    def num_shared(self) -> int:
        return int(self.shared.stop - self.shared.start)

    @property
    def latent_dim(self) -> int:
        return self.up_key_KNR.shape[2]

    @property
    def row_dim(self) -> int:
        """Numbers cached per token."""
        return self.latent_dim + self.num_shared

    def to(self, dtype: torch.dtype) -> LatentProjection:
        """The same in another type, made once."""
        if dtype is self.up_key_KNR.dtype:
            return self
        if dtype not in self._cast:
            self._cast[dtype] = LatentProjection(self.up_key_KNR.to(dtype), self.up_value_KVR.to(dtype), self.shared)
        return self._cast[dtype]

    def rows(self, latent_TR: Tensor, key_TKD: Tensor) -> Tensor:
        """What is cached of tokens: [T, C]."""
        return torch.cat([latent_TR, key_TKD[:, 0, self.shared].to(latent_TR.dtype)], dim=-1)

    def absorbed(self, query_THD: Tensor) -> Tensor:
        """Queries to the cached rows, of the dtype of the projection: [T, H, C]."""
        own, shared = self._parts(query_THD)
        own_TKGN = own.unflatten(1, (len(self.up_key_KNR), -1))
        latent = torch.einsum("tkgn,knr->tkgr", own_TKGN, self.up_key_KNR).flatten(1, 2)
        return torch.cat([latent, shared], dim=-1)

    def values_of(self, latent_THR: Tensor) -> Tensor:
        """Values of sums of latents, one for each query head: [T, H, V]."""
        latent_TKGR = latent_THR.unflatten(1, (len(self.up_value_KVR), -1))
        return torch.einsum("tkgr,kvr->tkgv", latent_TKGR, self.up_value_KVR).flatten(1, 2)

    def around(self, attend: Callable[[Tensor], Tensor], query_THD: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Attention to the cached rows as they are, for all that an attention to any keys and values knows.

        Args:
            attend: queries to the rows, [T, H, C], to sums of latents, [T, H, R]; dtype of the queries.
            query_THD: [T, H, D].
            compute_dtype: of the products with the projection.

        Returns: [T, H, V], dtype of the queries.
        """
        projection, dtype = self.to(compute_dtype), query_THD.dtype
        latent_THR = attend(projection.absorbed(query_THD.to(compute_dtype)).to(dtype))
        return projection.values_of(latent_THR.to(compute_dtype)).to(dtype)

    def expanded(self, rows_LC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [L, K, D] and values [L, K, V] of cached rows of the dtype of the projection."""
        latent, shared = rows_LC.split([self.latent_dim, self.num_shared], dim=-1)
        own = torch.einsum("lr,knr->lkn", latent, self.up_key_KNR)
        shared = shared[:, None].expand(-1, own.shape[1], -1)
        keys = torch.cat([shared, own] if self._shared_is_first else [own, shared], dim=-1)
        return keys, torch.einsum("lr,kvr->lkv", latent, self.up_value_KVR)

    def pays_to_expand(self, *, num_queries: int, context: int) -> bool:
        """Whether keys and values are better made first: by what has to be multiplied, for each head, if they fit."""
        num_heads, own_dim, latent_dim = self.up_key_KNR.shape
        value_dim = self.up_value_KVR.shape[1]
        expanded_dim = own_dim + self.num_shared + value_dim
        projected = (own_dim + value_dim) * latent_dim
        absorbed_cost = num_queries * (context * (self.row_dim + latent_dim) + projected)
        expanded_cost = context * (num_queries * expanded_dim + projected)
        num_bytes = context * num_heads * expanded_dim * self.up_key_KNR.itemsize
        return expanded_cost < absorbed_cost and num_bytes <= MAX_EXPANDED_BYTES

    @property
    def _shared_is_first(self) -> bool:
        return bool(self.shared.start == 0)

    def _parts(self, query_THD: Tensor) -> tuple[Tensor, Tensor]:
        """What of the queries meets each head's own part of the keys, and what meets the shared one."""
        shared = query_THD[..., self.shared]
        if self._shared_is_first:
            return query_THD[..., self.shared.stop :], shared
        return query_THD[..., : self.shared.start], shared
