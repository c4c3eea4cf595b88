"""Each way of forming a layer's norms and inner products, against that layer's gradients one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diag.gradients import ModelGradients
from diag.gradients.rules import blocks
from diag.gradients.rules.blocks import Dense, Outer
from diag.gradients.rules.combination import Placed, Scaled, Sum
from diag.gradients.rules.convolution import Patches, convolution
from diag.snapshot.reading.forms import as_batch

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# As in test_per_example.py: float64 leaves 1e-10, float32 1e-5.
BAR = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(BAR), ids=["float64", "float32"])


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def check(block, truth, bar):
    """Norms, products, sums and slices of a block against the dense (n, *shape) gradients in float64."""
    flat = truth.flatten(1)
    norms, gram = flat.norm(dim=1), flat @ flat.T
    scale = norms[:, None] * norms
    assert float((block.squared_norms().sqrt() / norms - 1).abs().max()) < bar
    assert float(((block.gram(block).double() - gram).abs() / scale).max()) < bar
    twin = type(block)(*vars_of(block))  # with another block there is no symmetry to use
    assert float(((block.gram(twin).double() - gram).abs() / scale).max()) < bar
    dense = torch.cat([block.dense(s) for s in block.slices()]).double()
    assert float((dense - truth).norm() / truth.norm()) < bar
    rows = slice(1, truth.shape[1])
    assert float((block.dense_rows(rows).double() - truth[:, rows]).norm() / truth.norm()) < bar
    total = block.group_sums([torch.arange(block.n)])[0].double()
    assert float((total - truth.sum(0)).norm()) < bar * float(norms.sum())


def vars_of(block):
    if isinstance(block, Patches):
        return block.x, block.b, block.shape, block.stride, block.padding, block.dilation, block.groups
    return block.a, block.b, block.shape


@DTYPES
@pytest.mark.parametrize(
    ("steps", "p", "q", "scratch"),
    [
        (1, 9, 7, blocks.SCRATCH),  # no sum over time
        (3, 40, 50, blocks.SCRATCH),  # by products of steps
        (300, 500, 450, blocks.SCRATCH),  # in three strips
        (20, 9, 7, blocks.SCRATCH),  # formed, several at a time
        (200, 150, 120, blocks.SCRATCH),  # formed one by one, along the longer rows
        (200, 120, 150, 1000),  # and in pieces
        (4, 5000, 4, 1000),  # rows longer than float32 should sum at once
    ],
)
def test_a_linear_layer_over_time(monkeypatch, dtype, steps, p, q, scratch):
    monkeypatch.setattr(blocks, "SCRATCH", scratch)
    a, b = normal(5, steps, p, dtype=dtype), normal(5, steps, q, dtype=dtype, seed=1)
    truth = b.double().transpose(1, 2) @ a.double()
    check(Outer(a[:, None], b[:, None], (q, p)), truth, BAR[dtype])


@pytest.mark.parametrize("made", ["times a number", "put in places", "added up"])
def test_what_is_made_of_blocks_is_as_of_their_dense_gradients(made):
    """Norms, products, sums and projections of a block that is scaled, placed in a larger one, or a sum."""
    a, b = normal(4, 3, 6), normal(4, 3, 5, seed=1)
    plain, truth = Outer(a[:, None], b[:, None], (5, 6)), b.transpose(1, 2) @ a
    if made == "times a number":
        block, truth = Scaled(plain, -2.5), -2.5 * truth
    elif made == "added up":
        block, truth = Sum([plain, Scaled(plain, 3.0), Dense(truth.flip(1))]), 4 * truth + truth.flip(1)
    else:
        places = torch.randperm(42, generator=torch.Generator().manual_seed(2))[:30]
        block, flat = Placed(plain, places, (6, 7)), truth.flatten(1)
        truth = torch.zeros(4, 42, dtype=torch.float64).index_copy_(1, places, flat).view(4, 6, 7)
    directions, flat = normal(3, *truth.shape[1:], seed=3), truth.flatten(1)
    for found, expected in (
        (block.dense(slice(None)), truth),
        (block.dense_rows(slice(1, 4)), truth[:, 1:4]),
        (block.squared_norms(), flat.square().sum(1)),
        (block.gram(block), flat @ flat.T),
        (block.gram(Dense(truth)), flat @ flat.T),
        (block.project(directions), flat @ directions.flatten(1).T),
        (
            block.group_sums([torch.tensor([0, 2]), torch.tensor([1])]),
            torch.stack([truth[[0, 2]].sum(0), truth[1]]),
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_products_that_cancel_are_formed():
    """Two steps with nearly opposite products: in float32 the sum of products keeps no digit, the gradient some."""
    a = normal(3, 1, 60, dtype=torch.float32)
    b = normal(3, 1, 50, dtype=torch.float32, seed=1)
    a, b = torch.cat([a, a], 1), torch.cat([b, -b], 1)
    b[:, 1, 0] += 1e-3
    block = Outer(a[:, None], b[:, None], (50, 60))
    truth = (b.double().transpose(1, 2) @ a.double()).flatten(1).norm(dim=1)
    terms = ((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).flatten(1).sum(1)
    assert float((terms.double().clamp_min(0).sqrt() / truth - 1).abs().max()) > 1e-2  # what is to be avoided
    # Forming the gradient rounds b's products at 6e-8 of their size, 1e3 times the result's.
    assert float((block.squared_norms().sqrt() / truth - 1).abs().max()) < 1e-3


# Input channels, output channels, image, kernel, stride, padding, dilation, groups: each with the way that its
# sizes make the shortest.
SMALL_IMAGE = (24, 20, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1)
CONVOLUTIONS = {
    "pixels": SMALL_IMAGE,
    "pixels, wide padding": (24, 24, (3, 3), (3, 3), (1, 1), (2, 2), (1, 1), 1),
    "pixels, dilated": (24, 24, (6, 5), (3, 2), (1, 1), (2, 1), (2, 1), 1),
    "patches": (40, 60, (8, 8), (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "one position": (6, 8, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1), 1),
    "formed": (3, 5, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "formed, strided, left over": (3, 5, (9, 10), (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "formed, groups": (6, 8, (7, 7), (3, 3), (1, 2), (1, 1), (1, 1), 2),
    "depthwise": (6, 12, (8, 8), (3, 3), (1, 1), (1, 1), (2, 2), 6),
    "one axis": (3, 4, (15,), (5,), (2,), (2,), (1,), 1),
    "three axes": (2, 3, (5, 4, 6), (2, 3, 2), (1, 1, 2), (1, 0, 1), (1, 1, 1), 1),
}


def convolved(x, out, kernel, stride, padding, dilation, groups):
    """The block of a convolution and its weight's gradients by autograd, one example at a time, in float64."""
    weight = torch.zeros(out, x.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
    convolve = CONVOLVE[len(kernel)]
    y = convolve(x.double(), weight, None, stride, padding, dilation, groups)
    b = normal(*y.shape, dtype=x.dtype, seed=1)
    rows = [torch.autograd.grad(row, weight, d, retain_graph=True)[0] for row, d in zip(y, b.double(), strict=True)]
    block = convolution(x, b, weight.shape, stride, padding, dilation, groups)
    return block, torch.stack(rows)


@DTYPES
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name, dtype):
    channels, out, image, *rest = CONVOLUTIONS[name]
    block, truth = convolved(normal(5, channels, *image, dtype=dtype), out, *rest)
    check(block, truth, BAR[dtype])
    patches, b = block.factors(slice(None))  # what other devices use
    assert float(((b.transpose(-1, -2) @ patches).reshape(truth.shape) - truth).norm() / truth.norm()) < BAR[dtype]


@pytest.mark.parametrize(
    ("name", "way"), [("pixels", "_pixel_sums"), ("patches", "_ghost_sums"), ("formed", "dense")]
)
def test_the_sizes_choose_the_way(monkeypatch, name, way):
    channels, out, image, *rest = CONVOLUTIONS[name]
    block, _ = convolved(normal(5, channels, *image), out, *rest)
    taken = []
    for method in ("_pixel_sums", "_ghost_sums", "dense"):
        plain = getattr(Patches, method)
        monkeypatch.setattr(
            Patches, method, lambda *args, plain=plain, method=method: taken.append(method) or plain(*args)
        )
    block.squared_norms()
    assert set(taken) == {way}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_convolution(data):
    """Random sizes, float64: whichever way they lead, the same numbers."""
    axes = data.draw(st.integers(1, 2))
    several = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation, padding = several(1, 3), several(1, 3), several(1, 2), several(0, 3)
    groups = data.draw(st.integers(1, 2))
    channels, out = groups * data.draw(st.integers(1, 12)), groups * data.draw(st.integers(1, 12))
    image = tuple(d * (k - 1) + 1 + data.draw(st.integers(0, 5)) for d, k in zip(dilation, kernel, strict=True))
    block, truth = convolved(normal(3, channels, *image), out, kernel, stride, padding, dilation, groups)
    if not truth.any():  # the kernel met zeros of the padding only
        assert not block.squared_norms().any()
        return
    if out > 1:
        check(block, truth, 1e-10)
    assert float((block.squared_norms() / truth.flatten(1).square().sum(1) - 1).abs().max()) < 1e-10


@DTYPES
def test_uneven_padding_and_inputs_that_the_output_does_not_reach(dtype):
    x, shape = normal(4, 6, 9, dtype=dtype), (5, 6, 4)
    b = normal(4, 5, 9, dtype=dtype, seed=1)

    def truth(x, b):
        patches = x.double().unfold(2, 4, 1)[:, :, : b.shape[2]]  # (n, channels, positions, kernel)
        return torch.einsum("nqt,nptk->nqpk", b.double(), patches)

    padded = F.pad(x, (1, 2))  # what "same" means for a kernel of four
    check(convolution(x, b, shape, (1,), "same", (1,), 1), truth(padded, b), BAR[dtype])
    short = b[..., :5].contiguous()  # of a transposed convolution with output padding
    check(convolution(x, short, shape, (1,), (0,), (1,), 1), truth(x, short), BAR[dtype])
    check(convolution(x, short, shape, (1,), (2,), (1,), 1), truth(F.pad(x, (2, 2)), short), BAR[dtype])


NORMS = {
    "layer norm": lambda: nn.LayerNorm(256),
    "layer norm, two axes": lambda: nn.LayerNorm((300, 256)),
    "group norm": lambda: nn.GroupNorm(4, 300),
    "rms norm": lambda: nn.RMSNorm(256),
}


@DTYPES
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_long_inputs(name, dtype):
    """300 x 256 numbers an example: where a layer norm's own kernel is called for each of them."""
    torch.manual_seed(0)
    norm = NORMS[name]()
    model = nn.Sequential(nn.Linear(256, 256), norm, nn.Tanh(), nn.Linear(256, 3), nn.Flatten()).to(dtype)
    with torch.no_grad():
        model[1].weight.normal_()
    batch = as_batch((3 + normal(3, 300, 256, dtype=dtype), normal(3, 900, dtype=dtype, seed=1)))
    found = ModelGradients(model, F.mse_loss, [batch]).by_layer()["1"].dense()
    double = model.double()
    for i, row in enumerate(found.double()):
        loss = F.mse_loss(double(batch.args[0][i : i + 1].double()), batch.targets[i : i + 1].double())
        truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(norm.parameters()))])
        assert float((row - truth).norm() / truth.norm()) < BAR[dtype]
