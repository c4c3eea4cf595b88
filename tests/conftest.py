"""What all tests share.

One thread a process: results then do not depend on the number of cores, and parallel workers do not fight.
"""

import gc

import pytest
import torch

from tests.source import parsed

torch.set_num_threads(1)


def pytest_collection_finish():
    """What there is when all tests are collected (modules, the tests themselves) stays to the end, and is taken out
    of what the garbage collector looks through: else each watch that looks for the optimizer of a training searches
    the modules of ten thousand tests, a tenth of a second each time. What a test makes is found as ever."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def syntax_trees_are_let_go():
    yield
    parsed.cache_clear()


@pytest.fixture(scope="module")
def transformers():
    """The library, quiet and offline: its models are built from configurations."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        found = pytest.importorskip("transformers")
        found.logging.set_verbosity_error()
        yield found
