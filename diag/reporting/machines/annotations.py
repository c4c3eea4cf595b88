"""A check in the forms that CI systems read: JUnit XML, SARIF 2.1.0 and GitHub's workflow commands.

Each is made from the document of `checking.check`, so that they all say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

import diag
from diag.reporting.machines.checking import UNJUDGED

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
SARIF_LEVELS = {"alarm": "error", "warning": "warning"}
NOT_JUDGED = (UNJUDGED, "ignored", "known")
GITHUB_LEVELS = {"alarm": "error", "warning": "warning"}


def junit(made: Mapping[str, Any]) -> str:
    """The check as JUnit XML: a test case each verdict and limit; one without a verdict counts as skipped."""
    cases = [*_cases(made)]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(outcome == "failed" for *_, outcome in cases)),
        "errors": str(len(made["broken"])),
        "skipped": str(sum(outcome in NOT_JUDGED for *_, outcome in cases)),
    }
    suite = ElementTree.Element("testsuite", {"name": f"diag {made['run']['name']}", **counts})
    for name, sentence, text, outcome in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "diag", "name": name})
        if outcome == "failed":
            ElementTree.SubElement(case, "failure", {"message": sentence}).text = text
        elif outcome in NOT_JUDGED:
            ElementTree.SubElement(case, "skipped", {"type": outcome, "message": sentence})
        else:
            ElementTree.SubElement(case, "system-out").text = sentence
    for name in made["broken"]:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "diag", "name": name})
        ElementTree.SubElement(case, "error", {"message": "It broke while measuring, so it was not judged."})
    suite.set("tests", str(len(cases) + len(made["broken"])))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _cases(made: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    for row in made["checks"]:
        text = "\n".join(filter(None, [row["sentence"], _try(row), f"Source: {row['source']}"]))
        yield row["instrument"], row["sentence"], text, row["outcome"]
    for row in made["limits"]:
        yield f"limit on {row['name']}", row["sentence"], row["sentence"], row["outcome"]


def _try(row: Mapping[str, Any]) -> str:
    return f"Try: {row['advice']}" if row.get("advice") else ""


def sarif(made: Mapping[str, Any]) -> str:
    """The check as SARIF 2.1.0: a result each finding that counts; known and ignored ones are suppressed."""
    rows = [row for row in made["checks"] if row["level"] in SARIF_LEVELS]
    limits = [row for row in made["limits"] if row["outcome"] != "passed"]
    where = [{"physicalLocation": {"artifactLocation": {"uri": _artifact(made)}}}]
    results = [_sarif_result(row, where) for row in rows]
    results += [
        {
            "ruleId": "limit",
            "level": SARIF_LEVELS[row["level"]],
            "message": {"text": row["sentence"]},
            "locations": where,
        }
        for row in limits
    ]
    rules = [_rule(row) for row in rows] + ([{"id": "limit", "name": "Limit"}] if limits else [])
    driver = {"name": "diag", "version": diag.__version__, "rules": rules}
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _artifact(made: Mapping[str, Any]) -> str:
    path = (made["run"]["path"] or made["run"]["name"]).replace("\\", "/")
    return f"{path.lstrip('/')}/run.json".replace(" ", "%20")


def _rule(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["instrument"],
        "name": row["title"].title().replace(" ", ""),
        "shortDescription": {"text": row["title"]},
        "help": {"text": "\n".join(filter(None, [_try(row), f"Source: {row['source']}"]))},
    }


def _sarif_result(row: Mapping[str, Any], where: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "ruleId": row["instrument"],
        "level": SARIF_LEVELS.get(row["counts_as"], "note"),
        "message": {"text": " ".join(filter(None, [row["sentence"], _try(row)]))},
        "locations": where,
        "properties": {"confidence": row["confidence"], "lastStep": row["last_step"], "cause": row["cause"]},
    }
    if row["outcome"] in ("known", "ignored"):
        justification = "in the baseline" if row["outcome"] == "known" else "ignored by the configuration"
        made["suppressions"] = [{"kind": "external", "justification": justification}]
    return made


def github(made: Mapping[str, Any]) -> str:
    """The findings that count as GitHub workflow commands, a line each; "" where there is none."""
    rows = [(row["counts_as"], row["title"], " ".join(filter(None, [row["sentence"], _try(row)])), row["outcome"])
            for row in made["checks"]]  # fmt: skip
    rows += [(row["level"], f"limit on {row['name']}", row["sentence"], row["outcome"]) for row in made["limits"]]
    reported = [(level, title, text) for level, title, text, outcome in rows if outcome in ("failed", "tolerated")]
    return "".join(
        f"::{GITHUB_LEVELS[level]} title={_property(f'diag: {title}')}::{_data(text)}\n"
        for level, title, text in reported
    )


def _data(text: str) -> str:
    """A message as GitHub's runner unescapes it: without this a line break would end the command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
