"""Attention, initialisation and representation on GPT-2, BERT, a ViT, an LSTM and a ResNet, as their makers build
them: against the models' own weights and hidden states, and hooks, or one sentence that says why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import DiagError

N, T, V = 8, 11, 40
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def ids():
    return torch.randint(3, V, (N, T), generator=torch.Generator().manual_seed(0))


def images():
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(N, 3, 16, 16, generator=generator), "labels": torch.arange(N) % 3}


def gpt2(library, how):
    config = library.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation=how, **TOKENS)
    return library.GPT2LMHeadModel(config), {"input_ids": ids(), "labels": ids()}


def bert(library, how):
    config = library.BertConfig(
        num_labels=3, max_position_embeddings=16, attn_implementation=how, **SIZES, **TOKENS
    )
    mask = (torch.arange(T) < torch.arange(N)[:, None] + 3).long()
    batch = {"input_ids": ids(), "attention_mask": mask, "labels": ids()[:, 1] % 3}
    return library.BertForSequenceClassification(config), batch


def vit(library, how):
    config = library.ViTConfig(image_size=16, patch_size=8, num_labels=3, attn_implementation=how, **SIZES)
    return library.ViTForImageClassification(config), images()


def resnet(library, how=None):
    config = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3
    )
    return library.ResNetForImageClassification(config), images()


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def made(make, library, how="sdpa"):
    """The model in evaluation mode, its batch, and a snapshot of both."""
    torch.manual_seed(0)
    model, batch = make(library, how)
    return model.eval(), batch, diag.Snapshot(model, None, batch)


def recurrent():
    torch.manual_seed(0)
    model, x = Lstm(), torch.randn(N, T, 5)
    return model, x, diag.Snapshot(model, F.cross_entropy, (x, torch.arange(N) % 3))


def refused(instrument, snapshot):
    """The one sentence in which it is refused."""
    with pytest.raises(DiagError) as caught:
        instrument(snapshot)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


# -- attention
# --------------------------------------------------------------------------------------------------------


def visible(name, batch, keys):
    """Which keys each query may see, (examples or 1, 1, queries, keys)."""
    if name == "gpt2":
        return torch.ones(keys, keys).tril()[None, None].bool()
    mask = batch.get("attention_mask", torch.ones(N, keys))
    return mask[:, None, None, :].expand(-1, -1, keys, -1).bool()


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, bert, vit])
def test_heads_have_the_entropies_of_the_models_own_weights(transformers, make, how):
    """Float32 weights that the model returns against scores that are heard: 1e-4 of entropies of order 1."""
    model, batch, snapshot = made(make, transformers, how)
    found = diag.attention(snapshot)
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions
    seen = visible(make.__name__, batch, weights[0].shape[-1])
    keys = seen.sum(-1).double()
    entropies, largest = [], []
    for layer in weights:
        p = layer.detach().double()
        assert not bool((p * ~seen).any())
        relative = torch.special.entr(p).sum(-1) / keys.log()
        chooses = (keys > 1).expand_as(relative)
        for head in range(p.shape[1]):
            entropies.append(float(relative[:, head][chooses[:, head]].mean()))
            largest.append(float(p.max(-1).values[:, head][chooses[:, head]].mean()))
    assert found.num_heads == 4
    assert found.entropies == pytest.approx(entropies, abs=1e-4)
    assert found.largest_weights == pytest.approx(largest, abs=1e-4)


def test_what_has_no_attention_is_refused(transformers):
    for snapshot in (recurrent()[2], made(resnet, transformers)[2]):
        assert "attention" in refused(diag.attention, snapshot)


# -- initialisation
# ----------------------------------------------------------------------------------------------------


def sizes_of_outputs(model, batch):
    """The mean square of what each linear or convolutional module returns, in the order of the calls."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv2d", "Conv1D"):

            def keep(m, a, out, name=name):
                found[name] = float(out.detach().double().square().mean())

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("make", [gpt2, bert, vit, resnet])
def test_kernels_are_the_mean_squares_of_what_layers_return(transformers, make):
    model, batch, snapshot = made(make, transformers)
    found, expected = diag.initialization(snapshot), sizes_of_outputs(model, batch)
    assert found.layers == tuple(expected)
    assert found.kernels == pytest.approx(list(expected.values()), rel=1e-5)
    widths = [m.nf if type(m).__name__ == "Conv1D" else len(m.weight) for m in map(model.get_submodule, expected)]
    assert found.widths == tuple(widths)
    assert not found.is_plain and found.verdict().level == "description"


def test_the_weights_of_gpt2_are_read_the_right_way_round(transformers):
    """Its Conv1D keeps (inputs, outputs): C_W of c_attn is its 16 inputs times the mean square of its weights."""
    model, _, snapshot = made(gpt2, transformers)
    found = diag.initialization(snapshot)
    at, module = found.layers.index("transformer.h.0.attn.c_attn"), model.transformer.h[0].attn.c_attn
    expected = 16 * float(module.weight.detach().double().square().mean())
    assert found.weight_variances[at] == pytest.approx(expected, rel=1e-6)
    assert found.widths[at] == 48


def test_an_lstm_has_no_chain_of_layers():
    assert "fewer than two linear or convolutional layers" in refused(diag.initialization, recurrent()[2])


# -- representation
# ----------------------------------------------------------------------------------------------------


def effective_rank(rows):
    """exp of the entropy of the normalised squared singular values of the centred rows, float64."""
    rows = rows.detach().double()
    squares = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return float(torch.special.entr(squares / squares.sum()).sum().exp())


def rank_of(found, layer):
    return found.effective_ranks[found.layers.index(layer)]


def test_tokens_of_gpt2_are_rows_where_the_labels_are_one_each(transformers):
    model, batch, snapshot = made(gpt2, transformers)
    rows = model(**batch, output_hidden_states=True).hidden_states[-1][:, :-1].flatten(0, 1)
    assert rank_of(diag.representation(snapshot), "transformer.ln_f") == pytest.approx(
        effective_rank(rows), rel=1e-4
    )


def test_tokens_of_a_sequence_classifier_are_averaged_without_padding(transformers):
    model, batch, snapshot = made(bert, transformers)
    mask = batch["attention_mask"][..., None]
    rows = (model(**batch, output_hidden_states=True).hidden_states[-1] * mask).sum(1) / mask.sum(1)
    found = rank_of(diag.representation(snapshot), "bert.encoder.layer.1.output.LayerNorm")
    assert found == pytest.approx(effective_rank(rows), rel=1e-4)


def test_patches_and_pixels_are_averaged(transformers):
    model, batch, snapshot = made(vit, transformers)
    rows = model.vit.layernorm(model(**batch, output_hidden_states=True).hidden_states[-1]).mean(1)
    assert rank_of(diag.representation(snapshot), "vit.layernorm") == pytest.approx(effective_rank(rows), rel=1e-4)
    model, batch, snapshot = made(resnet, transformers)
    rows = model(**batch, output_hidden_states=True).hidden_states[-1].mean((2, 3))
    assert rank_of(diag.representation(snapshot), "resnet.pooler") == pytest.approx(effective_rank(rows), rel=1e-4)


def test_outputs_of_an_lstm_are_averaged_over_time():
    model, x, snapshot = recurrent()
    rows = model.lstm(x)[0].mean(1)
    assert rank_of(diag.representation(snapshot), "lstm") == pytest.approx(effective_rank(rows), rel=1e-4)
