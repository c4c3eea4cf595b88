"""The curvature matrices: Hessian, Gauss-Newton and Fisher, by themselves and of a snapshot.

hessian = Hessian(model, loss_fn, batches)
hessian @ v                                  # (P,), over all the data
hessian.block(hessian.layers["encoder.0"])   # one layer's block
hessian.self_test.sentence()                 # how the products were found to be right
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from diag.curvature import fisher as fishers
from diag.curvature.objective import LossFn
from diag.curvature.operators import CurvatureOperator
from diag.curvature.products import Curvature, GeneralisedGaussNewton, HessianOfLoss, loss_gradient
from diag.curvature.vocabulary.jacobian import at_the_last_layer
from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.batch import Batch
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.objective.over_ranks import weight_of
from diag.snapshot.objective.own_loss import is_models_own
from diag.snapshot.snapshot import Snapshot


class Hessian(CurvatureOperator):
    """H = Hess L(theta), the matrix of second derivatives of the mean loss.

    At kinks (ReLU, max-pooling) it is the Hessian of the active linear piece. An embedding's padding row is
    held fixed, as in PyTorch's gradient.
    """

    def _curvature(self) -> Curvature:
        return HessianOfLoss()


class GaussNewton(CurvatureOperator):
    """G = (1/n) sum_i J_i^T S_i J_i, with J_i the Jacobian of the outputs and S_i the loss's Hessian in them.

    It is the Hessian of the loss with the network linearised; positive semi-definite where the loss is convex
    in the outputs (cross-entropy, squared error). Source: Schraudolph (2002), Neural Computation 14(7).
    """

    def _curvature(self) -> Curvature:
        return GeneralisedGaussNewton(loss_gradient, at=at_the_last_layer)


class Fisher(CurvatureOperator):
    """F = (1/n) sum_i J_i^T S_i J_i, with S_i the Fisher information of the model's own distribution.

    likelihood: "categorical" (outputs are logits; S = diag(p) - p p^T, so F is the Gauss-Newton matrix of the
    cross-entropy, whatever loss_fn is), "gaussian" (S = I: unit variance), or "empirical" ((1/n) sum_i g_i
    g_i^T from the gradients of the examples' losses, which is not the Fisher: Kunstner et al., arXiv:1905.12558).
    class_dim: the axis of the classes in the outputs; by default 1 where the targets have the outputs' other
    axes in that order (images), else the last one. ignored: the label of positions that do not count.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Batch],
        *,
        likelihood: str = "categorical",
        class_dim: int | None = None,
        ignored: int = IGNORED_LABEL,
        **settings: Any,
    ):
        super().__init__(model, loss_fn, batches, **settings)
        if likelihood not in fishers.LIKELIHOODS:
            raise InvalidInput(f"likelihood is {likelihood!r}; expected one of {', '.join(fishers.LIKELIHOODS)}.")
        self._settings |= {"likelihood": likelihood, "class_dim": class_dim, "ignored": ignored}

    def _curvature(self) -> Curvature:
        settings = self._settings
        return fishers.curvature(settings["likelihood"], settings["class_dim"], settings["ignored"])


def hessian(snapshot: Snapshot) -> Hessian:
    """The Hessian of the snapshot's mean loss over its data, self-tested."""
    return _of(snapshot, Hessian)


def gauss_newton(snapshot: Snapshot) -> GaussNewton:
    """The generalised Gauss-Newton matrix of the snapshot's mean loss over its data, self-tested."""
    if snapshot.loss_fn is None or is_models_own(snapshot.loss_fn):
        raise MissingQuantity(
            "the loss inside the model's outputs hides the logits; give loss_fn(outputs, targets)."
        )
    return _of(snapshot, GaussNewton)


def fisher(snapshot: Snapshot) -> Fisher:
    """The Fisher information of the snapshot's model: categorical where the loss compares classes, else Gaussian.

    Raises MissingQuantity where the targets are integers with which the loss compares the outputs as no classes.
    """
    if fishers.likelihood_of(snapshot.batches[0].targets) == "gaussian":
        return _of(snapshot, Fisher, likelihood="gaussian")
    class_dim, ignored = fishers.shape_of_logits(snapshot)
    return _of(snapshot, Fisher, likelihood="categorical", class_dim=class_dim, ignored=ignored)


def _of(snapshot: Snapshot, kind: type[Any], **settings: Any) -> Any:
    carried = snapshot.carry.next(kind.__name__, snapshot) if snapshot.carry is not None else None
    known = carried.self_test if carried is not None else None
    settings |= {"seed": snapshot.seed, "checked": known, "ranks": snapshot.together, "layers": snapshot.layers}
    if settings["ranks"] is not None:
        settings["weight"] = weight_of(snapshot, settings["ranks"])
    operator = kind(snapshot.model, snapshot.batch_loss, snapshot.cuttable(counted_batches(snapshot)), **settings)
    operator.deadline = snapshot.deadline
    test = operator.self_test  # now, so that what cannot be measured is refused here, before an algorithm begins
    if carried is not None:
        carried.self_test = replace(test, earlier=True)
        operator.carried = carried
    return operator
