"""Per-example gradients without materialising them: exact norms, inner products, projections and sums.

gradients = ModelGradients(model, loss_fn, batches)
gradients.norms()           # (n,)
gradients.gram()            # (n, n)
gradients.by_layer()["encoder.0"].mean()
gradients.coverage          # how much of the gradient this covers, and by which methods
"""

from __future__ import annotations

from diag.errors import Unsupported
from diag.gradients.engine import ModelGradients
from diag.gradients.from_matrix import MatrixGradients, StackedGradients, as_gradients
from diag.gradients.over_ranks import GradientsOfRanks
from diag.gradients.per_example import Coverage, LayerGradients, PerExampleGradients
from diag.gradients.queries import Gram, GroupGram, GroupSums, Projection, SquaredNorms
from diag.gradients.step import StepGradients, plan_for_steps
from diag.snapshot.batch import COUPLED_EXAMPLES
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.objective.over_ranks import scale_of
from diag.snapshot.snapshot import Snapshot


def per_example_gradients(snapshot: Snapshot) -> PerExampleGradients:
    """The gradients of the examples' losses, as an object that answers without holding n x P numbers.

    With ranks=, of all ranks' examples (see `over_ranks`).

    Raises InvalidInput where the loss is not a mean or not finite, Unsupported where examples depend on each
    other; what the first few examples do not show is raised when the gradients are first asked for something.
    """
    together = snapshot.together
    if together is None:
        return _own_gradients(snapshot)
    scale = scale_of(snapshot, together)
    made: list[ModelGradients] = []
    together.all_succeed(lambda: made.append(_own_gradients(snapshot)))
    return GradientsOfRanks(made[0], together, scale)


def _own_gradients(snapshot: Snapshot) -> ModelGradients:
    batches = snapshot.cuttable(counted_batches(snapshot))
    if whole := [batch for batch in batches if batch.coupled]:
        raise Unsupported(whole[0].why or COUPLED_EXAMPLES)
    gradients = ModelGradients(snapshot.model, snapshot.batch_loss, batches)
    gradients.deadline = snapshot.deadline
    gradients.prepare()
    return gradients


__all__ = [
    "Coverage",
    "GradientsOfRanks",
    "Gram",
    "GroupGram",
    "GroupSums",
    "LayerGradients",
    "MatrixGradients",
    "ModelGradients",
    "PerExampleGradients",
    "Projection",
    "SquaredNorms",
    "StackedGradients",
    "StepGradients",
    "as_gradients",
    "dry_run",
    "per_example_gradients",
    "plan_for_steps",
    "queries",
]
