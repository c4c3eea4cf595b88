"""Each fault of a loop is named, soon; a loop without one draws no finding."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch

import diag
from diag.registry import instruments
from diag.result import Level

_spec = importlib.util.spec_from_file_location("faulty_loops", Path(__file__).with_name("faulty_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)

CHECKS = [name for name, i in instruments().items() if "diag.instruments.loop." in i.function.__module__]


def watched(make):
    """The findings of a watched loop, {(cause, level): the step at which it was told}, and what of ours broke."""
    model, train = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=CHECKS) as watcher:
            train()
    told = {(f.verdict.cause, str(f.verdict.level)): f.first_step for f in reversed(watcher.findings)}
    return told, [e.text for e in watcher.run.events if e.kind == "internal error"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    threads = torch.get_num_threads()
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", loops.FAULTS)
def test_a_fault_is_named_and_nothing_else(name):
    make, causes, within = loops.FAULTS[name]
    told, broken = watched(make)
    assert not broken
    named = {cause: step for (cause, _), step in told.items() if cause in causes}
    assert named, f"told: {told}"
    assert within is None or min(named.values()) <= within, f"told: {told}"
    others = {cause for cause, level in told if cause not in causes and level == Level.ALARM}
    assert not others, f"told: {told}"


@pytest.mark.parametrize("name", loops.HEALTHY)
def test_a_healthy_loop_draws_no_finding(name):
    told, broken = watched(loops.HEALTHY[name])
    assert not broken
    assert not told
