"""The architectures on which symmetries are found and alignment is tried: small, each with its trap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class BasicBlock(nn.Module):
    """ResNet's block; without a projection the shortcut pads channels with zeros (He et al. 2015, option A)."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, width - inputs
        self.shortcut = None
        if stride > 1 and project:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1:
            half = self.pad // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.pad - half))
        out += x
        return F.relu(out)


class ResNet(nn.Module):
    """ResNet-20 for depth 3 and width 16."""

    def __init__(self, depth: int = 3, width: int = 16, project: bool = True, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(BasicBlock(inputs, width << stage, stride, project))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Fused query, key and value in one of the layouts in use."""

    def __init__(self, width: int, heads: int, layout: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.layout = heads, layout

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        (b, t, c), h = x.shape, self.heads
        qkv = self.qkv(x)
        if self.layout == "split":  # nanoGPT
            return tuple(y.view(b, t, h, c // h).transpose(1, 2) for y in qkv.split(c, dim=2))
        if self.layout == "three first":  # timm
            return qkv.reshape(b, t, 3, h, c // h).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "heads first":  # GPT-NeoX
            return qkv.view(b, t, h, 3 * c // h).transpose(1, 2).chunk(3, dim=-1)
        y = qkv.view(b, t, h, 3, c // h).transpose(1, 2)  # BLOOM
        return y[..., 0, :], y[..., 1, :], y[..., 2, :]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class GPT(nn.Module):
    """Hand-written, with fused qkv, learned positions longer than the example, and tied embeddings."""

    def __init__(
        self,
        width: int = 12,
        heads: int = 3,
        depth: int = 2,
        layout: str = "split",
        words: int = 11,
        context: int = 16,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(context, width)
        mlp = lambda: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))  # noqa: E731
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, layout))
            self.blocks += [Residual(attention), Residual(nn.Sequential(nn.LayerNorm(width), *mlp()))]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Llama(nn.Module):
    """One block with rotary positions, grouped query heads, RMSNorm and SwiGLU."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2, hidden: int = 20) -> None:
        super().__init__()
        self.tokens, self.unit = nn.Embedding(11, width), width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * self.unit, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(hidden, width, bias=False), nn.Linear(width, 11, bias=False)
        self.heads, self.kv_heads = heads, kv_heads
        angle = torch.outer(torch.arange(32.0), 10.0 ** -torch.arange(self.unit // 2))
        self.register_buffer("cos", torch.cat([angle, angle], 1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angle, angle], 1).sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        t = x.shape[-2]
        return x * self.cos[:t] + torch.cat([-b, a], -1) * self.sin[:t]

    def repeat(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        n = self.heads // self.kv_heads
        return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        b, t, c = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, -1, self.unit).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = self.rotate(q), self.repeat(self.rotate(k)), self.repeat(v)
        p = (q @ k.transpose(2, 3) / self.unit**0.5).softmax(-1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(b, t, c))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))


class ViT(nn.Module):
    """Patches, a class token, nn.MultiheadAttention, an answer read from one position."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(width, 3, 20, batch_first=True, norm_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(5 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(5 + 4 * i) for i in range(3))
        self.fc = nn.Linear(17, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(6, 7, 2, 2), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = self.up(F.relu(self.b(a)))
        return self.out(F.relu(torch.cat([a, b], 1)))


class SqueezeExcite(nn.Module):
    """MobileNet's block: expand, depthwise, channel attention, project, add."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand, self.depth = nn.Conv2d(width, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.norm = nn.BatchNorm2d(10)
        self.squeeze, self.excite = nn.Linear(10, 3), nn.Linear(3, 10)
        self.project, self.fc = nn.Conv2d(10, width, 1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.norm(self.depth(F.relu6(self.expand(x)))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        x = x + self.project(y * scale[:, :, None, None])
        return self.fc(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.core, self.head = nn.Embedding(11, 5), kind(5, 7, 2, batch_first=True), nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.tokens(ids))[0][:, -1])


@dataclass(frozen=True)
class Case:
    """A network, its example inputs, and the groups it must have: (size, sizes of the parents), sorted."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    groups: list[tuple[int, tuple[int, ...]]]


def images(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, channels, size, size)


def vectors(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, size)


def ids() -> Tensor:
    return torch.randint(0, 11, (4, 6))


def attention(width: int, heads: int) -> list[tuple[int, tuple[int, ...]]]:
    return [(heads, ()), (width // heads, (heads,))]


def gpt(layout: str) -> Case:
    groups = [(12, ()), *2 * attention(12, 3), (48, ()), (48, ())]
    return Case(lambda: GPT(layout=layout), ids, groups)


S = nn.Sequential
CASES = {
    "mlp": Case(
        lambda: S(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)),
        vectors(5),
        [(9, ()), (8, ())],
    ),
    "conv and flatten": Case(
        lambda: S(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(63, 4)),
        images(),
        [(7, ())],
    ),
    "batch norm": Case(
        lambda: S(
            nn.Conv2d(3, 7, 3),
            nn.BatchNorm2d(7),
            nn.ReLU(),
            nn.Conv2d(7, 5, 3),
            nn.BatchNorm2d(5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 4),
        ),
        images(),
        [(7, ()), (5, ())],
    ),
    "layer norm": Case(
        lambda: S(nn.Linear(5, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3)), vectors(5), [(9, ())]
    ),
    "group norm": Case(
        lambda: S(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Flatten(1), nn.Linear(432, 3)),
        images(),
        [(3, ()), (4, (3,))],
    ),
    "grouped conv": Case(
        lambda: S(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)
        ),
        images(),
        [(4, ()), (2, (4,)), (3, (4,))],
    ),
    "depthwise conv": Case(
        lambda: S(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 16, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
            nn.AvgPool2d(4),
            nn.Flatten(),
        ),
        images(),
        [(8, ()), (2, (8,))],
    ),
    "residual stream": Case(
        lambda: S(
            nn.Linear(5, 8),
            Residual(S(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))),
            Residual(S(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8))),
            nn.Linear(8, 3),
        ),
        vectors(5),
        [(8, ()), (9, ()), (7, ())],
    ),
    "resnet": Case(
        lambda: ResNet(depth=1, width=4), images(), [(4, ()), (4, ()), (8, ()), (8, ()), (16, ()), (16, ())]
    ),
    "resnet-20": Case(ResNet, images(), [(16, ())] * 4 + [(32, ())] * 4 + [(64, ())] * 4),
    "resnet, padded": Case(
        lambda: ResNet(depth=2, width=4, project=False),
        images(),
        [(4, ()), (2, ()), (2, ()), (4, ()), (4, ()), *[(4, ())] * 2, *[(8, ())] * 2, *[(16, ())] * 2],
    ),
    "squeeze and excite": Case(SqueezeExcite, images(), [(6, ()), (10, ()), (3, ())]),
    "dense net": Case(Dense, images(), [(5, ()), (4, ()), (4, ()), (4, ())]),
    "u-net": Case(UNet, images(), [(5, ()), (6, ()), (7, ())]),
    "gpt, split": gpt("split"),
    "gpt, three first": gpt("three first"),
    "gpt, heads first": gpt("heads first"),
    "gpt, bloom": gpt("bloom"),
    "llama": Case(Llama, ids, [(16, ()), (2, ()), (2, (2,)), (4, (2,)), (20, ())]),
    "vit": Case(ViT, images(), [(12, ()), *2 * attention(12, 3), (20, ()), (20, ())]),
    "lstm": Case(lambda: Recurrent(nn.LSTM), ids, [(5, ()), (7, ()), (7, ())]),
    "gru": Case(lambda: Recurrent(nn.GRU), ids, [(5, ()), (7, ()), (7, ())]),
}


@dataclass
class Network:
    model: nn.Module
    inputs: Tensor
    groups: list[tuple[int, tuple[int, ...]]]

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, torch.zeros(len(self.inputs), dtype=torch.long)


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        case = CASES[name]
        model, inputs = case.build().to(dtype), case.inputs()
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        with torch.no_grad():  # running statistics as after training
            model.train()(inputs)
        model.eval()
    return Network(model, inputs, case.groups)


@pytest.fixture
def network() -> Callable[..., Network]:
    """network(name, dtype, seed) builds one of the architectures."""
    return build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", CASES)
