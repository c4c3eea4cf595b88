"""The commands, each a few lines: what is asked of the run, and what is printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diag.cli.door import Door, Mistake
from diag.cli.output import JSON, PATHS, print_document
from diag.cli.ranks import is_first, started_ranks
from diag.cli.text import command_line, echo

if TYPE_CHECKING:
    from diag.run.run import Run

OUTPUT_PATH = click.Path(dir_okay=True, path_type=Path)


@click.group(cls=Door, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="diag", prog_name="diag")
def main() -> None:
    """Tells what state a PyTorch network is in, while it trains and afterwards, with evidence."""


@main.command(short_help="Train a small network, watched, and write its report.")
@click.option("--folder", default="runs/demo", show_default=True, type=PATHS, help="Where the run is written.")
@click.option("--seed", default=0, show_default=True, help="Another seed, another training.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="The report. [default: report.html in the folder]")
@JSON
def demo(folder: Path, seed: int, output: Path | None, as_json: bool) -> None:
    """Train a small network on real digits with wrong labels among them, watched, and write its report."""
    from diag import demo as demonstration
    from diag.cli import tables
    from diag.reporting import report as write_report

    with tables.progress_bar() as bar:
        task = bar.add_task("Training", total=None)
        if bar.disable:
            echo("Training the demo's network; this takes about a minute.", err=True)

        def progress(done: int, total: int, text: str = "Training") -> None:
            bar.update(task, completed=done, total=total, description=text)

        run = demonstration.run(folder, seed=seed, progress=progress)
    page = write_report(run, output or folder / "report.html", command=command_line())
    _tell(run, page, as_json)


def _tell(run: Run, page: Any, as_json: bool) -> None:
    """The verdicts and where the page is, for people or for programs."""
    from diag.cli import tables

    if as_json:
        _print_findings(run, report=str(Path(page).resolve()))
        return
    tables.show(tables.verdicts(run.findings()))
    if run.metadata.get("checkpoints") and run.outcomes:
        tables.show("", tables.others(run.outcomes))
    echo(f"\nReport: {Path(page).resolve()}")


def _print_findings(run: Run, **more: str) -> None:
    from diag.reporting.machines.findings import findings_document

    print_document(findings_document(run) | more)


@main.command("report")
@click.argument("sources", nargs=-1, required=True, type=PATHS, metavar="RUN|CKPT...")
@click.option("--build", metavar="MODULE:FUNCTION", help="For checkpoints: returns (model, loss_fn, data).")
@click.option("-o", "--output", default="report.html", show_default=True, type=OUTPUT_PATH)
@click.option("--instrument", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--set", "settings", multiple=True, metavar="INSTRUMENT.SETTING=VALUE", help="May be repeated.")
@click.option("--key", help="The checkpoints' entry that holds the state dict (`ema`, say).")
@click.option("--max-examples", type=click.IntRange(1), help="Measure on the first examples only.")
@click.option("--device", help="Where to measure: cpu, cuda, ...")
@click.option("--every", is_flag=True, help="Measure the expensive instruments, too, on every checkpoint.")
@click.option("--open", "open_it", is_flag=True, help="Show the report in the browser.")
@JSON
def report_command(
    sources: Sequence[Path],
    build: str | None,
    output: Path,
    names: Sequence[str],
    settings: Sequence[str],
    key: str | None,
    max_examples: int | None,
    device: str | None,
    every: bool,
    open_it: bool,
    as_json: bool,
) -> None:
    """Write the report of a run, or of checkpoints.

    A run is the folder that diag.watch(model, run=...) wrote. Checkpoints (.pt, .safetensors, .ckpt, folders of
    Hugging Face or torch.distributed.checkpoint) are measured with --build: module:function or file.py:function
    names a function that returns (model, loss_fn, data). Each checkpoint is loaded into that model and becomes a
    step. What takes long is measured on the first, the last and the best of them. Under torchrun (torchrun
    --nproc-per-node 4 -m diag report ...) the ranks share the data, and one page is written. Without --build the
    files are looked at by themselves: NaN, rows that are zero or repeated, number formats, what changed from one to
    the next, whether the optimizer's state fits.
    """
    from diag.cli.settings import read_settings
    from diag.reporting import report as write_report

    chosen = read_settings(settings)
    if build is None:
        run = _restricted(_without_build(sources, key), names, chosen)
    else:
        options = {k: v for k, v in {"max_examples": max_examples, "device": device}.items() if v is not None}
        with started_ranks(device) as ranks:
            measuring = {"names": names, "settings": chosen, "options": options, "key": key, "every": every}
            run = _measured(sources, build, ranks=ranks, **measuring)
    if not is_first():
        return
    page = write_report(run, output, command=command_line())
    _tell(run, page, as_json)
    if open_it:
        click.launch(os.fspath(page))


def _without_build(sources: Sequence[Path], key: str | None = None) -> Run:
    """A run's folder, or checkpoint files looked at by themselves."""
    from diag.run.opening import holds_run, refuse_log
    from diag.run.reading import read_run
    from diag.run.state_files import from_state_files

    runs = [holds_run(s) for s in sources]
    if runs == [True]:
        return read_run(sources[0])
    missing = next((s for s in sources if not s.exists()), None)
    if missing is not None:
        raise Mistake(f"There is no {missing}; give a run's folder, or checkpoints.")
    if all(runs):
        raise Mistake("A report is of one run; give one, or use diag compare for two.")
    if any(runs):
        raise Mistake("Runs and checkpoints were given together; give one run, or checkpoints alone.")
    for source in sources:
        refuse_log(source)
    run = from_state_files(sources, key=key)
    for event in run.events:
        echo(event.text, err=True)
    return run


def _measured(sources: Sequence[Path], build: str, **chosen: Any) -> Run:
    from diag.cli import tables
    from diag.run.checkpoints import from_checkpoints

    if not is_first():
        return from_checkpoints(sources, build, **chosen)
    with tables.progress_bar() as bar:
        task = bar.add_task("Reading", total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        run = from_checkpoints(sources, build, progress=progress, **chosen)
    for event in run.events:
        echo(event.text, err=True)
    return run


def _restricted(run: Run, names: Sequence[str], settings: dict[str, dict[str, Any]]) -> Run:
    """The run with only these instruments, and with other settings for those that are computed from its steps."""
    import dataclasses

    from diag.registry import find

    recorded = next((n for n in settings if not run.computes(find(n))), None)
    if recorded:
        raise Mistake(
            f"{recorded} was measured during the training, so its settings cannot be changed in the report; leave "
            "out its --set."
        )
    known = run.instruments
    absent = next((n for n in names if find(n).name not in known), None)
    if absent:
        raise Mistake(f"{absent} measured nothing in this run; it has {', '.join(known) or 'no results'}.")
    about = dict(run.metadata) | {"settings": dict(run.metadata.get("settings", {})) | settings}
    if not names:
        return dataclasses.replace(run, metadata=about)
    records = [r for r in run.records if r.instrument in names]
    return dataclasses.replace(run, metadata=about | {"instruments": list(names)}, records=records)


@main.command("list", short_help="The instruments: what each needs, costs and cites.")
@JSON
def list_instruments(as_json: bool) -> None:
    """The instruments: what each measures, needs, costs and cites, and its settings."""
    from diag.cli import tables
    from diag.registry import instruments

    known = sorted(instruments().values(), key=lambda i: i.name)
    if not as_json:
        tables.show(tables.instrument_list(known))
        return
    rows = [
        {
            "name": i.name,
            "title": i.title,
            "measures": i.summary,
            "needs": [{"name": n.name, "optional": n.optional} for n in i.needs],
            "cost": i.cost,
            "source": i.source,
            "from_history": i.from_history,
            "settings": [{"name": s.name, "default": _plain(s.default), "type": _type(s.type)} for s in i.settings],
        }
        for i in known
    ]
    print_document({"format": "diag-instruments", "format_version": 1, "instruments": rows})


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str, list, tuple)) else str(value)


def _type(annotation: Any) -> str:
    from diag.conversion import without_range

    bare = without_range(annotation)
    return bare.__name__ if isinstance(bare, type) else str(bare).removeprefix("typing.")


@main.command("show")
@click.argument("run", type=PATHS, metavar="RUN|CKPT")
@click.option("--instrument", "name", metavar="NAME", help="The numbers of this one, by step.")
@click.option("--follow", "go_on", is_flag=True, help="Print steps and findings until the run has ended.")
@JSON
def show_command(run: Path, name: str | None, go_on: bool, as_json: bool) -> None:
    """Show a run, or what a checkpoint file holds, in the terminal."""
    from diag.cli import tables
    from diag.cli.live import follow
    from diag.registry import find
    from diag.run.reading import read_run

    if go_on:
        follow(run)
        return
    opened = _without_build([run]) if run.is_file() else read_run(run)
    if name:
        chosen = _restricted(opened, [find(name).name], {})
        if as_json:
            print_document(_series(chosen, name))
        else:
            tables.show(tables.series(chosen, name))
    elif as_json:
        _print_findings(opened)
    else:
        tables.show(tables.run_page(opened))


def _series(run: Run, name: str) -> dict[str, Any]:
    from diag.reporting.machines.findings import json_number

    found = run.series(name)
    scalars = [result.scalars() for _, result in found]
    values = {
        n: [json_number(s[n]) if n in s else None for s in scalars]
        for n in dict.fromkeys(n for s in scalars for n in s)
    }
    about = {"format": "diag-series", "format_version": 1, "instrument": name}
    return about | {"steps": [step for step, _ in found], "values": values}
