"""Softmax regression and the multilayer perceptron, with exact gradients, on flat buffers.

Law: pure NumPy; knows arrays of inputs and labels, no data set and no peer. Keeps no scratch between calls, so one
model may be used by several lanes at once.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dlion.tensors import Flat, Layout, Tensors

Labels = npt.NDArray[np.int64]


class Mlp:
    """Fully connected layers with ReLU between them and cross entropy at the end.

    ``widths`` are (inputs, hidden ..., classes); two widths make softmax regression. Weights are (inputs, outputs).
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"an MLP needs at least two positive widths, not {widths}")
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
            names += [f"{number}.weight", f"{number}.bias"]
            shapes += [(fan_in, fan_out), (fan_out,)]
        self.layout = Layout(tuple(names), tuple(shapes))

    def initial(self, seed: int) -> Tensors:
        """He initialisation (He et al., ICCV 2015): normal with variance 2 / fan-in; biases zero."""
        rng = np.random.default_rng(seed)
        flat = np.zeros(self.layout.size, dtype=np.float32)
        for view in self.layout.views(flat).values():
            if view.ndim == 2:
                view[...] = rng.standard_normal(view.shape, dtype=np.float32) * np.sqrt(2.0 / view.shape[0])
        return Tensors(self.layout, flat)

    def logits(self, weights: Flat, inputs: Flat) -> Flat:
        """(samples, classes) scores for ``inputs`` of shape (samples, inputs)."""
        return self._forward(self._layers(weights), inputs)[-1]

    def gradient(self, weights: Flat, inputs: Flat, labels: Labels, out: Flat) -> float:
        """Write the gradient of the mean cross entropy to ``out``; return that mean."""
        layers, gradients = self._layers(weights), self._layers(out)
        activations = [inputs, *self._forward(layers, inputs)]
        delta = activations.pop()
        losses = cross_entropy(delta, labels)
        delta[np.arange(len(labels)), labels] -= 1
        delta /= len(labels)
        for number in range(len(layers) - 1, -1, -1):
            below = activations[number]
            weight_gradient, bias_gradient = gradients[number]
            np.matmul(below.T, delta, out=weight_gradient)
            np.sum(delta, axis=0, out=bias_gradient)
            if number:
                delta = delta @ layers[number][0].T
                delta *= below > 0
        return float(losses.mean())

    def _layers(self, flat: Flat) -> list[tuple[Flat, Flat]]:
        views = list(self.layout.views(flat).values())
        return list(zip(views[::2], views[1::2], strict=True))

    @staticmethod
    def _forward(layers: list[tuple[Flat, Flat]], inputs: Flat) -> list[Flat]:
        """Output of each layer, the last one without ReLU."""
        outputs: list[Flat] = []
        for number, (weight, bias) in enumerate(layers):
            inputs = inputs @ weight
            inputs += bias
            if number < len(layers) - 1:
                np.maximum(inputs, 0, out=inputs)
            outputs.append(inputs)
        return outputs


def cross_entropy(logits: Flat, labels: Labels) -> Flat:
    """Cross entropy of each sample. Turns ``logits`` into probabilities in place."""
    logits -= logits.max(axis=1, keepdims=True)
    target = logits[np.arange(len(labels)), labels]
    np.exp(logits, out=logits)
    sums = logits.sum(axis=1, keepdims=True)
    logits /= sums
    losses: Flat = np.log(sums[:, 0]) - target
    return losses
