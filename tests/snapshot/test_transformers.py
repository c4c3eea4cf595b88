"""Models of transformers, built small from their configurations: every number against an independent reference."""

import math

import pytest
import torch
from torch.nn import functional as F

import diag
import diag.registry
from diag.errors import DiagError

V, N, T = 40, 8, 11
WORDS = 50_257  # of GPT-2
SMALL = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt(transformers, **more):
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2} | SMALL | more
    config = transformers.GPT2Config(**sizes)
    return transformers.GPT2LMHeadModel(config)


BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def gpt_of_many_words(transformers):
    return gpt(transformers, n_embd=8, vocab_size=WORDS)


def bert(transformers):
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **BERT, **SMALL))


def bert_masked(transformers):
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT, **SMALL))


def albert(transformers):
    config = transformers.AlbertConfig(num_labels=3, embedding_size=8, **BERT, **SMALL)
    return transformers.AlbertForSequenceClassification(config)


def t5(transformers):
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=2, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config)


def bert_tokens(transformers):
    return transformers.BertForTokenClassification(transformers.BertConfig(num_labels=3, **BERT, **SMALL))


def llama(transformers):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=16, **sizes, **SMALL))


def vit(transformers):
    sizes = {"image_size": 16, "patch_size": 4, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **BERT))


def pictures():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, 16, 16, generator=generator)
    return {"pixel_values": x, "labels": torch.randint(0, 3, (N,), generator=generator)}


def tag_of_each(batch):
    """A tag of each token, -100 where it is padding."""
    return batch | {"labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 3)}


def tokens(ragged=False, classes=False, words=V):
    """A dict batch as a collator makes it: padded, with labels of -100 where there is nothing to predict."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, words, (N, T), generator=generator)
    lengths = torch.randint(3, T + 1, (N,), generator=generator) if ragged else torch.full((N,), T)
    mask = (torch.arange(T) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, 2)
    labels = ids[:, 1] % 3 if classes else torch.where(mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shifted(logits, labels):
    """(R, K) and (R,): what a causal language model predicts, and from what."""
    return logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)


def flat(logits, labels):
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def masked_labels(batch):
    chosen = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(2)) < 0.4
    return batch | {"labels": torch.where(chosen, batch["labels"], -100)}


CASES = {
    "GPT-2": (gpt, tokens(), shifted),
    "GPT-2, ragged": (gpt, tokens(ragged=True), shifted),
    "GPT-2, many words": (gpt_of_many_words, tokens(ragged=True, words=WORDS), shifted),
    "BERT": (bert, tokens(ragged=True, classes=True), flat),
    "BERT, masked": (bert_masked, masked_labels(tokens(ragged=True)), flat),
    "ALBERT, shared layers": (albert, tokens(classes=True), flat),
    "T5": (t5, tokens(ragged=True), flat),
    "BERT, tags": (bert_tokens, tag_of_each(tokens(ragged=True)), flat),
    "LLaMA, ragged": (llama, tokens(ragged=True), shifted),
    "ViT": (vit, pictures(), flat),
}


def made(transformers, name):
    torch.manual_seed(0)
    make, batch, rows = CASES[name]
    model = make(transformers).eval()
    return model, batch, rows


@pytest.mark.parametrize("name", CASES)
def test_what_is_compared_is_what_the_models_own_loss_compares(transformers, name):
    model, batch, rows = made(transformers, name)
    outputs = model(**batch)
    z, y = rows(outputs.logits.detach(), batch["labels"])
    counted = y != -100
    assert F.cross_entropy(z, y).item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    snapshot = diag.Snapshot(model, None, batch)
    assert torch.equal(snapshot.quantity("labels"), y[counted])
    torch.testing.assert_close(snapshot.quantity("logits"), z[counted])
    residual = z[counted].softmax(1) - F.one_hot(y[counted], z.shape[1])
    torch.testing.assert_close(snapshot.quantity("logit_gradients"), residual, rtol=1e-4, atol=1e-6)
    if (features := named(snapshot, "features")) is not None:
        classifier = snapshot.quantity("classifier")
        own = features @ classifier.weight.T + classifier.bias
        torch.testing.assert_close(own, z[counted], rtol=1e-4, atol=1e-5)


def named(snapshot, name):
    try:
        return snapshot.quantity(name)
    except DiagError:
        return None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_objective_is_the_models_own_whatever_the_batching(transformers, name, micro_batch):
    model, batch, _ = made(transformers, name)
    loss = model(**batch).loss
    values = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    expected = {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(values.items(), gradient, strict=True)
    }
    snapshot = diag.Snapshot(model, None, batch, micro_batch=micro_batch)
    found = snapshot.quantity("gradient")
    for parameter, g in expected.items():
        torch.testing.assert_close(found[parameter], g, rtol=1e-3, atol=1e-6)
    assert snapshot.quantity("losses").mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert snapshot.quantity("loss_at")(values) == pytest.approx(loss.item(), rel=1e-5)
    path = snapshot.quantity("interpolation")
    assert path.evaluate(path.start).losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["GPT-2, ragged", "T5"])
def test_the_error_of_a_path_is_that_of_the_counted_positions(transformers, name):
    model, batch, rows = made(transformers, name)
    z, y = rows(model(**batch).logits.detach(), batch["labels"])
    counted = (y != -100).view(N, -1)
    wrong = ((z.argmax(1) != y).view(N, -1) & counted).sum(1) / counted.sum(1)
    path = diag.Snapshot(model, None, batch, micro_batch=3).quantity("interpolation")
    torch.testing.assert_close(path.evaluate(path.start).errors, wrong.double())


def test_a_trained_language_model_is_seen_to_be_trained(transformers):
    """Read without the shift, next-token accuracy of a copying sequence would be near chance."""
    torch.manual_seed(0)
    model = gpt(transformers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = (torch.arange(T) * 3 + torch.arange(N)[:, None]) % V
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    model.eval()
    accuracy = (model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
    snapshot = diag.Snapshot(model, None, {"input_ids": ids, "labels": ids})
    assert accuracy > 0.9
    assert diag.softmax_collapse(snapshot).accuracy == pytest.approx(accuracy, abs=1e-6)
    path = snapshot.quantity("interpolation")
    assert 1 - path.evaluate(path.start).errors.mean().item() == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_watching_and_a_snapshot_agree(transformers, name):
    model, batch, rows = made(transformers, name)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with diag.watch(model, budget=math.inf, every=1, instruments=["softmax_collapse"]) as watcher:
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    z, y = rows(model(**batch).logits.detach(), batch["labels"])
    counted = y != -100
    accuracy = (z.argmax(1) == y)[counted].float().mean().item()
    watched = watcher.run.series("softmax_collapse")[-1][1]
    snapshot = diag.softmax_collapse(diag.Snapshot(model, None, batch))
    assert watched.accuracy == pytest.approx(accuracy, abs=1e-6) == snapshot.accuracy
    assert len(watched.margins) == int(counted.sum()) == len(snapshot.margins)
    assert not [e for e in watcher.run.events if e.kind == "internal error"]


@pytest.mark.parametrize(
    "name", ["GPT-2", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "GPT-2")]
)
def test_every_instrument_measures_or_says_what_to_do(transformers, name):
    model, batch, _ = made(transformers, name)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    noise = {p.data_ptr(): 0.05 * torch.randn_like(p) for p in model.parameters()}  # one for tied names
    other = {n: p + noise.get(p.data_ptr(), 0) for n, p in model.state_dict().items()}
    snapshot = diag.Snapshot(
        model, None, batch, other=other, previous=before, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    outcomes = diag.registry.measure_all(snapshot)
    for instrument, outcome in outcomes.items():
        assert type(outcome).__name__ != "Failed", (instrument, outcome)
    for instrument in ("hessian_spectrum", "softmax_collapse", "mode_connectivity", "sharpness"):
        assert not hasattr(outcomes[instrument], "reason"), (instrument, outcomes[instrument])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_sharpness_of_a_language_model_is_that_of_its_loss(transformers):
    """lambda_1 of the dense Hessian, float64, of the mean over all tokens that count."""
    torch.manual_seed(0)
    config = {"n_embd": 4, "n_head": 1, "vocab_size": 9, "attn_implementation": "eager"}
    model = gpt(transformers, **config).double().eval()
    batch = {k: v[:, :5] for k, v in tokens(ragged=True).items()}
    batch = {k: (v % 7 + 2 * (v < 0) * 0 if k == "input_ids" else v) for k, v in batch.items()}
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
    for p in model.transformer.wpe.parameters():
        p.requires_grad_(False)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in values.values()]

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        point = {n: v.view(s) for n, v, s in zip(values, parts, shapes, strict=True)}
        return torch.func.functional_call(model, point, (), batch).loss

    at = torch.cat([p.detach().reshape(-1) for p in values.values()])
    dense = torch.autograd.functional.hessian(loss, at)
    expected = torch.linalg.eigvalsh(dense)[-1].item()
    for micro_batch in (None, 3):
        snapshot = diag.Snapshot(model, None, batch, micro_batch=micro_batch)
        found = diag.hessian_spectrum(snapshot, num_eigenvalues=1).eigenvalues[0]
        assert found == pytest.approx(expected, rel=1e-3)
