"""Programs that start from something: fine-tuning of a frozen body, low-rank updates; and those that make their own
data by acting: two reinforcement learners. Last, two trainings on two ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from calibration import data, layers
from calibration.program import Batch, Program
from calibration.programs_images import CLASSIFIER, MLP, ConvGN


def _only(pair: data.Pair, wanted: Any) -> data.Pair:
    def kept(d: TensorDataset) -> TensorDataset:
        rows = wanted(d.tensors[1])
        return TensorDataset(*(t[rows] for t in d.tensors))

    return kept(pair[0]), kept(pair[1])


@functools.cache
def _pretrained(kind: str) -> dict[str, Tensor]:
    """A network trained for a second on the digits below five; the same in every process."""
    torch.manual_seed(0)
    model = _network(kind)
    train, _ = _only(data.digits(), lambda y: y < 5)
    x, y = train.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.state_dict()


def _network(kind: str) -> nn.Sequential:
    if kind == "convolution":
        body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        return nn.Sequential(body, nn.Linear(512, 5))
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU())
    return nn.Sequential(body, nn.Linear(96, 5))


class FrozenBody(Program):
    """A pretrained convolutional body, frozen and in eval mode, with a new head for other digits; SGD."""

    name, family, classes = "frozen_body", "fine_tuning", 5
    tags = frozenset({"classifier", "inputs", "epochs", "sgd", "frozen", "images", "rows", "conv"})
    epochs, batch, lr = 12, 32, 0.05

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        train, held_out = _only(data.digits(), lambda y: y >= 5)
        return tuple(TensorDataset(d.tensors[0], d.tensors[1] - 5) for d in (train, held_out))  # type: ignore[return-value]

    def make_model(self) -> nn.Module:
        state = _pretrained("convolution")
        model = _network("convolution")
        model.load_state_dict(state)
        torch.manual_seed(self.seed)
        model[0].requires_grad_(False)
        model[1] = nn.Linear(512, 5)
        return model

    def training_mode(self) -> None:
        self.model.train()
        self.model[0].eval()


class LoRAProgram(FrozenBody):
    """Low-rank updates of a pretrained perceptron and a new head for other digits; AdamW on the trained part."""

    name, family, classes = "lora", "fine_tuning", 5
    tags = frozenset({"classifier", "inputs", "epochs", "adam", "frozen", "rows"})
    epochs, batch, lr = 14, 32, 3e-3
    training_mode = Program.training_mode

    def make_model(self) -> nn.Module:
        state = _pretrained("perceptron")
        model = _network("perceptron")
        model.load_state_dict(state)
        torch.manual_seed(self.seed)
        model.requires_grad_(False)
        for i in (1, 3):
            model[0][i] = layers.LoRA(model[0][i])
        model[1] = nn.Linear(96, 5)
        return model

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.trained(), lr=self.lr)


class Bandit(Program):
    """A policy over ten arms given a context, REINFORCE with a running baseline; rewards are noisy. Adam."""

    name, family = "bandit", "reinforcement"
    tags = frozenset({"reinforcement", "adam", "relu"})
    epochs, batch, lr = 1, 64, 3e-3
    steps, eval_every = 300, 50

    def make_data(self) -> tuple[Any, Any]:
        arms = torch.randn(10, 8, generator=torch.Generator().manual_seed(17))
        return arms, None

    def make_loaders(self) -> None:
        self.baseline = 0.0
        self.loader: Any = [None]

    def make_model(self) -> nn.Module:
        return layers.mlp(8, 64, 10)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield self.transform([torch.randn(self.batch, 8)], training=True)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        policy = torch.distributions.Categorical(logits=outputs)
        arm = policy.sample()
        reward = (batch[0] * self.train_set[arm]).sum(1) + 0.5 * torch.randn(len(arm))
        advantage = reward - self.baseline
        self.baseline = 0.9 * self.baseline + 0.1 * float(reward.mean())
        return -(policy.log_prob(arm) * advantage).mean() - 0.01 * policy.entropy().mean()

    def evaluate(self) -> None:
        with torch.no_grad():
            x = torch.randn(500, 8)
            best = self.evaluation_forward([x]).argmax(1)
            self.metrics.append(float((x * self.train_set[best]).sum(1).mean()))

    @property
    def steps_per_epoch(self) -> int:
        return self.steps


class Gridworld(Program):
    """Episodes in a five by five grid with a goal and a pit, REINFORCE with a learned value as baseline; SGD."""

    name, family = "gridworld", "reinforcement"
    tags = frozenset({"reinforcement", "sgd", "tanh"})
    epochs, batch, lr = 1, 32, 0.05
    steps, horizon, eval_every = 150, 12, 30

    def make_data(self) -> tuple[Any, Any]:
        return None, None

    def make_loaders(self) -> None:
        self.loader: Any = [None]

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(25, 32), nn.Tanh(), nn.Linear(32, 5))

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield self.episodes(self.batch)

    def episodes(self, n: int) -> Batch:
        """Play `n` episodes with the present policy: states (n T, 25), actions (n T,), returns (n T,)."""
        place = torch.randint(20, (n,))
        states, actions, rewards = [], [], []
        for _ in range(self.horizon):
            state = F.one_hot(place, 25).float()
            with torch.no_grad():
                action = torch.distributions.Categorical(logits=self.model(state)[:, :4]).sample()
            states.append(state)
            actions.append(action)
            place = moved(place, action)
            rewards.append(torch.where(place == 24, 1.0, torch.where(place == 12, -1.0, -0.05)))
        gains = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        return [torch.cat(states), torch.cat(actions), gains.flatten()]

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        policy, value = torch.distributions.Categorical(logits=outputs[:, :4]), outputs[:, 4]
        advantage = batch[2] - value.detach()
        return -(policy.log_prob(batch[1]) * advantage).mean() + 0.1 * F.mse_loss(value, batch[2])

    def evaluate(self) -> None:
        self.metrics.append(float(self.episodes(100)[2].view(self.horizon, 100)[0].mean()))

    @property
    def steps_per_epoch(self) -> int:
        return self.steps


def moved(place: Tensor, action: Tensor) -> Tensor:
    """One step in the grid; walls and the goal (24) keep one where one is."""
    row, column = place // 5, place % 5
    row = (row + torch.tensor([-1, 1, 0, 0])[action]).clamp(0, 4)
    column = (column + torch.tensor([0, 0, -1, 1])[action]).clamp(0, 4)
    return torch.where(place == 24, place, row * 5 + column)


class DistributedMLP(MLP):
    """The perceptron on digits on two ranks, by DistributedDataParallel."""

    name, family = "ddp_mlp", "distributed"
    tags = CLASSIFIER | {"distributed", "sgd"}
    epochs, batch = 6, 32
    world = 2

    def make_model(self) -> nn.Module:
        return self.parallel(super().make_model())

    def parallel(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def make_loader(self, data: Dataset[Any], training: bool) -> Any:
        if not training:
            return super().make_loader(data, training)
        self.sampler = self.make_sampler(data)
        return DataLoader(data, batch_size=self.batch, sampler=self.sampler, drop_last=True)

    def make_sampler(self, data: Dataset[Any]) -> Any:
        return DistributedSampler(data, shuffle=True, seed=self.seed)

    def begin_epoch(self) -> None:
        self.set_epoch()
        self.training_mode()

    def set_epoch(self) -> None:
        self.sampler.set_epoch(self.epoch)


class DistributedConv(DistributedMLP):
    """The convolutional network on half-size MNIST on two ranks, by DistributedDataParallel."""

    name, family = "ddp_conv", "distributed"
    tags = CLASSIFIER | {"distributed", "adam", "buffers", "conv"}
    epochs, batch, lr = 2, 25, 4e-3
    make_data = ConvGN.make_data
    make_optimizer = ConvGN.make_optimizer

    def make_model(self) -> nn.Module:
        net = ConvGN.make_model(self)  # type: ignore[arg-type]
        net[1] = nn.BatchNorm2d(12)  # type: ignore[index]
        return self.parallel(net)

    def make_scheduler(self) -> Any:
        return None

    def schedule_epoch(self) -> None:
        pass


def warm() -> None:
    """What a process that is copied for each run should have at hand."""
    for kind in ("convolution", "perceptron"):
        _pretrained(kind)


PROGRAMS = [FrozenBody, LoRAProgram, Bandit, Gridworld, DistributedMLP, DistributedConv]
