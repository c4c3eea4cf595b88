"""Results of every level and a run around them, for the tests of the page."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy

from diag.reporting.evidence import Evidence
from diag.result import OUR_CHOICE, Failed, Precondition, Provenance, Result, Skipped, Verdict, measured
from diag.run.entries import Cost, Event, Finding
from diag.snapshot.history import empty_history

HOSTILE = "<script>alert(1)</script>"
LAYERS = {
    "conv1.weight": 144, "conv1.bias": 16, "norm1.weight": 16, "norm1.bias": 16, "conv2.weight": 4608,
    "conv2.bias": 32, HOSTILE: 32, "norm2.bias": 32, "head.weight": 5120, "head.bias": 10,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collapse(Result):
    collapsed: float = measured("examples whose loss gradient is exactly zero", unit="share")
    headroom: float = measured("margin left before rounding", unit="nats")
    headroom_standard_error: float = measured("standard error of the headroom", unit="nats", default=0.4)
    margins: Any = measured("margin of each example", unit="nats", shape="(N,)")
    level: str = measured("the level to report", default="alarm")

    def verdict(self):
        return Verdict(
            self.level,
            f"{100 * self.collapsed:.1f} % of the training examples have a gradient of exactly zero in float32.",
            advice="Compute the softmax in float64, or add weight decay; an exact-form loss is the control arm.",
            source="arXiv:2501.04697",
            confidence="arithmetic",
            refutation="The same share with the loss computed in float64.",
            value=self.collapsed,
            threshold=0.1,
            threshold_source=OUR_CHOICE,
            layers=("head", HOSTILE),
        )

    def plot(self, ax):
        ax.hist(self.margins, bins=30)
        ax.axvline(16.6, linestyle="--", color="#b3261e", label="23 ln 2")
        ax.set(xlabel="margin (nats)", ylabel="examples")
        ax.legend()

    @classmethod
    def plot_trend(cls, ax, series):
        ax.plot([s for s, _ in series], [100 * r.collapsed for _, r in series], marker="o", markersize=3)
        ax.axhline(10, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="step", ylabel=f"collapsed (%) {HOSTILE}")


@dataclass(frozen=True, kw_only=True)
class Opposing(Result):
    share: float = measured("loss change of the two groups that cancels", unit="share")

    def verdict(self):
        return Verdict(
            "warning",
            "24 examples in two groups carry 61 % of the curvature along the sharpest direction.",
            advice="Look at the examples below; check their labels.",
            source="arXiv:2311.04163",
            refutation="The groups change when the probe set is drawn again.",
            value=self.share,
            threshold=0.4,
            threshold_source=OUR_CHOICE,
        )

    def plot(self, ax):
        ax.bar(["group a", "group b"], [0.4, 0.3])
        ax.set(xlabel="group", ylabel="loss change")

    def examples(self):
        rng = numpy.random.default_rng(0)
        for i in range(30):
            yield {
                "row": 17 * i, "label": str(i % 10), "loss": 0.1 * i, "group": "ab"[i % 2],
                "image": rng.random((8, 8)),
            }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bare(Result):
    """Only what a third party must write."""

    ratio: float = measured("something over something")

    def verdict(self):
        return Verdict("ok", f"The ratio is {self.ratio:.2f}.")

    def plot(self, ax):
        raise ValueError(f"cannot draw {HOSTILE}")


@dataclass(frozen=True, kw_only=True)
class Uncertain(Result):
    alignment: float = measured("cosine of two directions")

    def verdict(self):
        return Verdict(
            "unknown", "The alignment, 0.48 ± 0.10, straddles 0.5.", value=self.alignment, threshold=0.5,
            source="https://example.org/paper (2020)", confidence="contested",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inapplicable(Result):
    nc1: float = measured("within-class over between-class variability")

    def verdict(self):
        return Verdict("not_applicable", "Not in the terminal phase: the training accuracy is 0.93.")


def about(name, **settings):
    return Provenance(name, settings, num_examples=640, data_fingerprint="9f3a", seed=0, seconds=0.021)


def series(cls, steps, name="", **values):
    rows = []
    for i, step in enumerate(steps):
        given = {k: v(i / max(1, len(steps) - 1)) if callable(v) else v for k, v in values.items()}
        rows.append((step, cls(**given, provenance=about(name, alarm_at=0.1))))
    return rows


def finding(name, title, rows, source=""):
    return Finding(name, title, source, rows[-1][1].verdict(), rows, rows[0][0], rows[-1][0])


def history(steps=900, layers=LAYERS, seed=0):
    rng = numpy.random.default_rng(seed)
    made, t = empty_history(layers, steps), numpy.linspace(0, 1, steps)
    wobble = numpy.exp(0.15 * rng.standard_normal((steps, len(layers))))
    depth = numpy.exp(-3.0 * numpy.linspace(1, 0, len(layers)))
    gradient = (depth * wobble * (0.05 + numpy.exp(-4 * t))[:, None]).astype("f4")
    gradient[steps // 2, 2:4] *= 80
    finite = numpy.ones(gradient.shape, bool)
    loss = 2.3 * numpy.exp(-5 * t) * numpy.exp(0.1 * rng.standard_normal(steps)) + 0.004
    loss_finite = numpy.ones(steps, bool)
    if steps > 700:
        gradient[700, 4], finite[700, 4], loss[700], loss_finite[700] = numpy.inf, False, numpy.nan, False
    size = (numpy.sqrt(numpy.fromiter(layers.values(), float)) * (1 + t[:, None])).astype("f4")
    return dataclasses.replace(
        made, loss=loss, loss_finite=loss_finite, learning_rate=0.1 * (1 + numpy.cos(numpy.pi * t)) / 2,
        gradient_norm=gradient, gradient_finite=finite, parameter_norm=size, update_norm=0.01 * gradient,
        distance=size * numpy.log1p(9 * t[:, None]).astype("f4"),
        applied_gradient_norm=gradient.sum(1).astype(float),
        optimizer={"kind": "SGD", "lr": 0.1, "momentum": 0.9},
        notes=("The loss call was seen inside torch.compile only through its value.",),
    )  # fmt: skip


def evidence(**changes):
    """A run with a finding of every kind; `changes` replaces parts of it."""
    rng = numpy.random.default_rng(1)
    steps = list(range(50, 901, 50))
    margins = rng.normal(14, 3, 640)
    collapse = series(Collapse, steps, "collapse", collapsed=lambda t: 0.21 * t**2, headroom=2.0, margins=margins)
    last = collapse[-1]
    low = Precondition("terminal phase", False, "the training accuracy is 0.93")
    whole = Evidence(
        kind="run",
        title="Run mine",
        metadata={
            "model": "ConvNet", "parameters": 10026, "device": "cpu", "seed": 0, "budget": 0.05,
            "created": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0", "diag": "0.1.0"},
            "probe": {"examples": 640, "fingerprint": "9f3a"}, "every": 50,
        },
        findings=[
            finding("collapse", "Softmax collapse", [*collapse[:-1], last], "arXiv:2501.04697"),
            finding("opposing", "Opposing signals", series(Opposing, [600], "opposing", share=0.61)),
            finding("uncertain", "Alignment", series(Uncertain, steps[3:], "uncertain", alignment=0.48)),
            finding("bare", "Bare third party", series(Bare, steps, "bare", ratio=lambda t: 1 + t)),
            finding(
                "inapplicable",
                "Neural collapse",
                [(900, Inapplicable(nc1=0.4, preconditions=(low,), provenance=about("inapplicable")))],
            ),
        ],
        outcomes=[
            (50, Skipped("curvature", "The model has an op without a double backward; pass method='finite'.")),
            (50, Failed("broken", f"ValueError: {HOSTILE}", f"Traceback ...\nValueError: {HOSTILE}")),
            (100, Skipped("uncertain", "Only one batch had been seen; it is measured from the second on.")),
        ],
        history=history(),
        events=[Event(300, "resume", "resumed after step 300"), Event(512, "exception", "The loop raised.")],
        costs=[
            Cost(900, "", 0.0, 48.0, 3.1),
            *[Cost(s, "collapse", 0.021) for s in steps],
            *[Cost(s, "bare", 0.3) for s in steps],
        ],
        torn=1,
        last_step=900,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)
