"""Ways to serve a model's attention, best first. Every model gets the highest that is proved right for it."""

from __future__ import annotations

from enum import StrEnum


class AttentionRung(StrEnum):
    """How a model's attention is served; `inspect` shows it, and why it is no better one."""

    INTERFACE = "interface"
    """Its code calls Transformers' attention interface: paged attention, all requests packed."""
    SDPA = "sdpa"
    """Its code calls scaled_dot_product_attention: those calls are answered by paged attention, all requests packed."""
    DATAFLOW = "dataflow"
    """Its code writes attention out: the products in it are answered by paged attention, all requests packed."""
    STATE = "state"
    """Layers that carry a state from token to token: a slot for each request, decodes batched; attention paged."""
    PER_REQUEST = "per-request"
    """Its own cache, one for each request: correct, one request per forward."""
    RECOMPUTE = "recompute"
    """No cache: the whole sequence again for every token. Correct, slow."""
