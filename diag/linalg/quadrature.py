"""The spectral density of an operator by stochastic Lanczos quadrature, and what follows from its moments.

A Lanczos run of m steps from a random unit vector v gives Gauss nodes theta_j and weights tau_j^2 with

    sum_j tau_j^2 f(theta_j) ~= v^T f(A) v,   E v^T f(A) v = tr f(A) / size,

exact in v for polynomials of degree 2 m - 1. Averaged over probes this is the spectral measure (Ubaru, Chen
and Saad 2017; Ghorbani, Krishnan and Xiao 2019). Pairs that have converged can be deflated: each is one
atom of weight 1 / size, and the probes see the rest only, which lowers the error where outliers dominate.

How far the distribution function can be off is known for a single probe, too. (1) The rule resolves the
distribution of v, F_v, to a node: by the inequalities of Chebyshev, Markov and Stieltjes (Szego, Orthogonal
Polynomials, 3.41) F_v lies between the sums of the weights before theta_j and up to theta_j+1 for every t in
[theta_j, theta_j+1). (2) v is Gaussian in the eigenvectors' basis, so F_v(t) is the share of p m among m squared
normal numbers, Beta(p m / 2, (1 - p) m / 2) where p is the share of eigenvalues sought: mean p, variance
2 p (1 - p) / (m + 2), and asin sqrt F_v has the standard deviation 1 / sqrt(2 m) whatever p is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.deflation import DeflatedOperator
from diag.linalg.lanczos import LanczosRun, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import normal


@dataclass(frozen=True)
class Estimate:
    """A stochastic estimate: its `value`, `standard_error`, how many `num_probes` and the `seed`."""

    value: float
    standard_error: float
    num_probes: int
    seed: int


@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete stand-in for the distribution of the eigenvalues.

    `nodes` and `weights` (probes, steps), float64; each row of weights sums to the share of the spectrum that
    the probes stand for: (size - deflated) / size. `atoms` (deflated,) are eigenvalues known one by one, each
    of weight 1 / size. `size`, `seed`, `num_products`. `exact`: every node is an eigenvalue with its true weight.
    """

    nodes: Tensor
    weights: Tensor
    atoms: Tensor
    size: int
    seed: int
    num_products: int
    exact: bool = False

    @property
    def num_probes(self) -> int:
        """How many start vectors the rules are of."""
        return len(self.nodes)

    def distribution(self, grid: Tensor) -> Tensor:
        """Share of eigenvalues <= each point of `grid` (g,), float64: a step function."""
        below = (self.nodes[..., None] <= grid).double()
        return (self.weights[..., None] * below).sum(1).mean(0) + self._atoms_below(grid)

    def distribution_bounds(self, grid: Tensor, deviations: float = 2.0) -> tuple[Tensor, Tensor]:
        """The least and the largest share of eigenvalues <= each point of `grid` (g,), two of (g,), float64.

        What the rules cannot resolve, and beyond it so many standard `deviations` of the random draw of the probes:
        two cover the true share at a point in at least 95 of 100 cases.
        """
        if self.exact:
            return self.distribution(grid), self.distribution(grid)
        rest = self._rest
        pairs = [_resolved(n[w > 0], w[w > 0] / rest, grid) for n, w in zip(self.nodes, self.weights, strict=True)]
        low, high = (torch.stack(side).mean(0).clamp(0, 1) for side in zip(*pairs, strict=True))
        turn = deviations / math.sqrt(2 * rest * self.size * self.num_probes)
        low = (low.sqrt().asin() - turn).clamp_min(0).sin().square()
        high = (high.sqrt().asin() + turn).clamp_max(math.pi / 2).sin().square()
        known = self._atoms_below(grid)
        return rest * low + known, rest * high + known

    @property
    def _rest(self) -> float:
        """The share of the eigenvalues that the probes stand for."""
        return (self.size - len(self.atoms)) / self.size

    def density(
        self, grid: Tensor, width: float | None = None, *, atoms: bool = True, scale: float | None = None
    ) -> Tensor:
        """Density on `grid` (g,), smoothed with a Gaussian of standard deviation `width` (default: 1 % of the
        range of the nodes); the integral over all of the line is the share of the spectrum it stands for.

        With `scale` the smoothing is done in asinh(value / scale), where spectra over many decades are seen
        whole; the density is still per unit of eigenvalue.
        """
        width = width or default_width(self)
        nodes, known, jacobian = self.nodes, self.atoms, torch.ones_like(grid)
        if scale is not None:
            grid, nodes, known = (torch.asinh(x / scale) for x in (grid, nodes, known))
            jacobian = 1 / (scale * torch.cosh(grid))
        smooth = (self.weights[..., None] * _gaussian(grid - nodes[..., None], width)).sum(1).mean(0)
        if atoms and len(known):
            smooth = smooth + _gaussian(grid - known[:, None], width).sum(0) / self.size
        return smooth * jacobian

    def moment(self, power: int) -> Estimate:
        """tr A^power, with its standard error."""
        sums = self.size * (self.weights * self.nodes**power).sum(1)
        value = float(sums.mean() + (self.atoms**power).sum())
        return Estimate(value, self._moment_error(sums, power), self.num_probes, self.seed)

    def trace(self) -> Estimate:
        """The trace of A, as the quadrature has it."""
        return self.moment(1)

    def frobenius_norm(self) -> Estimate:
        """|A|_F, with the error of its square carried over."""
        square = self.moment(2)
        norm = math.sqrt(max(square.value, 0.0))
        error = square.standard_error / (2 * norm) if norm else 0.0
        return Estimate(norm, error, self.num_probes, self.seed)

    def _moment_error(self, sums: Tensor, power: int) -> float:
        """The larger of what the probes' spread says and what theory says of Gaussian directions: the variance
        of n v^T B v is 2 (tr B^2 - (tr B)^2 / n) n / (n + 2), so that one probe has an error too."""
        rest = self.size - len(self.atoms)
        squares = self.size * (self.weights * self.nodes ** (2 * power)).sum(1).mean()
        theory = (2 * (squares - sums.mean() ** 2 / rest).clamp_min(0) * rest / (rest + 2) / len(sums)).sqrt()
        spread = _spread(sums) if len(sums) > 1 else torch.zeros((), dtype=torch.float64)
        return max(float(theory), float(spread))

    def _atoms_below(self, grid: Tensor) -> Tensor:
        return (self.atoms[:, None] <= grid).double().sum(0) / self.size


def spectral_measure(
    operator: LinearOperator,
    *,
    num_probes: int = 1,
    steps: int = 80,
    deflate: Tensor | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> SpectralMeasure:
    """The spectral measure from `num_probes` independent Gaussian start vectors, `steps` products each.

    Args: deflate, orthonormal rows (k, size), eigenvectors that are known: one product each gives their
    Rayleigh quotients, and the probes see only what is orthogonal to them.
    """
    if num_probes < 1 or steps < 1:
        raise InvalidInput(f"num_probes is {num_probes} and steps is {steps}; expected at least 1 of each.")
    target: LinearOperator = operator
    atoms = torch.zeros(0, dtype=torch.float64)
    if deflate is not None:
        target = DeflatedOperator(operator, deflate)
        atoms, _ = target.known_part()
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for _ in range(num_probes):
        start = gaussian_probe(target, generator)
        runs.append(run_lanczos(target, None, max_products=steps, start=start, memory=memory))
    products = len(atoms) + sum(run.num_products for run in runs)
    return measure_of(runs, operator.size, seed, atoms, products)


def gaussian_probe(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """A Gaussian vector of the operator's kind; inside the complement where directions are deflated."""
    v = operator.spread.drawn(operator.size, normal(generator))
    v = v.to(dtype=operator.dtype, device=operator.device)
    return operator.project(v) if isinstance(operator, DeflatedOperator) else v


def measure_of(runs: list[LanczosRun], size: int, seed: int, atoms: Tensor, num_products: int) -> SpectralMeasure:
    """Puts the quadrature rules of several runs side by side; shorter ones are filled up with weight 0."""
    rules = [quadrature_rule(run.first_cycle) for run in runs]
    longest = max(len(nodes) for nodes, _ in rules)
    nodes = torch.stack([_padded(nodes, longest) for nodes, _ in rules])
    weights = torch.stack([_padded(weights, longest) for _, weights in rules])
    return SpectralMeasure(nodes, weights * (size - len(atoms)) / size, atoms, size, seed, num_products)


def quadrature_rule(bordered: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights (m,) of the start vector, from its T (bordered, as Lanczos keeps it)."""
    nodes, columns = torch.linalg.eigh(bordered[:-1, :-1])
    return nodes, columns[0].square()


def default_width(measure: SpectralMeasure) -> float:
    """1 % of the range of the nodes (our choice; what looks like one peak or two depends on it)."""
    return 0.01 * float(measure.nodes.max() - measure.nodes.min()) or 1e-12


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


def _resolved(nodes: Tensor, weights: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds that a Gauss rule (m,) puts on its measure up to each point of the grid: see the module's text."""
    nodes, order = nodes.sort()
    sums = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
    reached = (nodes[:, None] <= grid).sum(0)
    return sums[(reached - 1).clamp_min(0)], sums[(reached + 1).clamp_max(len(nodes))]


def _gaussian(offset: Tensor, width: float) -> Tensor:
    return torch.exp(-0.5 * (offset / width) ** 2) / (width * math.sqrt(2 * math.pi))


def _spread(samples: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension, of two samples or more."""
    return samples.std(0) / math.sqrt(len(samples))
