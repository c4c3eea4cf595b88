"""Per-example gradients against a loop over the examples, on every kind of layer."""

import importlib.util
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from diag.gradients import Gram, GroupGram, GroupSums, ModelGradients, SquaredNorms
from diag.snapshot.reading.forms import as_batch

_spec = importlib.util.spec_from_file_location(
    "per_example_cases", Path(__file__).with_name("per_example_cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ALL = [*cases.CLASSIFIERS, *cases.LANGUAGE]
# The bars of exactness, relative: float64 leaves 1e-10, float32 1e-5 (about a hundred roundings of 6e-8).
BAR = {torch.float64: 1e-10, torch.float32: 1e-5}


def columns_of(gradients, layer):
    """Where the parameters of a layer lie in flat vectors."""
    slices = [gradients.columns[name] for name in gradients.parameters_of(layer)]
    return torch.cat([torch.arange(part.start, part.stop) for part in slices])


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def check_all_answers(gradients, truth, bar):
    """Everything an instrument can ask, against the dense (n, P) gradients in float64."""
    norms = truth.norm(dim=1)
    assert float(((gradients.norms() - norms).abs() / norms).max()) < bar
    scale = norms[:, None] * norms[None, :]
    assert float(((gradients.gram() - truth @ truth.T).abs() / scale).max()) < bar
    assert relative(gradients.mean(), truth.mean(0)) < bar * max(1.0, float(norms.mean() / truth.mean(0).norm()))
    assert relative(gradients.dense(), truth) < bar
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(3, truth.shape[1], generator=generator, dtype=torch.float64)
    for some in (directions, directions[:1]):  # many and one are computed in different ways
        scale = norms[:, None] * some.norm(dim=1)
        assert float(((gradients.project(some) - truth @ some.T).abs() / scale).max()) < bar
    layers = gradients.by_layer()
    shares = torch.stack([layer.norms() ** 2 for layer in layers.values()])
    assert relative(shares.sum(0), norms**2) < 2 * bar
    for name, layer in layers.items():
        part = truth[:, columns_of(gradients, name)]
        assert float((layer.norms() - part.norm(dim=1)).abs().max()) < bar * float(norms.max())
        assert float((layer.mean() - part.mean(0)).norm()) < bar * float(norms.mean())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exact_on_every_construct(name, dtype):
    model, loss_fn, batch = cases.problem(name, dtype=dtype)
    reference = cases.problem(name, dtype=dtype)[0].double()
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    args = tuple(a.double() if a.is_floating_point() else a for a in batch.args)
    truth = cases.loop(reference, loss_fn, type(batch)(args, {}, batch.targets, batch.size))
    gradients = ModelGradients(model, loss_fn, [batch])
    check_all_answers(gradients, truth, BAR[dtype])
    assert gradients.coverage.parameters == 1.0
    assert gradients.coverage.squared_gradient == 1.0


@pytest.mark.parametrize(
    "name", ["linear, in-place ReLU", "tied head", "conv2d, groups, dilation, same", "GRU", "no rule"]
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_change_nothing(name, size):
    model, loss_fn, batch = cases.problem(name)
    whole = ModelGradients(model, loss_fn, [batch])
    parts = ModelGradients(model, loss_fn, [batch], micro_batch=size)
    # The same sums in another order: a few roundings of float64.
    torch.testing.assert_close(parts.gram(), whole.gram(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.norms(), whole.norms(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.losses(), whole.losses(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 64])
@pytest.mark.parametrize(
    "name", ["linear, in-place ReLU", "class and position tokens", "tied head", "conv1d, stride"]
)
def test_batch_sizes(name, n):
    model, loss_fn, batch = cases.problem(name, n=n)
    truth = cases.loop(model, loss_fn, batch)
    gradients = ModelGradients(model, loss_fn, [batch])
    assert relative(gradients.norms(), truth.norm(dim=1)) < 1e-10
    assert relative(gradients.gram(), truth @ truth.T) < 1e-10


LAYERS = {
    "linear": lambda: nn.Linear(cases.D, cases.D),
    "layer norm": lambda: nn.LayerNorm(cases.D),
    "rms norm": lambda: nn.RMSNorm(cases.D),
    "custom norm": cases.CustomNorm,
    "tanh": nn.Tanh,
    "relu": lambda: nn.ReLU(inplace=True),
    "conv1d": lambda: Swapped(nn.Conv1d(cases.D, cases.D, 3, padding=1, groups=2)),
    "transposed": lambda: Swapped(nn.ConvTranspose1d(cases.D, cases.D, 3, padding=1)),
    "group norm": lambda: Swapped(nn.GroupNorm(3, cases.D)),
    "attention": lambda: SelfAttention(),
    "gru": lambda: First(nn.GRU(cases.D, cases.D, batch_first=True)),
    "lstm": lambda: First(nn.LSTM(cases.D, cases.D, batch_first=True)),
    "gpt conv": lambda: cases.HuggingFaceConv1D(cases.D, cases.D),
}


class Swapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2).contiguous()


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(cases.D, 3, batch_first=True)

    def forward(self, x):
        return x + self.layer(x, x, x)[0]


@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    n=st.integers(1, 6),
    repeated=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_compositions(names, n, repeated, seed):
    torch.manual_seed(seed)
    layers = [LAYERS[name]() for name in names]
    layers = layers + layers[:1] if repeated else layers  # the first module is called again
    model = cases.Pooled(*layers).double().eval()
    batch = as_batch((cases.sequence(n).double(), torch.randint(cases.CLASSES, (n,))))
    truth = cases.loop(model, F.cross_entropy, batch)
    gradients = ModelGradients(model, F.cross_entropy, [batch])
    assert relative(gradients.dense(), truth) < 1e-10
    assert relative(gradients.norms(), truth.norm(dim=1)) < 1e-10
    assert relative(gradients.gram(), truth @ truth.T) < 1e-10


def test_vmap_of_grad_agrees():
    model, loss_fn, batch = cases.problem("conv2d, BatchNorm in eval")
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, x, y):
        return loss_fn(torch.func.functional_call(model, values, (x[None],)), y[None])

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, batch.args[0], batch.targets)
    truth = torch.cat([g.flatten(1) for g in rows.values()], 1)
    assert relative(ModelGradients(model, loss_fn, [batch]).dense(), truth) < 1e-10


def test_cancelling_steps_are_not_lost_to_rounding():
    """Inner products over time that cancel to 1e-3: the product of squared sums would lose six digits."""
    torch.manual_seed(0)
    model = cases.Pooled(nn.Linear(64, 64), nn.Linear(64, cases.D))

    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            sign = 1 - 2 * (torch.arange(x.shape[1]) % 2)
            return self.inner.out((self.inner.layers(x) * sign[None, :, None]).sum(1))

    base = torch.randn(4, 1, 64)
    x = base + 1e-3 * torch.randn(4, 8, 64)
    batch = as_batch((x, torch.randint(cases.CLASSES, (4,))))
    single = ModelGradients(Alternating(), F.cross_entropy, [batch]).norms()
    double_batch = as_batch((x.double(), batch.targets))
    truth = cases.loop(Alternating().double(), F.cross_entropy, double_batch).norm(dim=1)
    assert relative(single, truth) < 1e-5


def test_hugging_face_style_batches():
    class Output(dict):
        __getattr__ = dict.__getitem__

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cases.LanguageModel()

        def forward(self, input_ids, attention_mask=None):
            return Output(logits=self.net(input_ids), note="kept as it is")

    torch.manual_seed(0)
    model = Model().double()
    batch = as_batch({"input_ids": cases.words(), "attention_mask": torch.ones(5, 7), "labels": cases.words()})

    def loss_fn(outputs, targets):
        return cases.token_loss(outputs["logits"], targets)

    truth = cases.loop(model, loss_fn, batch)
    assert relative(ModelGradients(model, loss_fn, [batch]).dense(), truth) < 1e-10


def test_selected_layers_report_their_coverage():
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    truth = cases.loop(model, loss_fn, batch)
    everything = ModelGradients(model, loss_fn, [batch])
    norms_only = ModelGradients(model, loss_fn, [batch], layers=lambda name: name.startswith("layers.1"))
    assert norms_only.layers == ("layers.1",)
    part = truth[:, columns_of(everything, "layers.1")]
    assert relative(norms_only.norms(), part.norm(dim=1)) < 1e-10
    coverage = norms_only.coverage
    assert coverage.parameters == part.shape[1] / truth.shape[1]
    share = float(part.mean(0).norm() ** 2 / truth.mean(0).norm() ** 2)
    assert abs(coverage.squared_gradient - share) < 1e-10
    assert "layers.0.weight" in coverage.missing


GRAPH = "through the whole graph, one example at a time"
EXPERTS = [f"experts.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")]
SLOW = {  # what has no closed form in the cases, and what is done instead
    "custom autograd function": {"w": GRAPH},
    "experts and in-place writes": dict.fromkeys(["blank", *EXPERTS], GRAPH),
    "scripted module": dict.fromkeys(["0.weight", "0.bias"], GRAPH),
    "no rule": {
        "bilinear.weight": "bilinear, replayed for each example",
        "bilinear.bias": "bilinear, replayed for each example",
        "mixing": "einsum, replayed for each example",
    },
}


@pytest.mark.parametrize("name", ALL)
def test_every_known_layer_has_its_closed_form(name):
    """The plan's own test sends what is wrong to a method that is right and many times slower."""
    model, loss_fn, batch = cases.problem(name)
    gradients = ModelGradients(model, loss_fn, [batch])
    gradients.prepare()
    methods = gradients.coverage.methods
    assert {n: m for n, m in methods.items() if "example" in m} == SLOW.get(name, {})
    assert methods.get("out.weight", "linear") == "linear" and methods.get("blank", GRAPH) in ("where", GRAPH)


def test_a_training_loop_can_ask_again_and_again():
    """One object, asked after each step: its plan is kept, its numbers are not."""
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    gradients = ModelGradients(model, loss_fn, [batch])
    for _ in range(3):
        truth = cases.loop(model, loss_fn, batch)
        assert relative(gradients.norms(), truth.norm(dim=1)) < 1e-10
        assert abs(float(gradients.losses().mean()) - loss_fn(batch.forward(model), batch.targets).item()) < 1e-12
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_selected_rows_and_permuted_targets():
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    gradients = ModelGradients(model, loss_fn, [batch], micro_batch=2)
    truth = cases.loop(model, loss_fn, batch)
    assert relative(gradients.select([4, 0, 3]).dense(), truth[[4, 0, 3]]) < 1e-10
    order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(2))
    mixed = as_batch((batch.args[0], batch.targets[order]))
    assert relative(gradients.with_permuted_targets(2).dense(), cases.loop(model, loss_fn, mixed)) < 1e-10
    layer = gradients.by_layer()["out"].select([1])
    assert relative(layer.dense(), truth[[1]][:, columns_of(gradients, "out")]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Against the float32 copy: half precision itself is off by some 1e-2 through three layers."""
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm", dtype=torch.float32)
    truth = cases.loop(model, loss_fn, batch).norm(dim=1)
    half = as_batch((batch.args[0].to(dtype), batch.targets))
    assert relative(ModelGradients(model.to(dtype), loss_fn, [half]).norms(), truth) < 3e-2


def test_batches_of_other_lengths_get_the_same_treatment():
    """Windows folded into the batch: their number changes with the length, so the plan must be made again."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(cases.D, 2, batch_first=True)
            self.out = nn.Linear(cases.D, cases.CLASSES)

        def forward(self, x):
            windows = x.reshape(-1, 4, cases.D)
            mixed = self.attention(windows, windows, windows)[0]
            return self.out(mixed.reshape(len(x), -1, cases.D).tanh().mean(1))

    torch.manual_seed(0)
    model = Windows().double()
    batches = [as_batch((torch.randn(5, t, cases.D).double(), torch.randint(4, (5,)))) for t in (8, 16, 8, 12)]
    truth = torch.cat([cases.loop(model, F.cross_entropy, b) for b in batches])
    assert relative(ModelGradients(model, F.cross_entropy, batches).dense(), truth) < 1e-10


FAMILIES = ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"]


@pytest.mark.slow
def test_compiled_submodules():
    torch.manual_seed(0)
    inner = torch.compile(nn.Sequential(nn.Linear(cases.D, 8), nn.Tanh()), backend="aot_eager")
    model = nn.Sequential(inner, nn.Linear(8, cases.CLASSES)).double()
    batch = as_batch((cases.flat().double(), torch.randint(cases.CLASSES, (cases.N,))))
    truth = cases.loop(model, F.cross_entropy, batch)
    gradients = ModelGradients(torch.compile(model, backend="aot_eager"), F.cross_entropy, [batch])
    assert relative(gradients.dense(), truth) < 1e-10
    assert set(gradients.coverage.methods.values()) == {"linear"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_models(name):
    """Skipped where transformers is not installed; a tiny model of each family, all layers exact."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": cases.WORDS, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 16}
    config = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=cases.WORDS, n_embd=12, n_layer=2, n_head=2),
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(**sizes, num_attention_heads=2),
        "BertForMaskedLM": lambda: transformers.BertConfig(**sizes, num_attention_heads=2),
        "T5ForConditionalGeneration": lambda: transformers.T5Config(
            vocab_size=cases.WORDS, d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
    }[name]()
    model = getattr(transformers, name)(config).double().eval()
    ids = {"input_ids": cases.words()}
    if name.startswith("T5"):
        ids["decoder_input_ids"] = cases.words()
    batch = as_batch({**ids, "labels": cases.words()})

    def loss_fn(outputs, targets):
        return cases.token_loss(outputs.logits, targets)

    truth = cases.loop(model, loss_fn, batch)
    gradients = ModelGradients(model, loss_fn, [batch])
    assert relative(gradients.dense(), truth) < 1e-10
    assert relative(gradients.norms(), truth.norm(dim=1)) < 1e-10
    assert relative(gradients.gram(), truth @ truth.T) < 1e-10


def test_several_questions_take_one_pass(monkeypatch):
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    gradients = ModelGradients(model, loss_fn, [batch], micro_batch=2)
    passes = []
    plain = ModelGradients.stream
    monkeypatch.setattr(ModelGradients, "stream", lambda self, consume: passes.append(1) or plain(self, consume))
    groups = ((0, 4), (1, 2, 3))
    squares, gram, between, sums = gradients.ask(SquaredNorms(), Gram(), GroupGram(groups), GroupSums(groups))
    assert len(passes) == 1
    truth = cases.loop(model, loss_fn, batch)
    assert relative(sum(squares.values()), truth.square().sum(1)) < 1e-10
    assert relative(sum(gram.values()), truth @ truth.T) < 1e-10
    expected = torch.stack([truth[list(group)].sum(0) for group in groups])
    assert relative(sums, expected) < 1e-10
    assert relative(sum(between.values()), expected @ expected.T) < 1e-10
    gradients.norms()
    gradients.squared_norms_by_layer()
    assert len(passes) == 1  # kept, until the parameters change
    with torch.no_grad():
        model.out.bias.add_(1.0)
    gradients.norms()
    assert len(passes) == 2


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("room", [1, 40, 1 << 28])
def test_the_sums_of_many_groups_are_formed_in_parts_that_fit_the_memory(room, micro_batch, monkeypatch):
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    monkeypatch.setattr("diag.gradients.queries.SUMS_AT_ONCE", room)
    monkeypatch.setattr("diag.gradients.queries.IN_ALL", room)
    monkeypatch.setattr("diag.gradients.queries.COLUMNS_AT_ONCE", min(room, 7))
    gradients = ModelGradients(model, loss_fn, [batch], micro_batch=micro_batch)
    truth = cases.loop(model, loss_fn, batch)
    groups = [torch.tensor(g, dtype=torch.long) for g in ([0, 4], [], [1, 2, 3], [2, 2], [])]
    expected = torch.stack([truth[g].sum(0) for g in groups])
    found = gradients.group_gram_by_layer(groups)
    assert relative(sum(found.values()), expected @ expected.T) < 1e-10
    for layer, gram in found.items():
        some = expected[:, columns_of(gradients, layer)]
        assert relative(gram, some @ some.T) < 1e-10
