"""A user's own training loop as a workload: what a step gives comes from another thread.

Law: passes a baton between two threads, the train lane and the user's; knows no peer, no link, no loop. Only the
thread that has the baton changes or reads off the module.

The user's tensors stay the user's: at the head of a step the snapshot's values are copied into them, and after it what
the user's optimizer changed is read off. A loop that is ``ahead`` waits for its turn only to make its step, not to
compute a gradient: to the tensors p that it was computed from, its step u is added and what p lacked to be the snapshot
s, and read off is (p + u + (s - p)) - s. What others say counts a step later, and nothing is copied while it waits.

What is exchanged follows the rules of ``torch_module``: every parameter that requires a gradient, once however often it
is used, and with ``buffers="averaged"`` the floating buffers behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from dlion.learn.optimizers import Optimizer, Plain
from dlion.learn.workload import Ended, Evaluation, Indices
from dlion.learn.workloads.torch_memory import alias, plain, tensors
from dlion.learn.workloads.torch_optimizer import BufferedOptimizer
from dlion.tensors import Flat, Layout, Tensors

PASS_SAMPLES = 1 << 16
"""What the run log calls an epoch where nobody said how large the data is."""
SIGNALS_EVERY_S = 0.5
Buffers = Literal["local", "averaged"]


class Keepable(Protocol):
    """What a checkpoint can hold beside the weights: an optimizer, a scheduler, a loader that knows its place."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Places:
    """The tensors of a module that are exchanged, and where each lies in the flat buffer."""

    def __init__(self, module: nn.Module, buffers: Buffers) -> None:
        if buffers not in ("local", "averaged"):
            raise ValueError(f"buffers are 'local' or 'averaged', not {buffers!r}")
        self._module = module
        self.parameters = _trainable(module)
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        for name, parameter in self.parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} has no shape yet: run one forward first (lazy layers)")
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype}: what is trained must be float32; compute in bfloat16 or "
                    "float16 with torch.autocast"
                )
        saved = module.state_dict().keys() if buffers == "averaged" else ()
        common = {n: b for n, b in module.named_buffers() if n in saved and b.dtype == torch.float32}
        self._tensors: list[torch.Tensor] = [*self.parameters.values(), *common.values()]
        self.own = {n: b for n, b in module.named_buffers() if n in module.state_dict() and n not in common}
        """Buffers that are not exchanged."""
        names = (*self.parameters, *common)
        self.layout = Layout(names, tuple(tuple(t.shape) for t in self._tensors))
        self.averaged = len(common)
        self.parameter_size = self.layout.offsets[len(self.parameters)]
        self._versions: list[int] = []
        self.resting: dict[str, torch.Tensor] = {}
        """``own`` as they were at the last ``rest``: the next forward may change them."""

    def fill(self, values: torch.Tensor) -> None:
        """Copy a flat buffer's values into the module's tensors."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._split(values), strict=True):
                tensor.copy_(value)

    def add(self, values: torch.Tensor) -> None:
        """Add a flat buffer's values to the module's tensors."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._split(values), strict=True):
                tensor.add_(value.to(tensor.device))

    def read(self, out: torch.Tensor) -> None:
        """Copy the module's values to the flat ``out``."""
        for tensor, place in zip(self._tensors, self._split(out), strict=True):
            place.copy_(tensor.detach())

    def moved(self, before: torch.Tensor, out: torch.Tensor) -> None:
        """How far the module's tensors are from the flat ``before``."""
        for tensor, old, place in zip(self._tensors, self._split(before), self._split(out), strict=True):
            if tensor.device.type == "cpu":
                torch.sub(tensor.detach(), old, out=place)
            else:
                place.copy_(tensor.detach()).sub_(old)

    def behind(self, goal: torch.Tensor, out: torch.Tensor) -> None:
        """What the module's tensors lack to be the flat ``goal``."""
        for tensor, wanted, place in zip(self._tensors, self._split(goal), self._split(out), strict=True):
            torch.sub(wanted, tensor.detach().to(wanted.device), out=place)

    def rest(self) -> None:
        """The user goes on, and must not change the tensors until ``unmoved``."""
        self._versions = [tensor._version for tensor in self._tensors]
        self.resting = {name: buffer.clone() for name, buffer in self.own.items()}

    def unmoved(self) -> None:
        """Raises RuntimeError when somebody did, so far as torch can tell."""
        now = [tensor._version for tensor in self._tensors]
        for name, here, then in zip(self.layout.names, now, self._versions, strict=True):
            if here != then:
                raise RuntimeError(
                    f"parameter {name!r} was changed between two steps, while the last one was being read off: change "
                    "parameters in your optimizer's step only, or attach with Options(overlap=False)"
                )

    def gradients(self, before: torch.Tensor, out: torch.Tensor) -> None:
        """Gradients, zero where there is none; of an averaged buffer, what its change would be the step of."""
        for tensor, old, place in zip(self._tensors, self._split(before), self._split(out), strict=True):
            if not tensor.requires_grad:
                torch.sub(old, tensor.detach().to(old.device), out=place)
            elif tensor.grad is None:
                place.zero_()
            else:
                place.copy_(tensor.grad)

    def check(self) -> None:
        """Raises ValueError when the trainable parameters are no longer those of the start."""
        now, then = _trainable(self._module), self.parameters
        same = now.keys() == then.keys() and all(now[name] is then[name] for name in now)
        if not same or any(tuple(p.shape) != s for p, s in zip(now.values(), self.layout.shapes, strict=False)):
            raise ValueError(
                "the model's trainable parameters changed; peers exchange one buffer laid out at the start: make, "
                "freeze and unfreeze all parameters before attach"
            )

    def _split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        layout = self.layout
        for shape, start, stop in zip(layout.shapes, layout.offsets, layout.offsets[1:], strict=False):
            yield flat[start:stop].view(shape)


class Turn(NamedTuple):
    """The user's: compute, from these weights, on so many samples."""

    weights: torch.Tensor
    """The snapshot itself, or where the loop is ahead what its tensors lack to be that; not to be written."""
    batch: int


class Guest:
    """A ``Workload`` whose gradients a user's loop computes.

    The user's thread calls ``turn`` (waits for the next snapshot) and ``answer`` in alternation; the train lane calls
    ``gradient``, which waits for the answer. ``end`` releases whichever thread waits, now and later.
    """

    def __init__(
        self,
        places: Places,
        steps_itself: bool,
        samples: int | None = None,
        keeps: Mapping[str, Keepable] | None = None,
    ) -> None:
        """``steps_itself``: the user's optimizer changes the module, else its gradients are taken. ``samples``: of all
        peers together; None: not known, and the global batch does not grow. ``keeps``: what else is in checkpoints."""
        self.places = places
        self.separable = False  # the batch is the loop's
        self.ahead = False
        """The user computes while its last step is taken in, and is told what it lacks; set by it in its first turn."""
        self._steps_itself = steps_itself
        self._samples = samples
        self._keeps = keeps or {}
        self._turns: SimpleQueue[Turn | None] = SimpleQueue()
        self._answers: SimpleQueue[float | None] = SimpleQueue()

    # -- the user's thread --------------------------------------------------------------------------------------

    def turn(self) -> Turn | None:
        """Wait until it is the user's turn; None: the run is over."""
        while True:
            try:
                found = self._turns.get(timeout=SIGNALS_EVERY_S)
                break
            except Empty:  # look for a Ctrl-C that came just before the wait began: nothing else would wake it
                continue
        if found is None:
            self._turns.put(None)
        return found

    def answer(self, loss: float) -> None:
        """The module's tensors, or their gradients, are what the turn made of them."""
        self._answers.put(loss)

    def end(self) -> None:
        """Nobody waits any more. From any thread."""
        self._turns.put(None)
        self._answers.put(None)

    # -- the train lane -----------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self.places.layout

    @property
    def train_size(self) -> int:
        return self._samples or PASS_SAMPLES

    @property
    def global_train_size(self) -> int:
        return self._samples or 1

    def initial(self, seed: int) -> Tensors:
        """The values that the user's module has now, whatever the seed: all peers must have made it alike."""
        found = torch.empty(self.layout.size)
        self.places.read(found)
        return Tensors(self.layout, found.numpy())

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        """Hand ``weights`` to the user and wait. Of ``batch`` only the length counts: the data are the user's.

        ``out`` is the user's whole step if its own optimizer made it (``optimizer`` then leaves it as it is).
        """
        before = given = alias(weights)
        if self.ahead:
            self.places.behind(before, given := alias(out))
        self._turns.put(Turn(given, len(batch)))
        loss = self._answers.get()
        if loss is None:
            self._answers.put(None)
            raise Ended("the training loop has ended")
        self.places.check()
        if self._steps_itself:
            self.places.moved(before, alias(out))
        else:
            self.places.gradients(before, alias(out))
        return loss

    def state(self) -> dict[str, Any]:
        """Of the user's things, which rest: a cut asks while it is not the user's turn, or the user has left."""
        kept = {name: plain(keepable.state_dict()) for name, keepable in self._keeps.items()}
        return {"kept": kept, "buffers": plain(self.places.resting if self.ahead else self.places.own)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``. Raises ValueError when something else is kept now than was then."""
        if state["kept"].keys() != self._keeps.keys() or state["buffers"].keys() != self.places.own.keys():
            then, now = sorted([*state["kept"], *state["buffers"]]), sorted([*self._keeps, *self.places.own])
            raise ValueError(f"the checkpoint holds {then} beside the weights, this loop keeps {now}")
        for name, keepable in self._keeps.items():
            keepable.load_state_dict(tensors(state["kept"][name]))
        for name, buffer in self.places.own.items():
            buffer.copy_(tensors(state["buffers"][name]))

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        """Refused: the user's loop has the held-out data, and evaluates by itself."""
        raise TypeError("a loop attached from outside evaluates by itself: the node has none of its data")

    def optimizer(self, own: Optimizer) -> Optimizer:
        """None beside the user's; else ``own``. Raises ValueError for what cannot work."""
        if isinstance(own, Plain):
            if self._steps_itself:
                raise ValueError("this exchange consumes gradients and steps by itself: attach with optimizer=None")
            if self.places.averaged:
                raise ValueError("this exchange consumes gradients: it cannot be used with averaged buffers")
            return own
        if self._steps_itself:
            return Plain()
        return BufferedOptimizer(own, self.places.parameter_size) if self.places.averaged else own


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
