"""A run that is killed goes on where it was and gives the numbers of the uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diag.errors import CheckpointError
from diag.linalg.lanczos import Eigenpairs, eigenpairs
from diag.linalg.operator import FunctionOperator, MatrixOperator
from diag.linalg.spectrum import spectrum

# The same problem in this process and in the one that is killed; `die_at` counts products.
PROBLEM = """
import os, signal, sys, torch
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import FunctionOperator
torch.set_num_threads(1)
die_at, path, memory = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None
diagonal = torch.linspace(0, 1, 3000) ** 8
calls = 0
def product(v):
    global calls
    calls += 1
    if calls == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return diagonal * v
eigenpairs(FunctionOperator(product, 3000), largest=4, checkpoint=path, memory=memory)
"""


def solve(checkpoint: Path | None, memory: int | None, largest: int = 4) -> tuple[Eigenpairs, int]:
    diagonal = torch.linspace(0, 1, 3000) ** 8
    operator = FunctionOperator(lambda v: diagonal * v, 3000)
    pairs = eigenpairs(operator, largest=largest, checkpoint=checkpoint, memory=memory)
    return pairs, operator.num_products


@pytest.mark.parametrize("memory", [None, 22 * 3000 * 4])
def test_killed_and_resumed_gives_the_same_numbers(tmp_path: Path, memory: int | None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path = tmp_path / "run.pt"
        killed = subprocess.run([sys.executable, "-c", PROBLEM, "25", str(path), str(memory or 0)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert path.exists()
        resumed, products = solve(path, memory)
        whole, all_products = solve(None, memory)
    finally:
        torch.set_num_threads(threads)
    assert products == all_products - 20, "the last checkpoint before product 25 was at 20"
    assert resumed.num_products == whole.num_products == all_products
    for name in ("values", "residuals", "bounds", "vectors"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_another_question_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    solve(path, None)
    with pytest.raises(
        CheckpointError, match="another choice of eigenvalues; give the same settings or delete the file"
    ):
        solve(path, None, largest=3)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "pickle"])
def test_other_files_are_refused_without_running_them(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.pt"
    if content == "pickle":
        torch.save({"identity": Trap()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a Lanczos checkpoint; delete it or give another file name"):
        solve(path, None)
    assert "DIAG_TRAP" not in os.environ


class Trap:
    def __reduce__(self) -> tuple:
        return os.putenv, ("DIAG_TRAP", "1")


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    solve(tmp_path / "run.pt", None)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("die_at", [25, 50])
def test_a_spectrum_goes_on_in_its_folder_and_leaves_nothing_there(tmp_path: Path, die_at: int) -> None:
    """Killed in the run itself, and in the probes after it; another operator in the same folder is another run."""
    matrix = torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64) ** 8)

    class Dying(MatrixOperator):
        def _matvec(self, v: torch.Tensor) -> torch.Tensor:
            if self.num_products >= die_at:
                raise Killed
            return super()._matvec(v)

        def __repr__(self) -> str:  # the same operator as the one that lives
            return repr(MatrixOperator(self.matrix))

    settings = {"largest": 4, "steps": 40, "checkpoint": tmp_path / "runs" / "kept"}
    with pytest.raises(Killed):
        spectrum(Dying(matrix), **settings)
    (file,) = (tmp_path / "runs" / "kept").iterdir()
    other = spectrum(MatrixOperator(2 * matrix), **settings)
    assert file.exists() and float(other.top.values[0]) == pytest.approx(2.0, rel=1e-6)
    operator = MatrixOperator(matrix)
    resumed = spectrum(operator, **settings)
    whole = spectrum(MatrixOperator(matrix), **settings | {"checkpoint": None})
    assert torch.equal(resumed.top.values, whole.top.values) and resumed.trace == whole.trace
    assert resumed.num_products == whole.num_products > operator.num_products
    assert not list((tmp_path / "runs" / "kept").iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be made a folder \(.*\); give another"):
        spectrum(MatrixOperator(torch.eye(9)), checkpoint=tmp_path / "file")
