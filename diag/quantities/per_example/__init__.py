"""Per-example gradients without materialising them: exact norms, inner products, projections and sums."""

from diag.quantities.per_example.engine import ModelGradients, per_example_gradients
from diag.quantities.per_example.gradients import Coverage, LayerGradients, MatrixGradients, PerExampleGradients

__all__ = [
    "Coverage",
    "LayerGradients",
    "MatrixGradients",
    "ModelGradients",
    "PerExampleGradients",
    "per_example_gradients",
]
