"""Images and the masks asked for beside them: do they stand as the images do?

Two comparisons, on a few calls, on the host. Of the network: is its answer for a row most like the row's own mask
as it stands, or like the same mask turned? A random flip of the image alone shows in about half of the rows once
the network has learned the others. Of the data: where is a local feature of the image most alike to the mask, over
all places by which one of the two can be moved? Both are judged against the masks of the other rows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import OF_BINARY_TARGETS, OF_LOG_PROBABILITIES
from diag.snapshot.loop.places import MaskFacts
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment, due

IMAGES_COMPARED, EVERY_CALL = 3, 8  # calls whose images are compared; of the later ones that are looked at
ANSWERS_KEPT = 12  # calls looked at last
TOLD_EVERY = 3  # looks
PICTURES, PIXELS_A_SIDE, CLASSES_OF_MASKS = 32, 48, 8  # of a call; classes told apart
FEWEST_PICTURES, SMALLEST_PICTURE = 4, 8
LIKE_ITSELF = 0.7  # correlation of a mask with itself turned, above which it says nothing
PLAINLY = 0.1  # correlation by which one way is more like than another
ROUNDING_OF_PICTURES = 1e-6  # of a picture's size, in single precision
SWAPPED_AXES = "rows for columns"
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "left to right": lambda t: t.flip(-1),
    "upside down": lambda t: t.flip(-2),
    "by half a turn": lambda t: t.flip(-1, -2),
    SWAPPED_AXES: lambda t: t.transpose(-1, -2),
}


class _Rows(NamedTuple):
    """How many rows were told apart, and how many fit as given and turned in each way."""

    rows: int
    as_given: int
    turned: Counter[str]


class _Related(NamedTuple):
    """The largest correlations of an image's features with masks (see `MaskFacts`)."""

    related: float
    unrelated: float
    best: float
    turned: str
    shift: tuple[int, int]
    block: int = 1


class Masks:
    """Follows the images of training calls and the masks of their losses."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls = self._looked = 0
        self._inputs: list[Tensor] = []
        self._answers: deque[_Rows] = deque(maxlen=ANSWERS_KEPT)
        self._images: list[_Related] = []

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        self._inputs = []
        if self._calls <= IMAGES_COMPARED or self._calls % EVERY_CALL == 0 or due(self._calls):
            self._inputs = [t for t in tensors_in((args, dict(kwargs))) if _is_images(t)]

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        images, self._inputs = self._inputs, []
        if not images or name not in (*OF_BINARY_TARGETS, *OF_LOG_PROBABILITIES):
            return
        prediction, target = input_and_target(args, kwargs)
        if (
            not isinstance(prediction, Tensor)
            or not isinstance(target, Tensor)
            or not _are_masks_of(prediction, target)
        ):
            return
        masks = as_masks(target.detach(), prediction.shape[1])
        if masks is None or not self._compare_images(images, target, masks):
            return
        self._looked += 1
        answers = prediction.detach()[:PICTURES].float()
        answers = answers.softmax(1) if name in OF_LOG_PROBABILITIES else answers
        self._answers.append(fitting(smaller(answers), masks))
        if self._looked % TOLD_EVERY == 0:
            self._moment.news(("masks", self._looked), "masks")

    def _compare_images(self, images: list[Tensor], target: Tensor, masks: Tensor) -> bool:
        """Compare the first few; whether anything can be told, which it cannot where all images are alike."""
        if len(self._images) >= IMAGES_COMPARED:
            return True
        own = [t for t in images if len(t) == len(target) and not _same(t, target)]
        pictures = [smaller(t.detach()[:PICTURES].float()) for t in own]
        telling = [t for t in pictures if _apart(_features(t)).any()]
        beside = next((t for t in telling if t.shape[-2:] == masks.shape[-2:]), None)
        if beside is not None:
            self._images.append(related(beside, masks)._replace(block=averaged_block(target)))
        return bool(telling) or not own

    def facts(self) -> MaskFacts:
        """As plain data."""
        return MaskFacts(
            calls=len(self._answers),
            rows=sum(a.rows for a in self._answers),
            as_given=sum(a.as_given for a in self._answers),
            turned=dict(sum((a.turned for a in self._answers), Counter())),
            images=len(self._images),
            **_together(self._images),
        )


def _is_images(t: Tensor) -> bool:
    dense = t.is_cpu and is_dense(t) and t.is_floating_point()
    return dense and t.ndim == 4 and len(t) >= FEWEST_PICTURES and min(t.shape[-2:]) >= SMALLEST_PICTURE


def _are_masks_of(prediction: Tensor, target: Tensor) -> bool:
    """Whether the target may hold a mask for each of the network's answers, in as many pixels, on the host."""
    return (
        target.is_cpu
        and prediction.ndim == 4
        and len(prediction) == len(target)
        and prediction.shape[-2:] == target.shape[-2:]
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def as_masks(target: Tensor, classes: int) -> Tensor | None:
    """Masks (rows, classes, height, width) of zeros and ones, in at most `PIXELS_A_SIDE` pixels a side; None of
    others."""
    if target.is_floating_point():
        binary = target.ndim == 4 and bool(((target == 0) | (target == 1)).all())
        return smaller(target[:PICTURES].float()) if binary else None
    if target.ndim == 4 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim != 3 or not 2 <= classes <= CLASSES_OF_MASKS:
        return None
    return torch.cat([smaller((target[:PICTURES, None] == k).float()) for k in range(classes)], 1)


def averaged_block(pictures: Tensor) -> int:
    """The side of the blocks of pixels that make one where pictures (..., height, width) are compared."""
    return max(-(-max(pictures.shape[-2:]) // PIXELS_A_SIDE), 1)


def smaller(pictures: Tensor) -> Tensor:
    """The pictures with whole blocks of pixels averaged, which turns commute with where blocks fill the picture."""
    block = averaged_block(pictures)
    return pictures if block == 1 else F.avg_pool2d(pictures, block)


def _apart(pictures: Tensor) -> Tensor:
    """The pictures without what is the same in all rows and without their means, in double precision; zero where no
    more than rounding is left."""
    whole = pictures.double()
    apart = whole - whole.mean(0)
    apart = apart - apart.mean((-2, -1), keepdim=True)
    left, size = (t.flatten(2).norm(dim=-1)[..., None, None] for t in (apart, whole))
    return torch.where(left > ROUNDING_OF_PICTURES * size, apart, 0.0)


def _unit(pictures: Tensor) -> Tensor:
    """What tells each row from the others, at unit length, (rows, numbers)."""
    flat = _apart(pictures).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _turned(masks: Tensor) -> dict[str, Tensor]:
    """The masks turned in each way in which they can be."""
    square = masks.shape[-1] == masks.shape[-2]
    return {name: turn(masks) for name, turn in TURNS.items() if square or name != SWAPPED_AXES}


def fitting(answers: Tensor, masks: Tensor) -> _Rows:
    """Which of the masks of a batch, as they stand and turned, each answer (rows, channels, height, width) is most
    like. Counted are rows whose mask is not like itself turned."""
    a, unit_masks = _unit(answers), _unit(masks)
    turned = {name: _unit(t) for name, t in _turned(masks).items()}
    told_apart = (unit_masks.norm(dim=1) > 0.5) & (a.norm(dim=1) > 0.5)
    for other in turned.values():
        told_apart &= (unit_masks * other).sum(1) < LIKE_ITSELF
    as_given, as_turned = a @ unit_masks.T, {name: a @ other.T for name, other in turned.items()}
    own, best = as_given.diagonal(), torch.cat([as_given, *as_turned.values()], 1).amax(1)
    fits: Counter[str] = Counter()
    for name, like in as_turned.items():
        its_own = like.diagonal()
        fits[name] = int((told_apart & (its_own >= best) & (its_own > own + PLAINLY)).sum())
    return _Rows(int(told_apart.sum()), int((told_apart & (own >= best)).sum()), fits)


def related(images: Tensor, masks: Tensor) -> _Related:
    """Where a local feature of the images is most like the masks, both in as many pixels."""
    spectra, size = _spectra(_features(images)), (masks.shape[-2], masks.shape[-1])
    one = masks[:, 1:] if masks.shape[1] > 1 else masks
    found: list[tuple[float, str, tuple[int, int]]] = []
    here, others = 0.0, 0.0
    for name, turned in {"": one, **_turned(one)}.items():
        theirs = _spectra(turned)
        own = _moved(spectra, theirs, size)
        others = max(others, float(_moved(spectra, theirs.roll(1, 0), size).abs().max()))
        place = int(own.abs().flatten(2).amax((0, 1)).argmax())
        found.append((float(own.abs().max()), name, _signed(divmod(place, size[1]), size)))
        if not name:
            here = float(own[..., 0, 0].abs().max())
    best, way, shift = max(found)
    return _Related(here, others, best, way, shift)


def _features(images: Tensor) -> Tensor:
    """(rows, features, height, width): brightness, its difference from the surroundings, and how large that is."""
    grey = images.mean(1, keepdim=True)
    around = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, 1)
    rough = (grey - around).abs()
    smooth = F.avg_pool2d(F.pad(rough, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return torch.cat([grey, smooth, F.avg_pool2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), 5, 1)], 1)


def _spectra(pictures: Tensor) -> Tensor:
    """The Fourier transforms of what tells the pictures of each channel apart, each at unit length."""
    apart = _apart(pictures)
    return torch.fft.rfft2(apart / apart.flatten(2).norm(dim=-1)[..., None, None].clamp_min(1e-12))


def _moved(features: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(features, masks' channels, height, width): the mean over rows of the correlation of a feature with the mask
    moved by so many pixels."""
    products = (features[:, :, None] * masks[:, None].conj()).mean(0)
    return torch.fft.irfft2(products, s=size)


def _signed(place: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    down, right = (at - n if at > n // 2 else at for at, n in zip(place, size, strict=True))
    return down, right


def _together(looks: list[_Related]) -> dict[str, Any]:
    """What the looks at images agree on: the largest relation where the mask stands, the least where it fits best,
    which is nothing unless all fit best in the same way."""
    if not looks:
        return {}
    ways = {(look.turned, look.shift, look.block) for look in looks}
    turned, shift, block = next(iter(ways)) if len(ways) == 1 else ("", (0, 0), 1)
    here = max(look.related for look in looks)
    return {
        "related": here,
        "unrelated": max(look.unrelated for look in looks),
        "best": min(look.best for look in looks) if len(ways) == 1 else here,
        "best_turned": turned,
        "best_shift": shift,
        "block": block,
    }
