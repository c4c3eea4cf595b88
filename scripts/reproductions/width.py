"""R6.2: changing the width of a network changes the bulk of its Hessian and not the number of outliers."""

from __future__ import annotations

from reproducing import Card, Expectation, Lab
from reproductions._class_spectrum import ClassSpectrum, class_spectrum, trained

from diag.display import format_number

CLASSES, WIDTHS, SEED = 5, (5, 10, 20, 40), 0
NEAR_ZERO = {5: 0.79, 10: 0.86, 20: 0.92, 40: 0.92}


def run(lab: Lab) -> list[Expectation]:
    """Four widths, five classes."""
    found: dict[int, ClassSpectrum] = {}
    for width in WIDTHS:
        model, data = trained(CLASSES, width, SEED)
        spectrum = found[width] = class_spectrum(model, data, CLASSES + 2)
        lab.say(
            f"  width {width}, {len(spectrum.dense)} parameters: top "
            f"{' '.join(format_number(float(v), 3) for v in spectrum.top)}; near zero {spectrum.near_zero:.2f}"
        )
    outliers = CLASSES - 1
    leading = [
        Expectation(f"width {w}: leading class directions", outliers, f.leading, outliers, outliers)
        for w, f in found.items()
    ]
    bulk = [
        Expectation(
            f"width {w}: share near zero", NEAR_ZERO[w], f.near_zero, NEAR_ZERO[w] - 0.1, NEAR_ZERO[w] + 0.08
        )
        for w, f in found.items()
    ]
    wide = [f.top[:outliers] for w, f in found.items() if w > WIDTHS[0]]
    spread = max(float((a / b).log().abs().max().exp()) for a in wide for b in wide)
    near = [f.near_zero for f in found.values()]
    return [
        *leading,
        *bulk,
        Expectation("share near zero, widest less narrowest", "0.92 - 0.79", near[-1] - near[0], low=0.0),
        Expectation("the four outliers from width 10 on, largest ratio", "0.46 / 0.37", spread, high=2.0),
        Expectation(
            "Lanczos against the dense spectrum", 0, max(f.lanczos_error for f in found.values()), high=1e-6
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
