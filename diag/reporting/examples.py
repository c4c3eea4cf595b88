"""The examples that a result speaks of: rows of the data, shown as thumbnails, texts or features, by group.

A result offers them with a method `examples()` that returns dicts, or its class with `trend_examples(series)` for
all results of a run, by step. Each dict has `row` (its index in the data) and may have `group`, `label`, `loss`,
and one of `image` (array (H, W), (C, H, W) or (H, W, C)), `text`, or `features` (an array, or a dict of name ->
standardised value).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.encoding import plain_data
from diag.reporting.plain import clean, finite, number
from diag.result import Result

MAX_IN_GROUP = 12
MOST_GROUPS_SHOWN = 4
MAX_SIDE = 48
MOST_FEATURES_SHOWN = 6
MAX_TEXT = 240


def examples(series: Sequence[tuple[int, Result]]) -> dict[str, Any] | None:
    """The groups of examples that the last result names, or all of them together; None where there are none."""
    last = series[-1][1]
    course = getattr(type(last), "trend_examples", None)
    offer = (lambda: course(series)) if course is not None else getattr(last, "examples", None)
    if not callable(offer):
        return None
    try:
        items_offered = [dict(item) for item in offer()]
        groups: dict[str, list[dict[str, Any]]] = {}
        for item in items_offered:
            groups.setdefault(clean(item.get("group", "")), []).append(item)
        pictures = [_group(name, items) for name, items in list(groups.items())[:MOST_GROUPS_SHOWN]]
    except Exception as error:
        return {"groups": [], "problem": clean(f"No examples: {type(error).__name__}: {error}")}
    return {"groups": pictures, "problem": ""} if pictures else None


def take_pictures(pictures: dict[str, Any] | None, prefix: str) -> Iterable[tuple[str, str]]:
    """Take the pictures out of what `examples` gave, leaving a name in place of each: (name, data URI)."""
    items = [item for group in (pictures or {"groups": []})["groups"] for item in group["examples"]]
    for number_, item in enumerate(item for item in items if item["image"]):
        name, picture = f"{prefix}-example-{number_}", item["image"]
        item["image"] = name
        yield name, picture


def _group(name: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": name, "count": len(items), "examples": [_example(item) for item in items[:MAX_IN_GROUP]]}


def _example(item: Mapping[str, Any]) -> dict[str, Any]:
    text = clean(item.get("text") or "")
    return {
        "row": finite(plain_data(item.get("row"))),
        "label": clean(plain_data(item["label"])) if item.get("label") is not None else "",
        "loss": number(plain_data(item["loss"])) if item.get("loss") is not None else None,
        "image": thumbnail(item["image"]) if item.get("image") is not None else "",
        "text": text[:MAX_TEXT] + ("…" if len(text) > MAX_TEXT else ""),
        "features": list(_features(item["features"])) if item.get("features") is not None else [],
    }


def _features(values: Any) -> Iterable[dict[str, Any]]:
    """The features that stand out most, the largest magnitude first, each with its share of the largest."""
    named = values if isinstance(values, Mapping) else dict(enumerate(numpy.ravel(plain_data(values)).tolist()))
    found = [(clean(k), float(v)) for k, v in named.items() if math.isfinite(float(v))]
    found.sort(key=lambda item: -abs(item[1]))
    largest = max((abs(v) for _, v in found), default=0.0) or 1.0
    for name, value in found[:MOST_FEATURES_SHOWN]:
        yield {"name": name, "value": number(value), "share": round(value / largest, 3)}


def thumbnail(image: Any) -> str:
    """A picture as the data URI of a PNG of at most 48 pixels a side; values are stretched to black and white."""
    pixels = _to_bytes(_height_width_channels(numpy.asarray(plain_data(image), numpy.float64)))
    step = max(1, -(-max(pixels.shape[:2]) // MAX_SIDE))
    pixels = pixels[::step, ::step]
    return png_uri(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _height_width_channels(image: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    if image.ndim == 3 and image.shape[2] not in (1, 3) and image.shape[0] not in (1, 3):
        last = image.shape[0] == image.shape[1] != image.shape[2]
        image = image.mean(axis=2 if last else 0)  # many channels: their mean
    if image.ndim == 2:
        return image[:, :, None]
    if image.ndim != 3:
        raise ValueError(f"an image has shape {image.shape}; expected (H, W), (C, H, W) or (H, W, C)")
    return image if image.shape[2] in (1, 3) else image.transpose(1, 2, 0)


def _to_bytes(image: NDArray[numpy.float64]) -> NDArray[numpy.uint8]:
    usable = image[numpy.isfinite(image)]
    low, high = (usable.min(), usable.max()) if len(usable) else (0.0, 1.0)
    spread = high - low or 1.0
    return (255 * numpy.nan_to_num((image - low) / spread)).clip(0, 255).round().astype(numpy.uint8)


def png_uri(pixels: NDArray[numpy.uint8], palette: Sequence[tuple[int, int, int, int]] = ()) -> str:
    """A PNG as a data URI: grey (H, W), colour (H, W, 3), or indices (H, W) into a palette of RGBA."""
    kind = 3 if palette else (0 if pixels.ndim == 2 else 2)
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + numpy.ascontiguousarray(line).tobytes() for line in pixels)
    colours = bytes(v for colour in palette for v in colour[:3])
    opacity = bytes(colour[3] for colour in palette)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    chunks += [(b"PLTE", colours), (b"tRNS", opacity)] if palette else []
    chunks += [(b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()
