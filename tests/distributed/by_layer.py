"""What two processes measure of models under fully_shard of which none holds all weights (see `test_by_layer`)."""

import contextlib
import copy
import gc
import math
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diag
from diag.curvature.by_layer import SpreadByLayer
from diag.curvature.vocabulary import loss
from diag.distributed.together import Together
from diag.linalg.lanczos import eigenpairs
from diag.linalg.reductions import normal
from diag.snapshot.sharded.by_layer import ByLayer

sys.path.insert(0, str(Path(__file__).parent))
import loading
import trainings

CPU = torch.device("cpu")
KINDS = {"mlp": F.cross_entropy, "conv": F.cross_entropy, "gpt": trainings.token_loss}


def whole_data(kind):
    x, y = trainings.rows()
    if kind == "words":
        return torch.randint(5, 8, (len(y), 5), generator=torch.Generator().manual_seed(5)), y
    return trainings.texts() if kind == "gpt" else (x.double(), y)


def share(kind):
    """Rank 0 has more rows, and so more batches."""
    data = whole_data(kind)
    size, world = len(data[0]), trainings.WORLD
    cut = [0, *(size * 5 // 8 + (size - size * 5 // 8) * r // max(world - 1, 1) for r in range(world))]
    return tuple(t[cut[trainings.RANK] : cut[trainings.RANK + 1]] for t in data)


def numbers(snapshot):
    """What is compared with one process."""
    found = diag.hessian_spectrum(snapshot, num_eigenvalues=3, trace_probes=2, steps=16, tolerance=1e-5)
    gauss_newton = snapshot.quantity("gauss_newton")
    v = torch.linspace(-1, 1, gauss_newton.size, dtype=gauss_newton.dtype)
    return {
        "eigenvalues": found.eigenvalues.tolist(),
        "trace": float(found.trace),
        "norm": float(found.frobenius_norm),
        "layers": dict(found.layer_shares),
        "gauss newton": eigenpairs(gauss_newton, largest=1, tolerance=1e-6).values.tolist(),
        "product": (gauss_newton @ v).tolist(),
        "product, logits in pieces": in_pieces(lambda: gauss_newton @ v).tolist(),
        "losses": snapshot.quantity("losses").double().mean().item(),
    }


def in_pieces(call):
    """As where the classes are many: the last layer's logits are computed some rows at a time."""
    with mock.patch.object(loss, "LEAST", 1), mock.patch.object(loss, "PIECE", 100):
        return call()


class Sizes(TorchDispatchMode):
    """The bytes of tensors that operations make: of the largest, and of all that live at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if type(t) is torch.Tensor and t.layout is torch.strided and not t.is_meta:
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata)
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
        return out

    def gone(self, key):
        self.live -= self.seen.pop(key, 0)


def deep():
    """Eight layers of one size, each a sixteenth of the entries less the first and the last."""
    torch.manual_seed(1)
    layers = [part for _ in range(8) for part in (nn.Linear(128, 128), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def memory():
    """Of one product in float32: bytes at most alive, of the largest tensor, left over; and of all parameters."""
    data = (
        torch.randn(4, 128, generator=torch.Generator().manual_seed(trainings.RANK)),
        torch.tensor([0, 1, 2, 0]),
    )
    net = trainings.fully(deep())
    hessian = diag.Snapshot(net, F.cross_entropy, data, ranks="by_layer").quantity("hessian")
    v = torch.ones(hessian.part_size)
    sizes, left = Sizes(), []
    for _ in range(2):
        with inside_measuring(sizes):
            hessian.apply(v)
        gc.collect()
        left.append(sizes.live)
    return [sizes.peak, sizes.largest, left[1] - left[0], 4 * hessian.size, hessian.part_size]


@contextlib.contextmanager
def inside_measuring(mode):
    """The mode is in force where models are called, which is hidden from modes outside."""
    from diag.curvature import guards

    measured = guards.measured_model

    @contextlib.contextmanager
    def seen(*args, **kwargs):
        with measured(*args, **kwargs), mode:
            yield

    with mock.patch.object(guards, "measured_model", seen):
        yield


def drawn():
    """Whether parts of vectors that are drawn in blocks are those of vectors drawn at once, and joined give
    them."""
    torch.manual_seed(0)
    layers = ByLayer(trainings.fully(nn.Sequential(nn.Linear(2200, 2000), nn.Linear(2000, 7))), Together(CPU))
    spread, size = SpreadByLayer(layers), sum(math.prod(shape) for shape in layers.shapes.values())
    found = []
    for draw in (normal, lambda g: lambda n: torch.randint(0, 2, (n,), generator=g, dtype=torch.int8)):
        whole = draw(torch.Generator().manual_seed(3))(size)
        part = spread.drawn(size, draw(torch.Generator().manual_seed(3)))
        found += [torch.equal(part, spread.part(whole)), torch.equal(spread.whole(part, size), whole)]
    return [size, *found]


class Branching(nn.Module):
    """Takes another layer where the rows are mostly positive."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.up(x) if x.sum() > 0 else self.down(x)


class Flash(torch.autograd.Function):
    """A layer whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(Flash.apply(self.first(x)))


class Words(nn.Module):
    """A row of its embedding, which the last rank has, is held fixed."""

    def __init__(self):
        super().__init__()
        self.table, self.rest = nn.Embedding(9, 12, padding_idx=6), Once()

    def forward(self, x):
        return self.rest(self.table(x).mean(1))


def differenced(kind, model, **given):
    """By finite differences, as nothing else is right; the method, and the eigenvalues."""
    data = share(kind) if given else whole_data(kind)
    hessian = diag.Snapshot(model, F.cross_entropy, data, **given).quantity("hessian")
    return [str(hessian.self_test.method), eigenpairs(hessian, largest=2, tolerance=1e-4).values.tolist()]


DIFFERENCED = {"mlp": Once, "words": Words}


def not_copied(model):
    """Why it is not."""
    try:
        copy.deepcopy(model)
    except TypeError as error:
        return str(error)
    return "copied"


def refused():
    """Sentences, on every rank; and a measurement after each, as all ranks must still be in step."""
    rank, refusal = trainings.RANK, trainings.refusal
    x = torch.ones(4, 12).double() * (1 if rank else -1)
    y = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(3)
    branching, by_layer = trainings.fully(Branching().double()), {"ranks": "by_layer"}
    bad = (share("mlp")[0], share("mlp")[1] + (7 if rank == trainings.WORLD - 1 else 0))
    net = trainings.fully(trainings.networks()["mlp"])

    def hessian(model, data, loss_fn=F.cross_entropy):
        return diag.Snapshot(model, loss_fn, data, **by_layer).quantity("hessian")

    def small_memory(call):
        with mock.patch("diag.snapshot.sharded.chosen_model.free_memory", lambda device: 10.0):
            return call()

    def measured():
        return (
            small_memory(lambda: diag.Snapshot(net, F.cross_entropy, share("mlp"), ranks=True)).layers is not None
        )

    columns = trainings.in_columns(trainings.networks()["mlp"])
    snapshot = diag.Snapshot(net, F.cross_entropy, share("mlp"), **by_layer)
    return {
        "branches": refusal(lambda: hessian(branching, (x, y))),
        "one rank": refusal(lambda: hessian(net, bad)),
        "few": refusal(lambda: hessian(net, [(x[:1], y[:1])] * (1 if rank else 3))),
        "columns": refusal(lambda: hessian(columns, share("mlp"))),
        "word": refusal(lambda: diag.Snapshot(net, F.cross_entropy, share("mlp"), ranks="rows")),
        "params": refusal(lambda: snapshot.quantity("params")),
        "whole row": refusal(lambda: ByLayer(nn.Linear(3, 2), Together(CPU)).own_row("weight", 1)),
        "too large": small_memory(
            lambda: refusal(lambda: diag.Snapshot(columns, F.cross_entropy, share("mlp"), ranks=True))
        ),
        "copied": not_copied(snapshot.model),
        "chosen by itself": measured(),
        "after": float(hessian(net, share("mlp")).self_test.gradient_error) < 1e-3,
    }


def by_layer():
    found = {}
    for kind, loss_fn in KINDS.items():
        net = trainings.fully(trainings.networks()[kind])
        torch.manual_seed(0)
        before = trainings.state_of(net)
        torch.manual_seed(0)
        found[kind] = numbers(
            diag.Snapshot(net, loss_fn, share(kind), ranks="by_layer", micro_batch=8 if kind == "mlp" else None)
        )
        found[kind]["untouched"] = trainings.state_of(net) == before
    found["drawn"] = drawn()
    for kind, network in DIFFERENCED.items():
        torch.manual_seed(2)
        found[f"differenced {kind}"] = differenced(kind, trainings.fully(network().double()), ranks="by_layer")
    return found | {
        "memory": memory(),
        "refused": refused(),
        "loaded": loading.loaded(sys.argv[3]),
        "unreadable": loading.unreadable(sys.argv[3]),
    }


trainings.measurements = {"by_layer": by_layer}

if __name__ == "__main__":
    trainings.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    sys.stderr.flush()
    trainings.os._exit(0)
