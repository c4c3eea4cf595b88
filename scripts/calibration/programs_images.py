"""Programs that classify images: perceptrons, convolutions with and without batch normalisation, patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import Dataset

from calibration import data, layers
from calibration.program import Batch, Program

CLASSIFIER = frozenset({"classifier", "inputs", "images", "epochs", "rows"})


class MLP(Program):
    """A perceptron on digits, SGD with momentum, the learning rate cut each third of the training."""

    name, family, classes = "mlp", "perceptron", 10
    tags = CLASSIFIER | {"relu", "sgd", "scheduler", "epoch_scheduler", "sequential", "plain_body"}
    epochs, batch, lr = 15, 64, 0.1

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.digits()

    def make_model(self) -> nn.Module:
        body = layers.mlp(64, 96, 96, 64, 10)
        return nn.Sequential(nn.Flatten(), *body)

    def make_scheduler(self) -> Any:
        return lr_scheduler.StepLR(self.optimizer, step_size=max(1, self.epochs // 3), gamma=0.3)

    def schedule_epoch(self) -> None:
        self.scheduler.step()  # type: ignore[union-attr]


class ConvBN(Program):
    """A small convolutional network with batch normalisation and dropout on digits, Adam, shifted by a pixel."""

    name, family, classes = "conv_bn", "convolution", 10
    tags = CLASSIFIER | {"relu", "adam", "batch_norm", "dropout", "augmented", "sequential", "conv"}
    epochs, batch, lr = 8, 64, 2e-3
    optimizer_inside = True

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.digits()

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def transform(self, batch: Batch, training: bool) -> Batch:
        return [shifted(batch[0]), batch[1]] if training else batch


class ConvGN(Program):
    """Convolutions with group normalisation on MNIST at half size, AdamW under a one-cycle schedule."""

    name, family, classes = "conv_gn", "convolution", 10
    tags = CLASSIFIER | {"relu", "adam", "scheduler", "step_scheduler", "dropout", "sequential", "conv"}
    epochs, batch, lr = 4, 50, 4e-3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.mnist()

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.1), nn.Linear(24 * 9, 10),
        )  # fmt: skip

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.trained(), lr=self.lr, weight_decay=0.01)

    def make_scheduler(self) -> Any:
        return lr_scheduler.OneCycleLR(self.optimizer, max_lr=self.lr, total_steps=self.total_steps)

    def schedule_step(self) -> None:
        self.scheduler.step()  # type: ignore[union-attr]


class SmallResNet(nn.Module):
    """A stem, three basic blocks, pooling and a linear head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = layers.Residual(width, width)
        self.layer2 = layers.Residual(width, 2 * width, 2)
        self.layer3 = layers.Residual(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class ResNet(Program):
    """A small residual network on half-size MNIST, SGD with weight decay under a cosine schedule."""

    name, family, classes = "resnet", "convolution", 10
    tags = CLASSIFIER | {"relu", "sgd", "batch_norm", "scheduler", "epoch_scheduler", "augmented", "blocks", "conv"}
    epochs, batch, lr = 5, 64, 0.05

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.mnist(held_out=2000)

    def make_model(self) -> nn.Module:
        return SmallResNet()

    def make_optimizer(self) -> Any:
        return torch.optim.SGD(self.trained(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def make_scheduler(self) -> Any:
        return lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=self.epochs)

    def schedule_epoch(self) -> None:
        self.scheduler.step()  # type: ignore[union-attr]

    def transform(self, batch: Batch, training: bool) -> Batch:
        return [shifted(batch[0]), batch[1]] if training else batch


class VisionTransformer(nn.Module):
    """Patches of 2 x 2, a class token, pre-normalised blocks with attention written out."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(
            *[layers.Block(width, heads, fused=False, dropout=dropout) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class ViT(Program):
    """A vision transformer on digits, AdamW with warm-up, label smoothing and clipping."""

    name, family, classes = "vit", "transformer", 10
    tags = CLASSIFIER | {
        "adam",
        "attention",
        "dropout",
        "scheduler",
        "step_scheduler",
        "warmup",
        "blocks",
        "clip",
        "conv",
    }
    epochs, batch, lr = 8, 64, 4e-3
    max_norm = 1.0

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.digits()

    def make_model(self) -> nn.Module:
        return VisionTransformer()

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.trained(), lr=self.lr, weight_decay=0.05)

    def make_scheduler(self) -> Any:
        return warm_cosine(self.optimizer, self.total_steps // 10, self.total_steps)

    def schedule_step(self) -> None:
        self.scheduler.step()  # type: ignore[union-attr]

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)


class MixerProgram(Program):
    """An MLP-Mixer on half-size MNIST, RMSprop, accumulating two micro-batches a step."""

    name, family, classes = "mixer", "mixer", 10
    tags = CLASSIFIER | {"adaptive", "accumulation", "blocks", "conv"}
    epochs, batch, lr = 3, 32, 1.5e-3
    accumulate = 2

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.mnist()

    def make_model(self) -> nn.Module:
        patch = nn.Conv2d(1, 32, 2, 2)
        blocks = [layers.Mixer(49, 32) for _ in range(2)]
        return nn.Sequential(
            patch, nn.Flatten(2), Transposed(), *blocks, nn.LayerNorm(32), Mean(), nn.Linear(32, 10)
        )

    def make_optimizer(self) -> Any:
        return torch.optim.RMSprop(self.trained(), lr=self.lr)


class Segmentation(Program):
    """A class for each pixel of noisy images with a disc and a square, Adam, loss over (n, classes, h, w)."""

    name, family, classes = "segmentation", "convolution", 3
    tags = frozenset(
        {"classifier", "inputs", "images", "epochs", "relu", "adam", "batch_norm", "sequential", "dense", "rows"}
    )
    epochs, batch, lr = 6, 32, 5e-3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.blobs()

    def make_model(self) -> nn.Module:
        def conv(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

        down, up = [*conv(1, 12), nn.MaxPool2d(2), *conv(12, 24)], [*conv(24, 24), nn.Upsample(scale_factor=2)]
        return nn.Sequential(*down, *up, *conv(24, 12), nn.Conv2d(12, 3, 1))

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return (outputs.argmax(1) == batch[1]).float().mean((1, 2))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def shifted(images: Tensor) -> Tensor:
    """The images moved by up to one pixel, each its own way."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    n, _, height, width = images.shape
    rows = torch.randint(3, (n, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.randint(3, (n, 1, 1)) + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def warm_cosine(optimizer: Any, warm: int, total: int) -> Any:
    """Linear warm-up over `warm` steps, then a cosine down to zero at `total`."""
    up = lr_scheduler.LinearLR(optimizer, 0.01, 1.0, max(1, warm))
    down = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total - warm))
    return lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warm])


PROGRAMS = [MLP, ConvBN, ConvGN, ResNet, ViT, MixerProgram, Segmentation]
