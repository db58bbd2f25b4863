"""Where a torch module's numbers lie: in dlion's own arrays, or in a copy of them on another device.

Law: flat buffers and tensors on the same memory; knows no module and no loss. The only file in which the host's
memory and a device's meet.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dlion.tensors import Flat


def alias(flat: Flat) -> torch.Tensor:
    """A tensor on the memory of ``flat`` (float32, contiguous), which it keeps alive. Nothing is copied.

    By address rather than ``torch.from_numpy``, which warns of arrays marked read-only, as snapshots are.
    """
    if flat.dtype.str != "<f4" or not flat.flags.c_contiguous:
        raise ValueError(f"expected contiguous float32, got {flat.dtype} with strides {flat.strides}")
    if not flat.size:
        return torch.empty(0)
    memory = (ctypes.c_float * flat.size).from_address(flat.ctypes.data)
    memory.owner = flat  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.float32)


def plain(value: Any) -> Any:
    """A state dict with arrays in the place of its tensors, for a checkpoint; on the same memory where that can be."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def tensors(value: Any) -> Any:
    """Inverse of ``plain``."""
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, dict):
        return {key: tensors(each) for key, each in value.items()}
    return type(value)(map(tensors, value)) if type(value) in (list, tuple) else value


class Memory(Protocol):
    """Where a step's weights and gradient lie. Each call ends the life of what the same method returned before."""

    def weights(self, host: Flat) -> torch.Tensor:
        """The values of ``host`` where the module computes; may be ``host`` itself, so it may not be written."""

    def gradient(self, host: Flat) -> torch.Tensor:
        """Zeros where the module computes, or what was not brought home before, as long as ``host``."""

    def fetch(self, tensor: torch.Tensor, host: Flat) -> None:
        """Make ``host`` hold the values of ``tensor``, which ``gradient(host)`` had returned."""


class Shared:
    """The host's processor computes on dlion's arrays themselves: no copy at all."""

    def weights(self, host: Flat) -> torch.Tensor:
        return alias(host)

    def gradient(self, host: Flat) -> torch.Tensor:
        return alias(host).zero_()

    def fetch(self, tensor: torch.Tensor, host: Flat) -> None:
        """They are the same memory."""


class Staged:
    """Another device: one copy there at the head of a step, one copy back at its end, two buffers that stay there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weights = self._gradient = torch.empty(0, device=device)

    def weights(self, host: Flat) -> torch.Tensor:
        if len(self._weights) != host.size:
            self._weights = torch.empty(host.size, device=self._device)
        return self._weights.copy_(alias(host))

    def gradient(self, host: Flat) -> torch.Tensor:
        if len(self._gradient) != host.size:
            self._gradient = torch.empty(host.size, device=self._device)
        return self._gradient.zero_()

    def fetch(self, tensor: torch.Tensor, host: Flat) -> None:
        alias(host).copy_(tensor)


class Selected:
    """Of a gradient only the largest ``share`` of its entries comes home; the rest stays on the device, and the next
    gradient is added to it: error feedback at the source (Aji & Heafield, EMNLP 2017; Lin et al., ICLR 2018)."""

    def __init__(self, device: torch.device, share: float) -> None:
        self.weights = _whole(device).weights
        self._share = share
        self.left = torch.empty(0, device=device)
        """What has not come home yet."""

    def gradient(self, host: Flat) -> torch.Tensor:
        if len(self.left) != host.size:
            self.left = torch.zeros(host.size, device=self.left.device)
        return self.left

    def fetch(self, tensor: torch.Tensor, host: Flat) -> None:
        places = tensor.abs().topk(max(1, round(self._share * len(tensor))), sorted=False).indices
        host.fill(0.0)
        host[places.cpu().numpy()] = tensor[places].cpu().numpy()
        tensor[places] = 0.0


@dataclass(frozen=True)
class Device:
    """Where a module computes, and how much of each gradient leaves that place: the largest entries, the rest later."""

    name: str
    gradient_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gradient_share <= 1:
            raise ValueError(f"device: gradient_share lies above 0 and at most at 1, not {self.gradient_share}")

    @property
    def memory(self) -> Memory:
        device, share = torch.device(self.name), self.gradient_share
        return _whole(device) if share == 1.0 else Selected(device, share)


def _whole(device: torch.device) -> Memory:
    return Shared() if device.type == "cpu" else Staged(device)
