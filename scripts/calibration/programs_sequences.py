"""Programs on text, sequences and series: language models, a translator, recurrent networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from calibration import data, layers
from calibration.program import Batch, Program
from calibration.programs_images import warm_cosine


class GPTModel(nn.Module):
    """A decoder-only transformer whose output weights are those of the embedding."""

    def __init__(self, letters: int, context: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([layers.Block(width, heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        for p in (self.embedding.weight, self.position.weight):
            nn.init.normal_(p, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position(torch.arange(codes.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GPT(Program):
    """A character-level language model on Python's documentation, AdamW, warm-up and cosine, clipped, no epochs."""

    name, family = "gpt", "transformer"
    tags = frozenset(
        {
            "language",
            "adam",
            "attention",
            "scheduler",
            "step_scheduler",
            "warmup",
            "blocks",
            "clip",
            "tied",
            "classifier_tokens",
        }
    )
    epochs, batch, lr = 1, 24, 3e-3
    steps, context = 300, 32
    max_norm = 1.0
    eval_every = 75

    def make_data(self) -> tuple[Any, Any]:
        codes, self.letters = data.text("pydoc_data.topics")
        return codes[:100_000], codes[100_000:120_000]

    def make_loaders(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed + 1)

    def make_model(self) -> nn.Module:
        return GPTModel(self.letters, self.context)

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.trained(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def make_scheduler(self) -> Any:
        return warm_cosine(self.optimizer, self.total_steps // 10, self.total_steps)

    def schedule_step(self) -> None:
        self.scheduler.step()  # type: ignore[union-attr]

    def window(self, codes: Tensor, start: Tensor) -> Batch:
        rows = codes[start[:, None] + torch.arange(self.context + 1)]
        return [rows[:, :-1], rows[:, 1:]]

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            start = torch.randint(len(self.train_set) - self.context - 1, (self.batch,), generator=self.draw)
            yield self.transform(self.window(self.train_set, start), training=True)

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())

    def evaluate(self) -> None:
        self.evaluation_mode()
        with torch.no_grad():
            start = torch.arange(0, 3900, 125)
            batch = self.transform(self.window(self.held_out_set, start), training=False)
            self.metrics.append(-float(self.criterion(self.evaluation_forward(batch), batch)))

    def held_out_data(self) -> Any:
        return None

    @property
    def steps_per_epoch(self) -> int:
        return self.steps


class Bert(GPT):
    """Masked codes of a quantised series, predicted by torch's own encoder layers.

    Windows end early and are padded with code 0; the loss ignores padding and what was not masked.
    """

    name, family = "bert", "transformer"
    tags = frozenset(
        {
            "language",
            "masked",
            "adam",
            "attention",
            "dropout",
            "scheduler",
            "step_scheduler",
            "warmup",
            "clip",
            "padded",
        }
    )
    batch, lr, steps = 32, 4e-3, 300
    context, eval_every = 20, 100

    def make_data(self) -> tuple[Any, Any]:
        codes, self.letters = data.levels()
        return codes[:16_000], codes[16_000:]

    def make_model(self) -> nn.Module:
        self.mask = self.letters + 1
        return Encoder(self.letters + 2, self.context)

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.trained(), lr=self.lr, weight_decay=0.01)

    def window(self, codes: Tensor, start: Tensor) -> Batch:
        rows = codes[start[:, None] + torch.arange(self.context)] + 1
        end = torch.randint(self.context // 3, self.context, (len(rows), 1), generator=self.draw)
        rows = rows.masked_fill(torch.arange(self.context) >= end, 0)
        masked = (torch.rand(rows.shape, generator=self.draw) < 0.2) & (rows > 0)
        return [rows.masked_fill(masked, self.mask), rows.masked_fill(~masked, -100)]


class Encoder(nn.Module):
    """Embeddings of codes and positions, two of torch's encoder layers that skip code 0, a linear head."""

    def __init__(self, codes: int, context: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(0.3 * torch.randn(context, width))
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(width, 4, 96, 0.1, "gelu", batch_first=True, norm_first=True)
                for _ in range(2)
            ]
        )
        self.head = nn.Linear(width, codes)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=codes == 0)
        return self.head(x)


class Translator(nn.Module):
    """torch's encoder-decoder transformer with learned positions; code 0 is padding."""

    def __init__(self, symbols: int, width: int = 48, longest: int = 12) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(symbols, width), nn.Embedding(symbols, width)
        self.position = nn.Parameter(0.1 * torch.randn(longest, width))
        self.transformer = nn.Transformer(width, 4, 1, 2, 96, 0.0, batch_first=True)
        self.out = nn.Linear(width, symbols)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.source(source) + self.position[: source.shape[1]]
        y = self.target(target) + self.position[: target.shape[1]]
        padding = source == 0
        return self.out(
            self.transformer(
                x, y, tgt_mask=causal.isinf(), src_key_padding_mask=padding, memory_key_padding_mask=padding
            )
        )


class SeqToSeq(Program):
    """Sequences of symbols reversed by an encoder-decoder with teacher forcing; padding is ignored by the loss."""

    name, family = "seq2seq", "transformer"
    tags = frozenset({"language", "adam", "attention", "padded", "epochs", "clip", "padded_index"})
    epochs, batch, lr = 6, 64, 3e-3
    max_norm = 1.0
    ignored = 0

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.reversals()

    def make_model(self) -> nn.Module:
        return Translator(15)

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr, betas=(0.9, 0.98))

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0], batch[1][:, :-1])

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), batch[1][:, 1:], ignore_index=self.ignored)

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        wanted = batch[1][:, 1:]
        return ((outputs.argmax(-1) == wanted) & (wanted > 0)).sum(1) / (wanted > 0).sum(1)


class RowReader(nn.Module):
    """An LSTM that reads a digit row by row and classifies by its last state."""

    def __init__(self, width: int = 48, outputs: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class LSTM(Program):
    """Digits read row by row by a two-layer LSTM, Adam, clipped at a norm that is often reached."""

    name, family, classes = "lstm", "recurrent", 10
    tags = frozenset({"classifier", "inputs", "epochs", "adam", "recurrent", "clip", "dropout", "rows"})
    epochs, batch, lr = 10, 64, 5e-3
    max_norm = 0.5

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        train, held_out = data.digits()
        return tuple(TensorDataset(d.tensors[0].squeeze(1), d.tensors[1]) for d in (train, held_out))  # type: ignore[return-value]

    def make_model(self) -> nn.Module:
        return RowReader()

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)


class Forecaster(nn.Module):
    """A GRU over a window and a linear layer to the next value."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


class GRUForecast(Program):
    """The next value of a noisy series from the 32 before it, GRU, Adam, mean squared error, plateau schedule."""

    name, family = "gru_forecast", "recurrent"
    tags = frozenset({"regression", "inputs", "epochs", "adam", "recurrent", "column_targets", "scheduler", "rows"})
    epochs, batch, lr = 6, 32, 3e-3
    optimizer_inside = True

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return data.windows()

    def make_model(self) -> nn.Module:
        return Forecaster()

    def make_optimizer(self) -> Any:
        return torch.optim.Adam(self.trained(), lr=self.lr)

    def make_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=1)

    def schedule_epoch(self) -> None:
        if self.metrics:
            self.scheduler.step(-self.metrics[-1])  # type: ignore[union-attr,arg-type]

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch[1])

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return -(outputs - batch[1]).square()

    def held_out_data(self) -> Any:
        return [self.transform(b, training=False) for b in self.held_out_loader]


PROGRAMS = [GPT, Bert, SeqToSeq, LSTM, GRUForecast]
