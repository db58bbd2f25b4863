"""Optimizers for torch workloads: the user's own torch optimizer, and the rule for buffers that are averaged.

Law: what ``learn.optimizers`` promises (a gradient in, the delta to be added out), by means of torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dlion.learn.optimizers import Optimizer
from dlion.learn.workloads.torch_memory import alias
from dlion.tensors import Flat

if TYPE_CHECKING:
    from dlion.learn.workloads.torch_module import TorchWorkload

TorchOptimizerFactory = Callable[[nn.Module], "torch.optim.Optimizer | tuple[torch.optim.Optimizer, LRScheduler]"]
"""From the module: an optimizer over its parameters, in groups if the user likes, and maybe a scheduler."""


class TorchOptimizer:
    """The user's torch optimizer steps on a copy of the snapshot; the delta is the copy's new values less the old.

    Its groups keep their own settings. The learning rates are its own and its scheduler's, which is stepped once per
    local step: dlion's schedule is not used. Its state never leaves the peer. Costs one more buffer, for the copy.
    """

    def __init__(self, workload: TorchWorkload, factory: TorchOptimizerFactory) -> None:
        self._workload = workload
        self._factory = factory
        self._module: nn.Module | None = None
        self._own: tuple[torch.optim.Optimizer, LRScheduler | None] | None = None
        self._new: torch.Tensor | None = None

    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        with self._workload.turn:
            return self._step(gradient, weights)

    def _step(self, gradient: Flat, weights: Flat) -> Flat:
        workload, old, delta = self._workload, alias(weights), alias(gradient)
        optimizer, scheduler = self._built()
        if self._new is None:
            self._new = torch.empty(len(old), device=workload.device)
        self._new.copy_(old)
        workload.bind(self._new)
        slopes, start = delta.to(workload.device), 0
        for parameter in workload.parameters.values():
            parameter.grad = slopes[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for parameter in workload.parameters.values():
            parameter.grad = None
        torch.sub(self._new.to("cpu"), old, out=delta)
        return gradient

    def state(self) -> dict[str, Any]:
        """Arrays of the optimizer's state; its groups' settings and the scheduler's as JSON.

        Raises TypeError when the scheduler holds what JSON does not know, such as a function.
        """
        optimizer, scheduler = self._built()
        saved = optimizer.state_dict()
        state: dict[str, Any] = {
            "groups": json.dumps(saved["param_groups"], default=float),
            "scheduler": json.dumps(None if scheduler is None else scheduler.state_dict()),
        }
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                if value is not None:
                    state[f"{index}.{key}"] = torch.as_tensor(value).detach().cpu().numpy()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        optimizer, scheduler = self._built()
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            index, dot, key = name.partition(".")
            if dot:
                entries.setdefault(int(index), {})[key] = torch.tensor(value)
        optimizer.load_state_dict({"state": entries, "param_groups": json.loads(state["groups"])})
        if scheduler is not None:
            scheduler.load_state_dict(json.loads(state["scheduler"]))

    def _built(self) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """Built when first needed, and again for a new module: the node starts a run by ``Workload.initial``."""
        if self._own is None or self._module is not self._workload.module:
            self._module = self._workload.module
            made = self._factory(self._module)
            self._own = made if isinstance(made, tuple) else (made, None)
        return self._own


class BufferedOptimizer:
    """``inner`` for the parameters; the averaged buffers behind them take their whole update, whatever the rate."""

    def __init__(self, inner: Optimizer, parameter_size: int) -> None:
        self._inner = inner
        self._size = parameter_size

    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        size = self._size
        self._inner.step(gradient[:size], weights[:size], learning_rate)
        np.negative(gradient[size:], out=gradient[size:])
        return gradient

    def state(self) -> dict[str, Any]:
        return self._inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._inner.restore(state)
