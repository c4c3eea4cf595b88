"""Records of steps with known courses, for the checks of the optimisation."""

import dataclasses

import numpy

from diag.snapshot.history import empty_history

LAYERS = {"0.weight": 256, "0.bias": 16, "2.weight": 256, "2.bias": 16}


def record(losses, ratio=1e-2, *, norm=None, clip=1.0, rates=None, **optimizer):
    """`losses` (T,): the loss at each step. ratio, norm, clip, rates: of each step, or one number for all.

    The large tensors have norm 4 (or `norm`), a step of `ratio` times that and a gradient norm of 1.
    """
    losses = numpy.asarray(losses, float)
    made = empty_history(LAYERS, len(losses))
    norms = numpy.broadcast_to(4.0 if norm is None else norm, losses.shape)
    sizes = numpy.broadcast_to(ratio, losses.shape) * norms
    table = numpy.ones((len(losses), len(LAYERS)), numpy.float32)
    settings = {"kind": "SGD", "lr": 0.1, "weight_decay": 0.0} | optimizer
    return dataclasses.replace(
        made,
        loss=losses,
        loss_finite=numpy.isfinite(losses),
        learning_rate=numpy.broadcast_to(0.1 if rates is None else rates, losses.shape).astype(float),
        gradient_norm=table,
        applied_gradient_norm=numpy.full(len(losses), 2.0 * clip),
        parameter_norm=(table * norms[:, None]).astype(numpy.float32),
        update_norm=(table * sizes[:, None]).astype(numpy.float32),
        optimizer=settings | {"groups": (settings,)},
    )


def falling(steps=100, start=2.3, end=0.1):
    return numpy.geomspace(start, end, steps)
