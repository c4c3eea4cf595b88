"""Changing the width of a network changes the bulk of its Hessian and not the number of outliers."""

from __future__ import annotations

from reproducing import Card, Expectation, Lab
from reproductions._class_spectrum import ClassSpectrum, class_spectrum, trained

CLASSES, WIDTHS, SEED = 5, (5, 10, 20, 40), 0
NEAR_ZERO = {5: 0.79, 10: 0.86, 20: 0.92, 40: 0.92}


def run(lab: Lab) -> list[Expectation]:
    """Four widths, five classes."""
    found: dict[int, ClassSpectrum] = {}
    for width in WIDTHS:
        model, data = trained(CLASSES, width, SEED)
        found[width] = class_spectrum(lab, f"width-{width}", model, data, CLASSES + 2)
    outliers = CLASSES - 1
    leading = [
        Expectation(f"width {w}: leading class directions", outliers, f.result.num_outliers, outliers, outliers)
        for w, f in found.items()
    ]
    bulk = [
        Expectation(
            f"width {w}: share near zero", NEAR_ZERO[w], f.near_zero, NEAR_ZERO[w] - 0.1, NEAR_ZERO[w] + 0.08
        )
        for w, f in found.items()
    ]
    wide = [f.result.eigenvalues[:outliers] for w, f in found.items() if w > WIDTHS[0]]
    spread = max(float((a / b).max()) for a in wide for b in wide)
    near = [f.near_zero for f in found.values()]
    return [
        *leading,
        *bulk,
        Expectation("share near zero, widest less narrowest", "0.92 - 0.79", near[-1] - near[0], low=0.0),
        Expectation("the four outliers from width 10 on, largest ratio", "0.46 / 0.37", spread, high=2.0),
        Expectation(
            "eigenvalues against the dense spectrum: error over the stated residual, largest",
            "<= 1",
            max(f.error_over_residual for f in found.values()),
            high=1,
        ),
    ]


CARD = Card(
    title="Width changes the bulk of the Hessian, not its outliers",
    source="Sagun, Evci, Guney, Dauphin, Bottou 2017, arXiv:1706.04454 (abstract)",
    claim=(
        "With five classes there are four outliers at hidden widths 5, 10, 20 and 40, of nearly the same size from "
        "10 on; what grows is the share of eigenvalues near zero."
    ),
    takes="1 minute",
    run=run,
    notes="Bands around one earlier run of the same experiment with another shuffle.",
)
