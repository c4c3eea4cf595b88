"""Every construct for which curvature products are known to fail or to be silently wrong: ours are right, are
finite differences that say so, or are refused with what to do. The reference is a float64 central difference
of the gradient that `.backward()` gives in a copy of the model."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from diag.curvature.matrices import GaussNewton, Hessian
from diag.errors import Unsupported
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
Composed = cases.Composed

# The reference is good to 1e-9 and float32 products to a few 1e-7 (see test_curvature.py).
CLOSE = 3e-6
N, T, D, K = 12, 3, 4, 3


def count_elsewhere():
    """A count of the calls where no one would look for the state of a network."""
    os.environ["CALLS_IN_A_TEST"] = str(int(os.environ.get("CALLS_IN_A_TEST", 0)) + 1)
    return int(os.environ["CALLS_IN_A_TEST"])


def inputs():
    return torch.randn(N, T, D)


def tokens():
    return torch.randint(0, 7, (N, T))


def plain_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(T * D, 4), nn.Tanh(), nn.Linear(4, K))


def on_top_of(middle, **parts):
    """A linear layer, what `middle(self, h)` makes of its output, a linear layer."""
    forward = lambda self, x: self.head(middle(self, self.first(x.flatten(1))))  # noqa: E731
    return Composed(forward, first=nn.Linear(T * D, 4), head=nn.Linear(4, K), **parts)


def recurrent(kind):
    parts = {"rnn": kind(D, 3, batch_first=True), "head": nn.Linear(3, K)}
    return Composed(lambda self, x: self.head(self.rnn(x)[0][:, -1]), **parts)


def attending(backend=None):
    def forward(self, x):
        with sdpa_kernel(backend or list(SDPBackend.__members__.values())[1:4]):
            h, _ = self.attention(x, x, x, need_weights=False)
        return self.head(h.mean(1))

    return Composed(forward, attention=nn.MultiheadAttention(D, 2, batch_first=True), head=nn.Linear(D, K))


def embedding(**settings):
    parts = {"table": nn.Embedding(7, 4, **settings), "head": nn.Linear(4, K)}
    return Composed(lambda self, i: self.head(self.table(i).mean(1).tanh()), **parts)


def short_rows():
    model = embedding(max_norm=2.0)
    with torch.no_grad():
        model.table.weight.mul_(0.1)
    return model


def autocasting():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)

    return Composed(forward, net=plain_net())


def checkpointed(reentrant):
    segment = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return on_top_of(lambda self, h: checkpoint(self.segment, h, use_reentrant=reentrant), segment=segment)


def checkpointed_closure():
    return on_top_of(
        lambda self, h: checkpoint(lambda: self.segment(h).tanh(), use_reentrant=False), segment=nn.Linear(4, 4)
    )


def tied():
    model = Composed(
        lambda self, i: self.head(self.table(i).mean(1).tanh())[:, :K],
        table=nn.Embedding(7, 4),
        head=nn.Linear(4, 7),
    )
    model.head.weight = model.table.weight
    return model


def frozen():
    model = plain_net()
    model[1].weight.requires_grad_(False)
    return model


def used_spectral_norm(wrap):
    model = Composed(
        lambda self, x: self.head(self.first(x.flatten(1)).tanh()),
        first=wrap(nn.Linear(T * D, 4)),
        head=nn.Linear(4, K),
    )
    model(inputs())  # some power iterations, as in training
    return model


class Square(torch.autograd.Function):
    """x^2 with a backward that may not be differentiated, and does not say so to `autograd.grad`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class FusedCrossEntropy(torch.autograd.Function):
    """A loss whose forward computes the derivative and stores it, as fused kernels do."""

    @staticmethod
    def forward(ctx, logits, targets):
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(leaf, targets)
        (ctx.derivative,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.derivative * grad, None


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def ctc(logits, targets):
    lengths = torch.full((len(targets),), T), torch.ones(len(targets), dtype=torch.long)
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets[:, None] % 2 + 1, *lengths)


def distances():
    model = Composed(
        lambda self, x: -torch.cdist(self.first(x.flatten(1)).tanh(), self.centres), first=nn.Linear(T * D, 4)
    )
    model.centres = nn.Parameter(torch.randn(K, 4))
    return model


CE = F.cross_entropy
CHANNELS_LAST = {"memory_format": torch.channels_last}
# name -> (model, data, loss) whose product by double backward is right.
RIGHT = {
    "gru": (lambda: recurrent(nn.GRU), inputs, CE),
    "lstm": (lambda: recurrent(nn.LSTM), inputs, CE),
    "rnn": (lambda: recurrent(nn.RNN), inputs, CE),
    "attention": (attending, inputs, CE),
    "attention with an inner flash region": (lambda: attending(SDPBackend.FLASH_ATTENTION), inputs, CE),
    "checkpoint": (lambda: checkpointed(False), inputs, CE),
    "checkpoint of a closure": (checkpointed_closure, inputs, CE),
    "reentrant checkpoint": (lambda: checkpointed(True), inputs, CE),
    "in place": (lambda: on_top_of(lambda self, h: h.sin().mul_(2).add_(1)), inputs, CE),
    "embedding": (embedding, tokens, CE),
    "sparse embedding": (lambda: embedding(sparse=True), tokens, CE),
    "embedding within max_norm": (short_rows, tokens, CE),
    "weight_norm": (lambda: used_spectral_norm(parametrizations.weight_norm), inputs, CE),
    "spectral_norm": (lambda: used_spectral_norm(parametrizations.spectral_norm), inputs, CE),
    "dropout": (lambda: on_top_of(lambda self, h: self.drop(h.tanh()), drop=nn.Dropout(0.5)), inputs, CE),
    "batch norm": (lambda: on_top_of(lambda self, h: self.norm(h).tanh(), norm=nn.BatchNorm1d(4)), inputs, CE),
    "tied": (tied, tokens, CE),
    "frozen": (frozen, inputs, CE),
    "tiny loss": (plain_net, inputs, lambda z, t: 1e-7 * CE(z, t)),
    "channels last": (
        lambda: Composed(
            lambda self, x: self.head(self.conv(x[:, None].to(**CHANNELS_LAST)).tanh().flatten(1)),
            conv=nn.Conv2d(1, 2, 2).to(**CHANNELS_LAST),
            head=nn.Linear(12, K),
        ),
        inputs,
        CE,
    ),
}  # fmt: skip
# ... whose product is a finite difference, for the reason given.
DIFFERENCED = {
    "once differentiable": (
        lambda: on_top_of(lambda self, h: Square.apply(h)),
        CE,
        "once-differentiable|differs from",
    ),
    "once differentiable loss": (
        plain_net,
        lambda z, t: CE(Square.apply(z), t),
        "once-differentiable|differs from",
    ),
    "stored derivative": (
        plain_net,
        FusedCrossEntropy.apply,
        "double backward differs from a finite difference by",
    ),
    "ctc": (lambda: Composed(lambda self, x: self.net(x).tanh(), net=nn.Linear(D, 5)), ctc, "_ctc_loss_backward"),
    "cdist": (distances, CE, "_cdist_backward"),
    "multi margin": (plain_net, F.multi_margin_loss, "multi_margin_loss_backward"),
}
REFUSED = {
    "dropout that evaluation mode does not stop": (
        lambda: on_top_of(lambda self, h: F.dropout(h.tanh())),
        "Two evaluations of the same gradient differ by .* draws random numbers in evaluation mode",
    ),
    "batch norm in training mode": (
        lambda: on_top_of(lambda self, h: self.norm.train()(h), norm=nn.BatchNorm1d(4)),
        "changes norm.num_batches_tracked in place, .* switch that update off in evaluation mode",
    ),
    "batch norm without running statistics": (
        lambda: on_top_of(lambda self, h: self.norm(h), norm=nn.BatchNorm1d(4, track_running_stats=False)),
        "BatchNorm1d 'norm' keeps no running statistics, .* build it with track_running_stats=True",
    ),
    "straight through": (
        lambda: on_top_of(lambda self, h: Rounded.apply(4 * h)),
        "The gradient is not the derivative of the loss .* measure a loss without them",
    ),
    "stop gradient": (
        lambda: on_top_of(lambda self, h: h * h.detach()),
        "The gradient is not the derivative of the loss .* as with detached terms",
    ),
    "a count of the calls that is out of reach": (
        lambda: on_top_of(lambda self, h: h * count_elsewhere()),
        "Two evaluations of the same gradient differ by .* the model keeps a state",
    ),
    "parameter changed by the forward pass": (
        lambda: on_top_of(lambda self, h: h * self.head.bias.detach().add_(1e-3)[0]),
        "changes head.bias in place",
    ),
}  # fmt: skip


def batches_of(data, seed=0):
    torch.manual_seed(seed)
    return cases.ragged(data(), torch.randint(K, (N,)))


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    build, data, loss_fn = RIGHT[name]
    batches = batches_of(data)
    model = cases.build(build).train()
    operator = Hessian(model, loss_fn, batches)
    reference = cases.Reference(model, loss_fn, batches)
    for v in cases.directions(operator.size, 2):
        assert cases.relative(operator @ v, reference.product(v)) < CLOSE
    assert operator.self_test.method == "double backward" and operator.self_test.level == "ok"
    gauss_newton = GaussNewton(model, loss_fn, batches)
    factor = 1e-7 if name == "tiny loss" else 1.0
    truth = factor * reference.gauss_newton() @ v.double()
    assert cases.relative(gauss_newton @ v, truth) < CLOSE
    assert gauss_newton.self_test.method == "double backward"
    assert model.training  # what the operator needed for itself is undone


@pytest.mark.parametrize("name", DIFFERENCED)
def test_finite_differences_stand_in_and_say_so(name):
    build, loss_fn, reason = DIFFERENCED[name]
    batches = batches_of(inputs)
    model = cases.build(build)
    operator = Hessian(model, loss_fn, batches)
    reference = cases.Reference(model, loss_fn, batches)
    for v in cases.directions(operator.size, 2):
        # The fallback is itself a float64 difference with another step, rounded to float32.
        assert cases.relative(operator @ v, reference.product(v)) < CLOSE
    record = operator.self_test
    assert record.method == "finite difference" and record.level == "warning"
    assert record.sentence().startswith("Products are finite differences, because ")
    assert re.search(reason, record.reason)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, message = REFUSED[name]
    model = cases.build(build)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for kind in (Hessian, GaussNewton):
        with pytest.raises(Unsupported, match=message):
            kind(model, CE, batches_of(inputs)).to_dense()
        if name != "parameter changed by the forward pass":
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_traps_are_real():
    """Plain double backward is silently wrong for these; were it right, the tests above would prove nothing."""
    for build, loss_fn, least in (
        (lambda: on_top_of(lambda self, h: Square.apply(h)), CE, 0.1),
        (plain_net, FusedCrossEntropy.apply, 0.1),
        (RIGHT["weight_norm"][0], CE, 0.01),
    ):
        batches = batches_of(inputs)
        model = cases.build(build)
        reference = cases.Reference(model, loss_fn, batches)
        v = cases.directions(sum(p.numel() for p in model.parameters()))[0]
        grads = torch.autograd.grad(sum(reference.losses()), reference.parameters, create_graph=True)
        slope = reference._flat(grads) @ v.double()
        naive = reference._flat(torch.autograd.grad(slope, reference.parameters, allow_unused=True))
        assert cases.relative(naive, reference.product(v)) > least


def test_weight_norm_of_the_old_kind_is_right_and_its_attribute_restored():
    batches = batches_of(inputs)
    with pytest.warns(FutureWarning):
        old = cases.build(lambda: used_spectral_norm(nn.utils.weight_norm))
        new = cases.build(RIGHT["weight_norm"][0])
    with torch.no_grad():
        for ours, theirs in zip(old.parameters(), sorted_like(old, new), strict=True):
            ours.copy_(theirs)
    weight = old.first.weight
    operator, other = Hessian(old, CE, batches), Hessian(new, CE, batches)
    dense, same = operator.to_dense(), other.to_dense()
    assert old.first.weight is weight
    order = torch.cat([torch.arange(other.size)[part] for part in matching_slices(operator, other)])
    assert cases.relative(dense, same[order][:, order]) < CLOSE


NEW_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def new_name(name):
    for old, new in NEW_NAMES.items():
        name = name.replace(old, new)
    return name


def sorted_like(old, new):
    parameters = dict(new.named_parameters())
    return [parameters[new_name(name)] for name, _ in old.named_parameters()]


def matching_slices(operator, other):
    places = dict(zip(other.layout.names, other.layout.slices, strict=True))
    return [places[new_name(name)] for name in operator.layout.names]


def test_a_buffer_that_the_forward_pass_binds_anew_is_the_old_one_in_every_product():
    def forward(self, x):
        self.count = self.count + 1
        return self.count * self.net(x)

    model = Composed(forward, net=cases.build(plain_net))
    model.register_buffer("count", torch.ones(1))
    batches = batches_of(inputs)
    exact = Hessian(model.net, lambda z, t: CE(2 * z, t), batches).to_dense()
    for settings in ({}, {"memory": 40_000}):
        assert cases.relative(Hessian(model, CE, batches, **settings).to_dense(), exact) < CLOSE
    assert model.count.item() == 1


def test_models_that_differentiate_by_their_inputs():
    """Forces from an energy: the forward pass holds a gradient already."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = self.second(self.first(x.flatten(1)).tanh()).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.sum(1)[:, :K]

    batches = batches_of(inputs)
    model = Composed(forward, first=nn.Linear(T * D, 4), second=nn.Linear(4, 1))
    with torch.no_grad():  # as an evaluation loop may be
        operator = Hessian(model, CE, batches)
        v = cases.directions(operator.size)[0]
        product = operator @ v
    assert operator.self_test.method == "double backward"
    assert cases.relative(product, cases.Reference(model, CE, batches).product(v)) < CLOSE


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(plain_net())
    with pytest.raises(
        Unsupported, match=r"compiled to TorchScript.* measure the Python module that it was made from"
    ):
        Hessian(scripted, CE, batches_of(inputs)).to_dense()


def test_padding_row_is_held_fixed():
    """PyTorch defines the padding row's gradient as zero: its row and column are zero, the rest is exact."""
    batches = batches_of(tokens)
    model = cases.build(lambda: embedding(padding_idx=0))
    operator = Hessian(model, CE, batches)
    dense = operator.to_dense()
    assert operator.self_test.method == "double backward" and operator.self_test.level == "ok"
    assert not dense[:4].any() and not dense[:, :4].any()
    v = cases.directions(operator.size)[0]
    v[:4] = 0
    truth = cases.Reference(model, CE, batches).product(v)
    assert cases.relative((dense @ v)[4:], truth[4:]) < CLOSE


def test_padding_row_is_held_fixed_by_finite_differences_too():
    batches = batches_of(tokens)
    model = cases.build(lambda: embedding(padding_idx=0))
    plain, fused = Hessian(model, CE, batches), Hessian(model, FusedCrossEntropy.apply, batches)
    assert fused.self_test.method == "finite difference"
    assert cases.relative(fused.to_dense(), plain.to_dense()) < CLOSE


def test_gradients_scaled_by_frequency_are_measured_as_the_loss_has_them():
    batches = batches_of(tokens)
    model = cases.build(lambda: embedding(scale_grad_by_freq=True))
    plain = cases.build(embedding)
    assert cases.relative(Hessian(model, CE, batches).to_dense(), Hessian(plain, CE, batches).to_dense()) < CLOSE


def test_long_rows_under_max_norm_are_refused_untouched():
    model = cases.build(lambda: embedding(max_norm=0.5))
    before = model.table.weight.detach().clone()
    with pytest.raises(Unsupported, match=r"max_norm=0.5 has longer rows.*torch.renorm"):
        Hessian(model, CE, batches_of(tokens)).to_dense()
    assert torch.equal(model.table.weight, before)


def test_autocast_inside_the_model_is_left_out():
    """The operator measures in float32 what the model would run in bf16."""
    batches = batches_of(inputs)
    model = cases.build(autocasting)
    operator = Hessian(model, CE, batches)
    exact = Hessian(model.net, CE, batches).to_dense()
    assert cases.relative(operator.to_dense(), exact) < CLOSE


def test_autocast_around_the_caller_is_left_out():
    batches = batches_of(inputs)
    model = cases.build(plain_net)
    exact = Hessian(model, CE, batches).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cases.relative(Hessian(model, CE, batches).to_dense(), exact) < CLOSE


def test_half_precision_weights_are_measured_in_float32():
    batches = batches_of(inputs)
    model = cases.build(plain_net).bfloat16()
    operator = Hessian(model, CE, batches)
    assert operator.dtype == torch.float32
    v = cases.directions(operator.size)[0]
    assert cases.relative(operator @ v, cases.Reference(model, CE, batches).product(v)) < CLOSE


def test_wrappers_are_taken_off():
    batches = batches_of(inputs)
    model = cases.build(plain_net)
    wrapped = nn.DataParallel(model)
    operator = Hessian(wrapped, CE, batches)
    assert operator.layout.names[0] == "1.weight"
    assert torch.equal(operator.to_dense(), Hessian(model, CE, batches).to_dense())


def test_parameters_used_past_the_forward_pass_are_refused():
    """A penalty in the loss, and parameters that a module keeps in a plain list: moved, they would stand still."""
    batches = batches_of(inputs)
    model = cases.build(plain_net)
    penalty = lambda z, t: CE(z, t) + sum(p.square().sum() for p in model.parameters())  # noqa: E731
    message = r"uses parameter 1\.weight outside the model's forward pass .* operator\.shifted"
    for kind in (Hessian, GaussNewton):
        with pytest.raises(Unsupported, match=message):
            kind(model, penalty, batches).to_dense()
    listed = Composed(lambda self, x: F.linear(self.net(x).tanh(), self.weights[0]), net=plain_net())
    listed.weight = nn.Parameter(torch.randn(K, K))
    listed.weights = [listed.weight]
    with pytest.raises(Unsupported, match=r"uses parameter weight outside .* register the parameter in the module"):
        Hessian(listed, CE, batches).to_dense()


class Accumulator:
    """An output that hides its tensor from everyone."""

    def __init__(self, logits):
        self.logits = logits


def test_outputs_that_hide_their_tensors_have_a_hessian_and_no_gauss_newton_matrix():
    batches = batches_of(inputs)
    net = cases.build(plain_net)
    hiding = Composed(lambda self, x: Accumulator(self.net(x)), net=net)
    half = Composed(lambda self, x: (self.net(x), Accumulator(self.net(x))), net=net)
    loss_fn = lambda accumulator, t: CE(accumulator.logits, t)  # noqa: E731
    both = lambda accumulator, t: CE(accumulator[0], t) + CE(accumulator[1].logits, t)  # noqa: E731
    exact = Hessian(net, CE, batches).to_dense()
    assert cases.relative(Hessian(hiding, loss_fn, batches).to_dense(), exact) < CLOSE
    assert cases.relative(Hessian(half, both, batches).to_dense(), 2 * exact) < CLOSE
    with pytest.raises(
        Unsupported, match="returns an Accumulator that holds tensors out of reach; return a tensor"
    ):
        GaussNewton(hiding, loss_fn, batches).to_dense()
    with pytest.raises(Unsupported, match="returns a tuple that holds tensors out of reach"):
        GaussNewton(half, both, batches).to_dense()


@pytest.fixture
def one_process(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_is_measured_bare(one_process):
    """Its own hooks would give gradients that depend on the other processes' batches, or break."""
    batches = batches_of(inputs)
    model = cases.build(plain_net)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert torch.equal(Hessian(wrapped, CE, batches).to_dense(), Hessian(model, CE, batches).to_dense())


def test_sharded_parameters_are_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = cases.build(plain_net)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        Unsupported, match=r"Parameter 1.weight is sharded .* gather the parameters into an unsharded"
    ):
        Hessian(model, CE, batches_of(inputs))


def test_sharded_models_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    model = nn.Sequential(plain_net(), FullyShardedDataParallel())
    with pytest.raises(Unsupported, match=r"The model is sharded .*; gather the parameters into an unsharded copy"):
        Hessian(model, CE, batches_of(inputs)).to_dense()


@pytest.mark.slow  # importing the compiler takes some ten seconds
def test_compiled_code_runs_eagerly():
    batches = batches_of(inputs)
    model = cases.build(plain_net)
    exact = Hessian(model, CE, batches).to_dense()
    inner = torch.compile(lambda self, x: self.net(x), backend="aot_eager")
    in_place = cases.build(plain_net)
    in_place.compile(backend="aot_eager")
    for compiled in (torch.compile(model, backend="aot_eager"), in_place, Composed(inner, net=model)):
        compiled(batches[0].args[0]).sum().backward()  # compiled before it is measured
        assert torch.equal(Hessian(compiled, CE, batches).to_dense(), exact)
    assert "torch._dynamo" in sys.modules


def test_a_loss_linear_in_the_outputs_of_relu_has_no_finite_difference_noise():
    """An exactly zero Hessian passes although every difference of it is rounding."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    operator = Hessian(model, lambda z, t: z.mean(), list(as_batches((torch.randn(8, 4), torch.zeros(8)))))
    assert not operator.to_dense().any() and operator.self_test.level == "ok"
