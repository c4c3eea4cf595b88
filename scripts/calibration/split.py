"""Which programs choose thresholds, and which score them: written down before the first threshold was chosen.

A threshold that was tuned on a program is right on it, so its error must be counted on others. The unit is the
program (model family, data, optimizer and size together), never the seed or the fault: two seeds of one program are
nearly one observation. The halves are mixed by hand so that each has an image network with batch normalisation and
one without, an encoder and a language model, a recurrent network, a regression, a generative model, a
self-supervised one, a fine-tuning, a reinforcement learner, a table and a distributed run, and no pair of programs
with the same model class and data stands on both sides.

Nobody who sets a threshold looks at the rows of the scoring programs; `scripts/calibrate --split choose` runs and
prints the choosing half alone. A program may be added to either half; none may change sides.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

CHOOSE, SCORE = "choose", "score"


@cache
def split() -> dict[str, tuple[str, ...]]:
    """The programs' names by side, as `split.json` has them."""
    stored = json.loads((Path(__file__).parent / "split.json").read_text())
    return {side: tuple(names) for side, names in stored.items()}


def side_of(program: str) -> str:
    """ "choose" or "score"; raises KeyError for a program that is on neither side."""
    for side, names in split().items():
        if program in names:
            return side
    raise KeyError(f"The program {program} is on no side of split.json; put it on one before it is first run.")
