"""Whether the steps go down the gradient: the angle between an optimizer's step and the gradient that it was given.

A few thousand numbers are enough to tell. What a step does along the weights themselves is left out, as weight
decay may move them against the gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TENSORS_ASKED = 256  # whether they can be looked at
TENSORS_LOOKED_AT, NUMBERS_LOOKED_AT = 8, 4096  # and numbers of each
STEPS_KEPT = 64


class Directions:
    """The cosines of the last steps that were measured."""

    def __init__(self) -> None:
        self._found: deque[Any] = deque(maxlen=STEPS_KEPT)

    def stepped(self, parameters: Sequence[Tensor], before: Sequence[Tensor], optimizer: Any) -> None:
        """The parameters were `before` and have their gradients still. An optimizer that maximises is left out, and
        so are parameters on another device than the first of them."""
        if any(group.get("maximize") for group in getattr(optimizer, "param_groups", ())):
            return
        every = list(zip(parameters, before, strict=True))
        some = every[:: max(len(every) // TENSORS_ASKED, 1)]
        plain = [(p, b) for p, b in some if _is_plain(p) and b.device == p.device]
        pairs = [(p, b) for p, b in plain if p.device == plain[0][0].device]
        if not pairs:
            return
        chosen = pairs[:: -(-len(pairs) // TENSORS_LOOKED_AT)]
        with torch.no_grad():
            weights = torch.cat([_some(b) for _, b in chosen])
            step = torch.cat([_some(p) for p, _ in chosen]) - weights
            gradient = torch.cat([_some(p.grad) for p, _ in chosen])  # type: ignore[arg-type]
            step, gradient = (x - weights * (x @ weights) / (weights @ weights) for x in (step, gradient))
            self._found.append(step @ gradient / (step.norm() * gradient.norm()))

    def facts(self) -> tuple[float, ...]:
        """As plain numbers; NaN where nothing moved. What is on a device is waited for."""
        return tuple(float(c) for c in self._found)


def _is_plain(p: Tensor) -> bool:
    g = p.grad
    dense = g is not None and g.layout is torch.strided and not hasattr(p, "to_local")
    return dense and p.is_floating_point() and p.numel() > 0


def _some(t: Tensor) -> Tensor:
    flat = t.detach().reshape(-1)
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    return flat[:: max(len(flat) // NUMBERS_LOOKED_AT, 1)][:NUMBERS_LOOKED_AT].to(wide)
