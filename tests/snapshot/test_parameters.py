"""Names of layers: one rule for every quantity."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.connectivity.interpolation_layers import parameters_by_layer
from diag.curvature.matrices import Hessian
from diag.gradients import ModelGradients
from diag.snapshot.parameters import layer_of
from diag.snapshot.reading.forms import as_batch

NAMES = {
    "net.0.weight": "net.0",
    "scale": "scale",  # of the model itself
    "net.0.parametrizations.weight.original1": "net.0",
    "parametrizations.scale.original": "scale",
    "net.0.parametrizations.weight.0.net.bias": "net.0",  # a parametrisation with parameters of its own
    "net.0.parametrizations.weight.0.parametrizations.scale.original": "net.0",
    "my_parametrizations.weight": "my_parametrizations",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_of_a_parameter(name):
    assert layer_of(name) == NAMES[name]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        nn.utils.parametrize.register_parametrization(self, "scale", nn.Softplus())

    def forward(self, x):
        return self.fc(x * self.scale)


def test_every_quantity_names_the_same_layers():
    model, batch = Scaled(), as_batch((torch.randn(6, 4), torch.arange(6) % 3))
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    curvature = Hessian(model, F.cross_entropy, [batch]).layers
    assert set(gradients.layers) == set(curvature) == set(parameters_by_layer(model)) == {"scale", "fc"}
    for name in gradients.layers:  # and puts the same parameters into them
        part = curvature[name]
        columns = [gradients.columns[parameter] for parameter in gradients.parameters_of(name)]
        assert (columns[0].start, columns[-1].stop) == (part.start, part.stop)
