"""A check is asked again only where facts have changed that it has read."""

import ast
import dataclasses
from pathlib import Path

import numpy

import diag
from diag.snapshot.loop.data import BatchFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.rows import RowFacts
from diag.watching.measure.reads import Reads
from diag.watching.observe.loop.formula.latents import Latents
from diag.watching.observe.loop.formula.rewards.actions import Actions
from diag.watching.observe.loop.formula.rewards.policy import Policies
from diag.watching.observe.loop.formula.sides.contrast import Contrasts

FIRST = Loop(step=1, calls=1, batches=BatchFacts(calls=1))


def judged(reads, facts, check, look):
    reads.begin(facts)
    news = reads.has_news(check)
    if news:
        look(reads.facts_for(check))
    return news


def test_what_a_check_never_saw_is_news_and_what_it_did_not_read_is_none():
    reads, look = Reads(), lambda loop: loop.batches.calls
    assert judged(reads, FIRST, "one", look)
    again = dataclasses.replace(FIRST, step=2, calls=2, batches=BatchFacts(calls=1))  # equal batches
    assert not judged(reads, again, "one", look)
    assert judged(reads, again, "other", look)
    assert judged(reads, dataclasses.replace(again, batches=BatchFacts(calls=2)), "one", look)


def test_a_change_is_not_lost_in_judgements_of_others():
    reads, look = Reads(), lambda loop: loop.calls
    assert judged(reads, FIRST, "one", look)
    for calls in (2, 3):
        reads.begin(dataclasses.replace(FIRST, calls=calls))
    assert reads.has_news("one")
    reads.facts_for("one").calls  # noqa: B018
    assert not reads.has_news("one")


def test_what_is_read_through_the_facts_own_methods_counts_and_they_say_the_same():
    reads = Reads()
    assert judged(reads, FIRST, "one", lambda loop: loop.full_batch)
    assert not judged(reads, dataclasses.replace(FIRST, unstepped=1), "one", lambda loop: loop.full_batch)
    more = dataclasses.replace(FIRST, batches=BatchFacts(calls=4, lag=1, repeats=3))
    seen = []
    assert judged(reads, more, "one", lambda loop: seen.append(loop.full_batch))
    assert seen == [more.full_batch] == [True]


def test_arrays_that_cannot_be_compared_at_once_count_as_changed():
    reads, look = Reads(), lambda loop: loop.rows
    rows = dataclasses.replace(RowFacts(), margins=numpy.zeros((2, 2), numpy.float32))
    assert judged(reads, dataclasses.replace(FIRST, rows=rows), "one", look)
    same = dataclasses.replace(rows, margins=numpy.zeros((2, 2), numpy.float32))
    assert judged(reads, dataclasses.replace(FIRST, rows=same), "one", look)


def test_news_of_one_fact_is_none_for_a_check_that_did_not_read_it():
    reads, look = Reads(), lambda loop: (loop.calls, loop.rows)
    assert judged(reads, FIRST, "one", look)
    reads.begin(dataclasses.replace(FIRST, calls=2))
    assert reads.has_news("one") and reads.has_news("one", {"calls", "order"})
    assert not reads.has_news("one", {"order"})  # what else it read has changed, and waits
    assert reads.has_news("other", {"order"})  # it has never been asked


def test_each_kind_of_news_names_a_fact_of_the_loop():
    said = [
        call.args[1].value
        for path in (Path(diag.__file__).parent / "watching" / "observe").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "news"
        if len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
    ]
    names = [r.NAME for r in (Actions, Contrasts, Latents, Policies)]
    assert len(said) > 50
    assert {*said, *names} <= {f.name for f in dataclasses.fields(Loop)}
