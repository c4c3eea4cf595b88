"""Attention trained by gradient descent turns toward a support vector machine that selects tokens."""

from __future__ import annotations

import numpy
import torch
from reproducing import Card, Expectation, Lab
from scipy.optimize import minimize
from torch import Tensor, nn

import diag
from diag.instruments.attention import Attention

EXAMPLES, TOKENS, WIDTH, STEPS, RATE = 4, 3, 8, 1000, 0.05
MEASURED = (0, 10, 30, 100, 300, STEPS)


class OneAttention(nn.Module):
    """f(X) = v^T X^T softmax(X W z), with z the last token, one matrix W to train and a fixed head v."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
        self.register_buffer("head", nn.functional.normalize(torch.randn(WIDTH, dtype=torch.float64), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.weight @ x[:, -1, :, None]
        return (scores.transpose(1, 2).softmax(-1) @ x)[:, 0] @ self.head


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(1 + exp(-y f)), targets -1 or 1, mean over examples."""
    return nn.functional.softplus(-outputs * targets).mean()


def svm(x: Tensor, selected: Tensor) -> Tensor:
    """The smallest W (Frobenius) with (x_selected - x_t)^T W z >= 1 for all other tokens t: by its dual."""
    rows = []
    for tokens, chosen in zip(x.double(), selected, strict=True):
        rows += [
            torch.outer(tokens[chosen] - tokens[t], tokens[-1]).flatten() for t in range(TOKENS) if t != chosen
        ]
    a = torch.stack(rows).numpy()
    gram = a @ a.T
    found = minimize(
        lambda c: (0.5 * c @ gram @ c - c.sum(), gram @ c - 1),
        numpy.zeros(len(a)),
        jac=True,
        bounds=[(0, None)] * len(a),
        method="L-BFGS-B",
        options={"maxiter": 20_000, "ftol": 1e-15, "gtol": 1e-9},
    )
    w = found.x @ a
    assert (a @ w).min() > 1 - 1e-3, "the support vector machine's constraints do not hold"
    return torch.from_numpy(w).view(WIDTH, WIDTH)


def train_arm(lab: Lab, seed: int) -> tuple[float, list[Attention], list[float]]:
    """Gradient descent of a fixed step length, in float64, since the gradient falls with the entropy; the cosine of
    W with the SVM's solution, and what was measured."""
    torch.manual_seed(seed)
    model = OneAttention()
    x = nn.functional.normalize(torch.randn(EXAMPLES, TOKENS, WIDTH, dtype=torch.float64), dim=-1)
    y = torch.where(torch.rand(EXAMPLES) < 0.5, -1.0, 1.0).double()
    measured, norms = [], []
    with lab.recorder(
        f"seed-{seed}", model, optimizer=f"gradient descent, steps of length {RATE}", seed=seed
    ) as arm:
        for step in range(STEPS + 1):
            if step in MEASURED:
                result = diag.attention(diag.Snapshot(model, logistic, (x, y)))
                assert isinstance(result, Attention)
                arm.append_outcome(step, result)
                measured.append(result)
                norms.append(float(model.weight.detach().norm()))
            (gradient,) = torch.autograd.grad(logistic(model(x), y), [model.weight])
            with torch.no_grad():
                model.weight -= RATE * gradient / gradient.norm().clamp_min(1e-30)
    selected = (x @ model.weight @ x[:, -1, :, None]).squeeze(-1).argmax(1)
    w = model.weight.detach().double()
    solution = svm(x, selected)
    cosine = float((w * solution).sum() / w.norm() / solution.norm())
    lab.say(f"  seed {seed}: cosine {cosine:.4f}, |W| {norms[-1]:.1f}")
    return cosine, measured, norms


def run(lab: Lab) -> list[Expectation]:
    """Three draws of tokens, heads and labels."""
    found = []
    for seed in (0, 1, 2):
        cosine, measured, norms = train_arm(lab, seed)
        first, last = measured[0], measured[-1]
        found += [
            Expectation(f"seed {seed}: cosine of W with the SVM's solution", "> 0.95", cosine, low=0.95),
            Expectation(f"seed {seed}: entropy at the start", 1.0, first.median_entropy, 1 - 1e-6, 1.0),
            Expectation(f"seed {seed}: entropy at the end", "toward 0", last.median_entropy, high=0.1),
            Expectation(f"seed {seed}: norm of W, end over step 100", "grows", norms[-1] / norms[3], low=3.0),
            Expectation(
                f"seed {seed}: smallest gap of the selected token at the end",
                "grows",
                float(last.smallest_gaps[0]),
                1.0,
            ),
        ]
    return found


CARD = Card(
    title="Attention as a support vector machine",
    source="Tarzanagh et al. 2023, arXiv:2308.16898",
    claim=(
        "Trained by gradient descent on a fixed head, the matrix W of one attention grows without bound, and its "
        "direction becomes that of the smallest W (Frobenius) that separates each selected token from the others."
    ),
    takes="10 seconds",
    run=run,
    notes="The selected tokens are those that training ended on, as in the authors' code; in float32 the "
    "gradient is "
    "rounding long before the direction has settled.",
)
