"""When is gradient descent on random batches stable in the mean square, for a quadratic that all examples share?

Near a minimum at which every example's gradient vanishes a step on a batch of B of the n examples, drawn without
replacement, is x <- x - eta H_batch x, and E x x^T stays bounded exactly for eta up to

    eta* = 2 / lambda_max(C^+ D),    C = (H (+) H) / 2,    D = (1 - pi) H (x) H + pi / n sum_i H_i (x) H_i,

pi = (n - B) / (B (n - 1)); for B = n it is 2 / lambda_max(H). Two conditions are necessary and cheaper. Source:
Mulayoff and Michaeli 2024, arXiv:2306.07850, theorem 1 and equations 15 and 16.

Here H_i = A_i^T A_i for rows A_i (K, P) of each example, so that H = A^T A / n has rank n K at most and all of it
follows from the Gram matrix A A^T. In the eigenvectors of H, whose values are lambda, C^+ D is similar to

    X -> S * D(S * X),    S_ab = (2 / (lambda_a + lambda_b))^(1/2),    D(X) = (1 - pi) H X H + pi / n sum H_i X H_i

(* entry by entry), which is symmetric: Lanczos finds its largest eigenvalue from products with square matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import FunctionOperator

SMALLEST = 1e-10  # of the largest eigenvalue of H: what lies below is its null space


def noise_factor(num_examples: int, batch_size: int) -> float:
    """pi = (n - B) / (B (n - 1)): 1 for batches of one, 0 for all examples at once."""
    if num_examples < 2:
        return 0.0
    return max(num_examples - batch_size, 0) / (batch_size * (num_examples - 1))


def scatter_bound(largest: float, shares: Tensor, pi: float) -> float:
    """Equation 15: eta <= 2 lambda / (lambda^2 + pi mean_i (v^T H_i v - lambda)^2), v the top eigenvector of H.

    shares (n,): v^T H_i v. Their mean is lambda where H is the mean of the H_i.
    """
    return 2 * largest / (largest**2 + pi * float((shares.double() - largest).square().mean()))


def norm_bound(trace: float, square: float, mean_square: float, pi: float) -> float:
    """Equation 16: eta <= 2 tr H / ((1 - pi) |H|_F^2 + pi mean_i |H_i|_F^2); `square` and `mean_square` are the
    squared norms."""
    return 2 * trace / ((1 - pi) * square + pi * mean_square)


def squared_norms(rows: Tensor) -> Tensor:
    """|H_i|_F^2 = |A_i A_i^T|_F^2 of each example (n,), from its rows (n, K, P)."""
    return torch.einsum("nkp,nlp->nkl", rows.double(), rows.double()).square().sum((1, 2))


def mean_square_threshold(rows: Tensor, batch_size: int, *, seed: int = 0) -> float:
    """eta*, the largest learning rate that is stable in the mean square, to 1e-6.

    rows: (n, K, P) of all examples, H_i = A_i^T A_i. Memory is that of a hundred matrices of n K squared.
    Raises InvalidInput where H is zero.
    """
    n, outputs, _ = rows.shape
    flat = rows.flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(flat @ flat.T / n)
    kept = values > SMALLEST * values[-1]
    values = values[kept]
    if not len(values) or not values[-1] > 0:
        raise InvalidInput(
            "The Gauss-Newton matrix is zero, so any learning rate is stable; there is no threshold."
        )
    inside = vectors[:, kept] * (n * values).sqrt()  # the rows in the eigenvectors of H
    each = inside.view(n, outputs, -1)
    scale = (2 / (values[:, None] + values)).sqrt()
    pi = noise_factor(n, batch_size)

    def product(flat_matrix: Tensor) -> Tensor:
        x = scale * flat_matrix.view(len(values), -1)
        middle = (each @ x) @ each.transpose(1, 2)  # A_i X A_i^T
        noise = inside.T @ (middle @ each).flatten(0, 1)
        return (scale * ((1 - pi) * values[:, None] * x * values + pi / n * noise)).flatten()

    operator = FunctionOperator(product, len(values) ** 2, torch.float64, rows.device)
    return 2 / float(eigenpairs(operator, largest=1, tolerance=1e-6, seed=seed, vectors=False).values[0])
