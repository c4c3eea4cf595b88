"""A curve of low loss between two networks: a quadratic Bezier whose middle point is trained.

theta(t) = (1-t)^2 theta_0 + 2 t (1-t) theta_c + t^2 theta_1; theta_c starts at the midpoint and follows the
gradient of the loss at a random t on each batch. Source: Garipov et al. 2018 (arXiv:1802.10026, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diag.connectivity.interpolation import Interpolation, NetworkState, overwrite, straight
from diag.connectivity.interpolation_norms import BATCH_NORMS
from diag.errors import InvalidInput
from diag.snapshot.call_at import call_at
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.preserve import preserved


def bezier(start: NetworkState, control: NetworkState, end: NetworkState) -> Callable[[nn.Module, float], None]:
    """Writes the curve's point `alpha` into a model; entries without a control point follow the straight line."""
    line = straight(start, end)

    def write(model: nn.Module, alpha: float) -> None:
        line(model, alpha)
        if 0.0 < alpha < 1.0:
            a, c, b = (1 - alpha) ** 2, 2 * alpha * (1 - alpha), alpha**2
            overwrite(model, {n: a * start[n] + c * t + b * end[n] for n, t in control.items()})

    return write


def train_control_point(
    path: Interpolation,
    end: NetworkState,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    norm_stats: str = "reset",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The middle point after `steps` steps of Adam on the snapshot's batches in turn.

    BatchNorm uses each batch's own statistics while training. The models and all random states stay as they
    are. Raises InvalidInput for fewer than 1 step.
    """
    if steps < 1:
        raise InvalidInput(f"bezier_steps is {steps}; expected at least 1.")
    path.refuse_shares("Training a curve")
    model = path.copy
    trained = {n for n, p in model.named_parameters() if p.is_floating_point()}
    control = {n: torch.lerp(path.start[n], end[n], 0.5).requires_grad_() for n in trained}
    optimizer = torch.optim.Adam(control.values(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    batches = counted_batches(path.snapshot)
    with preserved(model):
        if norm_stats == "reset":
            _norms_in_training(model)
        for _ in range(steps):
            batch = batches[int(torch.randint(len(batches), (), generator=generator))]
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            with torch.enable_grad():
                point = {
                    n: (1 - t) ** 2 * path.start[n] + 2 * t * (1 - t) * c + t**2 * end[n]
                    for n, c in control.items()
                }
                outputs = call_at(model, point, batch.args, batch.kwargs)
                loss = path.snapshot.batch_loss(outputs, batch.targets)
                gradients = torch.autograd.grad(loss, list(control.values()), allow_unused=True)
            for value, gradient in zip(control.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
    return {n: c.detach() for n, c in control.items()}


def _norms_in_training(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()
