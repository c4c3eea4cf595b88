"""Rules that a user gives for the per-example gradients of a layer of their own, against one backward pass an
example."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

import diag
from diag.errors import InvalidInput
from diag.gradients import ModelGradients, StepGradients, plan_for_steps
from diag.gradients.capture import Capture
from diag.gradients.methods import How
from diag.gradients.unexplained import unexplained
from diag.snapshot.reading.forms import as_batch


class Kernel(torch.autograd.Function):
    """x * w + b by hand, as a fused kernel would: no call of torch shows that a parameter takes part."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x * weight + bias

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = tuple(range(gradient.ndim - 1))
        return gradient * weight, (gradient * x).sum(rows), gradient.sum(rows)


def scale_of(width, dtype=torch.float64):
    """A class of layers of its own, since rules are kept on classes, and one layer of it."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=dtype))
            self.bias = nn.Parameter(torch.linspace(-0.1, 0.1, width, dtype=dtype))

        def forward(self, x):
            return Kernel.apply(x, self.weight, self.bias)

    return Scale


def rule(layer, inputs, output_gradient):
    """The gradients of each example, its positions summed."""
    by_example = {"weight": output_gradient * inputs[0], "bias": output_gradient}
    return {name: g.flatten(1, -2).sum(1) if g.ndim > 2 else g for name, g in by_example.items()}


def problem(layer_type, twice=False):
    """A classifier around one such layer, in float64, and data for it."""
    torch.manual_seed(0)
    layer = layer_type()
    middle = [layer, nn.Tanh(), layer] if twice else [layer]
    model = nn.Sequential(nn.Linear(5, 4), *middle, nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return model, (x, torch.arange(7) % 3)


def truth_of(model, data):
    """(n, P): one backward pass an example."""
    rows = []
    for x, y in zip(*data, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("twice", [False, True])
def test_a_rule_gives_what_autograd_gives_and_is_asked(twice):
    """Also where the layer is called twice: its contributions add."""
    kind = scale_of(4)
    asked = []

    @diag.gradient_rule(kind)
    def counted(layer, inputs, output_gradient):
        asked.append((type(layer), len(inputs), output_gradient.requires_grad, inputs[0].requires_grad))
        return rule(layer, inputs, output_gradient)

    model, data = problem(kind, twice)
    gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
    torch.testing.assert_close(gradients.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
    method = gradients.coverage.methods["1.weight"]
    assert method == "the rule of Scale" and method.how is How.RULE and not method.one_by_one
    assert set(asked) == {(kind, 1, False, False)}
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks
    assert counted is kind.diag_gradient_rule.function


def test_without_a_rule_the_kernel_costs_a_pass_an_example():
    model, data = problem(scale_of(4))
    gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
    torch.testing.assert_close(gradients.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
    assert gradients.coverage.methods["1.weight"].one_by_one


def test_a_rule_serves_a_training_steps_own_backward_pass():
    kind = scale_of(4)
    diag.gradient_rule(kind)(rule)
    model, data = problem(kind)
    batch = as_batch(data)
    plan = plan_for_steps(model, F.cross_entropy, batch)
    with StepGradients(model, plan, batch.size) as step:
        F.cross_entropy(model(data[0]), data[1]).backward()
    torch.testing.assert_close(step.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_instruments_use_it():
    kind = scale_of(4)
    diag.gradient_rule(kind)(rule)
    model, data = problem(kind)
    found = diag.gradient_coherence(diag.Snapshot(model, F.cross_entropy, data))
    dense = diag.gradient_coherence(truth_of(model, data))
    assert found.coherence == pytest.approx(dense.coherence, rel=1e-9)


def test_a_subclass_inherits_the_rule_while_it_keeps_forward():
    kind = scale_of(4)
    diag.gradient_rule(kind)(rule)

    class Same(kind):
        pass

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer_type, ruled in ((Same, True), (Doubled, False)):
        model, data = problem(layer_type)
        gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
        torch.testing.assert_close(gradients.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
        assert (gradients.coverage.methods["1.weight"].how is How.RULE) is ruled


def test_frozen_parameters_need_no_rule():
    kind = scale_of(4)
    diag.gradient_rule(kind)(lambda layer, inputs, delta: {"weight": delta * inputs[0]})
    model, data = problem(kind)
    model[1].bias.requires_grad_(False)
    gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
    assert gradients.coverage.methods["1.weight"].how is How.RULE and "1.bias" not in gradients.coverage.methods
    assert gradients.norms().shape == (7,)


WRONG = {
    "twice the gradient": (
        lambda layer, inputs, delta: {n: 2 * g for n, g in rule(layer, inputs, delta).items()},
        "By the rule of Scale the per-example gradients of 1.weight do not add up to autograd's gradient",
    ),
    "the examples in another order": (
        lambda layer, inputs, delta: {n: g.flip(0) for n, g in rule(layer, inputs, delta).items()},
        "do not add up to autograd's gradient when the examples are weighted; correct the rule",
    ),
    "one parameter left out": (
        lambda layer, inputs, delta: {"weight": delta * inputs[0]},
        r"The gradient rule of Scale gives nothing for bias; expected a tensor of shape \(3, 4\)",
    ),
    "the sum over the examples": (
        lambda layer, inputs, delta: {n: g.sum(0) for n, g in rule(layer, inputs, delta).items()},
        r"gives of shape \(4,\) for weight; expected a tensor of shape \(3, 4\), one gradient an example",
    ),
    "a tensor": (lambda layer, inputs, delta: delta, "returned a Tensor; expected a dict"),
    "an error": (lambda layer, inputs, delta: inputs[1], "raised an error .*; expected a dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_refused_in_one_sentence(what):
    wrong, sentence = WRONG[what]
    kind = scale_of(4)
    diag.gradient_rule(kind)(wrong)
    model, data = problem(kind)
    with pytest.raises(InvalidInput, match=sentence):
        ModelGradients(model, F.cross_entropy, [as_batch(data)]).norms()


def test_where_the_rule_cannot_be_asked_autograd_is():
    """Keyword arguments, and examples along another axis than the first."""
    kind = scale_of(4)
    diag.gradient_rule(kind)(rule)

    class Net(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.scale, self.call = kind(), call
            self.out = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.call(self.scale, x))

    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.arange(6) % 3
    for call in (
        lambda scale, x: scale(x=x),
        lambda scale, x: scale(x.expand(2, *x.shape)).sum(0),
    ):
        model = Net(call)
        gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
        torch.testing.assert_close(gradients.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
        assert gradients.coverage.methods["scale.weight"].how is not How.RULE


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), int, "Linear"])
def test_only_classes_of_layers_have_rules(wrong):
    with pytest.raises(InvalidInput, match="expected a class of layers"):
        diag.gradient_rule(wrong)


def test_a_rule_is_not_asked_where_its_layer_gives_more_than_one_tensor():
    """What the kernel inside does is found in the graph, also behind a layer whose calls were seen."""

    class Two(scale_of(4)):
        def forward(self, x):
            return super().forward(x), x.sum()

    diag.gradient_rule(Two)(rule)

    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    torch.manual_seed(0)
    model = nn.Sequential(Two(), First(), nn.Tanh(), nn.Linear(4, 3).double())
    data = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    gradients = ModelGradients(model, F.cross_entropy, [as_batch(data)])
    torch.testing.assert_close(gradients.dense(), truth_of(model, data), rtol=1e-10, atol=1e-12)
    assert gradients.coverage.methods["0.weight"].one_by_one


def test_the_paths_that_no_recorded_call_explains_are_found_behind_calls_that_were():
    model = nn.Sequential(scale_of(4)(), nn.Linear(4, 3).double())
    with Capture(model, dict(model.named_parameters())) as capture:
        loss = model(torch.randn(7, 4, dtype=torch.float64)).sum()
    parameters = dict(model.named_parameters())
    assert unexplained(capture, [get_gradient_edge(loss)], parameters) == {"0.weight", "0.bias"}
