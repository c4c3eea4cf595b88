"""Hessian, Gauss-Newton and Fisher products against dense float64 matrices that diag had no part in."""

import importlib.util
import math
import statistics
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from diag.curvature import guards
from diag.curvature import matrices as curvature
from diag.curvature.eigenvectors import sampling_errors
from diag.curvature.fisher import shape_of_logits
from diag.curvature.layout import check_one_device
from diag.curvature.matrices import Fisher, GaussNewton, Hessian
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.student import covering
from diag.snapshot.reading.forms import as_batch, as_batches
from diag.snapshot.snapshot import Snapshot
from diag.testing import planted_spectrum

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

# A float32 product carries some ten roundings of 6e-8 relative to the largest entries; float64 ones 1e-16.
FLOAT32, FLOAT64 = 2e-6, 1e-12


@pytest.fixture(scope="module", params=cases.MODELS, ids=lambda case: case.__name__)
def problem(request):
    model, loss_fn, batches = cases.build(request.param)
    return model, loss_fn, batches, cases.Reference(model, loss_fn, batches)


@pytest.fixture(scope="module")
def whole_matrix(problem):
    """The operator of a problem, and the matrix of its float32 products."""
    model, loss_fn, batches, _ = problem
    operator = Hessian(model, loss_fn, batches)
    return operator, operator.to_dense()


def test_hessian_is_the_dense_one(problem, whole_matrix):
    model, loss_fn, batches, reference = problem
    truth = reference.hessian()
    operator, dense = whole_matrix
    assert cases.relative(dense, truth) < FLOAT32
    assert operator.self_test.method == "double backward" and operator.self_test.level == "ok"
    assert operator.self_test.precision == "float64"
    exact = Hessian(model, loss_fn, batches, precision="float64", checked=operator.self_test)
    assert exact.dtype == torch.float64
    assert cases.relative(exact.to_dense(), truth) < FLOAT64


def test_gauss_newton_and_fisher_are_the_dense_ones(problem):
    model, loss_fn, batches, reference = problem
    truth = reference.gauss_newton()
    found = GaussNewton(model, loss_fn, batches).to_dense()
    assert cases.relative(found, truth) < FLOAT32
    assert torch.linalg.eigvalsh(found.double())[0] > -FLOAT32 * truth.norm()  # semi-definite
    assert cases.relative(Fisher(model, loss_fn, batches).to_dense(), truth) < FLOAT32


def test_micro_batches_and_rebuilt_graphs_change_nothing(problem):
    model, loss_fn, batches, _ = problem
    whole = Hessian(model, loss_fn, batches, precision="float64")
    v = cases.directions(whole.size)[0].double()
    split = Hessian(model, loss_fn, batches, precision="float64", micro_batch=2, checked=whole.self_test)
    least = whole.memory_plan.graph_bytes - 1
    rebuilt = Hessian(model, loss_fn, batches, precision="float64", memory=least, checked=whole.self_test)
    assert whole.memory_plan.retained and not rebuilt.memory_plan.retained
    for other in (split, rebuilt):
        assert cases.relative(other @ v, whole @ v) < FLOAT64
    pair = torch.stack([v, whole @ v])
    assert cases.relative(rebuilt.matvecs(pair), whole.matvecs(pair)) < FLOAT64


def test_layers_are_blocks_of_the_matrix(problem, whole_matrix):
    model, (operator, dense) = problem[0], whole_matrix
    ends = [part.stop for part in operator.layers.values()]
    assert [0, *ends[:-1]] == [part.start for part in operator.layers.values()] and ends[-1] == operator.size
    name, part = max(operator.layers.items(), key=lambda item: item[1].stop - item[1].start)
    block = operator.block(part).to_dense()
    owner = model.get_submodule(name)
    assert len(block) == sum(p.numel() for p in owner.parameters(recurse=False))
    assert torch.allclose(block, dense[part, part], atol=1e-6)


def test_the_order_of_the_flat_vector_is_that_of_named_parameters():
    model, loss_fn, batches = cases.build(cases.tied_gpt)
    model.mix.weight.requires_grad_(False)
    operator = Hessian(model, loss_fn, batches)
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(operator.layout.names) == expected
    assert "head.weight" not in expected and "mix.weight" not in expected  # tied once, frozen left out
    assert operator.size == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_layers_whose_parameters_are_not_neighbours_keep_their_own_path():
    block = cases.Composed(lambda self, x: self.inner(x) * self.scale, inner=nn.Linear(6, 4))
    block.scale, block.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
    nn.utils.parametrize.register_parametrization(block, "scale", nn.Softplus())
    model = nn.Sequential(block)
    operator = Hessian(model, F.cross_entropy, cases.ragged(torch.randn(9, 6), torch.arange(9) % 4))
    assert operator.layers == {
        "0": slice(0, 4),
        "0.inner": slice(4, 32),
        "0.parametrizations.scale": slice(32, 36),
    }


def test_outputs_that_are_more_than_one_tensor():
    """The Gauss-Newton matrix is that of the outputs that the loss uses, wherever they are."""
    net = cases.build(cases.mlp)[0]
    _, loss_fn, batches = cases.build(cases.mlp)
    plain = GaussNewton(net, loss_fn, batches).to_dense()
    several = cases.Composed(
        lambda self, x: {"hidden": self.net[:2](x), "logits": self.net(x), "name": "x"}, net=net
    )
    structured = lambda out, t: loss_fn(out["logits"], t)  # noqa: E731
    assert cases.relative(GaussNewton(several, structured, batches).to_dense(), plain) < FLOAT32
    assert cases.relative(Fisher(several, structured, batches).to_dense(), plain) < FLOAT32
    hidden = cases.Composed(lambda self, x: (self.net[:2](x), self.net(x)), net=net)
    with pytest.raises(MissingQuantity, match="returns 2 tensors and none is called logits; wrap it"):
        Fisher(hidden, lambda out, t: loss_fn(out[1], t), batches).to_dense()


def test_planted_spectrum_of_a_quadratic():
    spectrum = [10.0, 5.0, 2.0, -0.5, 0.1, 0.0]
    model, loss_fn, data = planted_spectrum(spectrum)
    found = torch.linalg.eigvalsh(Hessian(model, loss_fn, list(as_batches(data))).to_dense())
    assert torch.allclose(found, torch.tensor(sorted(spectrum)).double(), atol=1e-12)


def test_softmax_regression_has_a_null_space_from_the_shift_symmetry():
    """H = (1/n) sum (diag p - p p^T) (x) x x^T with d zero eigenvalues; G = H for a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    x, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
    batches = list(as_batches((x, y)))
    p = model(x).detach().softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    truth = torch.einsum("nij,na,nb->iajb", blocks, x, x).reshape(15, 15) / 30
    dense = Hessian(model, F.cross_entropy, batches).to_dense()
    assert cases.relative(dense, truth) < FLOAT64
    assert cases.relative(GaussNewton(model, F.cross_entropy, batches).to_dense(), truth) < FLOAT64
    assert int((torch.linalg.eigvalsh(dense).abs() < 1e-14).sum()) == 5


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_deep_scalar_chain_at_its_balanced_minimum(depth):
    """For 1/2 (prod w - y)^2 the only nonzero eigenvalue is L y^(2 - 2/L)."""
    y = 1.7
    model = cases.Composed(lambda self, x: self.w.prod().expand(len(x)))
    model.w = nn.Parameter(torch.full((depth,), y ** (1 / depth), dtype=torch.float64))
    data = (torch.zeros(4, 1).double(), torch.full((4,), y, dtype=torch.float64))
    operator = Hessian(model, lambda z, t: 0.5 * F.mse_loss(z, t), list(as_batches(data)))
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert abs(values[-1] - depth * y ** (2 - 2 / depth)) < 1e-10 and values[:-1].abs().max() < 1e-10


def test_a_rescaled_parameter_rescales_the_hessian():
    """With theta' = c theta in one layer and the layer divided by c, H' = D^-1 H D^-1."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    first = cases.Composed(
        lambda self, x: self.b(torch.tanh(self.a(x) / self.c)), a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    )
    first.double().c = 1.0
    batches = list(as_batches((x, y)))
    h = Hessian(first, F.cross_entropy, batches).to_dense()
    with torch.no_grad():
        for p in first.a.parameters():
            p.mul_(8)
    first.c = 8.0
    scale = torch.ones(len(h)).double()
    scale[:15] = 1 / 8
    moved = Hessian(first, F.cross_entropy, batches).to_dense()
    assert cases.relative(moved, scale[:, None] * h * scale) < 1e-10


@settings(deadline=None, max_examples=10)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), factor=st.sampled_from([1e-7, 1.0, 1e4]))
def test_any_partition_of_the_data_gives_the_mean_over_examples(sizes, factor):
    """Ragged batches weigh n_b / n, also when the loss is tiny: the same matrix as one batch of everything."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(sum(sizes), 3).double(), torch.randint(2, (sum(sizes),))
    loss_fn = lambda z, t: factor * F.cross_entropy(z, t)  # noqa: E731
    parts = list(as_batches(list(zip(x.split(sizes), y.split(sizes), strict=True))))
    whole = Hessian(model, loss_fn, list(as_batches((x, y)))).to_dense()
    assert cases.relative(Hessian(model, loss_fn, parts).to_dense(), whole) < FLOAT64


def test_an_unused_and_a_linear_parameter_give_zero_rows():
    torch.manual_seed(0)
    model = cases.Composed(
        lambda self, x: self.used(x) + 3 * self.bias, unused=nn.Linear(2, 2), used=nn.Linear(4, 3, bias=False)
    )
    model.bias = nn.Parameter(torch.randn(1))
    batches = cases.ragged(torch.randn(8, 4), torch.randn(8, 3))
    linear = Hessian(model, lambda z, t: (z * t).mean(), batches)
    assert not linear.to_dense().any() and linear.self_test.level == "ok"
    assert not GaussNewton(model, lambda z, t: (z * t).mean(), batches).to_dense().any()
    squared = Hessian(model, F.mse_loss, batches)
    dense = squared.to_dense()
    unused = squared.layers["unused"]
    assert not dense[unused].any() and not dense[:, unused].any()
    assert cases.relative(dense, cases.Reference(model, F.mse_loss, batches).hessian()) < FLOAT32


def test_fisher_of_other_likelihoods():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    batches = cases.ragged(torch.randn(10, 4), torch.randn(10, 2))
    reference = cases.Reference(model, lambda z, t: F.mse_loss(z, t), batches)
    rows, per_example = [], []
    for b in reference.batches:
        z = reference.model(b.args[0].double())
        for zi, ti in zip(z, b.targets.double(), strict=True):
            grad = lambda s: reference._flat(torch.autograd.grad(s, reference.parameters, retain_graph=True))  # noqa: E731
            rows += [grad(zi[0]), grad(zi[1])]
            per_example.append(grad(F.mse_loss(zi, ti)))
    jacobian, grads = torch.stack(rows), torch.stack(per_example)
    gaussian = Fisher(model, F.mse_loss, batches, likelihood="gaussian").to_dense()
    assert cases.relative(gaussian, jacobian.T @ jacobian / 10) < FLOAT32
    empirical = Fisher(model, F.mse_loss, batches, likelihood="empirical").to_dense()
    assert cases.relative(empirical, grads.T @ grads / 10) < FLOAT32
    with pytest.raises(InvalidInput, match="likelihood is 'poisson'; expected one of categorical"):
        Fisher(model, F.mse_loss, batches, likelihood="poisson")


def test_fisher_finds_the_axis_of_the_classes_and_leaves_out_ignored_labels():
    torch.manual_seed(0)
    images = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(6, 2, 2, 2), torch.randint(3, (6, 2, 2))
    y[0, 0, 0] = y[1] = -100
    one = list(as_batches((x, y)))
    assert (
        cases.relative(
            Fisher(images, F.cross_entropy, one).to_dense(), GaussNewton(images, F.cross_entropy, one).to_dense()
        )
        < FLOAT32
    )


def test_the_same_on_some_of_the_examples():
    model, loss_fn, batches = cases.build(cases.mlp)
    operator = Hessian(model, loss_fn, batches)
    part = operator.subsample(8, seed=3)
    assert part.num_examples == 8 and part.self_test is operator.self_test
    assert sum(b.size for b in part.objective.batches) == 8
    own = cases.Reference(model, loss_fn, part.objective.batches).hessian()
    assert cases.relative(part.to_dense(), own) < FLOAT32
    everything = operator.subsample(operator.num_examples)
    assert cases.relative(everything.to_dense(), operator.to_dense()) < FLOAT32
    again = [b.args[0] for b in operator.subsample(8, seed=3).objective.batches]
    assert all(map(torch.equal, again, [b.args[0] for b in part.objective.batches]))
    with pytest.raises(InvalidInput, match="22 examples were asked for; expected 1 to 21"):
        operator.subsample(22)
    with pytest.raises(InvalidInput, match="precision is 'int8'; expected one of float32"):
        Hessian(model, loss_fn, batches, precision="int8")


def test_the_operator_stays_at_one_point():
    model, loss_fn, batches = cases.build(cases.mlp)
    operator = Hessian(model, loss_fn, batches)
    v = cases.directions(operator.size)[0]
    before = operator @ v
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)  # written to, with the same values
    assert torch.equal(operator @ v, before)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(InvalidInput, match="have changed since this operator was made; make a new one"):
        operator @ v


def test_works_under_no_grad_and_inference_mode():
    model, loss_fn, batches = cases.build(cases.mlp)
    truth = {kind: kind(model, loss_fn, batches).to_dense() for kind in (Hessian, GaussNewton)}
    for context in (torch.no_grad, torch.inference_mode):
        for kind, memory in ((Hessian, None), (Hessian, 30_000), (GaussNewton, None)):
            with context():
                dense = kind(model, loss_fn, batches, memory=memory).to_dense()
            assert torch.equal(dense, truth[kind]) or cases.relative(dense, truth[kind]) < FLOAT32


def test_snapshot_quantities():
    model, loss_fn, _ = cases.build(cases.mlp)
    x, y = torch.randn(12, 6), torch.randint(4, (12,))
    snapshot = Snapshot(model, loss_fn, (x, y))
    operator = snapshot.quantity("hessian")
    assert isinstance(operator, Hessian) and operator._self_test is not None
    assert operator is snapshot.quantity("hessian")
    assert isinstance(snapshot.quantity("gauss_newton"), GaussNewton)
    assert snapshot.quantity("fisher")._settings["likelihood"] == "categorical"
    regression = Snapshot(model, F.mse_loss, (x, torch.randn(12, 4)))
    assert regression.quantity("fisher")._settings["likelihood"] == "gaussian"
    with pytest.raises(MissingQuantity, match="hides the logits; give loss_fn"):
        curvature.gauss_newton(Snapshot(model, None, (x, y)))


def test_user_mistakes_are_one_sentence():
    model, loss_fn, batches = cases.build(cases.mlp)
    with pytest.raises(InvalidInput, match="There is no batch"):
        Hessian(model, loss_fn, [])
    with pytest.raises(
        InvalidInput, match=r"The loss could not be computed on a batch \(RuntimeError: .*check that"
    ):
        Hessian(model, loss_fn, list(as_batches((torch.randn(4, 5), torch.zeros(4).long())))).self_test.sentence()
    with pytest.raises(InvalidInput, match="loss_fn returned a float; expected a floating-point tensor"):
        Hessian(model, lambda z, t: 1.0, batches).self_test.sentence()
    with pytest.raises(InvalidInput, match="does not depend on any trainable parameter"):
        Hessian(model, lambda z, t: z.detach().mean(), batches).self_test.sentence()
    with pytest.raises(InvalidInput, match="sums over the examples of a batch; expected their mean"):
        Hessian(model, lambda z, t: F.cross_entropy(z, t, reduction="sum"), batches).self_test.sentence()
    with pytest.raises(InvalidInput, match="not finite on the data"):
        Hessian(model, lambda z, t: z.mean() / 0.0 * 0.0, batches).self_test.sentence()
    with pytest.raises(InvalidInput, match="no trainable parameter"):
        Hessian(model.requires_grad_(False), loss_fn, batches)
    with pytest.raises(InvalidInput, match=r"Parameter 0\.weight of a lazy module has no shape yet"):
        Hessian(nn.Sequential(nn.LazyLinear(3)), loss_fn, batches)
    with pytest.raises(Unsupported, match=r"on several devices \(cuda:0, cuda:1\); put a copy of the model on one"):
        check_one_device({"cuda:1", "cuda:0"})
    with pytest.raises(InvalidInput, match="on the meta device"):
        Hessian(nn.Linear(6, 4, device="meta"), loss_fn, batches)
    with pytest.raises(Unsupported, match=r"Parameter weight has dtype torch.complex64"):
        Hessian(nn.Linear(6, 4, dtype=torch.complex64), loss_fn, batches)


def test_a_loss_for_each_example_is_averaged():
    model, loss_fn, batches = cases.build(cases.mlp)
    vector = Hessian(model, nn.CrossEntropyLoss(reduction="none"), batches)
    assert cases.relative(vector.to_dense(), Hessian(model, loss_fn, batches).to_dense()) < FLOAT32


def test_what_surrounds_products_is_entered_once_for_a_run_of_them(monkeypatch):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(9, 3), torch.arange(9) % 2
    operator = Hessian(model, F.cross_entropy, [as_batch((x, y))])
    expected = operator.to_dense()
    entered = []
    plain = guards.replayed_model
    monkeypatch.setattr(guards, "replayed_model", lambda model: entered.append(model) or plain(model))
    assert torch.equal(operator.shifted(1.0).block(slice(0, 20)).to_dense(), expected[:20, :20] + torch.eye(20))
    assert len(entered) == 1
    assert run_lanczos(operator, None, max_products=6).num_products == 6
    assert len(entered) == 2
    for v in torch.eye(operator.size)[:3]:
        operator.matvec(v)
    assert len(entered) == 5
    assert model.training and torch.backends.mha.get_fastpath_enabled()


def test_the_logits_are_found_among_outputs_of_other_shapes():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.body(x)
            return h, self.head(h)

    torch.manual_seed(0)
    data = torch.randn(4, 2), torch.arange(4) % 3  # 20 numbers in the first output, no multiple of three
    snapshot = Snapshot(Both(), lambda outputs, y: F.cross_entropy(outputs[1], y), data)
    assert shape_of_logits(snapshot) == (-1, -100)


def test_the_error_of_sampling_is_that_of_five_of_ten_blocks():
    """With one parameter there is one direction: what is left is the spread of the second moments."""
    torch.manual_seed(0)
    x = torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    operator = Hessian(model, F.mse_loss, list(as_batches((x, torch.zeros(40, 1, dtype=torch.float64)))))
    pairs = eigenpairs(operator, largest=1)
    blocks = [float(part.to_dense()) for part in operator.blocks(10, 3)[:5]]
    expected = covering(statistics.stdev(blocks) / math.sqrt(10), 5)
    assert sampling_errors(operator, pairs, 0.0, seed=3) == pytest.approx([expected], rel=1e-6)
