"""The processes of one peer (a ``torchrun`` job): its first has the weights, the others are told them.

Law: one broadcast of two numbers and one of the weights per step, over a group that PyTorch made; knows no peer.
Gradients are the group's own business (DistributedDataParallel).
"""

from __future__ import annotations

import torch
from torch import distributed

FAILED = -1


class Site:
    """One process of a peer. ``rank`` is its number in ``group``, ``device`` where the group's tensors must lie."""

    def __init__(self, group: distributed.ProcessGroup, device: torch.device, count: int) -> None:
        """``count``: entries of the flat buffer."""
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        on_host = "gloo" in distributed.get_backend(group)
        self._device = torch.device("cpu") if on_host else device
        self._flat = torch.empty(count, device=self._device)

    def share(self, weights: torch.Tensor | None, batch: int) -> tuple[torch.Tensor, int]:
        """What rank 0 gives, on all. Raises RuntimeError on the others when rank 0 has failed."""
        head = self.told(batch)
        if head == FAILED:
            raise RuntimeError("this peer's node has failed; process 0 of the peer says why")
        if weights is not None:
            self._flat.copy_(weights)
        distributed.broadcast(self._flat, group=self._group, group_src=0)
        return self._flat, head

    def fail(self) -> None:
        """On rank 0: let the others raise in their ``share``."""
        self.told(FAILED)

    def part(self, batch: int) -> int:
        """This process's part of the peer's batch, at least 1."""
        return int(max(1, batch // self.size + (self.rank < batch % self.size)))

    def told(self, number: int) -> int:
        """Rank 0's ``number``, on all."""
        head = torch.tensor([number], device=self._device)
        distributed.broadcast(head, group=self._group, group_src=0)
        return int(head)
