"""All programs by name."""

from __future__ import annotations

from functools import cache

from calibration import (
    programs_generative,
    programs_images,
    programs_sequences,
    programs_tables,
    programs_transfer,
)
from calibration.program import Program

MODULES = (programs_images, programs_sequences, programs_tables, programs_generative, programs_transfer)


@cache
def programs() -> dict[str, type[Program]]:
    """The programs, in the order of their files."""
    return {p.name: p for module in MODULES for p in module.PROGRAMS}
