"""The commands `diag align` and `diag connect`: two checkpoints brought into one order, and a map of many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from diag.cli.output import JSON, print_document
from diag.cli.text import echo

EXISTING_PATHS = click.Path(exists=True, path_type=Path)
BUILD_OPTION = click.option(
    "--build", required=True, metavar="MODULE:FUNCTION", help="Returns (model, loss_fn, data)."
)
EXAMPLES_OPTION = click.option("--max-examples", type=click.IntRange(1), help="Measure on the first examples only.")
KEY_OPTION = click.option("--key", help="The checkpoints' entry that holds the state dict (`ema`, say).")
POINTS_OPTION = click.option("--points", type=click.IntRange(3), default=11, show_default=True, help="Of the grid.")


@click.command("align", short_help="Move the units of one checkpoint to where another has them.")
@click.argument("first", type=EXISTING_PATHS, metavar="A")
@click.argument("second", type=EXISTING_PATHS, metavar="B")
@BUILD_OPTION
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the aligned B (.pt or .safetensors).")
@click.option("--by", type=click.Choice(["weights", "activations"]), default="weights", show_default=True)
@click.option("--beyond-permutations", is_flag=True, help="Also signs, scales, rotations, invertible maps.")
@POINTS_OPTION
@EXAMPLES_OPTION
@KEY_OPTION
@JSON
def align_command(
    first: Path,
    second: Path,
    build: str,
    output: Path | None,
    by: str,
    beyond_permutations: bool,
    points: int,
    max_examples: int | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Permute the units of checkpoint B so that they stand where the matching units of A are.

    B's function stays what it is (checked); afterwards the two can be averaged if no barrier is left between them.
    The file written holds B's state dict.
    """
    from diag.connectivity.connection import align

    if output is not None and output.suffix not in (".pt", ".safetensors"):
        raise click.UsageError(f"{output} ends in {output.suffix or 'nothing'}; expected .pt or .safetensors.")
    how: dict[str, Any] = {"by": by, "points": points, "beyond_permutations": beyond_permutations}
    found = align(first, second, build=build, key=key, options=_options(max_examples), **how)
    _tell(found.notes)
    if output is not None:
        _save(dict(found.aligned_state or {}), output)
    if as_json:
        _print("diag-alignment", found.sentence(), output, _numbers_of(found))
        return
    echo(found.sentence())
    if output is not None:
        echo(f"Aligned: {output}")


@click.command(short_help="Barriers between every two checkpoints: who is connected with whom.")
@click.argument("checkpoints", nargs=-1, required=True, type=EXISTING_PATHS, metavar="CKPT...")
@BUILD_OPTION
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A heat map (.png, .svg, .pdf), or .json.")
@click.option(
    "--align", "by", type=click.Choice(["none", "weights", "activations"]), default="none", show_default=True
)
@click.option("--threshold", type=float, default=0.02, show_default=True, help="Connected below this barrier.")
@POINTS_OPTION
@EXAMPLES_OPTION
@KEY_OPTION
@JSON
def connect_command(
    checkpoints: Sequence[Path],
    build: str,
    output: Path | None,
    by: str,
    threshold: float,
    points: int,
    max_examples: int | None,
    key: str | None,
    as_json: bool,
) -> None:
    """The barrier between every two checkpoints, the groups that are connected, and the cheapest tree over all.

    A barrier is in the share of wrong answers where the targets are classes, else in the loss. The default
    threshold of 2 % is Frankle et al. 2020's (arXiv:1912.05671).
    """
    from diag.connectivity.connection_map import connect

    if len(checkpoints) < 2:
        raise click.UsageError(f"There is {len(checkpoints)} checkpoint; give at least two.")
    if output is not None and output.suffix not in (".png", ".svg", ".pdf", ".json"):
        raise click.UsageError(
            f"{output} ends in {output.suffix or 'nothing'}; expected .png, .svg, .pdf or .json."
        )
    how: dict[str, Any] = {"points": points, "align": None if by == "none" else by, "threshold": threshold}
    found = connect(list(checkpoints), build=build, key=key, options=_options(max_examples), **how)
    _tell(found.notes)
    if output is not None:
        _draw(found, output)
    if as_json:
        _print("diag-connections", found.sentence(), output, found.to_dict())
        return
    echo(found.sentence())
    for number, group in enumerate(found.components, 1):
        echo(f"  group {number}: {', '.join(group)}")
    echo("The cheapest tree over all:")
    for a, b, barrier in sorted(found.spanning_tree.edges(data="barrier"), key=lambda e: e[2]):
        echo(f"  {a} - {b}: {barrier:.4g}")
    if output is not None:
        echo(f"Map: {output}")


def _print(name: str, sentence: str, output: Path | None, result: Any) -> None:
    from diag.reporting.machines.findings import plain_json

    about = {"format": name, "format_version": 1, "sentence": sentence}
    print_document(about | {"output": None if output is None else str(output), "result": plain_json(result)})


def _numbers_of(found: Any) -> dict[str, Any]:
    """What an alignment measured, without the weights."""
    lines = {name: getattr(found, name) for name in ("line", "aligned") if getattr(found, name) is not None}
    measured = {
        name: {n: getattr(line, n) for n in ("barrier", "error_barrier", "alphas", "losses", "errors")}
        for name, line in lines.items()
    }
    return measured | {"moved_units": found.alignment.moved, "units": found.alignment.units}


def _draw(found: Any, output: Path) -> None:
    if output.suffix == ".json":
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        return
    from matplotlib.figure import Figure

    size = 3 + 0.4 * len(found.names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    found.plot(figure.add_subplot())
    figure.savefig(output, dpi=150)


def _options(max_examples: int | None) -> dict[str, Any]:
    return {} if max_examples is None else {"max_examples": max_examples}


def _tell(notes: Sequence[str]) -> None:
    """How the files were read."""
    for note in notes:
        echo(note, err=True)


def _save(state: dict[str, Any], output: Path) -> None:
    if output.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({n: t.contiguous().clone() for n, t in state.items()}, output)
        return
    import torch

    torch.save(state, output)


COMMANDS = (align_command, connect_command)
