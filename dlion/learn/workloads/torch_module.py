"""Any ``torch.nn.Module`` as a workload.

Law: joins a module, a loss and data to the ``Workload`` protocol; knows no peer, no link, no time. Importing this
file imports torch, so nothing but ``learn.workloads`` and a user does.

What is exchanged: every parameter that requires a gradient, once however often it is used (tied weights), under its
name in the module. Frozen parameters stay out; all peers have the same ones, since all build the module by the same
seed. A parameter that a batch does not use has gradient zero. Buffers, such as the statistics of BatchNorm, stay each
peer's own, or with ``buffers="averaged"`` the floating ones follow the parameters in the layout: each peer computes
with the common ones, what a batch moves them by is its update, and adding the peers' weighted updates averages them.

Parameters that are trained are float32, whatever the factory made them. ``dtype`` bfloat16 or float16 is what the
module *computes* in (autocast); what is exchanged stays float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from threading import RLock
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import default_collate

from dlion.learn.optimizers import Optimizer, Plain
from dlion.learn.trainer import peer_seed
from dlion.learn.workload import Evaluation, Indices
from dlion.learn.workloads.torch_memory import Device, Selected
from dlion.learn.workloads.torch_optimizer import BufferedOptimizer, TorchOptimizer, TorchOptimizerFactory
from dlion.learn.workloads.torch_precision import DTYPES, LossScale
from dlion.tensors import Flat, Layout, Tensors

EVALUATION_PIECE = 256
"""Samples evaluated at a time."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) -> the mean loss over the samples, a scalar that can be differentiated."""


class Samples(Protocol):
    """A map-style data set as torch knows it. If it also has ``gather(indices) -> (inputs, targets)``, that is used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """(input, target) of one sample."""


@dataclass(frozen=True)
class TorchData:
    """What one peer learns from (``train``, its shard) and is judged by (``test``)."""

    train: Samples
    test: Samples
    global_train_size: int = 0
    """Samples of all peers together; 0: this shard is all there is."""
    shard: int = 0
    """Which peer's shard: random layers (dropout) draw differently on each."""


class TorchWorkload:
    """A ``Workload`` around the module that ``module_factory`` makes, with all its parameters already in it.

    The factory draws from torch's generator, seeded alike on all peers, or loads what all peers have alike.
    ``loss`` takes (outputs, targets). On the processor, parameters and gradients are views of dlion's own buffers, and
    nothing is copied. Elsewhere (``device="cuda"``) there is one copy each way; with ``Device("cuda", 0.01)`` only the
    largest hundredth of each gradient comes from there, the rest with a later step. For classes, outputs are (samples,
    classes, ...) and targets integers (samples, ...), as torch's cross entropy has them; for other tasks override
    ``right``. Give the trainer ``optimizer(...)``. The module serves one call at a time; a second thread waits.
    """

    def __init__(
        self,
        module_factory: Callable[[], nn.Module],
        loss: Loss,
        data: TorchData,
        optimizer_factory: TorchOptimizerFactory | None = None,
        *,
        device: str | Device = "cpu",
        dtype: torch.dtype = torch.float32,
        buffers: Literal["local", "averaged"] = "local",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"torch workload: dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
        if buffers not in ("local", "averaged"):
            raise ValueError(f"torch workload: buffers are 'local' or 'averaged', not {buffers!r}")
        place = device if isinstance(device, Device) else Device(device)
        if place.gradient_share < 1 and (optimizer_factory or buffers == "averaged" or dtype is torch.float16):
            raise ValueError(
                "torch workload: where only a part of each gradient leaves the device (gradient_share below 1), the "
                "job's optimizer steps, buffers are local, and the module does not compute in float16"
            )
        self._factory, self._loss, self._data = module_factory, loss, data
        self._optimizer_factory = optimizer_factory
        self._device, self._dtype, self._averaged = torch.device(place.name), dtype, buffers == "averaged"
        self._memory, self._whole = place.memory, place.gradient_share == 1
        self._scale = LossScale() if dtype is torch.float16 else None
        self._seed = 0
        self._draws = 0
        self.turn = RLock()
        """Held while the module is bound to somebody's weights."""
        self._adopt(self._made(0))
        self.layout = Layout.of(self._arrays())

    # -- the protocol -------------------------------------------------------------------------------------------

    @property
    def train_size(self) -> int:
        return len(self._data.train)

    @property
    def global_train_size(self) -> int:
        return self._data.global_train_size or self.train_size

    def initial(self, seed: int) -> Tensors:
        """A new module by ``seed``: its trainable values are returned, its frozen ones and buffers used from now on."""
        self._seed, self._draws = seed, 0
        self._adopt(self._made(seed))
        return Tensors(self.layout, self.layout.pack(self._arrays()))

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        """As the protocol says; raises ValueError when the module's parameters are no longer those of the layout."""
        with self.turn:
            return self._gradient(weights, batch, out)

    def _gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        flat = self._bind(weights)
        gradient = self._memory.gradient(out)
        for parameter, piece in zip(self._parameters.values(), self._split(gradient), strict=False):
            parameter.grad = piece  # backward adds to it in place
        inputs, targets = self._batch(self._data.train, batch)
        with self._drawing(), self._computing():
            loss = self._loss(self.module(inputs), targets)
        torch.autograd.backward(loss if self._scale is None else loss * self._scale.factor)
        if self._scale is not None:
            self._scale.unscale(gradient)
        self._check(flat)
        self._buffers_moved(flat, gradient)
        for parameter in self._parameters.values():
            parameter.grad = None
        self._memory.fetch(gradient, out)
        return float(loss.detach())

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        """With this peer's own buffers, unless they are averaged; layers in evaluation mode."""
        count = len(self._data.test) if limit is None else min(limit, len(self._data.test))
        loss = hits = 0.0
        with self.turn, self._judging(), torch.no_grad(), self._computing():
            self._bind(weights)
            for start in range(0, count, EVALUATION_PIECE):
                indices = np.arange(start, min(start + EVALUATION_PIECE, count))
                inputs, targets = self._batch(self._data.test, indices)
                outputs = self.module(inputs)
                loss += float(self._loss(outputs, targets)) * len(indices)
                hits += self.right(outputs, targets) * len(indices)
        return Evaluation(hits / max(count, 1), loss / max(count, 1), count)

    def right(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Share of right answers in a batch, 0 to 1: ``Evaluation.accuracy``. Override where there are no classes."""
        if targets.is_floating_point() or outputs.ndim < 2:
            raise ValueError("accuracy is defined for classes only: override TorchWorkload.right for this task")
        return float((outputs.argmax(1) == targets).float().mean())

    @property
    def separable(self) -> bool:
        """Not where layers normalise by the batch, nor where only a part of each gradient leaves the device.

        Override it where ``loss`` compares samples: that cannot be seen from here.
        """
        return self._whole and not any(isinstance(layer, _BatchNorm) for layer in self.module.modules())

    # -- beyond the protocol ------------------------------------------------------------------------------------

    def optimizer(self, own: Optimizer) -> Optimizer:
        """What to give the trainer: the user's torch optimizer where there is one, else dlion's ``own``.

        Raises ValueError for what cannot work: an exchange that consumes gradients (its optimizer is ``Plain``) sets
        the rate itself, and would neither use a torch optimizer nor leave averaged buffers alone.
        """
        if isinstance(own, Plain):
            if self._optimizer_factory is not None:
                raise ValueError("this exchange consumes gradients: it cannot be used with a torch optimizer")
            if self._averaged:
                raise ValueError("this exchange consumes gradients: it cannot be used with averaged buffers")
            return own
        if self._optimizer_factory is not None:
            own = TorchOptimizer(self, self._optimizer_factory)
        return BufferedOptimizer(own, self.parameter_size) if self._averaged else own

    @property
    def parameter_size(self) -> int:
        """Entries of the flat buffer that are parameters; averaged buffers follow."""
        return self.layout.offsets[len(self._parameters)]

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name, in the order of the layout."""
        return self._parameters

    @property
    def device(self) -> torch.device:
        return self._device

    def state(self) -> dict[str, Any]:
        """What a restart needs beside weights and optimizer: this peer's own buffers and the place in its draws."""
        own = {f"buffer.{name}": _array(self.module.get_buffer(name)) for name in self._own_buffers}
        scale = {} if self._scale is None else {"scale": self._scale.factor, "good_steps": self._scale.good_steps}
        left = {"left": _array(self._memory.left)} if isinstance(self._memory, Selected) else {}
        return {"seed": self._seed, "draws": self._draws, **scale, **left, **own}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        if int(state["seed"]) != self._seed:
            self.initial(int(state["seed"]))
        self._draws = int(state["draws"])
        if self._scale is not None:
            self._scale.factor, self._scale.good_steps = float(state["scale"]), int(state["good_steps"])
        if isinstance(self._memory, Selected):
            self._memory.left = torch.tensor(state["left"], device=self._device)
        for name in self._own_buffers:
            self.module.get_buffer(name).copy_(torch.tensor(state[f"buffer.{name}"]))

    def state_dict(self, weights: Flat) -> dict[str, npt.NDArray[np.generic]]:
        """The whole module with ``weights`` in it, frozen, tied and buffers too, under the names it loads. Copies."""
        with self.turn:
            self._bind(weights)
            return {name: _array(tensor).copy() for name, tensor in self.module.state_dict().items()}

    def bind(self, flat: torch.Tensor) -> None:
        """Let the parameters be views of ``flat`` (on this workload's device) until the next call of any method."""
        self._check()
        for parameter, piece in zip(self._parameters.values(), self._split(flat), strict=False):
            parameter.data = piece

    # -- inside -------------------------------------------------------------------------------------------------

    def _made(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self._factory()
        for name, parameter in module.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} has no shape yet: let the factory run one forward (lazy layers)")
            if parameter.requires_grad and not parameter.is_floating_point():
                raise ValueError(f"parameter {name!r} is {parameter.dtype}: only real floating numbers are exchanged")
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return module.to(self._device)

    def _adopt(self, module: nn.Module) -> None:
        self.module = module
        self._parameters = _trainable(module)
        if not self._parameters:
            raise ValueError("the module has no parameter that requires a gradient")
        self._shapes = [tuple(parameter.shape) for parameter in self._parameters.values()]
        self._offsets = list(accumulate((prod(shape) for shape in self._shapes), initial=0))
        saved = module.state_dict().keys()
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
        self._common_buffers = [n for n, buffer in buffers.items() if self._averaged and buffer.is_floating_point()]
        self._own_buffers = [name for name in buffers if name not in self._common_buffers]

    def _arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What is exchanged, by name, in the order of the layout."""
        buffers = {name: self.module.get_buffer(name) for name in self._common_buffers}
        return {name: _array(tensor) for name, tensor in (*self._parameters.items(), *buffers.items())}

    def _split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Views of ``flat``, one per tensor of the layout."""
        offsets = self.layout.offsets
        for shape, start, stop in zip(self.layout.shapes, offsets, offsets[1:], strict=False):
            yield flat[start:stop].view(shape)

    def _bind(self, weights: Flat) -> torch.Tensor:
        """The parameters become views of the snapshot, averaged buffers take its values."""
        flat = self._memory.weights(weights)
        self.bind(flat)
        for name, piece in self._common(flat):
            self.module.get_buffer(name).copy_(piece)
        return flat

    def _buffers_moved(self, flat: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of an averaged buffer is where it was less where it is: its update with the sign changed."""
        for (name, before), (_, out) in zip(self._common(flat), self._common(gradient), strict=True):
            torch.sub(before, self.module.get_buffer(name), out=out)

    def _common(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Averaged buffers: their names and where they lie in ``flat``."""
        return zip(self._common_buffers, islice(self._split(flat), len(self._parameters), None), strict=True)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            yield

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Layers in evaluation mode; afterwards each in the mode it had."""
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    def _batch(self, samples: Samples, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        if (gather := getattr(samples, "gather", None)) is not None:
            inputs, targets = gather(indices)
        else:
            inputs, targets = default_collate([samples[int(index)] for index in indices])
        return inputs.to(self._device), targets.to(self._device)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Random layers draw from a stream of (seed, shard, call): repeatable, and nobody else's generator moves."""
        devices = [self._device] if self._device.type == "cuda" else []
        seed = torch.manual_seed if devices else torch.default_generator.manual_seed
        with torch.random.fork_rng(devices=devices):
            seed(peer_seed(self._seed, f"{self._data.shard}/{self._draws}"))
            yield
        self._draws += 1

    def _check(self, bound_to: torch.Tensor | None = None) -> None:
        """Refuse a module whose parameters changed: a flat buffer laid out once cannot follow."""
        now, then = _trainable(self.module), self._parameters
        problem = ""
        if now.keys() != then.keys():
            problem = f"appeared: {sorted(now.keys() - then.keys())}, gone: {sorted(then.keys() - now.keys())}"
        for (name, parameter), shape, offset in zip(now.items(), self._shapes, self._offsets, strict=False):
            if problem:
                break
            if tuple(parameter.shape) != shape:
                problem = f"{name!r} was {shape} and is {tuple(parameter.shape)}"
            elif parameter is not then[name]:
                problem = f"{name!r} is another object now"
            elif bound_to is not None and parameter.numel() and parameter.data_ptr() != bound_to[offset:].data_ptr():
                problem = f"the memory of {name!r} was replaced during the step"
        if problem:
            raise ValueError(
                f"the module's trainable parameters changed ({problem}); peers exchange one buffer laid out at the "
                "start: make, freeze and unfreeze all parameters in the factory"
            )


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _array(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """NumPy's view or copy of a tensor; bfloat16, which it does not know, becomes float32."""
    host = tensor.detach().cpu()
    array: npt.NDArray[np.generic] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    return array
