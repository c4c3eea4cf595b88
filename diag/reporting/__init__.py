"""The report: one page that tells what state a network is in, with the evidence.

`report(source)` makes it; `document` is all that it says, as JSON; `render` is the page of a document.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

from diag.build import refuse_without_build
from diag.door import at_the_door
from diag.errors import InvalidInput, did_you_mean
from diag.reporting.comparison.compare import compare
from diag.reporting.document import document
from diag.reporting.files import Page
from diag.reporting.page import render
from diag.run.checkpoints import from_checkpoints
from diag.run.state_files import from_state_files

__all__ = ["Page", "compare", "comparison", "machines", "render", "report", "serving"]


@at_the_door
def report(
    source: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    build: Any = None,
    title: str = "",
    command: str = "",
    **measuring: Any,
) -> Page:
    """Report on a run, the path of its folder, a `Snapshot` (with every instrument) or a dict of results by name.

    With `build`, the function that gives `(model, loss_fn, data)` or its name, `source` is one checkpoint or
    several: `diag.report(["a.pt", "b.pt"], build=build)`. `measuring` are then arguments of
    `diag.run.checkpoints`: names, settings, options, key, every, progress. A list of checkpoints without `build` is
    looked at by itself, with no model: what the files hold and what changed.

    With `output` the page is written there, and its document beside it with the ending .json. title: in place
    of the run's name. command: the command line that makes this report, to be shown in it.
    Raises InvalidInput where no report can be made of `source` or written to `output`, RunError where the path
    holds no run.
    """
    known = inspect.signature(from_checkpoints).parameters
    if strange := next((name for name in measuring if name not in known), ""):
        meant = did_you_mean(strange, [*inspect.signature(report).parameters, *known], 1)
        raise InvalidInput(f"report has no argument {strange!r}; {meant or 'see help(diag.report).'}")
    if build is not None:
        paths = [source] if isinstance(source, (str, os.PathLike)) else source
        source = from_checkpoints(paths, build, **measuring)
    else:
        refuse_without_build("report", list(measuring))
        if isinstance(source, (list, tuple)):
            source = from_state_files(source)
    page = Page(document(source, title=title, command=command))
    return page if output is None else page.save(output)
