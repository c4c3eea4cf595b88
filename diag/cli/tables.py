"""What the commands print: verdicts, a run, instruments and two runs side by side, for any width of terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from diag import display
from diag.cli.text import visible

if TYPE_CHECKING:
    from diag.registry import Instrument
    from diag.run.entries import Finding
    from diag.run.run import Run

STYLES = {
    "alarm": "bold red",
    "warning": "yellow",
    "unknown": "blue",
    "ok": "green",
    "description": "cyan",
    "not_applicable": "dim",
}
PIPED_WIDTH = 160
QUIET = ("ok", "not_applicable")  # listed by name only


class Screen(Console):
    """A console for which no text is markup, and that shows control sequences instead of obeying them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The lines as the terminal shows them."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Text taken as it is, without markup."""
        return super().render_str(visible(text), **options)


def console(stderr: bool = False) -> Console:
    """A console that fits the terminal; a pipe gets lines long enough to be searched."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Screen(file=stream, width=width, highlight=False, markup=False, emoji=False)


def show(*parts: RenderableType) -> None:
    """Print to standard output, without blanks at the ends of lines."""
    screen = console()
    with screen.capture() as captured:
        screen.print(*parts)
    print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def progress_bar() -> Progress:
    """A progress bar on standard error; silent where that is not a terminal."""
    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


def mark(level: str) -> Text:
    """The level as colour, sign and word."""
    sign, _, word = display.LEVEL_MARKS[level]
    return Text(f"{sign} {word}", style=STYLES[level])


def verdicts(findings: Sequence[Finding]) -> RenderableType:
    """What went wrong, story by story with what to try and what follows; then what else was found, in short."""
    from diag.run.stories import stories

    if not findings:
        return Text("Nothing was measured.", style="dim")
    table = _grid(2)
    all_stories = stories(findings)
    for story in all_stories:
        _add(table, story.finding, str(story.level))
        for consequence in story.consequences:
            table.add_row("", Text.assemble(("Follows: ", "dim"), consequence.verdict.sentence))
    in_stories = {id(f) for story in all_stories for f in (story.finding, *story.consequences)}
    rest = [f for f in findings if id(f) not in in_stories]
    for finding in rest:
        if finding.verdict.level not in QUIET:
            _add(table, finding, str(finding.verdict.level))
    quiet = _grid(2)
    for level in QUIET:
        names = [f.title for f in rest if f.verdict.level == level]
        if names:
            quiet.add_row(mark(level), Text(", ".join(names), style="dim"))
    return Group(*(part for part in (table, quiet) if part.row_count))


def _add(table: Table, finding: Finding, level: str) -> None:
    verdict = finding.verdict
    table.add_row(mark(level), Text(finding.title, style="bold"))
    table.add_row("", verdict.sentence)
    if verdict.advice and verdict.level in ("alarm", "warning"):
        table.add_row("", Text.assemble(("Try: ", "bold"), verdict.advice))
    table.add_row("", Text(_where(finding), style="dim"))


def _where(finding: Finding) -> str:
    first, last = finding.first_step, finding.last_step
    steps = f"step {first:,}" if first == last else f"steps {first:,}–{last:,}"
    return f"{steps} · {finding.verdict.source or finding.source}"


def counts(findings: Iterable[Finding]) -> str:
    """How many verdicts there are of each level: "1 alarm, 3 ok"."""
    levels = [f.verdict.level for f in findings]
    words = [(levels.count(level), display.LEVEL_MARKS[level][2]) for level in dict.fromkeys(levels)]
    return ", ".join(f"{n} {word}" for n, word in words) or "no verdicts"


def run_page(run: Run) -> RenderableType:
    """A run: its facts, its verdicts, and what was skipped or failed."""
    facts = _grid(2)
    for name, text in run.facts().items():
        facts.add_row(Text(name, style="dim"), text)
    parts: list[RenderableType] = [facts, "", verdicts(run.findings())]
    if run.outcomes:
        parts += ["", others(run.outcomes)]
    if run.events:
        parts += ["", events(run)]
    return Group(*parts)


def others(outcomes: Sequence[tuple[int, Any]]) -> RenderableType:
    """What was skipped or failed, once a reason, with how often and the last step at which it was so."""
    table = _grid(2)
    by_reason: dict[tuple[str, str, str], list[int]] = {}
    for step, outcome in outcomes:
        by_reason.setdefault((type(outcome).__name__.lower(), outcome.instrument, outcome.reason), []).append(step)
    for (kind, instrument, reason), steps in by_reason.items():
        often = f" ({len(steps)} times, last at step {steps[-1]:,})" if len(steps) > 1 else ""
        table.add_row(Text(kind, style="red" if kind == "failed" else "dim"), f"{instrument}: {reason}{often}")
    return table


def events(run: Run, most: int = 10) -> RenderableType:
    """The last things that happened."""
    table = _grid(2)
    for event in run.events[-most:]:
        table.add_row(Text(f"step {event.step:,}", style="dim"), f"{event.kind}: {event.text}")
    if len(run.events) > most:
        table.add_row("", Text(f"and {len(run.events) - most:,} before", style="dim"))
    return table


def series(run: Run, name: str, most: int = 20) -> RenderableType:
    """The scalars of one instrument: a row a scalar, a column a step, as many as fit."""
    found = run.series(name)
    if not found:
        return Text(f"{name} has no results.", style="dim")
    chosen = found if len(found) <= most else [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
    # About twelve characters a step and twenty-eight for the names; the last step is always shown.
    fit = max(1, (console().width - 28) // 12)
    chosen = chosen[:: max(1, -(-len(chosen) // fit))] if len(chosen) > fit else chosen
    chosen = [*chosen[:-1], found[-1]]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step")
    for step, _ in chosen:
        table.add_column(f"{step:,}", justify="right", no_wrap=True)
    for scalar in dict.fromkeys(name for _, result in chosen for name in result.scalars()):
        table.add_row(scalar, *(_number(result.scalars().get(scalar)) for _, result in chosen))
    return table


def _number(value: Any) -> str:
    return "" if value is None else display.format_number(value)


def instrument_list(instruments: Iterable[Instrument]) -> RenderableType:
    """Every instrument: what it measures, needs, costs and cites, and its settings with their defaults."""
    parts: list[RenderableType] = []
    for instrument in instruments:
        about = _grid(2)
        for name, text in instrument_rows(instrument).items():
            about.add_row(Text(name, style="dim"), text)
        parts += [Text(instrument.name, style="bold"), Padding(about, (0, 0, 1, 2))]
    return Group(*parts) if parts else Text("There is no instrument.")


def instrument_rows(instrument: Instrument) -> dict[str, str]:
    """The rows about one instrument, as texts."""
    needs = ", ".join(n.name + (" (optional)" if n.optional else "") for n in instrument.needs)
    settings = ", ".join(f"{s.name}={s.default}" for s in instrument.settings)
    return {
        "measures": instrument.summary,
        "needs": needs,
        "cost": instrument.cost,
        "source": instrument.source,
        "settings": settings or "none",
    }


def side_by_side(runs: Mapping[str, Run], everything: bool = False) -> RenderableType:
    """Two runs: the verdicts that differ beside each other, then the last values of the scalars that do; or all."""
    names = list(runs)
    judged = {n: {f.instrument: f for f in run.findings()} for n, run in runs.items()}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", *names):
        table.add_column(heading, ratio=1 if heading else None)
    every = dict.fromkeys(i for found in judged.values() for i in found)
    differ = [i for i in every if len({_level_of(found.get(i)) for found in judged.values()}) > 1]
    for instrument in every if everything else differ:
        title = next(found[instrument].title for found in judged.values() if instrument in found)
        table.add_row(
            Text(title, style="bold"), *(_cell(judged[n].get(instrument)) for n in names), end_section=True
        )
    alike = len(every) - len(differ)
    said = (
        f"{alike} of {len(every)} checks say the same of both" + ("" if everything else " (--all shows them)") + "."
    )
    return Group(table, said, "", _scalars(runs, everything))


def _level_of(finding: Finding | None) -> str:
    return "" if finding is None else str(finding.verdict.level)


def sweep(made: Mapping[str, Any]) -> RenderableType:
    """Many runs: a row a run, with its state, how it ended and the settings that differ."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("run", "state", "steps", "last loss", "best held-out", *made["sweep"]["columns"]):
        table.add_column(heading, overflow="fold")
    for row in made["sweep"]["rows"]:
        state = mark(row["level"]) + Text(f" {row['worst']}" if row["worst"] else "")
        best = f"{row['best']['text']} (step {row['best']['step']:,})" if row["best"] else "–"
        loss = row["loss"]["text"] if row["loss"] else "–"
        table.add_row(f"{row['key']}: {row['title']}", state, f"{row['steps']:,}", loss, best, *row["settings"])
    return Group(Text(made["verdict"]["headline"], style="bold"), made["verdict"]["sentence"], "", table)


def _cell(finding: Finding | None) -> RenderableType:
    if finding is None:
        return Text("not measured", style="dim")
    return Group(mark(finding.verdict.level), finding.verdict.sentence, "")


def _scalars(runs: Mapping[str, Run], everything: bool) -> RenderableType:
    values = [run.last_values() for run in runs.values()]
    names = list(dict.fromkeys(name for found in values for name in found))
    different = [n for n in names if everything or not _alike(*(found.get(n) for found in values))]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("last value", overflow="fold")
    for heading in (*runs, "difference"):
        table.add_column(heading, justify="right")
    above = ""
    for name in different:
        instrument, _, scalar = name.rpartition(".")
        if instrument != above:
            table.add_row(Text(instrument, style="dim"))
        above = instrument
        a, b = (found.get(name) for found in values)
        row = (_number(a), _number(b), "" if a is None or b is None else _number(b - a))
        table.add_row(f"  {scalar}" if instrument else scalar, *row)
    left = len(names) - len(different)
    return Group(table, Text(f"{left} more are equal (--all shows them)" if left else "", style="dim"))


def _alike(a: float | None, b: float | None) -> bool:
    """Equal, or undefined on both sides."""
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


def _grid(columns: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns - 1):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
