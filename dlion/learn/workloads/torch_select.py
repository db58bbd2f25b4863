"""Selection where the gradient lies: only what is sent crosses to the host.

Law: ``blocks.compress`` in torch operations. The same entries are chosen and the same block is made, to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dlion.blocks import Block, Encoding, block_bytes, dense, entries_within, sparse
from dlion.selection import SAMPLE_ALL_BELOW, SAMPLE_EVERY


def select_on_device(
    tensor: torch.Tensor, budget_bytes: int, *, encoding: Encoding = Encoding.I8, start: int = 0
) -> Block | None:
    """The largest entries of ``tensor`` (1-d float32, any device) that fit ``budget_bytes``; all, when they fit.

    None: not even one entry fits, or all are zero. Raises ValueError when an entry is NaN or infinite. Makes two
    temporaries of the tensor's size on its device.
    """
    size = tensor.numel()
    count = entries_within(budget_bytes, size, encoding)
    keys = tensor.abs()
    if size and not torch.isfinite(keys.max()):
        raise ValueError("an entry is NaN or infinite")
    if count == 0:
        return None
    chosen = _largest(keys, count)
    found = chosen.numel()
    if found == 0:
        return None
    if block_bytes(encoding, size) <= block_bytes(encoding, size, found):
        return dense(tensor.cpu().numpy(), encoding, start=start)
    values = tensor[chosen].cpu().numpy()
    block = sparse(values, np.arange(found), encoding, start=start, scanned=size)
    return replace(block, size=size, indices=chosen.cpu().numpy().astype(np.uint32))


def _largest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending positions of the ``count`` largest keys (all that are not zero, if fewer); ties from the front."""
    candidates = (keys >= _threshold(keys, count)).logical_and_(keys > 0).nonzero().squeeze(1)
    if candidates.numel() < count:  # the sample was misleading, or so few are not zero
        candidates = keys.nonzero().squeeze(1)
    surplus = candidates.numel() - count
    if surplus <= 0:
        return candidates
    mine = keys[candidates]
    least = torch.topk(mine, count, sorted=False).values.min()
    keep = mine > least
    ties = (mine == least).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return candidates[keep]


def _threshold(keys: torch.Tensor, count: int) -> torch.Tensor:
    """A key that somewhat more than ``count`` entries reach, judged by a sample of one in ``SAMPLE_EVERY``."""
    if keys.numel() <= SAMPLE_ALL_BELOW:
        return keys.new_zeros(())
    sample = keys[::SAMPLE_EVERY].sort().values
    expected = count / SAMPLE_EVERY
    place = sample.numel() - int(expected + 4.0 + 4.0 * expected**0.5)
    return sample[place] if place > 0 else keys.new_zeros(())
