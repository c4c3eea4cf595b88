"""Real data that installed packages carry, and a few made-up sets; nothing is downloaded, everything is kept."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from diag import datasets

Pair = tuple[TensorDataset, TensorDataset]


def split_rows(tensors: tuple[Tensor, ...], held_out: int, seed: int = 0) -> Pair:
    """The rows in one random order, the last `held_out` of them apart."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:-held_out], order[-held_out:]
    return TensorDataset(*(t[first] for t in tensors)), TensorDataset(*(t[rest] for t in tensors))


@functools.cache
def _images(name: str) -> tuple[Tensor, Tensor]:
    loaded = datasets.load_dataset(name)
    return loaded.inputs, loaded.labels


def digits(held_out: int = 400, mean: float = 0.305, std: float = 0.376) -> Pair:
    """1,797 digits of 8 x 8, (n, 1, 8, 8), normalised; ten classes."""
    inputs, labels = _images("digits")
    return split_rows(((inputs - mean) / std, labels), held_out)


@functools.cache
def _half_size() -> tuple[Tensor, Tensor]:
    inputs, labels = _images("mnist5k")
    return torch.nn.functional.avg_pool2d(inputs, 2), labels


def mnist(held_out: int = 1000) -> Pair:
    """5,000 digits of MNIST at half size, (n, 1, 14, 14), normalised; ten classes."""
    inputs, labels = _half_size()
    return split_rows(((inputs - 0.131) / 0.265, labels), held_out)


def raw_digits(held_out: int = 400) -> Pair:
    """Digits of 8 x 8 in [0, 1]."""
    return digits(held_out, 0.0, 1.0)


@functools.cache
def _table(name: str) -> tuple[Tensor, Tensor]:
    import sklearn.datasets as source

    x, y = getattr(source, f"load_{name}")(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def standard(x: Tensor) -> Tensor:
    """Each column with zero mean and unit deviation."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-8)


def diabetes() -> Pair:
    """442 patients: ten features, and the disease's progression as a standardised column (n, 1)."""
    x, y = _table("diabetes")
    return split_rows((standard(x), standard(y.float()[:, None])), 90)


def wide_table() -> Pair:
    """Breast cancer: 569 rows of 30 standardised features, two classes."""
    x, y = _table("breast_cancer")
    return split_rows((standard(x), y.long()), 120)


def friedman(rows: int = 1500) -> Pair:
    """Friedman's first function of ten uniform features with noise, standardised; targets (n,)."""
    generator = numpy.random.default_rng(0)
    x = generator.uniform(size=(rows, 10))
    y = 10 * numpy.sin(numpy.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + generator.normal(size=rows)
    to = functools.partial(torch.tensor, dtype=torch.float32)
    return split_rows((standard(to(x)), standard(to(y)[:, None])[:, 0]), 300)


def purchases(rows: int = 3000) -> Pair:
    """Made-up customers: three categories (20, 12 and 7 values), four numbers, and whether they bought."""
    g = torch.Generator().manual_seed(7)
    sizes = (20, 12, 7)
    categories = torch.stack([torch.randint(k, (rows,), generator=g) for k in sizes], 1)
    numbers = torch.randn(rows, 4, generator=g)
    effects = [torch.randn(k, generator=g) for k in sizes]
    odds = sum(e[categories[:, i]] for i, e in enumerate(effects)) + numbers[:, 0] - numbers[:, 1] * numbers[:, 2]
    bought = (torch.rand(rows, generator=g) < torch.sigmoid(1.5 * odds)).float()
    return split_rows((categories, numbers, bought), 600)


@functools.cache
def text(source: str) -> tuple[Tensor, int]:
    """Characters of a text that Python carries, as codes, and how many different ones there are."""
    place = importlib.util.find_spec(source)
    assert place is not None and place.origin is not None
    plain = re.sub(r"\\n", "\n", Path(place.origin).read_text(encoding="utf-8"))[:200_000].lower()
    plain = re.sub(r"[^a-z0-9 .,;:'()=_\n-]", "", plain)
    letters = sorted(set(plain))
    index = {c: i for i, c in enumerate(letters)}
    return torch.tensor([index[c] for c in plain]), len(letters)


@functools.cache
def waves(length: int = 4000) -> Tensor:
    """A series of three incommensurable oscillations with noise, (length,), of unit scale."""
    g = torch.Generator().manual_seed(3)
    t = torch.arange(length).float()
    series = torch.sin(t / 5.1) + 0.6 * torch.sin(t / 17.3 + 1) + 0.4 * torch.sin(t / 2.7) * torch.sin(t / 90)
    return series + 0.1 * torch.randn(length, generator=g)


def levels(count: int = 24) -> tuple[Tensor, int]:
    """A series like that of `waves`, five times as long, as the number of the quantile (0 to count - 1)."""
    series = waves(20_000)
    edges = series.quantile(torch.linspace(0, 1, count + 1)[1:-1])
    return torch.bucketize(series, edges), count


def windows(width: int = 32) -> Pair:
    """Windows of the series (n, width, 1) and the value that follows (n, 1)."""
    cut = waves().unfold(0, width + 1, 2)
    return split_rows((cut[:, :-1, None], cut[:, -1:]), 400)


def blobs(images: int = 1200, side: int = 16) -> Pair:
    """Images (n, 1, side, side) with a disc and a square over noise, and the class of each pixel (0, 1, 2)."""
    g = torch.Generator().manual_seed(5)
    grid = torch.arange(side).float()
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    c = torch.rand(images, 4, 1, 1, generator=g) * (side - 6) + 3
    disc = (rows - c[:, 0]) ** 2 + (columns - c[:, 1]) ** 2 < 9
    square = torch.maximum((rows - c[:, 2]).abs(), (columns - c[:, 3]).abs()) < 2.5
    labels = torch.zeros(images, side, side, dtype=torch.long).masked_fill(disc, 1).masked_fill(square, 2)
    values = torch.tensor([0.0, 1.0, -1.0])[labels]
    return split_rows(((values + 0.8 * torch.randn(labels.shape, generator=g))[:, None], labels), 240)


def reversals(rows: int = 3000, longest: int = 10, symbols: int = 12) -> Pair:
    """Sequences of symbols 3.. padded with 0 to (n, longest), and each reversed between 1 (start) and 2 (end)."""
    g = torch.Generator().manual_seed(11)
    lengths = torch.randint(4, longest + 1, (rows,), generator=g)
    source = torch.zeros(rows, longest, dtype=torch.long)
    target = torch.zeros(rows, longest + 2, dtype=torch.long)
    target[:, 0] = 1
    for i, n in enumerate(lengths.tolist()):
        source[i, :n] = torch.randint(3, 3 + symbols, (n,), generator=g)
        target[i, 1 : n + 1] = source[i, :n].flip(0)
        target[i, n + 1] = 2
    return split_rows((source, target), 400)


@functools.cache
def communities(nodes: int = 600, groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A graph of communities: normalised adjacency (n, n), features (n, 16) and the community of each node."""
    g = torch.Generator().manual_seed(13)
    labels = torch.randint(groups, (nodes,), generator=g)
    chance = torch.where(labels[:, None] == labels[None], 0.03, 0.006)
    edges = torch.triu((torch.rand(nodes, nodes, generator=g) < chance).float(), 1)
    adjacency = edges + edges.T + torch.eye(nodes)
    degree = adjacency.sum(1).rsqrt()
    centers = torch.randn(groups, 16, generator=g)
    features = 0.5 * centers[labels] + torch.randn(nodes, 16, generator=g)
    return degree[:, None] * adjacency * degree[None], features, labels


def warm() -> None:
    """Read once what a process that is copied for each run should have at hand."""
    for name in ("digits", "mnist5k"):
        _images(name)
    _half_size()
    for name in ("diabetes", "breast_cancer"):
        _table(name)
    for source in TEXTS:
        text(source)
    waves()
    levels()
    communities()


TEXTS = ("pydoc_data.topics",)
