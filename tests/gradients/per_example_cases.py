"""Small models for tests of per-example gradients, one for each construct, and the loop to hold them against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from diag.snapshot.reading.forms import as_batch

N, T, D, CLASSES, WORDS = 5, 7, 6, 4, 11


def loop(model, loss_fn, batch, dtype=torch.float64):
    """(n, P): the gradient of each example's loss alone, one backward pass each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(batch.size):
        part = batch.slice(i, i + 1)
        found = torch.autograd.grad(loss_fn(part.forward(model), part.targets), parameters, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.flatten() for g in dense]))
    return torch.stack(rows).to(dtype)


class Pooled(nn.Module):
    """(n, T, D) -> logits: layers, the mean over time, a classifier."""

    def __init__(self, *layers, width=D):
        super().__init__()
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.out(self.layers(x).mean(1))


class Convolved(nn.Module):
    """A convolution, a norm over channels, and a classifier on the mean over positions."""

    def __init__(self, conv, norm=None):
        super().__init__()
        width = conv.out_channels
        self.conv, self.norm = conv, norm or nn.GroupNorm(2, width)
        self.act, self.out = nn.PReLU(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.out(self.act(self.norm(self.conv(x))).flatten(2).mean(-1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(D, 5, **options)
        width = options.get("proj_size") or 5
        self.out = nn.Linear(width * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x):
        first = self.cell.batch_first
        hidden = self.cell(x if first else x.transpose(0, 1))[0]
        return self.out(hidden.mean(1 if first else 0))


class Attention(nn.Module):
    def __init__(self, batch_first=True, cross=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first, **options)
        self.out, self.cross, self.first = nn.Linear(D, CLASSES), cross, batch_first

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        keys = 2 * x.flip(1 if self.first else 0) if self.cross else x
        return self.out(self.attention(x, keys, keys)[0].mean(1 if self.first else 0))


class LanguageModel(nn.Module):
    """Tokens, positions, a class token, a scale used directly, and a head that may share the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(WORDS, D, padding_idx=3), nn.Embedding(T, D)
        self.scale, self.start = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(1, 1, D))
        self.norm, self.mix = nn.RMSNorm(D), nn.Linear(D, D)
        self.head = nn.Linear(D, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = torch.cat([self.start.expand(len(ids), -1, -1), x], 1).cumsum(1)
        return self.head(self.norm(self.mix(x) * self.scale).tanh())[:, :-1]


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class Reused(nn.Module):
    """One weight as F.linear, as a matrix product and transposed; one module twice; a scalar."""

    def __init__(self):
        super().__init__()
        self.w, self.scalar = nn.Parameter(torch.randn(D, D) / 3), nn.Parameter(torch.tensor(1.3))
        self.twice, self.out = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x):
        x = (F.linear(x, self.w).tanh() @ self.w).tanh()
        x = self.twice(self.twice(x).tanh()) * self.scalar
        return self.out(x @ self.w.t())


class HuggingFaceConv1D(nn.Module):
    """The linear layer of GPT-2: the weight lies the other way round, and time is folded into the batch."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class CustomNorm(nn.Module):
    """A norm that nobody has a rule for, written with plain operations."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * (centred / (1 + centred.abs().mean(-1, keepdim=True))) - self.shift


class ClassToken(nn.Module):
    """A vision transformer's class and position tokens, around one encoder layer."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, T + 1, D))
        self.encoder = nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)
        self.out = nn.Linear(D, CLASSES)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.out(self.encoder(x)[:, 0])


class ScaledFunction(torch.autograd.Function):
    """A kernel that no function mode sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(D)), nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.out(ScaledFunction.apply(x, self.w).tanh())


class NoRule(nn.Module):
    """Operations without a closed form here: a bilinear layer, einsum, a mask that selects a parameter."""

    def __init__(self):
        super().__init__()
        self.bilinear, self.mixing = nn.Bilinear(D, D, D), nn.Parameter(torch.randn(D, D) / 3)
        self.blank, self.out = nn.Parameter(torch.randn(D)), nn.Linear(D, CLASSES)

    def forward(self, x):
        x = torch.where(x > 0.5, self.blank, x)
        return self.out(torch.einsum("nd,de->ne", self.bilinear(x, x), self.mixing))


class RelativePosition(nn.Module):
    """A table of biases of which one element is used at many places, and windows folded into the batch."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Parameter(torch.randn(7)), nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.register_buffer("index", (torch.arange(4)[:, None] - torch.arange(4)[None, :] + 3).flatten())

    def forward(self, x):
        n = len(x)
        windows = self.inner(x.reshape(2 * n, 4, D))
        scores = windows @ windows.transpose(1, 2) + self.table[self.index].view(4, 4)
        windows = self.attention(*[scores.softmax(-1) @ windows] * 3)[0]
        return self.out(windows.reshape(n, 8, D).tanh().mean(1))


class Cells(nn.Module):
    """Recurrent cells called step by step."""

    def __init__(self):
        super().__init__()
        self.gru, self.lstm, self.out = nn.GRUCell(D, 5), nn.LSTMCell(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        h, state = x.new_zeros(len(x), 5), (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
        for step in x.unbind(1):
            h = self.gru(step, h)
            state = self.lstm(h, state)
        return self.out(state[0])


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.inner, self.first(x).tanh(), use_reentrant=self.reentrant)
        return self.out(x.tanh())


class Routed(nn.Module):
    """Experts that see a part of the batch each, and a parameter written into a tensor in place."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.blank, self.out = nn.Parameter(torch.randn(D)), nn.Linear(D, CLASSES)

    def forward(self, x):
        x = x.clone()
        x[:, 0] = self.blank
        mixed = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (x[..., 1] > 0, x[..., 1] <= 0), strict=True):
            mixed[chosen] = expert(x[chosen])
        return self.out(mixed.tanh().mean(1))


def frozen():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[2].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def flat(n=N):
    return torch.randn(n, D)


def sequence(n=N):
    return torch.randn(n, T, D)


def words(n=N):
    return torch.randint(WORDS, (n, T))


def image(*shape):
    return lambda n=N: torch.randn(n, D, *shape)


def mlp():
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(D, 8)), nn.Linear(8, CLASSES))


# name -> (the model, its inputs)
CLASSIFIERS = {
    "linear, in-place ReLU": (mlp, flat),
    "linear over time, LayerNorm": (
        lambda: Pooled(nn.Linear(D, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, D)), sequence,
    ),
    "RMSNorm, custom norm": (lambda: Pooled(nn.RMSNorm(D), CustomNorm()), sequence),
    "Hugging Face Conv1D": (lambda: Pooled(HuggingFaceConv1D(D, 8), nn.Tanh(), HuggingFaceConv1D(8, D)), sequence),
    "conv1d, stride": (lambda: Convolved(nn.Conv1d(D, 8, 3, stride=2, padding=1)), image(9)),
    "conv2d, groups, dilation, same": (
        lambda: Convolved(nn.Conv2d(D, 8, 3, groups=2, dilation=2, padding="same")), image(9, 8),
    ),
    "conv2d, stride that leaves a rest": (lambda: Convolved(nn.Conv2d(D, 8, 3, stride=2)), image(8, 6)),
    "conv2d, depthwise, circular": (
        lambda: Convolved(nn.Conv2d(D, D, 3, groups=D, padding=1, padding_mode="circular")), image(5, 5),
    ),
    "conv2d, BatchNorm in eval": (
        lambda: Convolved(nn.Conv2d(D, 8, 1, bias=False), nn.BatchNorm2d(8)), image(4, 4),
    ),
    "conv2d, InstanceNorm": (lambda: Convolved(nn.Conv2d(D, 8, 2), nn.InstanceNorm2d(8, affine=True)), image(4, 4)),
    "conv3d": (lambda: Convolved(nn.Conv3d(D, 8, (1, 2, 3))), image(5, 4, 6)),
    "conv3d, stride, dilation": (
        lambda: Convolved(nn.Conv3d(D, 8, 2, stride=(1, 2, 1), dilation=(2, 1, 1))), image(5, 4, 3),
    ),
    "transposed conv1d": (lambda: Convolved(nn.ConvTranspose1d(D, 8, 3, bias=False)), image(5)),
    "transposed conv2d, output padding": (
        lambda: Convolved(nn.ConvTranspose2d(D, 8, 3, stride=2, output_padding=1, padding=1, groups=2)),
        image(5, 4),
    ),
    "transposed conv3d, dilation": (lambda: Convolved(nn.ConvTranspose3d(D, 8, 3, dilation=2)), image(3, 3, 2)),
    "LSTM, two layers, both ways": (
        lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), sequence,
    ),
    "LSTM, projected": (lambda: Recurrent(nn.LSTM, proj_size=3), sequence),
    "GRU": (lambda: Recurrent(nn.GRU), sequence),
    "RNN, ReLU, no bias": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False), sequence),
    "attention": (lambda: Attention(), sequence),
    "attention, time first": (lambda: Attention(batch_first=False), sequence),
    "attention, keys from elsewhere": (lambda: Attention(cross=True), sequence),
    "attention, bias for keys and values": (lambda: Attention(add_bias_kv=True), sequence),
    "class and position tokens": (ClassToken, sequence),
    "weight norm": (weight_norm, flat),
    "tied in three ways": (Reused, flat),
    "custom autograd function": (CustomFunction, flat),
    "no rule": (NoRule, flat),
    "windows and relative positions": (RelativePosition, lambda n=N: torch.randn(n, 8, D)),
    "recurrent cells": (Cells, sequence),
    "experts and in-place writes": (Routed, sequence),
    "scripted module": (lambda: nn.Sequential(torch.jit.script(nn.Linear(D, 8)), nn.Linear(8, CLASSES)), flat),
    "checkpointed": (Checkpointed, flat),
    "frozen parts": (frozen, flat),
}  # fmt: skip

LANGUAGE = {"tied head": lambda: LanguageModel(True), "untied head": lambda: LanguageModel(False)}


def problem(name, n=N, dtype=torch.float64):
    """(model, loss_fn, batch) of a case, in evaluation mode; the default dtype must be `dtype`."""
    torch.manual_seed(0)
    if name in LANGUAGE:
        return LANGUAGE[name]().to(dtype).eval(), token_loss, as_batch((words(n), words(n)))
    make, inputs = CLASSIFIERS[name]
    model = make().to(dtype).eval()
    return model, F.cross_entropy, as_batch((inputs(n).to(dtype), torch.randint(CLASSES, (n,))))
