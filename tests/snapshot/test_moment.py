"""A snapshot is of one moment: whatever changes the model, the loss or the data afterwards is noticed."""

import copy

import pytest
import torch
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.snapshot.state.bits import BYTES_KEPT_WHOLE, ROW, TensorBits, bits_of
from diag.testing import is_one_sentence


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def averaged(model):
    """Averaged weights in the place of the trained ones, as libraries for EMA put them there."""
    for p in model.parameters():
        p.data = 0.9 * p.data


def moved_statistics(model):
    model.train()(data()[0])
    model.eval()


def written_by_numpy(model):
    model[0].weight.detach().numpy()[0, 0] += 1e-6


def other_layer(model):
    model[3] = copy.deepcopy(model[3])
    model[3].bias.data += 1


CHANGES = {
    "through .data": (lambda m: m[0].weight.data.mul_(2), "The model's 0.weight"),
    "averaged weights": (averaged, "The model's 0.weight"),
    "batch norm": (moved_statistics, "The model's 1.running_mean"),
    "a buffer's .data": (lambda m: m[1].running_var.data.add_(1), "The model's 1.running_var"),
    "NumPy": (written_by_numpy, "The model's 0.weight"),
    "another layer": (other_layer, "The model's 3.bias"),
    "frozen": (lambda m: m[0].bias.requires_grad_(False), "The model's 0.bias"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("quantity", ["gradient", "hessian", "per_example_gradients", "features"])
def test_a_change_of_any_kind_is_noticed(name, quantity):
    change, named = CHANGES[name]
    model = network()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    diag.class_counts(snapshot)
    change(model)
    with pytest.raises(InvalidInput, match=f"{named} has changed since the snapshot was made") as found:
        snapshot.quantity(quantity)
    assert is_one_sentence(str(found.value))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_before_the_first_quantity_is_noticed(name):
    model = network()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    CHANGES[name][0](model)
    with pytest.raises(InvalidInput, match="has changed since the snapshot was made"):
        snapshot.quantity("logits")


def test_what_changes_no_value_is_let_pass():
    model = network()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    snapshot.quantity("logits")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model(data()[0])
    model.train()
    for p in model.parameters():
        p.data = p.data.clone()
    assert snapshot.quantity("gradient")


def test_a_loss_and_data_that_change_are_noticed():
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    snapshot = diag.Snapshot(network(), loss, data())
    snapshot.quantity("logits")
    loss.weight[1] = 5
    with pytest.raises(InvalidInput, match="The loss function's weight has changed"):
        snapshot.quantity("gradient")
    x, y = data()
    snapshot = diag.Snapshot(network(), nn.CrossEntropyLoss(), (x, y))
    snapshot.quantity("logits")
    x[3] += 1
    with pytest.raises(InvalidInput, match="data have changed since the snapshot read them") as found:
        snapshot.quantity("gradient")
    assert is_one_sentence(str(found.value))


class Scaling(nn.Module):
    """Writes into its inputs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x.mul_(0.5))


def test_a_model_that_writes_into_its_inputs_is_refused():
    snapshot = diag.Snapshot(Scaling(), nn.CrossEntropyLoss(), data())
    snapshot.quantity("logits")
    with pytest.raises(InvalidInput, match="a model that writes into its inputs"):
        snapshot.quantity("gradient")


def test_an_operator_and_gradients_notice_writes_that_count_no_version():
    model = network()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    hessian, gradients = snapshot.quantity("hessian"), snapshot.quantity("per_example_gradients")
    v, before = torch.ones(hessian.size), gradients.norms()
    hessian @ v
    model[0].weight.data.mul_(2)
    with pytest.raises(InvalidInput, match="changed since this operator was made"):
        hessian @ v
    fresh = diag.Snapshot(model, nn.CrossEntropyLoss(), data()).quantity("per_example_gradients").norms()
    assert not torch.equal(before, fresh)
    torch.testing.assert_close(gradients.norms(), fresh)


@pytest.mark.parametrize("size", [1, BYTES_KEPT_WHOLE // 4, BYTES_KEPT_WHOLE // 4 + 1, 5 * 2 * ROW, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_every_bit_counts(size, dtype):
    tensor = torch.zeros(size + 1, dtype=dtype)[1:]  # not at the beginning of its memory
    for place in {0, size // 2, size - 1}:
        before = bits_of(tensor)
        raw = tensor.view(torch.uint8)
        at = place * dtype.itemsize
        raw[at] ^= 1
        assert bits_of(tensor) != before
        raw[at] ^= 1
        assert bits_of(tensor) == before


def test_values_that_change_places_are_noticed():
    tensor = torch.arange(40_000, dtype=torch.float32)
    for order in (tensor.flip(0), tensor.roll(1), tensor.view(200, 200).T.reshape(-1), tensor.view(4, -1).flip(0)):
        assert bits_of(order.reshape(-1)) != bits_of(tensor)


def test_tensors_without_bits_go_by_their_version():
    sparse = torch.eye(3).to_sparse()
    assert bits_of(sparse) == sparse._version
    assert bits_of(torch.empty(3, device="meta")) == 0
    assert TensorBits(nn.LazyLinear(3)).changed() == ""


def test_many_small_tensors_are_read_together_as_one_by_one():
    from diag.snapshot.state.bits import bits_of, bits_of_all

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(i % 5 + 1, 2, generator=generator) for i in range(70)]
    tensors += [torch.arange(i % 3) for i in range(70)] + [t.t() for t in tensors[:5]]
    tensors += [torch.randn(3, generator=generator).double(), torch.tensor([True]), torch.randn(9000)]
    assert bits_of_all(tensors) == [bits_of(t) for t in tensors]
