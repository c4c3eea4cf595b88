"""Variational latents: whether the code of a row says anything of it, and what keeps it from doing so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.ranges import Share
from diag.registry import instrument
from diag.result import OUR_CHOICE, Level, Precondition
from diag.snapshot.loop.arithmetic import LatentLook
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the divergence's parts; Bowman et al. 2016 (arXiv:1511.06349) on the collapse"
NOTHING_TOLD, TOLD_LESS = 0.01, 0.2  # share; over what it was at the start
STEPS_NEEDED = 100
OUTWEIGHS = 5.0
STEPS_OF_ITS_OWN = 1000  # until when a divergence of the usual weight may leave a code empty and come back


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentCode(LoopCheck):
    """Codes that say nothing of their rows, or that nothing but their divergence depends on."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Latent code",
    kind="check",
    why="A variational autoencoder whose code says nothing of its row decodes the same average for all of them, "
    "and samples of it are that average.",
)
def latent_code(loop: Loop, *, nothing: Share = NOTHING_TOLD) -> LatentCode:
    """Whether the code of a variational autoencoder says anything of the rows.

    loop: the facts of the loop, with the means and variances whose KL divergence from the standard Gaussian is a
    part of the loss, and its weight over that of the other parts, entry by entry. An alarm where no other part
    depends on the means at each of at least three looks (a code that is detached, sampled without
    reparametrisation, or made of noise alone), and where at each of them the noise is multiplied by something else
    than the deviation whose variance the divergence holds, or by nothing. A finding, too, where at the last two
    looks every latent has less than `nothing` of its variance between the rows, a fifth at most of what it had at
    the start: an alarm where the divergence weighs more than five times as much as in a sum over latents and
    outputs, else a warning late in training. Raises nothing of its own.
    """
    looks = loop.latents.looks
    known = Precondition("latents", len(looks) > 0, "no KL divergence of Gaussian latents was seen in the loss.")
    fine = "No fault of the latent code was seen: neither a collapse nor one that its KL divergence alone trains."
    return judged(LatentCode, loop.step, list(_findings(loop, nothing)), fine, preconditions=(known,))


def _findings(loop: Loop, nothing: float) -> Iterator[LoopFinding]:
    looks = loop.latents.looks
    if len(looks) < THRICE:
        return
    if all(look.mean_used is False for look in looks):
        yield _unused(looks[0])
        return
    wrong = {look.noise for look in looks}
    if len(wrong) == 1 and (noise := wrong.pop()) in WRONG_NOISE:
        yield _wrong_noise(looks[0], noise)
        return
    first, last = looks[0], looks[-1]
    empty = all(look.told < min(nothing, TOLD_LESS * first.told) for look in looks[-2:])
    if not empty or last.step < STEPS_NEEDED:
        return
    if last.weight > OUTWEIGHS:
        yield _outweighed(first, last)
    elif loop.ended or last.step >= STEPS_OF_ITS_OWN:
        yield _collapsed(first, last)


def _unused(first: LatentLook) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRAPH_CUT,
        "The reconstruction does not train the mean of the latent code: no part of the loss but the KL divergence "
        "depends on it, and that one draws it to zero for every example.",
        "Decode mean + deviation * noise with their gradients: rsample() and not sample(), no detach() and no "
        "no_grad() on the way, and the mean not left out.",
        "A gradient of the reconstruction with respect to the means.",
        step=first.step,
    )


WRONG_NOISE = {
    "nothing": "The latent code is not drawn: no part of the loss but the KL divergence depends on its variance, "
    "which that alone brings to one while the decoder gets the mean without noise.",
    "logarithm": "The noise of the latent code is multiplied by the logarithm of its variance and not by its "
    "deviation: the KL divergence takes the exponential of the same numbers for the variance.",
    "variance": "The noise of the latent code is multiplied by its variance and not by its deviation, of which the "
    "KL divergence takes the square.",
}


def _wrong_noise(first: LatentLook, noise: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.NOISE_MISPLACED,
        WRONG_NOISE[noise],
        "Decode mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean).",
        "A code that is drawn with the variance that its divergence is taken of.",
        step=first.step,
    )


def _outweighed(first: LatentLook, last: LatentLook) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.LOSS_TERM_DOMINATES,
        "The latent code hardly differs between examples, since its KL divergence outweighs the reconstruction: "
        f"the divergence of one latent counts {format_number(last.weight)} times as much in the loss as the "
        f"error of one output, and {_empty(last)}.",
        f"Lower the factor of the KL divergence {format_number(last.weight)}-fold, so that it and the "
        "reconstruction are each summed over an example's entries and averaged over the examples; or raise it "
        "from zero over the first epochs.",
        "A smaller factor leaves the code as empty.",
        step=first.step,
        threshold_source=OUR_CHOICE,
    )


def _empty(last: LatentLook) -> str:
    return (
        f"at step {last.step:,} none of the {last.size:,} latents has more than {format_share(last.told)} of its "
        f"variance between examples, the rest being its noise (a divergence of {format_number(last.nats)} nats an "
        "example)"
    )


def _collapsed(first: LatentLook, last: LatentLook) -> LoopFinding:
    times = f"{format_number(last.weight)} times as much in the loss as the error of one output"
    weight = "" if math.isnan(last.weight) else f" The divergence of one latent counts {times}."
    return LoopFinding(
        Level.WARNING,
        Cause.EMBEDDINGS_COLLAPSED,
        "The latent code no longer differs between examples, as it did at the start, so that the decoder does "
        f"without it (posterior collapse): {_empty(last)}.{weight}",
        "Raise the factor of the KL divergence from zero over the first epochs, or leave each latent some nats "
        "free; weaken a decoder that can do without the code; see that each target is that of its input.",
        "Reconstructions that differ between rows.",
        step=first.step,
        threshold_source=OUR_CHOICE,
    )
