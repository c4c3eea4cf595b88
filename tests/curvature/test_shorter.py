"""The shorter second derivatives against torch's own, in float64, and on whole models against a dense Hessian."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diag.curvature.matrices import Hessian
from diag.curvature.shorter import SHORTER
from diag.errors import Unsupported
from diag.snapshot.batch import Batch

# Two orders of the same float64 sums: relative rounding of 1e-16 times the square root of some thousand terms.
WITHIN = 1e-12


def derivatives(function, tensors, order):
    """The value, and derivatives up to `order` along fixed random directions, of a function of `tensors`."""
    generator = torch.Generator().manual_seed(0)
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    found = [output]
    scalar = (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    for _ in range(order):
        if not scalar.requires_grad:  # constant: the next derivative is zero
            found += [torch.zeros_like(leaf) for leaf in leaves]
            continue
        grads = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        found += grads
        # The same draws for both functions, as both have the same derivatives in the same order.
        scalar = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in grads)
    return [t.detach() for t in found]


def agree(ours, theirs, tensors, order=2):
    pairs = zip(derivatives(ours, tensors, order), derivatives(theirs, tensors, order), strict=True)
    for mine, other in pairs:
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= WITHIN * (1 + other.abs().max())


@st.composite
def convolutions(draw):
    """A convolution's function, tensors and settings."""
    dims, transposed = draw(st.sampled_from([(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]))
    groups = draw(st.integers(1, 2))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, dilation, stride, padding = (draw(st.integers(low, 2)) for low in (1, 1, 1, 0))
    sizes = [draw(st.integers(5, 6)) for _ in range(dims)]
    channels = (inside, outside // groups) if transposed else (outside, inside // groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [random(draw(st.integers(1, 3)), inside, *sizes), random(*channels, *[kernel] * dims)]
    if draw(st.booleans()):
        tensors.append(random(outside))
    names = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return getattr(F, f"conv{'_transpose' * transposed}{dims}d"), tensors, names


@settings(deadline=None, max_examples=40)
@given(case=convolutions())
def test_convolution(case):
    function, tensors, names = case
    agree(
        lambda x, w, b=None: SHORTER[function](x, w, b, **names),
        lambda x, w, b=None: function(x, w, b, **names),
        tensors,
    )


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolution_given_padding_by_name(padding):
    x, w = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    agree(
        lambda *t: SHORTER[F.conv2d](*t, None, 1, padding),
        lambda *t: F.conv2d(*t, None, 1, padding),
        [x, w],
    )


def test_convolution_of_one_example_without_a_batch_axis():
    x, w = torch.randn(3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    agree(lambda *t: SHORTER[F.conv2d](*t), lambda *t: F.conv2d(*t), [x, w])


def test_positional_settings_of_a_transposed_convolution():
    """conv_transpose takes output_padding and groups before dilation; conv takes dilation before groups."""
    x, w = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    agree(
        lambda *t: SHORTER[F.conv_transpose2d](*t, None, 2, 1, 1, 2, 2),
        lambda *t: F.conv_transpose2d(*t, None, 2, 1, 1, 2, 2),
        [x, w],
    )


ACTIVATIONS = {
    "gelu": (F.gelu, {}),
    "gelu, tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "softplus": (F.softplus, {"beta": 2.0}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("order", [2, 3])
def test_activation(name, order):
    function, named = ACTIVATIONS[name]
    x = torch.linspace(-4, 4, 60, dtype=torch.float64).view(3, 20)
    agree(lambda t: SHORTER[function](t, **named), lambda t: function(t, **named), [x], order)


@pytest.mark.parametrize("function", [F.relu, torch.relu, torch.Tensor.relu])
def test_rectifier_also_at_its_kink_and_where_it_is_not_a_number(function):
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan")], dtype=torch.float64)
    mine, other = (derivatives(lambda t, f=f: f(t) * t.sin(), [x], 3) for f in (SHORTER[function], function))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=WITHIN, atol=WITHIN, equal_nan=True)


@pytest.mark.parametrize("how", [{"args": (True,)}, {"named": {"inplace": True}}])
def test_activation_in_place_is_left_alone(how):
    x = torch.randn(3, 4)
    before = x.clone()
    assert SHORTER[F.silu](x, *how.get("args", ()), **how.get("named", {})) is x
    assert torch.equal(x, F.silu(before))


def test_a_positional_one_is_no_flag():
    """softplus(x, 1) has beta = 1, which equals True."""
    x = torch.randn(3, 4, requires_grad=True)
    assert "Elementwise" in SHORTER[F.softplus](x, 1, 20).grad_fn.name()


def test_third_derivative_of_a_convolution():
    """x**3-like: a convolution of a convolution's output with the same kernel has a third derivative in it."""
    x, w = torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    ours = SHORTER[F.conv2d]
    agree(
        lambda x, w: ours(ours(x, w).tanh(), w, None, 1, 1),
        lambda x, w: F.conv2d(F.conv2d(x, w).tanh(), w, None, 1, 1),
        [x, w],
        order=3,
    )


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine):
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(3, dtype=torch.float64), torch.tensor([1.0, 4.0, 0.1], dtype=torch.float64)
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    tensors = [x, torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)] if affine else [x]
    agree(
        lambda x, *wb: SHORTER[F.batch_norm](x, mean, variance, *wb),
        lambda x, *wb: F.batch_norm(x, mean, variance, *wb),
        tensors,
    )


def test_batch_norm_with_a_mean_of_many_deviations():
    """x * s - m * s would lose all digits of float32 here; (x - m) * s loses those that x itself lacks."""
    x = 1e6 + torch.arange(8.0).view(8, 1)
    found = SHORTER[F.batch_norm](x, torch.tensor([1e6]), torch.tensor([1.0]), eps=0.0)
    assert torch.equal(found, torch.arange(8.0).view(8, 1))


def normalised_convolution(convolve, normalise, between):
    """Of tensors x, w, b, and the affine parameters of the norm."""
    mean, variance = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)

    def function(x, w, b, scale, shift):
        y = convolve(x, w, b, 1, 1)
        return normalise(between(y), mean, variance, scale, shift) + y.mean()

    return function


@pytest.mark.parametrize("between", ["nothing", "writing to it"])
def test_batch_norm_takes_over_the_convolution_that_it_follows(between):
    """Right also where the convolution's output is used elsewhere, or was written to in between."""
    steps = {"nothing": lambda y: y, "writing to it": lambda y: y.mul_(y.detach().clone())}[between]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 4), (2, 3, 3, 3), (2,), (2,), (2,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    ours = normalised_convolution(SHORTER[F.conv2d], SHORTER[F.batch_norm], steps)
    agree(ours, normalised_convolution(F.conv2d, F.batch_norm, steps), tensors)


def test_batch_norm_on_batch_statistics_is_left_alone():
    x, mean, variance = torch.randn(8, 3), torch.zeros(3), torch.ones(3)
    found = SHORTER[F.batch_norm](x, mean, variance, training=True)
    assert mean.abs().min() > 0
    assert (found.mean(0)).abs().max() < 1e-6


def test_view_after_a_convolution_that_has_its_channels_last():
    """`view` fails on such an output, where the user's own, contiguous, would not."""
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(SHORTER[torch.Tensor.view](x, 2, -1), x.reshape(2, -1))
    with pytest.raises(RuntimeError):
        SHORTER[torch.Tensor.view](torch.randn(2, 3), 4)


class Everything(nn.Module):
    """Convolutions, batch norm in evaluation mode, smooth activations, a view."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.depthwise, self.up = nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.ConvTranspose2d(3, 2, 2)
        self.head = nn.Linear(2 * 5 * 5, 3)

    def forward(self, x):
        x = F.gelu(self.norm(self.first(x)))
        x = F.silu(self.up(self.depthwise(x)))
        return self.head(x.view(len(x), -1))


def test_hessian_of_a_whole_model_against_a_dense_one():
    torch.manual_seed(0)
    model = Everything().double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    model.eval()
    x, y = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.randint(3, (6,))
    found = Hessian(model, nn.CrossEntropyLoss(), [Batch((x,), {}, y, 6)]).to_dense()
    names = [name for name, _ in model.named_parameters()]

    def loss(*values):
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return F.cross_entropy(outputs, y)

    rows = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in model.parameters()))
    sizes = [p.numel() for p in model.parameters()]
    dense = torch.cat(
        [torch.cat([block.reshape(n, -1) for block in row], 1) for n, row in zip(sizes, rows, strict=True)]
    )
    assert (found - dense).abs().max() <= WITHIN * dense.abs().max()


class ReadsMemory(nn.Module):
    """Takes a convolution's output for contiguous memory, as a foreign kernel may."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(27, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.as_strided((len(x), 27), (27, 1)))


def test_model_that_depends_on_the_layout_in_memory_is_refused():
    torch.manual_seed(0)
    batch = Batch((torch.randn(8, 2, 5, 5),), {}, torch.randint(2, (8,)), 8)
    with pytest.raises(Unsupported, match="reads the memory"):
        _ = Hessian(ReadsMemory(), nn.CrossEntropyLoss(), [batch]).self_test
