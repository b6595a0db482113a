"""Keys of block contents: a hash chain over token ids.

The key of a block covers its own tokens and, through the previous key, all tokens before it, so equal keys mean equal
prefixes. SHA-256 keeps chance and malicious collisions out (a collision would show one user another's context).
"""

from __future__ import annotations

import hashlib

import numpy as np

ROOT_KEY = b"shardwright"


def extend_keys(keys: list[bytes], token_ids: list[int], block_size: int) -> None:
    """Append, in place, the keys of all whole blocks of `token_ids` that `keys` does not cover yet."""
    first, whole = len(keys), len(token_ids) // block_size
    if whole <= first:
        return
    data = np.asarray(token_ids[first * block_size : whole * block_size], dtype=np.int64).tobytes()
    size = block_size * 8
    key = keys[-1] if keys else ROOT_KEY
    for start in range(0, len(data), size):
        key = hashlib.sha256(key + data[start : start + size]).digest()
        keys.append(key)
