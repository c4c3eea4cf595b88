"""A state that does not fit is refused with the first difference; names may differ where only one reading fits."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diag.checkpoints import Checkpoint, load_into, load_state
from diag.errors import CheckpointError


def checkpoint(state):
    return Checkpoint("a.pt", dict(state), "torch file")


def linear(n_in=2, n_out=3):
    return nn.Linear(n_in, n_out)


def test_the_first_difference_and_how_many_more(net):
    state = net.state_dict()
    state["embedding.weight"] = state["head.weight"] = torch.ones(7, 4)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    text = (
        "a.pt does not fit Net: embedding.weight has shape (7, 4) in the checkpoint and (5, 4) in the model, and "
        "1 more differ; build the model that was trained."
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_into(net, checkpoint(state))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_missing_and_surplus_names(net):
    state = net.state_dict()
    del state["conv.bias"]
    with pytest.raises(CheckpointError, match=r"conv\.bias is missing in the checkpoint; build"):
        load_into(net, checkpoint(state))
    state = net.state_dict() | {"extra": torch.ones(1)}
    with pytest.raises(CheckpointError, match="extra of the checkpoint is not in the model; build"):
        load_into(net, checkpoint(state))


def test_a_tied_weight_may_be_there_once_and_old_batch_norms_lack_a_counter(net, other, same):
    state = net.state_dict()
    del state["embedding.weight"], state["norm.num_batches_tracked"]
    assert load_into(other, checkpoint(state)) == ()
    same(net, other)


def test_a_prefix_is_taken_off_or_put_before():
    small, wrapped = linear(), nn.ModuleDict({"body": linear()})
    state = {f"body.{n}": t for n, t in linear().state_dict().items()} | {"loss.weight": torch.ones(1)}
    notes = load_into(small, checkpoint(state))
    assert notes == ("The prefix 'body.' was taken off the names, and 1 entries outside it were left out.",)
    assert torch.equal(small.weight, state["body.weight"])
    notes = load_into(wrapped, checkpoint(small.state_dict()))
    assert notes == ("The prefix 'body.' was put before the names.",)
    assert torch.equal(wrapped["body"].weight, small.weight)


def test_two_parts_that_both_fit_are_not_chosen_between():
    state = {f"{part}.{n}": t for part in ("student", "teacher") for n, t in linear().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fits Linear in 2 ways, by the parts student\., teacher\.; save"):
        load_into(linear(), checkpoint(state))


def test_another_dtype_is_converted_and_noted():
    model, state = linear(), linear().half().state_dict()
    assert load_into(model, checkpoint(state)) == (
        "Values stored as torch.float16 were read as the model's torch.float32.",
    )
    assert torch.equal(model.weight, state["weight"].float())


def test_parameters_in_place_of_tensors():
    model, state = linear(), dict(linear().named_parameters())
    load_into(model, checkpoint(state))
    assert torch.equal(model.weight, state["weight"])


@pytest.mark.parametrize(
    "prefix",
    [
        "model._orig_mod.module.",
        "_forward_module.model.",
        "model.module.",
        "a.b.c.d.",
        "module.module._orig_mod.net.",
    ],
)
def test_wrappers_in_wrappers_are_taken_off(prefix, net, other, same, tmp_path):
    torch.save({"state_dict": {prefix + n: t for n, t in net.state_dict().items()}}, tmp_path / "a.pt")
    load_into(other, load_state(tmp_path / "a.pt"))
    same(net, other)


def test_a_wrapped_block_inside_the_names(net, other, same, tmp_path):
    def wrapped(name):
        return name.replace("conv.", "conv._checkpoint_wrapped_module.").replace(
            "norm.", "_fsdp_wrapped_module.norm."
        )

    state = {wrapped(n): t for n, t in net.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    read = load_state(tmp_path / "a.pt")
    load_into(other, read)
    same(net, other)
    assert len(read.notes) == 2


def test_the_state_of_an_optimizer_is_no_model(net, tmp_path):
    optimizer = torch.optim.Adam(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    for name, contents in {
        "alone": optimizer.state_dict(),
        "by name": {"optimizer": optimizer.state_dict(), "epoch": 3},
        "without a state": torch.optim.SGD(net.parameters()).state_dict(),
        "in a list": {"optimizer_states": {"0": optimizer.state_dict()}},
    }.items():
        torch.save(contents, tmp_path / f"{name}.pt")
        with pytest.raises(
            CheckpointError, match="holds the state of an optimizer and no weights of a model; give"
        ):
            load_state(tmp_path / f"{name}.pt")
    torch.save({"optimizer": optimizer.state_dict(), "gan": {"critic": net.state_dict()}}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"holds several states \(gan\.critic\)"):
        load_state(tmp_path / "both.pt")


def lazy():
    layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    return nn.Sequential(*layers).eval()


def test_lazy_layers_take_the_sizes_of_the_checkpoint():
    trained, fresh, x = lazy(), lazy(), torch.randn(20, 2, 6, 6)
    trained(x)
    assert load_into(fresh, checkpoint(trained.state_dict())) == ()
    assert [type(m).__name__ for m in fresh] == ["Conv2d", "BatchNorm2d", "ReLU", "Flatten", "Linear"]
    assert (fresh[0].in_channels, fresh[1].num_features, fresh[4].in_features) == (2, 4, 64)
    assert torch.equal(trained(x), fresh(x))
    with pytest.raises(CheckpointError, match=r"4\.weight is missing in the checkpoint"):
        load_into(lazy(), checkpoint({n: t for n, t in trained.state_dict().items() if n != "4.weight"}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(3, 2) * 1j, "would lose their imaginary part"),
        (torch.ones(3, 2).double() * 1e300, "are too large for it as the model's float32"),
        (torch.ones(3, 2).char(), "may be the codes of a quantised model"),
        (torch.ones(3, 2, dtype=torch.bool), "may be the codes of a quantised model"),
    ],
)
def test_values_that_the_models_dtype_would_change_are_refused(value, text):
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=text):
        load_into(model, checkpoint({"weight": value, "bias": torch.ones(3)}))
    assert torch.equal(model.weight, before)


def test_a_buffer_of_whole_numbers_takes_no_fractions():
    norm = nn.BatchNorm1d(2)
    state = norm.state_dict()
    load_into(norm, checkpoint(state | {"num_batches_tracked": torch.tensor(3.0)}))
    assert int(norm.num_batches_tracked) == 3
    with pytest.raises(
        CheckpointError, match=r"num_batches_tracked holds float32 values .* would become other numbers"
    ):
        load_into(norm, checkpoint(state | {"num_batches_tracked": torch.tensor(3.5)}))
    infinite = state | {"running_var": torch.tensor([float("inf"), 1.0])}
    load_into(norm, checkpoint({n: t.double() if t.is_floating_point() else t for n, t in infinite.items()}))
    assert bool(norm.running_var.isinf()[0])


class PreTrainedModel(nn.Module):
    """What a model of transformers has: it leaves names aside, and its class reads names of old."""

    _keys_to_ignore_on_load_unexpected = (r"attn\.bias",)
    _keys_to_ignore_on_load_missing = (r"position_ids", r"classifier")

    def __init__(self, config="config"):
        super().__init__()
        self.config = config
        self.LayerNorm = nn.LayerNorm(2)
        self.classifier = nn.Linear(2, 2)
        self.register_buffer("position_ids", torch.arange(3))

    @classmethod
    def from_pretrained(cls, path, config, state_dict, output_loading_info):
        assert path is None and config == "config" and output_loading_info
        torch.rand(3)  # a class that draws its first weights
        made = cls(config)
        renamed = {n.replace("old.", ""): t for n, t in state_dict.items()}
        missing, unexpected = made.load_state_dict(renamed, strict=False)
        missing = [name for name in missing if name != "position_ids"]
        return made, {"missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set()}


def test_what_a_model_of_transformers_leaves_aside():
    model, trained = PreTrainedModel(), PreTrainedModel()
    extra = {"h.0.attn.bias": torch.ones(2), "h.1.attn.bias": torch.ones(2)}
    notes = load_into(model, checkpoint(trained.state_dict() | extra))
    told = "Entries that the model declares as not its own were left out: h.0.attn.bias and h.1.attn.bias."
    assert notes == (told,) and torch.equal(model.classifier.weight, trained.classifier.weight)
    state = trained.state_dict()
    del state["position_ids"]
    assert load_into(model, checkpoint(state)) == ()
    del state["classifier.weight"]
    with pytest.raises(CheckpointError, match=r"classifier\.weight is missing"):
        load_into(model, checkpoint(state))


def test_old_names_and_what_the_class_itself_reads():
    model, trained = PreTrainedModel(), PreTrainedModel()
    state = trained.state_dict()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    assert load_into(model, checkpoint({old.get(n, n): t for n, t in state.items()})) == ()
    older = {f"old.{n}" if "classifier" in n else n: t for n, t in state.items()} | {"pooler.weight": torch.ones(2)}
    random = torch.random.get_rng_state()
    [note] = load_into(model, checkpoint(older))
    assert note == (
        "The names were read as PreTrainedModel of transformers reads them; entries that it has no place for were "
        "left out: pooler.weight."
    )
    assert torch.equal(model.classifier.weight, trained.classifier.weight)
    assert torch.equal(torch.random.get_rng_state(), random)
    del older["old.classifier.weight"]
    with pytest.raises(CheckpointError, match=r"classifier\.weight is missing in the checkpoint"):
        load_into(model, checkpoint(older))


def test_models_of_transformers_from_their_folders(tmp_path):
    """What save_pretrained wrote and what older versions wrote, against what transformers itself reads."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(**small, vocab_size=50, max_position_embeddings=20)
    gpt = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20)
    vit = transformers.ViTConfig(**small, image_size=16, patch_size=8)
    pooler = {
        "bert.pooler.dense.weight": torch.ones(16, 16),
        "bert.embeddings.position_ids": torch.arange(20)[None],
    }
    masks = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 20, 20) for i in range(2)}
    for name, kind, config, extra in (
        ("BERT", transformers.BertForMaskedLM, bert, pooler),
        ("GPT-2", transformers.GPT2LMHeadModel, gpt, masks),
        ("ViT", transformers.ViTForImageClassification, vit, {}),
    ):
        trained, model = kind(config), kind(config)
        trained.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | extra, file, metadata={"format": "pt"})
        load_into(model, load_state(tmp_path / name))
        reference = kind.from_pretrained(tmp_path / name)
        for (n, p), q in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
            assert torch.equal(p, q), f"{name}: {n}"
        for p, q in zip(model.parameters(), trained.parameters(), strict=True):
            assert torch.equal(p, q)
