"""Under torchrun: the ranks find each other before the command's work begins, and part when it has ended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

WAIT = timedelta(hours=6)  # the ranks wait for what rank 0 measures alone


def is_first() -> bool:
    """Whether this process is to write and print: the only one, or rank 0."""
    return int(os.environ.get("RANK", 0) or 0) == 0 or not _are_several()


def _are_several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1) or 1) > 1 and "MASTER_ADDR" in os.environ


def leave(status: int) -> None:
    """End this process at once, where torchrun has started it as one of several; return where it is the only one.

    A thread of gloo may still drop its reference to the tensors of the last exchange while the interpreter is torn
    down; taking Python's lock is then refused by ending the thread, and C++ ends the process with SIGABRT. All that
    a command has to say is written by then.
    """
    if not _are_several():
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def started_ranks(device: str | None) -> Iterator[bool]:
    """Whether there are several ranks; inside the context they are connected."""
    if not _are_several():
        yield False
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available() and not str(device or "cuda").startswith("cpu")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield True
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()
