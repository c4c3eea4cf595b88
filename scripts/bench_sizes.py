#!/usr/bin/env python3
"""How much room diag takes, and what it needs besides torch and numpy, as installed here.

    .venv/bin/python scripts/bench_sizes.py

Prints megabytes (10^6 bytes): diag's own files, all that the others take, and each of them that takes 10 or more.
Extras are not counted.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = {"torch", "numpy"}  # and what these need


def needed(name: str, found: set[str]) -> set[str]:
    """`found`, and the distributions that `name` needs, whatever level down; those of `found` are not followed."""
    return followed(metadata.requires(name) or [], found)


def followed(requirements: Iterable[str], found: set[str]) -> set[str]:
    """The same for requirements as pyproject.toml writes them."""
    for requirement in requirements:
        other = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if "extra ==" not in requirement and other not in found and installed(other):
            found.add(other)
            needed(other, found)
    return found


def installed(name: str) -> bool:
    """Whether it is here; a requirement of another system is not."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def megabytes(files: list[Path]) -> float:
    """What these files hold."""
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def main() -> None:
    """Print diag's size, the sum of the others, and the large ones among them."""
    without = set(WITHOUT)
    for name in WITHOUT:
        needed(name, without)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    others = followed(project["dependencies"], set(without)) - without
    sizes = {name: megabytes([Path(f.locate()) for f in metadata.files(name) or []]) for name in others}
    own = [file for file in (ROOT / "diag").rglob("*") if file.suffix != ".pyc"]
    print(f"{'diag':20} {megabytes(own):6.1f} MB")
    print(f"{'what it needs':20} {sum(sizes.values()):6.1f} MB, of which")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size >= 10:
            print(f"  {name:18} {size:6.1f} MB")


if __name__ == "__main__":
    main()
