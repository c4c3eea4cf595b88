"""Is the curvature product of this model right? A test on a few examples, run before an operator's first use.

Several constructs give wrong products and raise nothing: fused losses that store their own derivative,
functions whose backward cannot be differentiated, layers that change state in the forward pass. The test
takes the product along two directions, compares each with a finite difference of first derivatives, asks
whether the gradient is repeatable and is the derivative of the loss, whether the forward pass left parameters
and buffers alone, and whether the product is symmetric. It runs in float64 where the model allows, since
there a step can be so small that no ReLU changes side; else in float32 along smooth directions only.

What fails has no product: the finite difference itself is used where it is good enough, else Unsupported says
why. Thresholds are our choice, uncalibrated.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from diag.curvature.guards import refuse_impossible
from diag.curvature.objective import Objective
from diag.curvature.probe import (
    hold_fixed,
    in_float64,
    probe_batch,
    random_direction,
    refuse_sums,
    rows_held_fixed,
)
from diag.curvature.products import Curvature
from diag.curvature.record import WARN_ABOVE, ProductMethod, SelfTest
from diag.errors import DiagError, InvalidInput, Unsupported, first_line
from diag.snapshot.autograd_graph import nodes_before

FAIL_ABOVE = {"float64": 0.03, "float32": 0.3}  # a float32 difference crosses kinks, so it can prove less
FALLBACK_BELOW = 0.03
# The gap is looked at in each parameter by itself, so that a large layer does not hide what is wrong in a small
# one; a part of the product below this share of the whole is compared with that share.
SMALLEST_PART = {"float64": 0.01, "float32": 1.0}
REPEATABLE_WITHIN = 1e-3
# Steps relative to the length of the parameter vector. No single one is good: the smallest avoids kinks, the
# largest drowns the rounding of models that compute a part in float32 whatever their weights are.
DIFFERENCE_STEPS = {"float64": (1e-10, 1e-8, 1e-6, 1e-4, 1e-3), "float32": (1e-5, 1e-4, 1e-3)}
FALLBACK_STEPS = {"float64": (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4), "float32": (1e-5, 1e-4, 1e-3, 1e-2)}


def run_self_test(curvature: Curvature, objective: Objective, seed: int = 0) -> SelfTest:
    """Test the product of `curvature` with a few of the objective's examples.

    Raises InvalidInput where the loss cannot be computed or is not finite, and Unsupported, with the reason
    and what to do, where no correct product is available.
    """
    refuse_impossible(objective.model)
    probe = probe_batch(objective)
    refuse_sums(objective, probe)
    trial, gradient = in_float64(objective.on([probe]))
    with trial.measured():
        curvature.check(trial, trial.parameters())
        examination = _Examination(curvature, trial, gradient, seed)
        record = examination.outcome()
    if record.differenced or objective.precision == trial.precision:
        return record
    true = examination.direction, examination.product
    return replace(record, rounding_error=_rounding_error(curvature, objective.on([probe]), *true))


class Gap(NamedTuple):
    """||product - finite difference|| / ||product|| in the worst parameter: the part that rounding does not
    explain, all of it, and the parameter's name. Gaps compare by the first."""

    unexplained: float
    total: float
    parameter: str


class _Examination:
    """The steps of one self-test; each raises Unsupported or InvalidInput, or leaves a number."""

    def __init__(self, curvature: Curvature, trial: Objective, gradient: Tensor, seed: int):
        self.gradient = gradient
        self.curvature, self.trial, self.seed = curvature, trial, seed
        # One true product, for a caller that compares with it.
        self.direction = self.product = torch.empty(0, dtype=torch.float32)
        self.theta = trial.parameters()
        self.precision = "float64" if trial.dtype == torch.float64 else "float32"
        self.scale = max(trial.length(self.theta), 1e-3)
        self.fixed = rows_held_fixed(trial.model, trial)

    def outcome(self) -> SelfTest:
        self.repeatability = self._repeatability()
        self.rounding = self._rounding()
        self.gradient_error = self._gradient_error()
        failure = self._double_backward()
        if isinstance(failure, SelfTest):
            return failure
        return self._fall_back(failure)

    # -- first derivatives -------------------------------------------------------------------------

    def _repeatability(self) -> float:
        state = dict(self.trial.model.named_buffers()) | self.trial.constants
        state |= dict(zip(self.trial.layout.names, self.theta, strict=True))
        versions = {name: tensor._version for name, tensor in state.items()}
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):  # other draws than the first gradient's
            seed(self.seed + 1)
        again = self.trial.gradient(self.theta)
        changed = [name for name, tensor in state.items() if tensor._version != versions[name]]
        if changed:
            raise Unsupported(
                f"A forward pass in evaluation mode changes {changed[0]} in place, so the loss is not a function "
                "of the parameters; switch that update off in evaluation mode."
            )
        if not self.trial.everywhere(bool(torch.isfinite(again).all())):
            raise InvalidInput(
                "The gradient of the loss is not finite on the data; look for the step at which training broke."
            )
        difference = self._relative(again, self.gradient)
        if not difference <= REPEATABLE_WITHIN:
            self._refuse_reader_of_memory(again)
            raise Unsupported(
                f"Two evaluations of the same gradient differ by {difference:.1e} of its length: the model keeps a "
                "state or draws random numbers in evaluation mode (such as F.dropout without training=); switch "
                "that off."
            )
        return difference

    def _refuse_reader_of_memory(self, gradient: Tensor) -> None:
        """Raises Unsupported where the gradient differs because of the kernels, not from one time to the next."""
        if self._relative(self.trial.gradient(self.theta), gradient) <= REPEATABLE_WITHIN:
            raise Unsupported(
                "The model's gradient depends on which kernels compute its convolutions: it reads the memory of "
                "their outputs directly (as_strided, a foreign kernel); call .contiguous() on them first."
            )

    def _gradient_error(self) -> float:
        direction = self._unit(self.gradient)
        if direction is None:
            return 0.0
        slope = self.trial.inner(self.gradient, direction)
        views = self.trial.layout.views(direction)
        errors = []
        for relative in DIFFERENCE_STEPS[self.precision]:
            step = relative * self.scale
            ahead, behind = (self.trial.value(self.trial.shifted(self.theta, views, s)) for s in (step, -step))
            noise = 100 * torch.finfo(self.trial.dtype).eps * abs(ahead) / step
            errors.append(abs((ahead - behind) / (2 * step) - slope) / max(abs(slope), noise, 1e-300))
            if errors[-1] < WARN_ABOVE["float64"]:
                break
        if min(errors) > FAIL_ABOVE[self.precision] and abs(slope) > 10 * self.trial.length(self.rounding):
            raise Unsupported(
                f"The gradient is not the derivative of the loss ({min(errors):.0%} off along its own direction), "
                "as with detached terms, straight-through estimators or a custom backward; such a loss has no "
                "curvature: measure a loss without them."
            )
        return min(errors)

    def _rounding(self) -> Tensor:
        """What a rounding of every parameter changes in the gradient: the part of it that is rounding, flat.

        A model that computes a part in float32 whatever its weights are shows it here.
        """
        rounded = self.trial.shifted(self.theta, self.theta, 4 * torch.finfo(self.trial.dtype).eps)
        return self.trial.gradient(rounded).sub_(self.gradient)

    # -- second derivatives ------------------------------------------------------------------------

    def _double_backward(self) -> SelfTest | str:
        """The passed test, or why double backward failed."""
        try:
            graph = self.curvature.graph(self.trial, self.theta, self.trial.batches)

            def product(direction: Tensor) -> Tensor:
                pieces = graph.product(self.trial.layout.views(direction), True)
                return self.trial.layout.flatten(pieces, self.gradient)

            along = {"gradient": self._unit(self.gradient)}
            # A random direction meets every layer, but in float32 also every kink near by.
            if self.precision == "float64" or along["gradient"] is None:
                along["random"] = self._random()
            else:
                along["top"] = self._unit(product(along["gradient"]))
            directions = {name: d for name, d in along.items() if d is not None}
            products = {name: product(d) for name, d in directions.items()}
            undifferentiable = error_node(graph)
        except DiagError:
            raise
        except RuntimeError as error:  # an operation without a second derivative says so when it is reached
            return f"the loss cannot be differentiated twice ({first_line(error)})"
        if undifferentiable:
            return "the loss holds a function marked once-differentiable"
        gaps = {name: self._disagreement(d, products[name]) for name, d in directions.items()}
        worst = max(gaps.values())
        if worst.unexplained > FAIL_ABOVE[self.precision]:
            return (
                f"double backward differs from a finite difference by {worst.total:.0%}, most in {worst.parameter}"
            )
        asymmetry = self._asymmetry(directions, products)
        if asymmetry > FAIL_ABOVE[self.precision]:
            return f"the double-backward product is not symmetric ({asymmetry:.0%})"
        name = next(reversed(directions))
        self.direction, self.product = directions[name], products[name]
        errors = {name: gap.total for name, gap in gaps.items()}
        return self._record(method=ProductMethod.DOUBLE_BACKWARD, errors=errors, asymmetry=asymmetry)

    def _disagreement(self, direction: Tensor, product: Tensor) -> Gap:
        """The gap to a finite difference at the best of the steps.

        A step at which rounding is not far below the product can show nothing and is passed over; where that is
        so at every step, the product must vanish within the rounding of the last one.
        """
        found: list[Gap] = []
        unseen = Gap(0.0, 0.0, "")
        for relative in DIFFERENCE_STEPS[self.precision]:
            step = relative * self.scale
            difference, noise = self._difference(direction, step), self.rounding * (2 / step)
            *sizes, rounding = self.trial.lengths([product, difference, noise]).tolist()
            size = max(sizes)
            if rounding > 0.1 * size:
                share = size / (10 * rounding)
                unseen = Gap(share, share, self.trial.layout.names[0])
                continue
            found.append(self._largest_gap(product, difference, noise))
            if found[-1].unexplained < WARN_ABOVE["float64"]:
                break
        return min(found, default=unseen)

    def _largest_gap(self, product: Tensor, difference: Tensor, noise: Tensor) -> Gap:
        vectors = (product - difference, product, difference, noise)
        lengths = self.trial.lengths([piece for v in vectors for piece in self.trial.layout.views(v)])
        least = max(SMALLEST_PART[self.precision] * self.trial.length(product), 1e-300)
        gaps = []
        for name, (gap, p, d, n) in zip(self.trial.layout.names, lengths.view(4, -1).T.tolist(), strict=True):
            size = max(p, d, least)
            gaps.append(Gap(max(gap - n, 0.0) / size, gap / size, name))
        return max(gaps)

    # -- the finite difference as a product --------------------------------------------------------

    def _fall_back(self, reason: str) -> SelfTest:
        directions = {"gradient": self._unit(self.gradient), "random": self._random()}
        known = {name: d for name, d in directions.items() if d is not None}
        steps = FALLBACK_STEPS[self.precision]
        table = {
            name: [self._difference(d, relative * self.scale) for relative in steps] for name, d in known.items()
        }
        changes = [
            {name: self._relative(row[k + 1], row[k]) for name, row in table.items()} for k in range(len(steps) - 1)
        ]
        best = min(range(len(changes)), key=lambda k: max(changes[k].values()))
        asymmetry = self._asymmetry(known, {name: row[best] for name, row in table.items()})
        worst = max(*changes[best].values(), asymmetry)
        if not worst <= FALLBACK_BELOW:
            raise Unsupported(
                f"No correct curvature product is available: {reason}, and finite differences are no better than "
                f"{worst:.0%}; replace that operation by one of plain torch functions for the measurement."
            )
        return self._record(
            method=ProductMethod.FINITE_DIFFERENCE,
            errors=changes[best],
            asymmetry=asymmetry,
            step=steps[best],
            reason=reason,
        )

    # -- small pieces ------------------------------------------------------------------------------

    def _record(self, **fields: object) -> SelfTest:
        return SelfTest(
            precision=self.precision,
            num_examples=self.trial.num_examples,
            gradient_error=self.gradient_error,
            repeatability=self.repeatability,
            **fields,  # type: ignore[arg-type]
        )

    def _difference(self, direction: Tensor, step: float) -> Tensor:
        views = self.trial.layout.views(direction)
        return self.curvature.finite_difference(self.trial, self.theta, views, step)

    def _unit(self, vector: Tensor) -> Tensor | None:
        """The unit vector along `vector` without the rows that are held fixed; None for zero."""
        vector = hold_fixed(vector.clone(), self.trial, self.fixed)
        size = self.trial.length(vector)
        return vector / size if size > 0 else None

    def _random(self) -> Tensor:
        return random_direction(self.trial, self.theta, self.seed)

    def _asymmetry(self, directions: dict[str, Tensor], products: dict[str, Tensor]) -> float:
        first, last = next(iter(directions)), next(reversed(directions))
        size = max(*self.trial.lengths([products[first], products[last]]).tolist(), 1e-300)
        there = self.trial.inner(directions[first], products[last])
        back = self.trial.inner(directions[last], products[first])
        return abs(there - back) / size

    def _relative(self, a: Tensor, b: Tensor) -> float:
        difference, *sizes = self.trial.lengths([a - b, a, b]).tolist()
        return float(difference / max(*sizes, 1e-300))


def _rounding_error(curvature: Curvature, own: Objective, direction: Tensor, product: Tensor) -> float:
    """How far the product in `own`'s precision is from the true `product` with `direction`, relative."""
    with own.measured():
        graph = curvature.graph(own, own.parameters(), own.batches)
        rounded = own.layout.flatten(graph.product(own.layout.views(direction.to(own.dtype)), False), direction)
    difference, size = own.lengths([rounded - product, product]).tolist()
    if not size:
        return 0.0
    error = float(difference / size)
    if not error <= FAIL_ABOVE["float32"]:
        raise Unsupported(
            f"The product in {own.precision} differs from the one in {product.dtype} by {error:.0%}; measure with "
            "precision='float64'."
        )
    return error


def error_node(graph: object) -> bool:
    """True where a graph holds a node that stands for "cannot be differentiated again"."""
    roots = [t.grad_fn for name in ("gradient", "pulled") for t in getattr(graph, name, ()) if t is not None]
    return any(n.name() in ("Error", "torch::autograd::Error", "NotImplemented") for n in nodes_before(roots))
