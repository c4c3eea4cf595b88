"""The Hessian's leading eigenvectors are class directions, one fewer than there are classes."""

from __future__ import annotations

from reproducing import Card, Expectation, Lab
from reproductions._class_spectrum import ClassSpectrum, class_spectrum, trained

CLASSES, HIDDEN, SEEDS = (2, 3, 5, 10), 20, (0, 1)


def run(lab: Lab) -> list[Expectation]:
    """Every number of classes, two seeds."""
    found: dict[tuple[int, int], ClassSpectrum] = {}
    for classes in CLASSES:
        for seed in SEEDS:
            model, data = trained(classes, HIDDEN, seed)
            found[classes, seed] = class_spectrum(lab, f"classes-{classes}-seed-{seed}", model, data, classes + 2)
    expectations = [
        Expectation(f"C = {c}, seed {s}: leading class directions", c - 1, f.result.num_outliers, c - 1, c - 1)
        for (c, s), f in found.items()
    ]
    last = found[CLASSES[-1], SEEDS[0]]
    return [
        *expectations,
        Expectation(
            "smallest overlap of the first C - 1 vectors",
            ">= 0.89; further seeds >= 0.80",
            min(float(f.result.overlaps[: c - 1].min()) for (c, _), f in found.items()),
            low=0.8,
        ),
        Expectation(
            "largest overlap of the next vector, C >= 3",
            "<= 0.04; further seeds <= 0.19",
            max(float(f.result.overlaps[c - 1]) for (c, _), f in found.items() if c > 2),
            high=0.2,
        ),
        Expectation("C = 10: largest eigenvalue", 1.257, float(last.result.eigenvalues[0])),
        Expectation("C = 10: smallest eigenvalue", -0.0025, last.result.smallest, high=0.0),
        Expectation("C = 10: the share within 1e-3 of the largest around 0", 0.87, last.near_zero, 0.8, 0.95),
        Expectation(
            "C = 10: Gauss-Newton part of the nine outliers, least",
            "about 1",
            float(last.gauss_newton[:9].min()),
            0.9,
        ),
        Expectation(
            "C = 10: error of the trace over its standard error",
            "0 +- 1",
            (last.result.trace - float(last.dense.sum())) / last.result.trace_standard_error,
            -4,
            4,
        ),
        Expectation(
            "eigenvalues against the dense spectrum: error over the stated residual, largest",
            "<= 1",
            max(f.error_over_residual for f in found.values()),
            high=1,
        ),
    ]


CARD = Card(
    title="Outliers of the Hessian are the classes, one fewer than there are",
    source="Papyan 2019, arXiv:1901.08244; Sagun, Evci, Guney, Dauphin, Bottou 2017, arXiv:1706.04454",
    claim=(
        "In a small network trained on C of the digits the C - 1 leading eigenvectors of the Hessian lie in the "
        "span of the C class directions, and the next one does not."
    ),
    takes="2 minutes",
    run=run,
    notes=(
        "The count cannot exceed C, the dimension of the span: that it is C - 1 and not C is the finding. At ten "
        "classes the eigenvalues show no clear gap, so the count rests on the overlap alone. Bands are those of an "
        "earlier study with other shuffles; the largest eigenvalue differs from seed to seed and has none."
    ),
)
