"""A step or a run that descends several losses: none of them is taken for all, and no labels for another's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag

N, STEPS = 48, 6


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
            nn.Linear(8, 3),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        hidden = self.trunk(x)
        return self.first(hidden), self.second(hidden)


G = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=G)
Y, Z = (torch.randint(0, 3, (N,), generator=G) for _ in range(2))
ONE_HOT = F.one_hot(Z, 3).float()
PARTS = torch.tensor([1.0, 2.0, 3.0])


def both_heads(model, step):
    first, second = model(X)
    F.cross_entropy(first, Y).backward(retain_graph=True)
    F.cross_entropy(second, Z).backward()


def two_targets(model, step):
    """Mixed labels, a backward pass each."""
    first = model(X)[0]
    (0.3 * F.cross_entropy(first, Y)).backward(retain_graph=True)
    (0.7 * F.cross_entropy(first, Z)).backward()


def two_calls(model, step):
    F.cross_entropy(model(X)[0], Y).backward()
    F.cross_entropy(model(X)[1], Z).backward()


def other_function(model, step):
    first, second = model(X)
    F.cross_entropy(first, Y).backward(retain_graph=True)
    F.mse_loss(second, ONE_HOT).backward()


def in_turns(model, step):
    F.cross_entropy(model(X)[step % 2], [Y, Z][step % 2]).backward()


def other_function_in_turns(model, step):
    (F.mse_loss(model(X)[1], ONE_HOT) if step % 2 else F.cross_entropy(model(X)[0], Y)).backward()


def later(model, step):
    F.cross_entropy(model(X)[step > 3], Z if step > 3 else Y).backward()


def smoothed_more_and_more(model, step):
    F.cross_entropy(model(X)[0], Y, label_smoothing=0.02 * step).backward()


def weighted_differently(model, step):
    nn.CrossEntropyLoss(weight=PARTS.roll(step))(model(X)[0], Y).backward()


def trained(steps, model, count=STEPS, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["hessian_spectrum", "label_audit"], **options) as watcher:
        for step in range(count):
            optimizer.zero_grad()
            steps(model, step)
            optimizer.step()
        watcher.measure()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run


def reasons(run):
    return {o.instrument: o.reason for _, o in run.outcomes}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (both_heads, "losses that differ in a step"),
        (two_calls, "losses that differ in a step"),
        (two_targets, "losses that differ in a step"),
        (other_function, "more than one kind of loss in a step"),
        (in_turns, "another output than before"),
        (other_function_in_turns, "another loss than before"),
        (later, "another output than before"),
        (smoothed_more_and_more, "with other settings"),
        (weighted_differently, "with other settings"),
    ],
)
def test_what_is_not_all_that_is_descended_is_not_measured(steps, said):
    model = TwoHeads()
    run = trained(steps, model)
    assert not run.series("hessian_spectrum")
    assert said in reasons(run)["hessian_spectrum"] and "give loss_fn=" in reasons(run)["hessian_spectrum"]
    # The labels are the first head's, each once.
    _, result = run.series("label_audit")[-1]
    assert len(result.labels) == N and sorted(result.labels) == sorted(Y.tolist())
    with torch.no_grad():
        right = model(X)[0].argmax(1) == Y
    assert result.accuracy == pytest.approx(right.double().mean().item())


def halves(model, step):
    """The same loss of the same output, in micro-batches of different sizes."""
    for part in (slice(0, 30), slice(30, N)):
        (F.cross_entropy(model(X[part])[0], Y[part], weight=PARTS) / 2).backward()


def test_parts_of_one_loss_are_one_loss():
    run = trained(halves, TwoHeads())
    assert run.series("hessian_spectrum") and "hessian_spectrum" not in reasons(run)


@pytest.mark.parametrize("which", [0, 1])
def test_a_part_of_an_output_is_told_from_another(which):
    """One layer that is cut into two heads."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x)[:, None]

    part = [slice(0, 3), slice(3, 6)]

    def one(model, step):
        F.cross_entropy(model(X)[:, 0, part[which]], Y).backward()

    def other(model, step):
        F.cross_entropy(model(X)[:, 0, part[step % 2]], Y).backward()

    assert trained(one, Cut()).series("hessian_spectrum")
    assert "another output" in reasons(trained(other, Cut()))["hessian_spectrum"]


def test_what_follows_the_first_position_of_sequences_of_several_lengths():
    """`[:, 1:]` of a longer sequence is longer: the loss is that of all its positions."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    sequences = [(torch.randn(8, t, 4), torch.randint(0, 3, (8, t - 1))) for t in (5, 7)]

    def steps(model, step):
        x, y = sequences[step % 2]
        F.cross_entropy(model(x)[:, 1:].reshape(-1, 3), y.reshape(-1)).backward()

    run = trained(steps, model)
    _, result = run.series("hessian_spectrum")[-1]

    def objective(flat):
        weight, bias = flat.split([12, 3])
        sums = []
        for x, y in sequences:
            logits = (x.double() @ weight.view(3, 4).T + bias)[:, 1:]
            sums.append(F.cross_entropy(logits.reshape(-1, 3), y.reshape(-1), reduction="sum"))
        return sum(sums) / sum(y.numel() for _, y in sequences)

    flat = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
    truth = torch.linalg.eigvalsh(torch.autograd.functional.hessian(objective, flat))
    # float32 products, some sqrt(n) roundings of 6e-8 each.
    assert float(result.eigenvalues[0]) == pytest.approx(float(truth[-1]), rel=1e-4)


def test_a_run_that_has_no_loss_to_measure_does_not_blame_the_budget():
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, budget=1e-6, instruments=["hessian_spectrum"]) as watcher:
        for step in range(STEPS):
            optimizer.zero_grad()
            other_function(model, step)
            optimizer.step()
    assert "more than one kind of loss" in reasons(watcher.run)["hessian_spectrum"]
