"""Representation: how many directions each layer uses, which of its dimensions are dead or duplicates, and
how alike layers are to each other, to themselves under small noise, and to an earlier snapshot.

Redundancy is the mean squared correlation of two dimensions (Barlow Twins' second term) above what chance gives.
None of these numbers has been tried as a judgement, so they describe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import MissingQuantity, layer_called
from diag.linalg.geometry.similarity import centred_gram, cka_between, covariance_rank
from diag.ranges import Count, Size
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.layers import LayerOutputs, as_layer_outputs

SOURCE = "Zbontar et al. 2021, Barlow Twins, arXiv:2103.03230; Kornblith et al. 2019, arXiv:1905.00414 (CKA)"
DEAD_FEATURE, SAME_FEATURE = 1e-4, 0.999
MOST_FEATURES, EXAMPLES_COMPARED = 2048, 512
NOISE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Representation(Result):
    """The layers are in the order of the forward pass; "used" dimensions are those that are not dead."""

    effective_rank: float = measured("exp of the entropy of the covariance's eigenvalues, last layer")
    dead: float = measured("dimensions that hardly vary over the examples, last layer", unit="share")
    redundancy: float = measured("mean squared correlation of two used dimensions less chance, last layer")
    invariance: float = measured("mean correlation of a used dimension with itself under noise, last layer")
    previous_cka: float = measured("debiased linear CKA of the last layer with the earlier snapshot's")
    previous_cka_standard_error: float = measured("its jackknife standard error")
    num_rows: int = measured("examples (or tokens)")
    num_compared: int = measured("of these, those that CKA and invariance are measured on")
    layers: tuple[str, ...] = measured("the layers")
    widths: tuple[int, ...] = measured("dimensions measured, positions other than padding averaged")
    effective_ranks: NDArray[numpy.float64] = measured("effective rank", shape="(layers,)")
    dead_shares: NDArray[numpy.float64] = measured("dead dimensions", unit="share", shape="(layers,)")
    duplicates: NDArray[numpy.float64] = measured(
        "used dimensions that an earlier one repeats (|correlation| > 0.999)", unit="share", shape="(layers,)"
    )
    redundancies: NDArray[numpy.float64] = measured("redundancy above chance 1/(n - 1)", shape="(layers,)")
    invariances: NDArray[numpy.float64] = measured(
        "invariance under noise", remark="NaN: no floating inputs", shape="(layers,)"
    )
    cka: NDArray[numpy.float64] = measured("debiased linear CKA between layers", shape="(layers, layers)")
    cka_errors: NDArray[numpy.float64] = measured("its jackknife standard errors", shape="(layers, layers)")
    previous_ckas: NDArray[numpy.float64] = measured("CKA with the earlier snapshot's layer", shape="(layers,)")
    previous_errors: NDArray[numpy.float64] = measured("its jackknife standard errors", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        before = (
            ""
            if math.isnan(self.previous_cka)
            else (
                f", and its CKA with the earlier snapshot is {format_number(self.previous_cka)} ± "
                f"{format_number(self.previous_cka_standard_error, 2)}"
            )
        )
        return Verdict(
            Level.DESCRIPTION,
            f"The last layer looked at, {layer_called(self.layers[-1])}, uses about "
            f"{format_number(self.effective_rank)} of {self.widths[-1]:,} directions "
            f"(effective rank), {format_share(self.dead)} of its dimensions are dead and two of the others share "
            f"{format_share(max(self.redundancy, 0.0))} of their variance beyond chance{before}; the numbers only "
            "describe.",
            advice="Compare layers and snapshots; a constant or dead dimension carries nothing, and a classifier "
            "of K classes needs only K - 1 directions in the end.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.effective_rank,
        )

    def plot(self, ax: Any = None) -> Any:
        """CKA between the layers."""
        mesh = ax.imshow(self.cka, vmin=0, vmax=1, cmap="viridis")
        ax.figure.colorbar(mesh, ax=ax, label="debiased CKA")
        ax.set_xticks(range(len(self.layers)), self.layers, rotation=90, fontsize=6)
        ax.set_yticks(range(len(self.layers)), self.layers, fontsize=6)
        ax.grid(False)
        ax.set(xlabel="layer", ylabel="layer")


@instrument(
    source=SOURCE,
    title="Representation",
    kind="description",
    why="Layers with dead or repeated dimensions are narrower than they look; how alike layers and "
    "checkpoints are says where training changed something.",
    formula="rank = exp(-sum_i p_i ln p_i), p_i = lambda_i / sum_j lambda_j; CKA = U(X, Y) / sqrt(U(X, X) "
    "U(Y, Y)), U unbiased HSIC",
)
def representation(
    layer_outputs: LayerOutputs | Mapping[str, Tensor] | Tensor,
    previous_layer_outputs: LayerOutputs | Mapping[str, Tensor] | Tensor | None = None,
    *,
    noise: Size = NOISE,
    compared: Count = EXAMPLES_COMPARED,
) -> Representation:
    """Effective rank, dead, duplicate and redundant dimensions, invariance and debiased CKA of every layer.

    layer_outputs: the outputs of the layers, or features (n, d), or a mapping from names to features; the same of
    an earlier snapshot, for CKA between the two. Covariances are over all rows, in float64; of layers wider than
    2,048, evenly spaced dimensions are measured. Positions of one example are averaged, without padding where a
    mask or the embedding's padding index says which it is. A dimension is dead below 1e-4 of the median standard
    deviation (or where all are constant). CKA is the U-statistic for a linear kernel on `compared` rows, evenly
    spaced, with a jackknife error over ten blocks. Invariance compares two passes, one with `noise` (in standard
    deviations of the inputs) added; features that are given have no second pass, and NaN.

    Raises MissingQuantity where no layer outputs rows of features. Sources: Zbontar et al. 2021, arXiv:2103.03230
    (C_ii and C_ij); Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012 (the U-statistic).
    """
    outputs = as_layer_outputs(layer_outputs)
    sums = _gathered(outputs, compared)
    noisy = {}
    if noise > 0 and isinstance(layer_outputs, LayerOutputs):
        noisy = {n: s.kept() for n, s in _gathered(outputs, compared, noise).items()}
    before = {} if previous_layer_outputs is None else _gathered(as_layer_outputs(previous_layer_outputs), compared)
    grams = [centred_gram(s.kept()) for s in sums.values()]
    cka, errors = _between(grams)
    earlier = [
        tuple(float(x[0, 1]) for x in cka_between([g, centred_gram(before[n].kept())]))
        if n in before and before[n].count == sums[n].count
        else (math.nan,) * 2
        for n, g in zip(sums, grams, strict=True)
    ]
    invariances = [_invariance(s, noisy.get(n)) for n, s in sums.items()]
    return Representation(
        **_of_the_layers(sums, invariances),
        previous_cka=earlier[-1][0],
        previous_cka_standard_error=earlier[-1][1],
        num_rows=max(s.count for s in sums.values()),
        num_compared=len(grams[-1]),
        cka=cka,
        cka_errors=errors,
        previous_ckas=numpy.array([e[0] for e in earlier]),
        previous_errors=numpy.array([e[1] for e in earlier]),
    )


def _of_the_layers(sums: Mapping[str, _Sums], invariances: list[float]) -> dict[str, Any]:
    tables = numpy.array([s.statistics() for s in sums.values()])
    ranks, dead, twice, redundant = tables.T
    return {
        "effective_rank": ranks[-1],
        "dead": dead[-1],
        "redundancy": redundant[-1],
        "invariance": invariances[-1],
        "layers": tuple(sums),
        "widths": tuple(s.width for s in sums.values()),
        "effective_ranks": ranks,
        "dead_shares": dead,
        "duplicates": twice,
        "redundancies": redundant,
        "invariances": numpy.array(invariances),
        "preconditions": (_varies(float(dead[-1]), float(ranks[-1])),),
    }


class _Sums:
    """Sums over the rows of one layer's features, and some of the rows themselves.

    The place of the rows that are kept is taken once: small pieces that outlive a block would hold the memory of
    blocks apart, and the process would grow with the number of rows.
    """

    def __init__(self, first: Tensor, every: int, rows: int) -> None:
        step = math.ceil(first.shape[1] / MOST_FEATURES)
        self.columns = slice(0, None, step)
        self.width = len(range(0, first.shape[1], step))
        self.shift = first[:, self.columns].double().mean(0)  # near the mean, so that little is lost in the sums
        self.count, self.every = 0, every
        self.total = torch.zeros_like(self.shift)
        self.products = self.total.new_zeros(self.width, self.width)
        self._kept, self._filled = first.new_empty(rows, self.width), 0

    def add(self, block: Tensor) -> None:
        h = block[:, self.columns]
        chosen = h[(-self.count) % self.every :: self.every][: len(self._kept) - self._filled]
        self._kept[self._filled : self._filled + len(chosen)] = chosen
        self._filled += len(chosen)
        h = h.double() - self.shift
        self.count += len(h)
        self.total += h.sum(0)
        self.products += h.T @ h

    def kept(self) -> Tensor:
        return self._kept[: self._filled]

    def used(self) -> Tensor:
        """Which dimensions are not dead."""
        std = self.covariance().diagonal().clamp_min(0).sqrt()
        small = 1e-12 * float(self.shift.abs().max())  # what rounding leaves of a constant
        return std > max(DEAD_FEATURE * float(std.median()), small)

    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def statistics(self) -> tuple[float, float, float, float]:
        """Effective rank; shares of dead and of duplicate dimensions; redundancy above chance."""
        covariance, used = self.covariance(), self.used()
        if not bool(torch.isfinite(covariance).all()):
            return (math.nan,) * 4
        live = covariance[used][:, used]
        rank = covariance_rank(torch.linalg.eigvalsh(live)) if len(live) else 0.0
        dead = 1 - len(live) / self.width
        if len(live) < 2 or self.count < 3:
            return rank, dead, 0.0, math.nan
        std = live.diagonal().sqrt()
        r = live / std[:, None] / std
        duplicate = (r.abs() > SAME_FEATURE).triu(1).any(0)
        off = r.square().sum() - r.diagonal().square().sum()
        redundancy = float(off) / (len(r) * (len(r) - 1)) - 1 / (self.count - 1)
        return rank, dead, float(duplicate.double().mean()), redundancy


def _gathered(outputs: LayerOutputs, compared: int, noise: float = 0.0) -> dict[str, _Sums]:
    """One pass; every layer's sums, and about `compared` rows of each, the same ones in every layer and pass."""
    rows: dict[str, int] = {}
    if outputs.labels is None:
        outputs.visit(lambda name, block, start: rows.__setitem__(name, start + len(block)))
    total = len(outputs.labels) if outputs.labels is not None else max(rows.values(), default=0)
    every = max(1, math.ceil(total / max(compared, 1)))
    sums: dict[str, _Sums] = {}

    def add(name: str, block: Tensor, start: int) -> None:
        if name not in sums:
            sums[name] = _Sums(block, every, math.ceil(total / every))
        sums[name].add(block)

    outputs.visit(add, noise)
    if not sums:
        raise MissingQuantity(
            "no layer gives rows of features, one for each example or token; pass layer_outputs= yourself."
        )
    return sums


def _between(grams: list[Tensor]) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """CKA between all pairs of layers, and its standard errors; NaN for layers whose rows are others."""
    cka = numpy.full((len(grams), len(grams)), math.nan)
    errors = cka.copy()
    same = [i for i, g in enumerate(grams) if g.shape == grams[-1].shape]
    values, spread = cka_between([grams[i] for i in same])
    cka[numpy.ix_(same, same)], errors[numpy.ix_(same, same)] = values.numpy(), spread.numpy()
    return cka, errors


def _invariance(sums: _Sums, noisy: Tensor | None) -> float:
    """Mean over used dimensions of the correlation between the two passes."""
    used = sums.used()
    if noisy is None or not bool(used.any()) or len(noisy) != len(sums.kept()):
        return math.nan
    a, b = (h.double()[:, used] - h.double()[:, used].mean(0) for h in (sums.kept(), noisy))
    sizes = a.norm(dim=0) * b.norm(dim=0)
    correlations = (a * b).sum(0) / sizes
    return float(correlations[sizes > 0].mean()) if bool((sizes > 0).any()) else math.nan


def _varies(dead: float, rank: float) -> Precondition:
    holds = math.isfinite(rank) and dead < 1
    found = "are not finite" if not math.isfinite(rank) else "are the same for every example (degenerate)"
    return Precondition(
        "features that vary", holds, "the features vary." if holds else f"the features of the last layer {found}."
    )
