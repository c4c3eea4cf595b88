"""Small networks, and two references that share no code with diag: float64 rows of the gradient's graph, and
float64 central differences of `.backward()` gradients in a copy of the model."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from diag.snapshot.reading.forms import as_batches

cross_entropy = F.cross_entropy


class Composed(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def token_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mlp():
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    return model, cross_entropy, ragged(torch.randn(21, 6), torch.randint(4, (21,)))


def conv_batchnorm():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    model(3 + 2 * torch.randn(50, 2, 6, 6))  # running statistics unlike those of the data measured on
    return model, cross_entropy, ragged(torch.randn(13, 2, 6, 6), torch.randint(3, (13,)))


def gru():
    parts = {"rnn": nn.GRU(4, 4, batch_first=True), "head": nn.Linear(4, 3)}
    model = Composed(lambda self, x: self.head(self.rnn(x)[0][:, -1]), **parts)
    return model, cross_entropy, ragged(torch.randn(9, 4, 4), torch.randint(3, (9,)))


def attention():
    parts = {"layer": nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), "head": nn.Linear(4, 3)}
    model = Composed(lambda self, x: self.head(self.layer(x).mean(1)), **parts)
    return model, cross_entropy, ragged(torch.randn(9, 4, 4), torch.randint(3, (9,)))


class TiedGPT(nn.Module):
    """One block with fused attention; the output layer is the embedding."""

    def __init__(self, vocabulary=7, width=4, length=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + self.mix(attended)))


def tied_gpt():
    return TiedGPT(), token_loss, ragged(torch.randint(7, (9, 5)), torch.randint(7, (9, 5)))


MODELS = [mlp, conv_batchnorm, gru, attention, tied_gpt]


def ragged(inputs, targets):
    """Two batches of different sizes."""
    cut = 2 * len(inputs) // 3
    return list(as_batches([(inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])]))


def build(case, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return case()


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Reference:
    """The mean loss of a float64 copy of the model in evaluation mode, differentiated by plain torch."""

    def __init__(self, model, loss_fn, batches):
        self.model = copy.deepcopy(model).double().eval()
        self.loss_fn, self.batches = loss_fn, batches
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.n = sum(b.size for b in batches)

    def losses(self):
        for b in self.batches:
            yield self.loss_fn(self.model(*map(_double, b.args)), _double(b.targets)) * b.size / self.n

    def gradient(self):
        return sum(self._backward(loss) for loss in self.losses())

    def _backward(self, scalar):
        for p in self.parameters:
            p.grad = None
        scalar.backward(retain_graph=True)
        return self._flat([p.grad for p in self.parameters])

    def move(self, step, direction):
        start = 0
        with torch.no_grad():
            for p in self.parameters:
                p += step * direction[start : start + p.numel()].view_as(p)
                start += p.numel()

    def product(self, direction, step=1e-5):
        """H d by central differences: an error of about step^2 and of 1e-16 / step."""
        saved = [p.detach().clone() for p in self.parameters]
        ends = []
        for sign in (1, -1):
            self.move(sign * step, direction.double())
            ends.append(self.gradient())
            with torch.no_grad():
                for p, value in zip(self.parameters, saved, strict=True):
                    p.copy_(value)
        return (ends[0] - ends[1]) / (2 * step)

    def hessian(self):
        """Row by row from the graph of the gradient."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            loss = sum(self.losses())
            grads = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.parameters, strict=True)]
            flat = torch.cat([g.reshape(-1) for g in grads])
            return torch.stack(
                [
                    self._flat(torch.autograd.grad(x, self.parameters, retain_graph=True, allow_unused=True))
                    for x in flat
                ]
            )

    def gauss_newton(self):
        """(1/n) sum over examples of J^T (diag p - p p^T) J, with J row by row; positions are averaged too."""
        total = 0
        for b in self.batches:
            z = self.model(*map(_double, b.args))
            rows = z.reshape(-1, z.shape[-1])
            for row in rows:
                jacobian = torch.stack([self._backward(x) for x in row])
                p = row.detach().softmax(0)
                total = total + jacobian.T @ (p.diag() - p.outer(p)) @ jacobian * b.size / self.n / len(rows)
        return total

    def _flat(self, grads):
        zeros = [torch.zeros_like(p) for p in self.parameters]
        return torch.cat([(z if g is None else z + g).reshape(-1) for z, g in zip(zeros, grads, strict=True)])


def relative(found, truth):
    """||found - truth|| / ||truth||, in float64."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def directions(size, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, size, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)
