"""Hooks that a network has put on itself: what it needs stays or the network is refused; none is left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import Unsupported
from diag.registry import measure_all


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    return sum(len(vars(m)[name]) for m in model.modules() for name in names)


class HooksItself(nn.Module):
    """At its first call it hooks its layers, and reads what the hooks have collected in that call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head, self.hooked, self.collected = nn.Linear(4, 3), False, None

    def forward(self, x):
        if not self.hooked:
            for layer in self.layers:
                layer.register_forward_hook(self.keep, with_kwargs=True)
            self.hooked = True
        self.collected = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
        kept, self.collected = self.collected, None
        return self.head(sum(kept))

    def keep(self, module, args, kwargs, output):
        self.collected.append(output)


def plain(model, x):
    """What it computes, without hooks."""
    first, second = model.layers
    before = F.linear(x, first.weight, first.bias)
    return model.head(before + F.linear(torch.tanh(before), second.weight, second.bias))


def made():
    torch.manual_seed(0)
    return HooksItself(), torch.randn(32, 4), torch.randint(0, 3, (32,))


def test_a_network_that_hooks_itself_at_its_first_call_is_measured_and_left_as_it_was():
    model, x, y = made()
    truth = F.cross_entropy(plain(model, x), y)
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y))
    outcomes = measure_all(snapshot, ["hessian_spectrum", "softmax_collapse", "sharpness", "gradient_coherence"])
    assert {name: getattr(o, "reason", "") for name, o in outcomes.items()} == dict.fromkeys(outcomes, "")
    assert snapshot.quantity("losses").mean().item() == pytest.approx(truth.item(), rel=1e-6)
    assert hooks_of(model) == 0 and not model.hooked
    torch.testing.assert_close(model(x), plain(model, x))
    assert hooks_of(model) == 4  # two hooks, each marked as one that takes keywords


def test_a_network_that_reads_what_its_hooks_append_is_refused():
    model, x, y = made()
    model(x)
    with pytest.raises(Unsupported, match=r"without HooksItself\.keep of layers\.0"):
        diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y)))
    assert hooks_of(model) == 4
    torch.testing.assert_close(model(x), plain(model, x))


def test_what_a_hook_appends_elsewhere_is_not_asked_for():
    calls = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: calls.append(output))
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.arange(8) % 3))
    assert diag.softmax_collapse(snapshot).collapsed == 0
    assert calls == []


def test_training_goes_on_as_it_would_have():
    """The network hooks itself while a measurement calls it, or training does: the weights are the same."""

    def trained(watched):
        model, x, y = made()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if watched:
            diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y)))
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], hooks_of(model)

    (watched, hooks), (unwatched, expected) = trained(True), trained(False)
    assert hooks == expected and all(map(torch.equal, watched, unwatched))


@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_the_hidden_states_of_transformers(transformers, called):
    """Its models hook themselves where their hidden states are asked for, and this one's head reads them."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 4, (4, 16, 16))}
    if called:
        model(**batch)
    before = hooks_of(model)
    snapshot = diag.Snapshot(model, None, batch)
    outcomes = measure_all(snapshot, ["hessian_spectrum", "sharpness", "gradient_flow"])
    assert {name: getattr(o, "reason", "") for name, o in outcomes.items()} == dict.fromkeys(outcomes, "")
    assert hooks_of(model) == before
    loss = model(**batch).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for gradient, own in zip(torch.autograd.grad(loss, list(named.values())), named, strict=True):
        torch.testing.assert_close(snapshot.quantity("gradient")[own], gradient, rtol=1e-4, atol=1e-6)
