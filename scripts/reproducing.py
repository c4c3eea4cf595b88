"""What a reproduction card is, and how `scripts/reproduce` runs one.

A card is a file `scripts/reproductions/NAME.py` that defines `CARD`:

    from reproducing import Card, Expectation, Lab

    def run(lab: Lab) -> list[Expectation]:
        with lab.recorder("plain", model) as arm:             # each arm becomes a run and a report
            arm.append_outcome(step, diag.softmax_collapse(snapshot))
        return [Expectation("test accuracy at the end", "98 %", accuracy, low=0.95)]

    CARD = Card(title="...", source="...", claim="...", takes="3 minutes", run=run)

A card of more than eight minutes says `long=True`; `--all` leaves it out, `--long` runs it too.
Bands are fixed before the run that is to be judged; a card says where they come from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import diag
from diag.display import format_number
from diag.errors import MissingData
from diag.run.writer import RunWriter

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "scripts" / "reproductions"
GALLERY = ROOT / "reports"


@dataclass(frozen=True)
class Expectation:
    """One number that a paper or an earlier study states, beside the one measured, and the band it must lie in."""

    name: str
    expected: str | float
    measured: float
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    @property
    def holds(self) -> bool:
        """True inside the band; a NaN is outside."""
        return self.low <= self.measured <= self.high

    @property
    def band(self) -> str:
        """The band in words."""
        if self.low == self.high:
            return f"= {format_number(self.low, 4)}"
        if math.isinf(self.high):
            return "any" if math.isinf(self.low) else f">= {format_number(self.low, 4)}"
        if math.isinf(self.low):
            return f"<= {format_number(self.high, 4)}"
        return f"{format_number(self.low, 4)} to {format_number(self.high, 4)}"

    def row(self) -> tuple[str, str, str, str, str]:
        """Name, expected, measured, band and yes or NO, as text."""
        expected = self.expected if isinstance(self.expected, str) else format_number(self.expected, 4)
        unit = f" {self.unit}" if self.unit else ""
        measured = format_number(self.measured, 4) + unit
        return self.name, expected, measured, self.band, "yes" if self.holds else "NO"


@dataclass
class Lab:
    """Where a card works: it records its arms here and may say how far it is."""

    folder: Path
    say: Callable[[str], None] = print
    arms: list[str] = field(default_factory=list)

    def run_folder(self, arm: str) -> Path:
        """The folder of the arm's run, also for `diag.watch(model, run=...)`; arms keep their order."""
        if arm not in self.arms:
            self.arms.append(arm)
        return self.folder / "runs" / arm

    def recorder(self, arm: str, model: nn.Module, **metadata: Any) -> RunWriter:
        """A writer for results that the card measures itself, at the steps that it chooses."""
        layers = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        about = {
            "model": type(model).__name__,
            "num_parameters": sum(layers.values()),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        return RunWriter(self.run_folder(arm), about | metadata | {"layers": layers})


@dataclass(frozen=True, kw_only=True)
class Card:
    """A claim of a paper, and the experiment that checks it: `run(lab)` gives the numbers beside their bands."""

    title: str
    source: str
    claim: str
    takes: str
    run: Callable[[Lab], Sequence[Expectation]]
    notes: str = ""
    long: bool = False


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "diag": diag.__version__}


@contextmanager
def reseeded(by: int) -> Iterator[None]:
    """While this lasts, every seed that torch is given is larger by that much: another draw of everything."""

    class Reseeded(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + by)

    seed_all = torch.manual_seed
    with (
        mock.patch.object(torch, "manual_seed", lambda seed: seed_all(seed + by)),
        mock.patch.object(torch, "Generator", Reseeded),
    ):
        yield


def find_cards(folder: Path = CARDS) -> dict[str, Path]:
    """The cards by name; a file that begins with an underscore is none."""
    return {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}


def load_card(path: Path) -> Card:
    """The `CARD` of the file."""
    spec = importlib.util.spec_from_file_location(f"reproductions.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    card = getattr(module, "CARD", None)
    if not isinstance(card, Card):
        raise TypeError(f"{path} defines no CARD of type reproducing.Card.")
    return card


def reproduce(name: str, path: Path, gallery: Path = GALLERY, say: Callable[[str], None] = print) -> bool:
    """Run a card, print expected beside measured, write its runs and reports; True if all lies in its band."""
    card, folder = load_card(path), gallery / name
    say(f"{name}: {card.title} (about {card.takes})\nClaim: {card.claim}\nSource: {card.source}\n")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # One thread: the number of threads changes the order of sums, and with it the course of chaotic training.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        lab = Lab(folder, say)
        found = tuple(card.run(lab))
        seconds = time.perf_counter() - began
        reports = write_reports(lab, card, f"scripts/reproduce {name}")
    finally:
        torch.set_num_threads(threads)
    print_table(found, say)
    write_page(folder, name, card, found, reports, seconds)
    holds = bool(found) and all(e.holds for e in found)
    say(f"{'All in their bands' if holds else 'OUTSIDE a band'}, after {seconds:.0f} s; see {folder}")
    return holds


def write_reports(lab: Lab, card: Card, command: str) -> list[str]:
    """One report an arm; the names of the pages."""
    pages = []
    for arm in lab.arms:
        run = lab.run_folder(arm)
        (run / "writer.lock").unlink(missing_ok=True)
        diag.report(run, output=lab.folder / f"{arm}.html", title=f"{card.title}: {arm}", command=command)
        pages.append(f"{arm}.html")
    return pages


def print_table(found: Sequence[Expectation], say: Callable[[str], None] = print) -> None:
    """Expected beside measured, in aligned columns."""
    rows = [("what", "expected", "measured", "band", "holds"), *(e.row() for e in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def write_page(
    folder: Path, name: str, card: Card, found: Sequence[Expectation], reports: Sequence[str], seconds: float
) -> None:
    """The outcome as a page for people and as JSON."""
    table = ["| what | expected | measured | band | holds |", "|---|---|---|---|---|"]
    table += ["| " + " | ".join(e.row()) + " |" for e in found]
    links = [f"- [{page.removesuffix('.html')}]({page})" for page in reports]
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        f"# {card.title}",
        "",
        card.claim,
        "",
        f"Source: {card.source}",
        "",
        f"    scripts/reproduce {name}",
        "",
    ]
    lines += [*table, "", *([card.notes, ""] if card.notes else [])]
    lines += ["Reports, one an arm:", "", *links, "", f"Took {seconds:.0f} s on one thread ({about})."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    data = {
        "name": name,
        "title": card.title,
        "claim": card.claim,
        "source": card.source,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "expectations": [
            dict(zip(("what", "expected", "measured", "band", "holds"), e.row(), strict=True)) for e in found
        ],
    }
    (folder / "measured.json").write_text(json.dumps(data, indent=1) + "\n")


def _chosen(cards: dict[str, Path], short: bool, long: bool) -> list[str]:
    """The cards that take minutes, those that take longer, or both."""
    wanted = [kind for kind, asked in ((False, short), (True, long)) if asked]
    return [name for name, path in cards.items() if wanted and load_card(path).long in wanted]


def main(arguments: Sequence[str], description: str | None = None) -> int:
    """The command line of `scripts/reproduce`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="reproduce", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="the cards to run")
    parser.add_argument("--list", action="store_true", help="the cards, what they claim and how long they take")
    parser.add_argument("--all", action="store_true", help="run every card that takes minutes")
    parser.add_argument("--long", action="store_true", help="with --all: also those that take longer; alone: those")
    parser.add_argument("--cards", type=Path, default=CARDS, help="the folder of the cards")
    parser.add_argument("--output", type=Path, help="where runs and reports go [default: reports]")
    parser.add_argument("--reseed", type=int, default=0, metavar="N", help="add N to every seed; needs --output")
    asked = parser.parse_args(arguments)
    if asked.reseed and asked.output is None:
        parser.error(
            "--reseed needs --output, a folder of its own: the pages in reports are of the cards' own seeds."
        )
    cards = find_cards(asked.cards)
    if asked.list:
        for name, path in cards.items():
            card = load_card(path)
            takes = f"{card.takes}; with --long" if card.long else card.takes
            print(f"{name:14} {card.title} ({takes})\n{'':14} {card.claim}")
        return 0
    names = asked.names or _chosen(cards, short=asked.all, long=asked.long)
    unknown = [name for name in names if name not in cards]
    if unknown or not names:
        print(f"There is no card {unknown[0]!r}." if unknown else "No card was named.", end=" ", file=sys.stderr)
        print(f"Give some of: {', '.join(cards)}; or --all, --long, or --list.", file=sys.stderr)
        return 2
    # No shortcut: with several cards, all run even where the first fails.
    try:
        with reseeded(asked.reseed):
            output = asked.output or GALLERY
            held = [reproduce(name, cards[name], output, lambda text: print(text, flush=True)) for name in names]
    except MissingData as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(held) else 1
