"""Other people's trainers on several ranks; a script for every rank: `trainers.py NAME RANK WORLD FOLDER`.

What a rank found goes to FOLDER/NAME-RANK.json: hashes of the weights, unwatched and watched.
"""

import contextlib
import hashlib
import json
import os
import sys

import torch
from torch import nn
from torch.nn import functional as F

import diag

WATCHED = {
    "hessian_spectrum": {"num_eigenvalues": 2, "steps": 6, "trace_probes": 2, "half_split": False},
    "softmax_collapse": {},
    "replicas_equal": {},
    "ranks_data": {},
}
ROWS, EPOCHS = 64, 5  # 20 steps a rank: the probe set is complete after 16


def rows():
    x = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def watching(model, run):
    more = {"instruments": WATCHED, "every": 2, "budget": float("inf")}
    return contextlib.nullcontext() if run is None else diag.watch(model, run=run, **more)


def accelerate(run):
    """Accelerate's own loop: it wraps the model, shares the rows out and steps the optimizer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), 8)
    net = network()
    net, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), data)
    with watching(net, run):
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(net(x), y))
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
    return accelerator.unwrap_model(net)


class WithLoss(nn.Module):
    """A model that gives its own loss, as the Trainer expects."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def transformers(run):
    """The Trainer of Hugging Face, under its own data-parallel wrapper."""
    from transformers import Trainer, TrainingArguments

    x, y = rows()
    settings = {"output_dir": os.environ["FOLDER"], "per_device_train_batch_size": 8, "num_train_epochs": EPOCHS,
                "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
                "ddp_backend": "gloo"}  # fmt: skip
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = WithLoss()
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=data)
    with watching(model, run):
        trainer.train()
    return model


def lightning(run):
    """Lightning's strategy "ddp" among processes that are there already."""
    return _lightning(run, "ddp")


def lightning_fsdp(run):
    """Its strategy for fully_shard."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    return _lightning(run, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


def _lightning(run, strategy):
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def configure_model(self):
            if strategy != "ddp" and not hasattr(self.net[0], "unshard"):
                from torch.distributed.fsdp import fully_shard

                for part in (self.net[0], self.net[2], self.net):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    lightning.seed_everything(0, verbose=False)
    model, watched = Net(), []

    class Watching(lightning.Callback):
        def on_train_start(self, trainer, module):
            watched.append(watching(module, run))
            watched[0].__enter__()

        def on_train_end(self, trainer, module):
            watched[0].__exit__(None, None, None)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), 8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False}  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=2, strategy=strategy, callbacks=[Watching()], **quiet
    )
    trainer.fit(model, data)
    return model


def state_of(model):
    parts = [
        getattr(v, "to_local", lambda v=v: v)().detach().double().flatten() for v in model.state_dict().values()
    ]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()


def main(name, rank, folder):
    torch.set_num_threads(1)
    os.environ["FOLDER"] = folder
    states = [state_of(globals()[name](run)) for run in (None, f"{folder}/{name}")]
    with open(f"{folder}/{name}-{rank}.json", "w") as file:
        json.dump(states, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[4])
    # Threads of gloo that outlive the interpreter can end a process with SIGABRT after its work.
    sys.stderr.flush()
    os._exit(0)
