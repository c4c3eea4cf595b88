"""Starts one process a rank, and reads what each of them found.

A rank is forked from a server that has imported torch and diag, and nothing else: it starts in a tenth of a second
where a new interpreter takes as long as all that it is to do. The server has one thread, and has run neither a
backward pass nor anything in parallel, so that no thread is missing in what is forked.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).with_name("trainings.py")
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # read when torch is imported: by the server
SECONDS = 400


def start(world, folder, names, script=SCRIPT):
    """Run the trainings of a script; what the ranks found, by rank."""
    run_ranks([[script, str(rank), str(world), folder, *names] for rank in range(world)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def run_ranks(arguments, env=None):
    """Run Python with each rank's arguments, all at once; env: what each has in its environment besides."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(len(arguments))]
        ranks = [
            forking().Process(target=as_script, args=([str(part) for part in each], more, where))
            for each, more, where in zip(arguments, env or [{}] * len(arguments), said, strict=True)
        ]
        try:
            for rank in ranks:
                rank.start()
            ends = time.monotonic() + SECONDS
            for rank in ranks:
                rank.join(max(ends - time.monotonic(), 0))
            codes = [rank.exitcode for rank in ranks]  # None of one that is still at work
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        assert codes == [0] * len(ranks), (codes, [where.exists() and where.read_text() for where in said])


def forking():
    """What starts processes, with the server that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.imported"])
    with mock.patch.dict(os.environ, QUIET):
        forkserver.ensure_running()
    return context


def as_script(arguments, env, said):
    """As `python SCRIPT ARGUMENT...`; what it writes to standard error goes to a file."""
    for number, where in ((1, os.devnull), (2, said)):
        file = os.open(where, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(QUIET | env)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
