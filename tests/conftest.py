"""What all tests share.

One thread a process: results then do not depend on the number of cores, and parallel workers do not fight.
"""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def transformers():
    """The library, quiet and offline: its models are built from configurations."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        found = pytest.importorskip("transformers")
        found.logging.set_verbosity_error()
        yield found
