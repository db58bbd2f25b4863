"""Computing in fewer bits than dlion exchanges.

Law: tensors in place; knows no module. Autocast itself is torch's.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a module may compute in. Its parameters, and so all that is exchanged, stay float32."""


class LossScale:
    """Keeps float16 gradients from vanishing: the loss is multiplied before backward, the gradient divided after.

    Micikevicius et al., Mixed precision training, ICLR 2018, with its dynamic choice of the factor: halved when a
    gradient overflows (that step's gradient counts as zero), doubled after ``grow_after`` good steps.
    """

    def __init__(self, factor: float = 2.0**16, grow_after: int = 2000) -> None:
        self.factor = factor
        self.good_steps = 0
        self._grow_after = grow_after

    def unscale(self, gradient: torch.Tensor) -> None:
        """Divide in place, or zero what overflowed; then choose the next factor."""
        if not torch.isfinite(gradient.norm()):
            gradient.zero_()
            self.factor, self.good_steps = max(1.0, self.factor / 2), 0
            return
        gradient.div_(self.factor)
        self.good_steps += 1
        if self.good_steps == self._grow_after:
            self.factor, self.good_steps = self.factor * 2, 0
