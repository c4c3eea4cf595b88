"""Programs on tables and graphs: regression, embeddings of categories, a wide perceptron, a graph network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from calibration import data, layers
from calibration.program import Batch, Program


class RegressionDiabetes(Program):
    """Ten features to one standardised value (n, 1), Adam, mean squared error, weight decay and dropout."""

    name, family = "regression_diabetes", "perceptron"
    tags = frozenset(
        {
            "regression",
            "inputs",
            "epochs",
            "adam",
            "relu",
            "column_targets",
            "sequential",
            "dropout",
            "rows",
            "plain_body",
        }
    )
    epochs, batch, lr = 40, 32, 1e-3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.diabetes()

    def make_model(self) -> nn.Module:
        return layers.mlp(10, 32, 32, 1, dropout=0.2)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr, weight_decay=1e-3)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch[1])

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return -(outputs - batch[1]).square()

    def held_out_data(self) -> Any:
        return list(self.held_out_loader)


class RegressionFriedman(RegressionDiabetes):
    """Friedman's function by tanh layers, SGD with momentum, Huber loss, flat targets (n,)."""

    name, family = "regression_friedman", "perceptron"
    tags = frozenset(
        {"regression", "inputs", "epochs", "sgd", "tanh", "flat_targets", "sequential", "rows", "plain_body"}
    )
    epochs, batch, lr = 15, 50, 0.05
    optimizer_inside = True

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.friedman()

    def make_model(self) -> nn.Module:
        return layers.mlp(10, 64, 64, 1, activation=nn.Tanh)

    def make_optimizer(self) -> Any:
        return torch.optim.SGD(self.trained(), lr=self.lr, momentum=0.9)

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0]).squeeze(-1)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.smooth_l1_loss(outputs, batch[1])


class Customers(nn.Module):
    """Embeddings of three categories beside four numbers, and a perceptron to one logit."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(k, 6) for k in (20, 12, 7)])
        self.norm = nn.BatchNorm1d(4)
        self.body = layers.mlp(22, 48, 32, 1, dropout=dropout)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        parts = [e(categories[:, i]) for i, e in enumerate(self.embeddings)]
        return self.body(torch.cat([*parts, self.norm(numbers)], 1)).squeeze(1)


class TabularEmbeddings(Program):
    """Whether a customer buys, from categories and numbers; Adam and binary cross-entropy on logits."""

    name, family = "tabular_embeddings", "table"
    tags = frozenset({"binary", "epochs", "adam", "relu", "dropout", "batch_norm", "float_labels"})
    epochs, batch, lr = 8, 64, 5e-3

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.purchases()

    def make_model(self) -> nn.Module:
        return Customers()

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0], batch[1])

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch[2])

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return ((outputs > 0) == (batch[2] > 0.5)).float()


class WideMLP(Program):
    """Thirty features of a table, two classes, a wide perceptron, Adam and little data."""

    name, family, classes = "mlp_wide", "perceptron", 2
    tags = frozenset(
        {"classifier", "inputs", "epochs", "adam", "relu", "sequential", "dropout", "rows", "plain_body"}
    )
    epochs, batch, lr = 20, 32, 5e-4

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.wide_table()

    def make_model(self) -> nn.Module:
        return layers.mlp(30, 128, 64, 2, dropout=0.3)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr, weight_decay=1e-4)


class GraphNetwork(nn.Module):
    """Two graph convolutions over one fixed, normalised adjacency."""

    def __init__(self, adjacency: Tensor, features: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.first, self.second = nn.Linear(features, 32), nn.Linear(32, classes)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.adjacency @ self.first(x))
        return self.adjacency @ self.second(self.dropout(x))


class Graph(Program):
    """Communities of a graph's nodes from a third of their labels; the whole graph at every step."""

    name, family = "graph", "graph"
    tags = frozenset({"full_batch", "adam", "relu", "dropout", "fixed_input"})
    epochs, lr = 200, 0.01

    def make_data(self) -> tuple[Any, Any]:
        self.adjacency, self.features, self.labels = data.communities()
        rows = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        return rows[:200], rows[200:]

    def make_loaders(self) -> None:
        self.loader: Any = [None]

    def make_model(self) -> nn.Module:
        return GraphNetwork(self.adjacency, 16, 4)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr, weight_decay=5e-4)

    def batches(self) -> Iterator[Batch]:
        yield [self.features, self.labels, self.train_set]

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs[batch[2]], batch[1][batch[2]])

    def end_epoch(self) -> None:
        if self.epoch % 20 == 19:
            self.evaluate()

    def evaluate(self) -> None:
        self.evaluation_mode()
        with torch.no_grad():
            outputs = self.evaluation_forward([self.features])
        rows = self.held_out_set
        self.metrics.append(float((outputs[rows].argmax(1) == self.labels[rows]).float().mean()))


PROGRAMS = [RegressionDiabetes, RegressionFriedman, TabularEmbeddings, WideMLP, Graph]
