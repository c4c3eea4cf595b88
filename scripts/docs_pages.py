"""What the documentation site is given by the code: a page an instrument, the commands, the public names.

A hook of mkdocs: `on_config` sets the order of the pages, `on_files` adds those that are written here. Tests call
`pages()` without mkdocs.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

THEMES = {
    "loop": "The training loop",
    "loss": "The loss",
    "data": "The data",
    "optimization": "Optimization",
    "network": "The network",
    "outcome": "The outcome",
    "distributed": "Several processes",
    "trial": "Before training",
    "saved": "Checkpoint files, by themselves",
}
KINDS = {"check": "Checks", "measurement": "Measurements", "description": "Descriptions"}
PAGES = [
    {"Home": "index.md"},
    {"Tutorial": "tutorial.md"},
    {
        "How to, by symptom": [
            {"Before training: will it work?": "howto/preflight.md"},
            {"My loss spiked, or went up for good": "howto/spike.md"},
            {"My loss is flat": "howto/flat.md"},
            {"Is the network initialised well": "howto/initial.md"},
            {"NaN": "howto/nan.md"},
            {"Validation is bad": "howto/validation.md"},
            {"Which labels are wrong": "howto/labels.md"},
            {"Can I average these checkpoints": "howto/average.md"},
            {"What is in this checkpoint": "howto/checkpoints.md"},
            {"Compare runs, or a sweep": "howto/compare.md"},
            {"Check every run in CI": "howto/ci.md"},
            {"With Lightning, transformers, W&B": "howto/tools.md"},
            {"Find your way on the page": "howto/page.md"},
            {"Follow a run while it trains": "howto/live.md"},
            {"Yesterday's logs": "howto/logs.md"},
        ]
    },
    {
        "Reference": [
            {"Instruments": "reference/instruments.md"},
            {"Commands": "reference/commands.md"},
            {"Public names": "reference/api.md"},
            {"Findings as JSON": "reference/json.md"},
            {"SageMaker Debugger's rules": "reference/sagemaker.md"},
        ]
    },
    {
        "Why a number can be trusted": [
            {"Verdicts": "explanation/verdicts.md"},
            {"Curvature": "explanation/curvature.md"},
            {"Watching changes nothing": "explanation/watching.md"},
            {"Do the stated errors cover?": "coverage.md"},
        ]
    },
]
ABOUT_INSTRUMENTS = """Checks say what is wrong with a run and cost nothing or one pass over the probe set;
measurements are expensive; descriptions judge nothing and run by name."""
COUNTS = "../../calibration.md"
NOT_COUNTED = f"no program of the [calibration]({COUNTS}) is broken in a way that it names"
ABOUT_COMMANDS = """Every command says more by `--help`. Exit status: 0 fine, 1 a check failed, 2 nothing could be
done: the call, the configuration or the run is not as it must be."""


def pages() -> dict[str, str]:
    """The pages that are written from the code, by their path in the site."""
    from diag.registry import instruments

    known = {n: i for n, i in sorted(instruments().items()) if i.function.__module__.startswith("diag.")}
    made = {f"reference/instruments/{name}.md": instrument_page(i) for name, i in known.items()}
    made["reference/instruments.md"] = index_page(known)
    made["reference/commands.md"] = commands_page()
    made["reference/api.md"] = api_page()
    made["llms.txt"] = llms_page(known)
    return made


def instrument_page(instrument: Any) -> str:
    """One instrument: what it says, needs and costs, its settings and what it returns."""
    lines = [f"# {instrument.title}", "", f"`diag.{instrument.name}`", ""]
    lines += [tidy(inspect.getdoc(instrument.function) or ""), ""]
    lines += ["## Why it matters", "", instrument.why, ""] if instrument.why else []
    formula = instrument.formula.replace("; ", "\n")
    lines += ["## Formula", "", "```text", formula, "```", ""] if formula else []
    rows = {
        "kind": instrument.kind.value,
        "needs": ", ".join(f"`{n.name}`" + (" (optional)" if n.optional else "") for n in instrument.needs),
        "cost": instrument.cost,
        "source": instrument.source,
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {cell(text)} |" for name, text in rows.items() if text), ""]
    if instrument.settings:
        lines += ["## Settings", "", "| setting | default |", "|---|---|"]
        lines += [f"| `{s.name}` | `{cell(repr(s.default))}` |" for s in instrument.settings] + [""]
    lines += ["## What it returns", "", f"`{instrument.result.__name__}`: {summary(instrument.result)}", ""]
    lines += ["| field | unit | what it is |", "|---|---|---|"]
    for field in instrument.result.measured_fields():
        about = field.metadata
        lines.append(f"| `{field.name}` | {cell(about['unit'])} | {cell(about['description'])} |")
    lines += ["", "## When it is silent", "", *silence(instrument), ""]
    lines += ["## How often it is right", "", how_often(instrument), ""]
    lines += picture(instrument)
    return "\n".join(lines)


def silence(instrument: Any) -> list[str]:
    """What must be there, and how to give it where it is not."""
    must = [n for n in instrument.needs if not n.optional]
    lines = [f"- Without `{n.name}` it is skipped: {n.quantity.how}." for n in must]
    lines += [f"- Without `{n.name}` it says less: {n.quantity.how}." for n in instrument.needs if n.optional]
    return [*lines, "- Where a precondition does not hold it gives no verdict and says which one."]


def how_often(instrument: Any) -> str:
    """The counts of the calibration, on programs that chose no threshold."""
    from diag.rates import rates

    counted = rates().get(instrument.name)
    if counted is None:
        return f"It has not been counted: {NOT_COUNTED}."
    said = f"it said something in {counted['disturbed']} of {counted['sound']} sound trainings (false alarms)"
    named, broken = counted["named"], counted["broken"]
    missed = f"(missed: {broken - named})"
    found = f"it named the cause in {named} of {broken} trainings that are broken in its ways {missed}"
    told = f"{found}, and {said}" if broken else f"{said}; none of them is broken in a way that it names"
    return f"On programs that chose no threshold {told}. Counted by `scripts/calibrate`: [all]({COUNTS})."


@functools.cache
def drawings() -> dict[str, str]:
    """A drawing of each instrument that the reports in the repository have, by the instrument's name."""
    found: dict[str, str] = {}
    for file in [ROOT / "reports" / "demo" / "report.json", *sorted((ROOT / "reports").glob("*/*.json"))]:
        made = json.loads(file.read_text(encoding="utf-8"))
        for key, svg in (made.get("drawings") or {}).items():
            if svg.startswith("<svg"):
                found.setdefault(key.rpartition("-")[0], svg)
    return found


def picture(instrument: Any) -> list[str]:
    """How the report draws it, from a run in the repository; nothing where no run has it."""
    svg = drawings().get(instrument.name)
    if svg is None:
        return []
    return [
        "## Picture",
        "",
        f"<figure>{svg}<figcaption>{instrument.title}, in a report.</figcaption></figure>",
        "",
    ]


def index_page(known: dict[str, Any]) -> str:
    """All instruments by kind and theme."""
    lines = ["# Instruments", "", ABOUT_INSTRUMENTS, ""]
    for kind, heading in KINDS.items():
        chosen = [i for i in known.values() if i.kind.value == kind]
        lines += [f"## {heading}", ""]
        for theme in dict.fromkeys(theme_of(i) for i in chosen):
            lines += [f"### {theme}", ""] if kind == "check" else []
            lines += [
                f"- [{i.title}](instruments/{i.name}.md): {i.summary}" for i in chosen if theme_of(i) == theme
            ]
            lines += [""]
    return "\n".join(lines)


def theme_of(instrument: Any) -> str:
    """The theme of a check: the folder that it stands in."""
    parts = instrument.function.__module__.split(".")
    return THEMES.get(parts[2], "Others") if len(parts) > 3 else "Others"


def commands_page() -> str:
    """Every command with its help."""
    import click

    from diag.cli import main

    lines = ["# Commands", "", ABOUT_COMMANDS, ""]
    context = click.Context(main, info_name="diag")
    for name in sorted(main.list_commands(context)):
        command = main.get_command(context, name)
        assert command is not None
        text = command.get_help(click.Context(command, info_name=f"diag {name}", max_content_width=96))
        lines += [f"## diag {name}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def api_page() -> str:
    """The public names that are no instruments, from their docstrings."""
    import diag

    homes: dict[str, str] = vars(diag)["_HOMES"]
    lines = ["# Public names", "", "Instruments have [pages of their own](instruments.md).", ""]
    return "\n".join([*lines, *(f"::: {homes[n]}.{n}\n" for n in sorted(homes))])


def llms_page(known: dict[str, Any]) -> str:
    """What a language model needs to use diag: https://llmstxt.org."""
    lines = [
        "# diag",
        "",
        "> Tells what state a PyTorch network is in, while it trains and afterwards, with evidence.",
        "",
    ]
    lines += ["## Documentation", "", "- [Tutorial](tutorial.html): from nothing to the first page"]
    lines += [
        "- [Commands](reference/commands.html)",
        "- [Findings as JSON](reference/json.html): --json and the schema",
    ]
    lines += ["", "## Instruments", ""]
    lines += [f"- [{n}](reference/instruments/{n}.html): {i.summary}" for n, i in known.items()]
    return "\n".join(lines) + "\n"


def tidy(text: str) -> str:
    """A docstring as Markdown: lists and indented parts stay as they are."""
    return re.sub(r"`(\S[^`]*)`", r"`\1`", text)


def cell(text: str) -> str:
    """A text in a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def listed(nav: list[dict[str, Any]]) -> Iterator[str]:
    """The files that the order of the pages names."""
    for part in nav:
        for value in part.values():
            yield from [value] if isinstance(value, str) else listed(value)


def further(docs: Path) -> list[Path]:
    """Pages at the top that other scripts write, for the last section of the site."""
    known = set(listed(PAGES))
    return [file for file in sorted(docs.glob("*.md")) if file.name not in known]


def heading(file: Path) -> str:
    """A page's title: its first heading."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), file.stem)


# What mkdocs calls.


def on_config(config: Any) -> Any:
    """The order of the pages."""
    nav = [dict(part) for part in PAGES]
    (title, pages_there), *_ = nav[-1].items()
    nav[-1] = {title: [*pages_there, *({heading(file): file.name} for file in further(Path(config["docs_dir"])))]}
    config["nav"] = nav
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages that are written from the code."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
