"""Before training: what will not work is told, what works is left in peace, and the user's objects stay as they
are."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.snapshot.external.trial import Attempt, Trial

torch.manual_seed(0)
X, Y = torch.randn(96, 20), torch.randint(0, 5, (96,))
ABOUT = {"steps": 120, "seconds": 30.0}


def mlp(*more):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 64), *more, nn.ReLU(), nn.Linear(64, 5))


class Around(nn.Module):
    """A network with something done to its input or its output."""

    def __init__(self, before=lambda x: x, after=lambda y: y):
        super().__init__()
        self.inner, self.before, self.after = mlp(), before, after

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def tried(model, loss=F.cross_entropy, data=((X, Y),), optimizer=None):
    return diag.preflight(model, loss, list(data), optimizer, **ABOUT)


def causes(run):
    return [story.finding.verdict.cause for story in run.stories()]


def level(run, name):
    return run.series(name)[-1][1].verdict().level


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 1e-2),
        torch.optim.LBFGS,
    ],
)
def test_a_sound_network_is_left_in_peace(optimizer):
    model = mlp(nn.BatchNorm1d(64))
    run = tried(model, optimizer=optimizer and optimizer(model.parameters()))
    assert causes(run) == []
    assert [level(run, n) for n in ("one_batch", "input_used", "examples_mixed", "modes_agree")] == ["ok"] * 4


def test_nothing_of_the_users_is_moved():
    """Parameters, modes, optimizer state, schedule and random numbers are bit for bit what they were; a schedule
    patches the step of the very optimizer that it was made for, which a copy must not call."""
    model = mlp(nn.Dropout(0.2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    schedule.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    tried(model, optimizer=optimizer)
    after = (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
    assert str(after) == str(before)
    assert all(torch.equal(a, b) for a, b in zip(after[0].values(), before[0].values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


@pytest.mark.parametrize(("rate", "cause"), [(1e-7, "learning_rate_too_low"), (1e4, "learning_rate_too_high")])
def test_an_optimizer_that_cannot_learn_is_told_from_a_network_that_cannot(rate, cause):
    model = mlp()
    run = tried(model, optimizer=torch.optim.SGD(model.parameters(), rate))
    verdict = run.series("one_batch")[-1][1].verdict()
    assert (verdict.level, verdict.cause) == ("alarm", cause)
    assert "Adam at a learning rate of" in verdict.sentence


def test_a_rate_that_throws_the_weights_out_is_too_high_wherever_the_loss_comes_to_lie():
    leap = Attempt("the given Adam", (2.3, 1e6, 2.4, 2.2), 2.1)
    verdict = diag.one_batch(trial=Trial(8, (leap, Attempt("Adam", (2.3,), 0.05)), own=True)).verdict()
    assert verdict.cause == "learning_rate_too_high" and "probably too large" in verdict.advice


def test_without_an_optimizer_nothing_is_said_of_one():
    run = tried(mlp())
    assert not {"step_size", "divergence", "weight_decay", "weights_move"} & {*run.instruments}


def test_a_network_that_ignores_its_input():
    run = tried(Around(before=torch.zeros_like))
    assert level(run, "input_used") == level(run, "one_batch") == "alarm"
    assert causes(run) in (["input_ignored"], ["output_constant"])  # one story, whichever says it


def test_a_softmax_over_the_batch_mixes_the_examples():
    run = tried(Around(after=lambda y: y.log_softmax(0)))
    assert causes(run) == ["examples_mixed"]


def test_noise_in_evaluation_is_not_mixing():
    run = tried(Around(after=lambda y: y + 0.1 * torch.randn_like(y)))
    assert level(run, "examples_mixed") == "ok"


def test_positions_are_not_told_from_examples():
    """An input without a row for each example (an adjacency) may let them see each other: no verdict."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x, adjacency):
            return self.inner(adjacency @ x)

    adjacency = torch.eye(96).roll(1, 0) + torch.eye(96)
    run = diag.preflight(Graph(), F.cross_entropy, [((X, adjacency), Y)], **ABOUT)
    skipped = {o.instrument: o.reason for _, o in run.outcomes}
    assert (
        "examples_mixed" not in run.instruments and "do not belong to single examples" in skipped["examples_mixed"]
    )


def test_a_cut_graph_comes_first():
    run = tried(Around(after=lambda y: y.detach().requires_grad_()))
    assert causes(run)[0] == "graph_cut"
    assert level(run, "one_batch") == "alarm"


def test_targets_that_broadcast():
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    with pytest.warns(UserWarning, match="target size"):
        run = tried(model, F.mse_loss, [(X, torch.randn(96))])
    assert causes(run)[0] == "targets_broadcast"


def test_statistics_that_never_follow():
    run = tried(mlp(nn.BatchNorm1d(64, momentum=0.0)), data=[(X * 20 + 50, Y)])
    assert "normalization_statistics_bad" in causes(run) or level(run, "modes_agree") == "warning"


def test_a_network_that_knows_the_batch_already():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    run = tried(model, optimizer=torch.optim.SGD(model.parameters(), 1e-4))
    assert level(run, "one_batch") == "ok"


def deep(depth, variance, act=nn.Tanh):
    """A plain stack with weights of `variance` / fan-in."""
    torch.manual_seed(1)
    layers = [nn.Linear(20 if i == 0 else 32, 32) for i in range(depth)] + [nn.Linear(32, 5)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(variance / layer.in_features))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*[m for layer in layers for m in (layer, act())][:-1])


def test_signals_that_die_over_the_depth_are_told_where_nothing_is_learned():
    """C_W = .04 over 24 layers of tanh: each leaves .04 of the squared signal, all of them 1e-34."""
    run = tried(deep(24, 0.04))
    verdict = run.series("initialization")[-1][1].verdict()
    assert (verdict.level, verdict.cause) == ("warning", "initialization_scale")
    assert verdict.sentence.startswith("Signals and gradients vanish") and causes(run) == ["initialization_scale"]
    assert level(run, "one_batch") == "alarm" and "batch_not_learned" not in causes(run)  # it is explained


def test_a_stack_that_learns_is_left_in_peace_whatever_its_signals_do():
    """torch's own weights leave a sixth of the squared signal a layer of ReLU, and Adam trains them."""
    torch.manual_seed(0)
    layers = [m for i in range(4) for m in (nn.Linear(20 if i == 0 else 64, 64), nn.ReLU())]
    run = tried(nn.Sequential(*layers, nn.Linear(64, 5)))
    found = run.series("initialization")[-1][1]
    assert min(found.forward_factor, found.backward_factor) < 0.01 and found.learned > 0.5
    assert found.verdict().level == "ok" and causes(run) == []


def test_a_normalised_or_shallow_network_is_only_described():
    assert level(tried(mlp(nn.BatchNorm1d(64))), "initialization") == "not_applicable"  # two layers


def test_what_will_run_is_told_and_what_will_not():
    run = tried(mlp())
    told = next(event.text for event in run.events if "this machine run" in event.text)
    assert "hessian_spectrum" in told and "gradient_coherence" in told
    assert any(outcome.instrument == "edge_of_stability" for _, outcome in run.outcomes)  # it asks for an optimizer


def test_time_is_kept(tmp_path):
    run = diag.preflight(mlp(), F.cross_entropy, [(X, Y)], steps=10, seconds=1.0)
    assert any("Preflight took" in event.text for event in run.events)
    assert diag.report(run, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((nn.ReLU(), F.cross_entropy, [(X, Y)]), "no trainable parameter"),
        ((mlp(), F.cross_entropy, [(X, Y)], "adam"), "expected a torch.optim.Optimizer"),
        ((mlp(), F.cross_entropy, [(X[:, :3], Y)]), "cannot be called on this data"),
        ((mlp(), F.cross_entropy, [(X, Y.float() * 1e3)]), "loss_fn cannot be called"),
    ],
)
def test_mistakes_get_one_sentence(arguments, words):
    with pytest.raises(InvalidInput, match=words):
        diag.preflight(*arguments)


def test_a_model_that_cannot_be_copied():
    model = mlp()
    model.cache = (X * torch.ones(1, requires_grad=True)) * 2  # not a leaf, as a kept activation is
    with pytest.raises(InvalidInput, match="cannot be copied"):
        tried(model)


@pytest.mark.parametrize(
    ("losses", "final", "fall"),
    [((2.0, 1.0), 0.5, 0.75), ((2.0,), 3.0, -0.5), ((0.0,), 1.0, math.nan), ((2.0,), math.inf, math.nan)],
)
def test_the_fall_of_an_attempt(losses, final, fall):
    found = Attempt("SGD", losses, final).fall
    assert found == pytest.approx(fall, nan_ok=True)


def trial(*falls, start=2.0, **about):
    attempts = tuple(Attempt(f"attempt {i}", (start,), start * (1 - fall)) for i, fall in enumerate(falls))
    return Trial(examples=8, attempts=attempts, own=True, **about)


@pytest.mark.parametrize(
    ("falls", "about", "expected"),
    [
        ((0.6,), {}, "ok"),  # half and more has gone
        ((0.48, 0.52), {}, "unknown"),  # the other optimizer is hardly better
        ((0.2, 0.9), {}, "warning"),
        ((0.05, 0.9), {}, "alarm"),
        ((0.05, 0.08, 0.0), {}, "alarm"),
        ((0.05,), {"exchanged_loss": 3.1}, "ok"),  # it knew the batch: another's answers cost 1.55 times as much
        ((0.05,), {"start": -1.0}, "not_applicable"),  # a loss that may be negative
    ],
)
def test_levels_of_one_batch(falls, about, expected):
    assert diag.one_batch(trial=trial(*falls, **about)).verdict().level == expected
