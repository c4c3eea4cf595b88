"""Programs without labels: autoencoders, a denoiser, an adversarial pair, two self-supervised learners."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from calibration import data, layers
from calibration.program import Batch, Program
from calibration.programs_images import shifted


class Autoencoder(Program):
    """Digits through a bottleneck of eight values, mean squared error, Adam."""

    name, family = "autoencoder", "autoencoder"
    tags = frozenset({"reconstruction", "inputs", "epochs", "adam", "relu", "sequential", "images"})
    epochs, batch, lr = 10, 64, 3e-3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.raw_digits()

    def make_model(self) -> nn.Module:
        down, up = layers.mlp(64, 64, 8), layers.mlp(8, 64, 64)
        return nn.Sequential(nn.Flatten(), *down, *up)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch[0].flatten(1))

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return -(outputs - batch[0].flatten(1)).square().mean(1)


class Variational(nn.Module):
    """Encoder to a mean and a log-variance, a sample, decoder to pixel logits."""

    def __init__(self, hidden: int = 64, latent: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = layers.mlp(latent, hidden, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.decoder(code), mean, log_variance


class VAE(Program):
    """A variational autoencoder of digits: reconstruction and Kullback-Leibler terms, Adam."""

    name, family = "vae", "autoencoder"
    tags = frozenset({"reconstruction", "inputs", "epochs", "adam", "relu", "terms", "images"})
    epochs, batch, lr = 10, 64, 3e-3

    make_data = Autoencoder.make_data
    make_optimizer = Autoencoder.make_optimizer

    def make_model(self) -> nn.Module:
        return Variational()

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        pixels, mean, log_variance = outputs
        rebuilt = F.binary_cross_entropy_with_logits(pixels, batch[0].flatten(1), reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (rebuilt + divergence).mean()

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return -(outputs[0].sigmoid() - batch[0].flatten(1)).square().mean(1)


class NoisePredictor(nn.Module):
    """A perceptron that gets a noised image and the time, and predicts the noise."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.time = nn.Linear(32, width)
        self.inside = nn.Linear(64, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(self.inside(x) + self.time(layers.times(t, 32)))


class Denoiser(Program):
    """A small diffusion model of digits: predicts the noise at random times, Adam."""

    name, family = "denoiser", "diffusion"
    tags = frozenset({"reconstruction", "epochs", "adam", "noise_targets"})
    epochs, batch, lr = 14, 64, 1e-3
    levels = 100

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.digits()

    def make_model(self) -> nn.Module:
        return NoisePredictor()

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def transform(self, batch: Batch, training: bool) -> Batch:
        clean = batch[0].flatten(1)
        t = torch.randint(self.levels, (len(clean),)).float()
        kept = torch.cos(0.5 * torch.pi * (t + 1) / (self.levels + 1)).square()[:, None]
        noise = torch.randn_like(clean)
        return [kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, noise]

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0], batch[1])

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch[2])

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return -(outputs - batch[2]).square().mean(1)


class Pair(nn.Module):
    """A generator of digits and the discriminator that it plays against."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(
            nn.Linear(64, 64),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(64, 32),
            nn.LeakyReLU(0.2),
            nn.Linear(32, 1),
        )


class GAN(Program):
    """A generative adversarial network on digits: two optimizers in turn; the user watches the generator."""

    name, family = "gan", "adversarial"
    tags = frozenset({"adversarial", "epochs", "adam", "two_optimizers"})
    epochs, batch, lr = 12, 64, 5e-4

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.raw_digits(200)

    def make_model(self) -> nn.Module:
        return Pair()

    @property
    def watched(self) -> nn.Module:
        return self.model.generator

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.model.generator.parameters(), lr=self.lr, betas=(0.5, 0.999))

    def make_critic_optimizer(self) -> Any:
        return torch.optim.Adam(self.model.discriminator.parameters(), lr=self.lr, betas=(0.5, 0.999))

    def prepare(self) -> None:
        super().prepare()
        self.critic_optimizer = self.make_critic_optimizer()

    def train_batch(self, batch: Batch) -> Tensor:
        real = batch[0].flatten(1)
        judge = self.model.discriminator
        made = self.model.generator(torch.randn(len(real), 16))
        self.critic_optimizer.zero_grad()
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        critic = F.binary_cross_entropy_with_logits(judge(torch.cat([real, made.detach()])), truth)
        critic.backward()
        self.critic_optimizer.step()
        self.zero_grad()
        loss = F.binary_cross_entropy_with_logits(judge(made), torch.ones(len(real), 1))
        self.backward(loss)
        self.update()
        return loss

    def evaluate(self) -> None:
        self.evaluation_mode()
        with torch.no_grad():
            made = self.model.generator(torch.randn(200, 16))
            real = self.held_out_set[:][0].flatten(1)
            self.metrics.append(-float((made.mean(0) - real.mean(0)).square().sum()))


class Siamese(nn.Module):
    """An encoder and a projector, trained on two views of each image."""

    def __init__(self, width: int = 16, embedding: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 64),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, embedding))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.encoder(x))


class Barlow(Program):
    """Barlow Twins on digits: the cross-correlation of two views' embeddings should be the identity. Adam."""

    name, family = "barlow", "self_supervised"
    tags = frozenset({"self_supervised", "conv", "epochs", "adam", "batch_norm", "augmented", "images", "relu"})
    epochs, batch, lr = 6, 96, 2e-3
    redundancy = 0.02

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.digits()

    def make_model(self) -> nn.Module:
        return Siamese()

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def view(self, images: Tensor) -> Tensor:
        return shifted(images) + 0.2 * torch.randn_like(images)

    def transform(self, batch: Batch, training: bool) -> Batch:
        return [self.view(batch[0]), self.view(batch[0])]

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0]), self.model(batch[1])

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        a, b = ((z - z.mean(0)) / (z.std(0) + 1e-6) for z in outputs)
        c = a.T @ b / len(a)
        on = (c.diagonal() - 1).square().sum()
        return on + self.redundancy * (c.square().sum() - c.diagonal().square().sum())

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cosine_similarity(*outputs)


class SimCLR(Barlow):
    """Contrastive learning on half-size MNIST by the normalised temperature-scaled loss, SGD with momentum."""

    name, family = "simclr", "self_supervised"
    tags = frozenset(
        {"self_supervised", "conv", "epochs", "sgd", "batch_norm", "augmented", "images", "relu", "negatives"}
    )
    epochs, batch, lr = 4, 128, 0.1
    temperature = 0.3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.mnist(held_out=1500)

    def make_model(self) -> nn.Module:
        model = Siamese(width=12)
        model.encoder[-1] = nn.Linear(12 * 49, 64)
        return model

    def make_optimizer(self) -> Any:
        return torch.optim.SGD(self.trained(), lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        z = F.normalize(torch.cat(outputs), dim=1)
        likeness = (z @ z.T / self.temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        partner = torch.arange(len(z)).roll(len(z) // 2)
        return F.cross_entropy(likeness, partner)


PROGRAMS = [Autoencoder, VAE, Denoiser, GAN, Barlow, SimCLR]
