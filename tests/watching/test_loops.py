"""Training loops of many shapes: what is recorded of each is right, or said not to be known."""

import copy
import io
import math
import pickle

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import diag


def norms(parameters):
    return [float(p.grad.double().norm()) for p in parameters]


def test_two_optimizers_that_step_together_make_one_row(tiny):
    model, x, y = tiny
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.Adam(model[2].parameters(), 0.01)
    expected = []
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(5):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            expected.append(norms(model.parameters()))
            first.step()
            second.step()
    history = watcher.run.history
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    numpy.testing.assert_allclose(history.gradient_norm, expected, rtol=1e-6)
    assert numpy.isfinite(history.update_norm[:3]).all()
    assert history.optimizer["kind"] == "SGD and Adam" and len(history.optimizer["groups"]) == 2


def test_two_optimizers_that_alternate_make_a_row_each(tiny):
    model, x, y = tiny
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)]
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(6):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[i % 2].step()
    seen = numpy.isfinite(watcher.run.history.gradient_norm)
    assert seen.tolist() == [[True, True, False, False], [False, False, True, True]] * 3


def test_optimizers_that_step_inside_backward(tiny):
    model, x, y = tiny
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    for p in model.parameters():

        def step(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        p.register_post_accumulate_grad_hook(step)
    losses = []
    with diag.watch(model, budget=math.inf, probe=(x, y), instruments=["softmax_collapse"]) as watcher:
        for _ in range(4):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
    history = watcher.run.history
    numpy.testing.assert_allclose(history.loss, losses)
    assert len(watcher.run.series("softmax_collapse")) >= 3
    assert history.steps.tolist() == [1, 2, 3, 4] and numpy.isfinite(history.gradient_norm).all()


def test_only_the_given_optimizer_counts(tiny):
    model, x, y = tiny
    ours, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[], optimizer=ours) as watcher:
        for optimizer in (ours, other, ours):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert watcher.run.history.steps.tolist() == [1, 2]


def test_parameter_groups_frozen_and_foreign_parameters(tiny, helpers):
    model, x, y = tiny
    model[0].bias.requires_grad_(False)
    foreign = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    groups = [
        {"params": model[0].parameters(), "lr": 0.3},
        {"params": [*model[2].parameters(), foreign], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, 0.2)
    with diag.watch(model, instruments=[]) as watcher:
        F.cross_entropy(model(x) + foreign, y).backward()
        optimizer.step()
    history = watcher.run.history
    assert history.layers == ("0.weight", "2.weight", "2.bias")
    assert history.learning_rate.tolist() == [0.3]
    assert "also steps parameters that were not trainable parameters of the model" in helpers.texts(watcher.run)


def test_tied_weights_are_one_column():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randint(0, 7, (20,))
    with diag.watch(model, budget=math.inf, probe=(x, x), instruments=["softmax_collapse"]) as watcher:
        F.cross_entropy(model(x), x).backward()
        expected = norms(model.parameters())
        optimizer.step()
    assert watcher.run.history.layers == ("0.weight",)
    numpy.testing.assert_allclose(watcher.run.history.gradient_norm[0], expected, rtol=1e-6)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Embedding(7, 5, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        model(torch.tensor([1, 1, 3])).square().sum().backward()
        expected = float(model.weight.grad.to_dense().norm())
        optimizer.step()
    assert watcher.run.history.gradient_norm[0, 0] == pytest.approx(expected, rel=1e-6)


def test_a_closure_gives_the_gradients_and_the_loss_at_its_first_evaluation(tiny):
    model, x, y = tiny
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        evaluations.append((norms(model.parameters()), loss.item()))
        return loss

    firsts = []
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(3):
            firsts.append(len(evaluations))
            optimizer.step(closure)
        firsts.append(len(evaluations))
        optimizer.step(closure=closure)
    history = watcher.run.history
    assert len(evaluations) > 8
    numpy.testing.assert_allclose(history.gradient_norm, [evaluations[i][0] for i in firsts], rtol=1e-6)
    numpy.testing.assert_allclose(history.loss, [evaluations[i][1] for i in firsts], rtol=1e-12)


def test_a_closure_trains_to_the_same_weights(helpers):
    def train(model):
        x, y = helpers.images(32)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)

    unwatched, _ = helpers.final_state(train, False)
    watched, _ = helpers.final_state(train, True, budget=math.inf, instruments=["softmax_collapse"])
    helpers.assert_identical(watched, unwatched)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_passes_are_not_counted(tiny, reentrant):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    with diag.watch(model, instruments=[]) as watcher:
        original, watcher._losses.forward_called = (
            watcher._losses.forward_called,
            lambda *a: seen.append(1) or original(*a),
        )
        out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        loss = F.cross_entropy(out, y)
        loss.backward()
        expected = norms(model.parameters())
        optimizer.step()
    assert len(seen) == (0 if reentrant else 1)
    numpy.testing.assert_allclose(watcher.run.history.gradient_norm[0], expected, rtol=1e-6)
    assert watcher.run.history.loss[0] == pytest.approx(loss.item())


def test_copies_are_not_watched_and_pickling_works(watch_all, helpers):
    model = helpers.Net()
    x, y = helpers.images(16)
    watcher = watch_all(model, instruments=[])
    average = AveragedModel(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    pickled = pickle.loads(pickle.dumps(model))
    before = watcher._training.calls
    for other in (average, twin, loaded, pickled):
        out = other(x)
        assert out.requires_grad and watcher._training.calls == before
        # A hook that returned something would replace the outputs.
        assert torch.equal(out.detach().isfinite().all(), torch.tensor(True))
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    F.cross_entropy(twin(x), y).backward()
    optimizer.step()
    assert watcher.last_step == 0
    F.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    average.update_parameters(model)
    assert watcher.last_step == 1
    assert pickle.loads(pickle.dumps(F.cross_entropy)) is F.cross_entropy


def test_a_pickled_watched_model_opens_without_diag(helpers, tmp_path):
    import subprocess
    import sys

    model = nn.Linear(2, 2)
    with diag.watch(model, instruments=[]):
        torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['diag'] = None; import torch; "
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(m(torch.ones(1, 2)).shape)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([1, 2])" in shown.stdout


class Discriminated(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(4, 6), nn.Linear(6, 1)


def test_the_losses_of_two_watched_models_are_kept_apart():
    torch.manual_seed(0)
    pair = Discriminated()
    g = torch.optim.SGD(pair.generator.parameters(), 0.1)
    d = torch.optim.SGD(pair.critic.parameters(), 0.1)
    losses = {"g": [], "d": []}
    first, second = diag.watch(pair.generator, instruments=[]), diag.watch(pair.critic, instruments=[])
    for _ in range(3):
        z = torch.randn(8, 4)
        loss = F.binary_cross_entropy_with_logits(pair.critic(pair.generator(z).detach()), torch.zeros(8, 1))
        d.zero_grad()
        loss.backward()
        d.step()
        losses["d"].append(loss.item())
        loss = F.binary_cross_entropy_with_logits(pair.critic(pair.generator(z)), torch.ones(8, 1))
        g.zero_grad()
        loss.backward()
        g.step()
        losses["g"].append(loss.item())
    first.close()
    second.close()
    numpy.testing.assert_allclose(first.run.history.loss, losses["g"], rtol=1e-6)
    assert first.run.history.steps.tolist() == [1, 2, 3]
    # The critic's row takes the passes that reached it since its last step: its own, and the generator's.
    assert second.run.history.loss[0] == pytest.approx(losses["d"][0], rel=1e-6)
