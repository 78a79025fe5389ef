"""The mark of a chunk: a few bits that tell whether it has the values that it had before.

Each column is summed in words of 64 bits over blocks of 4 KiB, and a digest of those sums and of
the leaf's index is the mark: it changes where blocks, columns or leaves are exchanged, and where
values change, but for one case in 2⁶³. (Words that change places within a block go unnoticed.)
Summing words is as fast as the memory is; a checksum of all bytes would take a good part of a pass.
"""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from nlsq_dask.sources.base import Chunk

__all__ = ["MARK_MODULUS", "mark_of"]

MARK_MODULUS = 2**63  # what is not negative as an int64
_BLOCK_BYTES = 2**12


def mark_of(chunk: Chunk, leaf: int) -> int:
    """The mark of a padded chunk, above zero."""
    digest = hashlib.blake2b(leaf.to_bytes(8, "little"), digest_size=8)
    for array in jax.tree.leaves(chunk):
        octets = np.asarray(array).reshape(-1).view(np.uint8)
        in_blocks = octets.size - octets.size % _BLOCK_BYTES
        words = octets[:in_blocks].view(np.uint64).reshape(-1, _BLOCK_BYTES // 8)
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.add.reduce(words, axis=1).data)
        digest.update(octets[in_blocks:].data)
    return int.from_bytes(digest.digest(), "little") % MARK_MODULUS or 1
