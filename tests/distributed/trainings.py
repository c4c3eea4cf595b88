"""Trainings on several ranks, each watched; a script for every rank: `trainings.py RANK WORLD FOLDER NAME...`.

What a rank found goes to FOLDER/RANK.json: for each training hashes of the weights, unwatched and watched.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import DiagError
from diag.registry import find
from diag.run.over_ranks import AllRanks
from diag.watching.ranks.shared_rows import SharedRows

CHECKS = ["replicas_equal", "ranks_data", "wrapper_called"]
STEPS, ROWS, LIMIT = 12, 64, 0.5
RANK, WORLD = 0, 1


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 12, generator=generator)
    return x, x[:, :3].argmax(1)


def own_rows():
    x, y = rows()
    part = slice(RANK * ROWS // WORLD, (RANK + 1) * ROWS // WORLD)
    return x[part], y[part]


def mlp(*more):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), *more, nn.Linear(16, 3))


def ddp(net):
    return nn.parallel.DistributedDataParallel(net)


def train(
    model, data, *, watch=None, lr=0.1, limit=LIMIT, steps=STEPS, optimizer=None, before_step=None, close_at=0
):
    """Plain SGD with clipping; watch: where the record goes, None for none; before_step(k) may break something."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    watcher = None if watch is None else diag.watch(model, run=watch, instruments=CHECKS)
    with watcher or contextlib.nullcontext():
        for k in range(1, steps + 1):
            x, y = data[k % len(data)] if isinstance(data, list) else data
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if limit is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            if before_step is not None:
                before_step(k)
            optimizer.step()
            if watcher is not None and k == close_at:
                watcher.close()
    return model


# Ways to spread a network


def as_ddp(watch):
    return train(ddp(mlp()), own_rows(), watch=watch)


def as_fsdp(watch):
    """The last layer has three rows on two ranks, so that shards are uneven."""
    from torch.distributed.fsdp import fully_shard

    net = mlp()
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    return train(net, own_rows(), watch=watch)


def as_tensor_parallel(watch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = parallelize_module(
        mlp(), init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    return train(net, rows(), watch=watch)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(self.embed(x))))).flatten(0, 1)


def as_sequence_parallel(watch):
    """The gradients of the normalisation's weights are sums that no rank has before the step makes them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    x, y = rows()
    net = parallelize_module(Normed(), init_device_mesh("cpu", (WORLD,)), plan)
    return train(net, (x.view(-1, 8, 12), y), watch=watch, limit=None)


def columns_apart(watch):
    """Ranks that hold parts of one network read rows of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return train(parallelize_module(mlp(), init_device_mesh("cpu", (WORLD,)), plan), own_rows(), watch=watch)


def as_distributed_tensors(placement, watch):
    """All of the network on each rank, and rows: a rank's own, that lie as `placement` says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_module

    mesh = init_device_mesh("cpu", (WORLD,))
    x, y = (DTensor.from_local(t, mesh, [placement]) for t in own_rows())
    return train(distribute_module(mlp(), mesh), (x, y), watch=watch, limit=None)


def copies_apart(watch):
    """Rows that pass for the same on all ranks are not."""
    from torch.distributed.tensor import Replicate

    return as_distributed_tensors(Replicate(), watch)


def rows_spread(watch):
    from torch.distributed.tensor import Shard

    return as_distributed_tensors(Shard(0), watch)


def rows_spread_watched_alone(watch):
    """Reading a row, or the loss, would wait for the rank that is not watched."""
    return rows_spread(watch if RANK == 0 else None)


def as_fsdp1(watch):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return train(
        FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")), own_rows(), watch=watch, limit=None
    )


def accumulated(watch):
    """Dropout, batch normalisation, two micro-batches a step, and Adam."""
    net = ddp(mlp(nn.BatchNorm1d(16), nn.Dropout(0.3)))
    torch.manual_seed(RANK)
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), 0.01), own_rows()
    with contextlib.nullcontext() if watch is None else diag.watch(net, run=watch, instruments=CHECKS):
        for _ in range(STEPS):
            with net.no_sync():
                (F.cross_entropy(net(x[:16]), y[:16]) / 2).backward()
            (F.cross_entropy(net(x[16:]), y[16:]) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net


# Measured while training goes on: on the probe sets of all ranks

MEASURED_STEPS = 6
MEASURED = {
    "hessian_spectrum": {"num_eigenvalues": 3, "steps": 12, "trace_probes": 4, "half_split": False},
    "softmax_collapse": {},
    "neural_collapse": {},
}


ONLY_SPECTRUM = {"hessian_spectrum": MEASURED["hessian_spectrum"]}


def measured(net, data, watch, **more):
    watched = {"instruments": MEASURED, "every": 4, "budget": float("inf"), **more}
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), 0.01), data
    with contextlib.nullcontext() if watch is None else diag.watch(net, run=watch, **watched):
        for _ in range(MEASURED_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def measured_ddp(watch):
    return measured(ddp(mlp()), own_rows(), watch)


def measured_norm(watch):
    """Running means that differ between the ranks."""
    return measured(ddp(mlp(nn.BatchNorm1d(16))), own_rows(), watch)


def measured_again(watch):
    """A run that goes on: rank 0 numbers its steps from the last one, the others from 1."""
    for resume in (False, True):
        net = measured(ddp(mlp()), own_rows(), watch, resume=resume, instruments=ONLY_SPECTRUM)
        dist.barrier()
    return net


def measured_fsdp(watch):
    return measured(fully(mlp()), own_rows(), watch)


def measured_columns(watch):
    return measured(in_columns(mlp()), rows(), watch)


@contextlib.contextmanager
def failing(error):
    """On the last rank the 30th derivative that a measurement takes fails: training calls another function."""
    plain, calls = torch.autograd.grad, iter(range(1, 1 << 30))

    def grad(*args, **kwargs):
        if RANK == WORLD - 1 and next(calls) == 30:
            raise error
        return plain(*args, **kwargs)

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = plain


def out_of_memory(watch):
    """In a measurement, on one rank."""
    with failing(MemoryError("no room")):
        return measured(fully(mlp()), own_rows(), watch)


# Numbers that are not finite


def not_finite_ddp(watch):
    """The last rank's inputs are infinite at step 5."""
    x, y = own_rows()
    bad = x.clone()
    bad[0] = float("inf") if RANK == WORLD - 1 else bad[0]
    batches = [(bad if k == 5 else x, y) for k in range(STEPS)]
    return train(ddp(mlp()), batches, watch=watch, limit=None)


def not_finite_shard(watch):
    """The last rank's shard of one gradient is not a number at step 5."""
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(mlp())

    def spoil(k):
        if k == 5 and RANK == WORLD - 1:
            next(net.parameters()).grad.to_local().view(-1)[0] = float("nan")

    return train(net, own_rows(), watch=watch, limit=None, before_step=spoil)


# What only several ranks can get wrong


def averaged(net):
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def start_apart(watch):
    net = mlp()
    for p in net.parameters():
        p.data.mul_(1 + 0.1 * RANK)
    return train(net, own_rows(), watch=watch, before_step=lambda k: averaged(net))


def drift(watch):
    """The last rank changes the second layer after step 4."""
    net = mlp()
    wrapped = ddp(net)

    def shift(k):
        if k == 4 and RANK == WORLD - 1:
            net[2].bias.data.add_(0.1)

    return train(wrapped, own_rows(), watch=watch, before_step=shift)


def past_the_wrapper(watch):
    wrapped = ddp(mlp())
    optimizer, (x, y) = torch.optim.SGD(wrapped.parameters(), 0.1), own_rows()
    with contextlib.nullcontext() if watch is None else diag.watch(wrapped, run=watch, instruments=CHECKS):
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(wrapped.module(x), y).backward()
            optimizer.step()
    return wrapped


def not_averaged(watch):
    return train(mlp(), own_rows(), watch=watch)


def same_rows(watch):
    return train(ddp(mlp()), rows(), watch=watch)


def uneven(watch):
    x, y = own_rows()
    return train(ddp(mlp()), (x[: 32 - 16 * RANK], y[: 32 - 16 * RANK]), watch=watch)


def other_rate(watch):
    return train(ddp(mlp()), own_rows(), watch=watch, lr=0.1 * (1 + RANK))


class Mixed(nn.Module):
    """A network with a constant random buffer."""

    def __init__(self, seed):
        super().__init__()
        self.net = mlp()
        self.register_buffer("mix", torch.randn(12, 12, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return self.net(x @ self.mix)


def other_buffer(watch):
    net = Mixed(RANK)
    return train(net, own_rows(), watch=watch, before_step=lambda k: averaged(net))


# Ranks that do not go on together


def watched_alone(watch):
    return train(ddp(mlp()), own_rows(), watch=watch if RANK == 0 else None)


def closes_early(watch):
    return train(ddp(mlp()), own_rows(), watch=watch, close_at=5 if RANK == WORLD - 1 else 0)


def breaks_inside(watch):
    """Our own code raises on the last rank at its fourth step."""
    old = SharedRows._vector

    def vector(self, row):
        if self._sent == 4 and RANK == WORLD - 1:
            raise MemoryError("no room for the step")
        return old(self, row)

    SharedRows._vector = vector
    try:
        return train(ddp(mlp()), own_rows(), watch=watch)
    finally:
        SharedRows._vector = old


def raises(watch):
    """The last rank's training raises at step 5, and the others, which wait for it, go on alone."""
    net = mlp()

    def stop(k):
        if k == 5 and RANK == WORLD - 1:
            raise ZeroDivisionError("the loop's own")

    with contextlib.suppress(ZeroDivisionError):
        train(net, own_rows(), watch=watch, before_step=stop)
    return net


# Curvature of data that are split over the ranks, in unequal shares


class Conv(nn.Module):
    """A convolution with batch normalisation, in float64 as everything here."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Linear(30, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.norm(self.conv(x[:, None]))).flatten(1))


def networks():
    torch.manual_seed(5)
    found = {"mlp": mlp().double(), "conv": Conv().double()}
    found["conv"].norm.running_mean.normal_(0, 0.1)
    found["gpt"] = SmallGPT().double()
    return found


class Heads(nn.Module):
    """Causal attention over the heads that this rank holds; `heads`: None where that is told by the shapes."""

    def __init__(self, width, size, heads=None):
        super().__init__()
        self.size, self.heads = size, heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        heads = self.heads or -1
        q, k, v = (p(x).unflatten(-1, (heads, self.size if heads < 0 else -1)).transpose(1, 2)
                   for p in (self.query, self.key, self.value))  # fmt: skip
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads=None):
        super().__init__()
        self.attend, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Heads(width, 4, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.attend(x))
        return x + self.down(F.gelu(self.up(self.mlp(x))))


class SmallGPT(nn.Module):
    """A language model whose first and last weight are one."""

    def __init__(self, words=11, length=6, width=16, heads=None):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.block, self.norm = Block(width, heads), nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.3)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.block(x)))


def texts():
    tokens = torch.randint(0, 11, (24, 7), generator=torch.Generator().manual_seed(4))
    return tokens[:, :-1], tokens[:, 1:]


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class Balanced(nn.Module):
    """A loss of its own with a term of the whole batch, whose value nobody sees: only its gradient."""

    def __init__(self):
        super().__init__()
        self.net = networks()["mlp"]

    def forward(self, x, labels):
        logits = self.net(x)
        balance = logits.softmax(-1).mean(0).square().sum()
        return {"loss": F.cross_entropy(logits, labels) + balance - balance.detach(), "logits": logits}


def balanced(given, data):
    return diag.Snapshot(Balanced(), None, [{"x": data[0].double(), "labels": data[1]}], ranks=True, **given)


# Networks whose parameters are sharded


def fully(net):
    """FSDP2, layer by layer where the network has blocks."""
    from torch.distributed.fsdp import fully_shard

    for part in reversed(list(net.modules())):
        if part is not net and isinstance(part, (nn.Linear, Block)) and part is not getattr(net, "head", None):
            fully_shard(part)
    return fully_shard(net)


def in_columns(net):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    attention = {f"block.attention.{n}": ColwiseParallel() for n in ("query", "key", "value")}
    plans = {
        "mlp": {"0": ColwiseParallel(), "2": RowwiseParallel()},
        "gpt": attention | {"block.attention.out": RowwiseParallel(), "block.up": ColwiseParallel(),
                            "block.down": RowwiseParallel()},
    }  # fmt: skip
    plan = plans["gpt" if isinstance(net, SmallGPT) else "mlp"]
    return parallelize_module(net, init_device_mesh("cpu", (WORLD,)), plan)


SHARDED = {
    "mlp fsdp": fully,
    "conv fsdp": fully,
    "gpt fsdp": fully,
    "mlp columns": in_columns,
    "gpt columns": in_columns,
}


def sharded_curvature(name):
    """Of a sharded network; under tensor parallelism every rank has all the rows."""
    kind, _, way = name.partition(" ")
    net = SHARDED[name](networks()[kind])
    data = texts() if kind == "gpt" else rows()
    data = data if kind == "gpt" else (data[0].double(), data[1])
    if way == "fsdp":
        cut = [0, *(len(data[0]) * (r + 1) // WORLD - (r < WORLD - 1) for r in range(WORLD))]
        data = tuple(t[cut[RANK] : cut[RANK + 1]] for t in data)
    torch.manual_seed(0)
    before = state_of(net)
    found = curvature_of(net, token_loss if kind == "gpt" else F.cross_entropy, data, ranks=True)
    torch.manual_seed(0)
    return found | {"untouched": state_of(net) == before}


def share():
    """This rank's rows, of which rank 0 has more."""
    x, y = rows()
    cut = [0, *(40 + (ROWS - 40) * r // max(WORLD - 1, 1) for r in range(WORLD))]
    return x[cut[RANK] : cut[RANK + 1]].double(), y[cut[RANK] : cut[RANK + 1]]


def curvature_of(model, loss_fn, data, **given):
    """What is compared: loss, gradient, eigenvalues and their residuals, trace, and how the product was tested."""
    snapshot = diag.Snapshot(model, loss_fn, data, **given)
    found = diag.hessian_spectrum(snapshot, num_eigenvalues=5, trace_probes=4)
    return {
        "loss": snapshot.quantity("loss_at")(snapshot.quantity("params")),
        "gradient": [float(g.norm()) for g in snapshot.quantity("gradient").values()],
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
        "trace": float(found.trace),
        "examples": snapshot.quantity("hessian").num_examples,
        "half": found.sampling_errors.tolist(),
    }


def second(model):
    """Another network of the same kind, near the first."""
    generator = torch.Generator().manual_seed(9)
    noise = {n: 0.3 * torch.randn(v.shape, generator=generator).double() for n, v in model.state_dict().items()}
    return {n: v + noise[n].abs() if v.is_floating_point() else v for n, v in model.state_dict().items()}


def examples_of(name, data, spread=lambda net: net, **given):
    """What is compared of instruments that ask for examples: features, logits, gradients, the line between two."""
    model = networks()["conv" if name == "conv" else "mlp"]
    more = {"other": second(model), "micro_batch": 8, "held_out": data}
    loss_fn = weighted_loss if name == "weighted" else F.cross_entropy
    size = sum(p.numel() for p in model.parameters())
    snapshot = diag.Snapshot(spread(model), loss_fn, data, **more, **given)
    found = {
        "neural_collapse": diag.neural_collapse(snapshot),
        "softmax_collapse": diag.softmax_collapse(snapshot),
        "boundary_tilting": diag.boundary_tilting(snapshot),
        "trivial_predictor": diag.trivial_predictor(snapshot),
        "gradient_coherence": diag.gradient_coherence(snapshot),
        "gradient_conflict": diag.gradient_conflict(snapshot),
        "mode_connectivity": diag.mode_connectivity(snapshot, points=3, refine=0, layers=True),
    }
    sharp = numbers_of(diag.sharpness(snapshot, m=ROWS, steps=3, num_draws=4, tolerance=1e-6))
    found["sharpness"] = {n: v for n, v in sharp.items() if "function_space" not in n}
    found["trust_radius"] = diag.trust_radius(snapshot)
    groups = diag.sharpness(snapshot, m=10, steps=2, num_draws=4)
    assert groups.m_worst_case >= groups.worst_case and groups.num_groups >= 7
    projected = snapshot.quantity("per_example_gradients").project(torch.ones(size).double())
    return {name: numbers_of(r) if not isinstance(r, dict) else r for name, r in found.items()} | {
        "projected": projected.flatten().tolist()
    }


def numbers_of(result):
    """Every number of a result, by its field's name."""
    found = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        value = list(value.values()) if isinstance(value, Mapping) else value
        try:
            found[field.name] = numpy.asarray(value, float).flatten().tolist()
        except (TypeError, ValueError):  # words
            continue
    return found


def basis_held():
    """The largest number of entries in a basis of 40 vectors and the pairs that it gave: here, and in one
    process."""
    from diag.linalg.spectrum import spectrum

    found = []
    for given in ({"ranks": True}, {}):
        hessian = diag.Snapshot(networks()["mlp"], F.cross_entropy, share(), **given).quantity("hessian")
        pairs = spectrum(hessian, steps=40, largest=5, trace_probes=2).top
        found.append((41 + 5) * pairs.vectors.shape[1] + 4)
    return found


def refusal(call):
    """The sentence with which it is refused."""
    try:
        call()
    except DiagError as error:
        return str(error)
    return "not refused"


def refused_without_memory(module, call):
    """The same where the last rank has no memory left."""
    with mock.patch(f"{module}.free_memory", lambda device: 0.0 if RANK == WORLD - 1 else 1e12):
        return refusal(call)


def weighted_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 4.0], dtype=outputs.dtype))


EXAMPLES = {"mlp": ddp, "conv": ddp, "weighted": ddp, "mlp fsdp": fully}


def of_a_checkpoint(model, data):
    """Of a checkpoint measured on shares: what one rank alone measures, and what is put together; on rank 0."""
    by = AllRanks(model, {"loss_fn": F.cross_entropy, "data": data})
    by.begin(None)
    refused, measured = (by.measure(find(name), {}) for name in ("dead_units", "softmax_collapse"))
    return [getattr(refused, "reason", ""), getattr(getattr(measured, "provenance", None), "num_examples", 0)]


def curvature():
    """On every rank the same numbers; and what is refused, on all of them."""
    found = {
        n: curvature_of(ddp(m), F.cross_entropy, share(), ranks=True) for n, m in networks().items() if n != "gpt"
    }
    found |= {name: sharded_curvature(name) for name in SHARDED}
    found["examples"] = {name: examples_of(name, share(), spread, ranks=True) for name, spread in EXAMPLES.items()}
    found["held"] = basis_held()
    found["weighted"] = curvature_of(networks()["mlp"], weighted_loss, share(), ranks=True)
    snapshot = diag.Snapshot(networks()["mlp"], F.cross_entropy, share(), ranks=True)
    with_other = snapshot.replace(other=second(networks()["mlp"]))
    gradients = snapshot.quantity("per_example_gradients")
    apart = networks()["mlp"]
    apart[2].bias.data += RANK
    bad = (share()[0], share()[1] + (7 if RANK == WORLD - 1 else 0))
    broken = diag.Snapshot(networks()["mlp"], F.cross_entropy, bad, ranks=True)
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    heads = in_columns(SmallGPT(heads=4))
    heads.block.attention.heads = 1
    found["refused"] = {
        "activations": refusal(lambda: diag.dead_units(snapshot)),
        "contrast": refusal(lambda: diag.gradient_coherence(snapshot, contrast=True)),
        "repair": refusal(lambda: diag.mode_connectivity(with_other, repair=True)),
        "align": refusal(lambda: diag.mode_connectivity(with_other, align="weights")),
        "opposing": refusal(lambda: diag.opposing_signals(snapshot, k=4)),
        "single": refusal(lambda: snapshot.quantity("per_example_gradients").gram()),
        "labels of one rank": refusal(lambda: broken.quantity("losses")),
        "apart": refusal(lambda: diag.Snapshot(apart, F.cross_entropy, share(), ranks=True).quantity("hessian")),
        "one rank": refusal(lambda: broken.quantity("hessian")),
        "alone": refusal(lambda: diag.neural_collapse(diag.Snapshot(fully(mlp()), F.cross_entropy, rows()))),
        "flat": refusal(lambda: diag.Snapshot(flat, F.cross_entropy, rows(), ranks=True).quantity("hessian")),
        "heads": refusal(lambda: diag.Snapshot(heads, token_loss, texts(), ranks=True).quantity("hessian")),
        "coupled": refusal(lambda: balanced({}, rows()).quantity("hessian")),
        "coupled and cut": refusal(lambda: balanced({"micro_batch": 4}, share()).quantity("gradient")),
        "unlike": refusal(lambda: snapshot.together.rows(lambda: torch.zeros(2, 3 + RANK), "outputs")),
        "rows": refused_without_memory(
            "diag.distributed.together", lambda: snapshot.together.rows(lambda: share()[0], "outputs")
        ),
        "no rows": refused_without_memory(
            "diag.distributed.together", lambda: snapshot.together.rows(lambda: torch.ones(3 * RANK, 2), "outputs")
        ),
        "sums": refused_without_memory("diag.gradients.over_ranks", lambda: gradients.group_sums([[0, 1], [2]])),
        "shares": of_a_checkpoint(networks()["mlp"], share()),
    }
    return found


def state_of(model):
    parts = [
        getattr(v, "to_local", lambda v=v: v)().detach().double().flatten() for v in model.state_dict().values()
    ]
    return hashlib.sha256(torch.cat([*parts, torch.rand(3).double()]).numpy().tobytes()).hexdigest()


measurements = {"curvature": curvature}  # of all ranks together, beside no training


def main(rank, world, folder, names):
    global RANK, WORLD
    RANK, WORLD = rank, world
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit
    )
    found = {}
    for name in names:
        if name in measurements:
            found[name] = measurements[name]()
            continue
        states = []
        for watch in (None, f"{folder}/{name}"):
            torch.manual_seed(0)
            states.append(state_of(globals()[name](watch)))
            dist.barrier()
        found[name] = states
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def reading_every_step():
    """Gradients are read however long it takes on a machine that does other things as well."""
    return mock.patch("diag.watching.observe.steps.READING_FREE", 1.0)


if __name__ == "__main__":
    with reading_every_step():
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    # Threads of gloo that outlive the interpreter can end a process with SIGABRT after its work.
    sys.stderr.flush()
    os._exit(0)
