"""Examples that a result names: thumbnails, texts and features, group beside group."""

import base64
import io
from dataclasses import dataclass

import numpy
import pytest
import report_fakes
import torch
from matplotlib.image import imread

from diag.reporting import document, render
from diag.reporting.examples import examples, png_uri, thumbnail
from diag.result import Result


@dataclass(frozen=True, kw_only=True)
class Naming(Result):
    items: object = None

    def examples(self):
        if isinstance(self.items, Exception):
            raise self.items
        return self.items


def pixels(uri):
    return imread(io.BytesIO(base64.b64decode(uri.split(",")[1])), format="png")


def test_a_result_without_examples_has_none():
    assert examples([(1, Result())]) is None
    assert examples([(1, Naming(items=()))]) is None


def test_groups_are_counted_and_cut():
    items = [{"row": i, "group": "a" if i % 3 else "b", "label": i % 10, "loss": 0.5} for i in range(60)]
    found = examples([(1, Naming(items=items))])
    assert [(g["name"], g["count"], len(g["examples"])) for g in found["groups"]] == [("b", 20, 12), ("a", 40, 12)]
    first = found["groups"][0]["examples"][0]
    assert (first["row"], first["label"], first["loss"]["text"], first["image"]) == (0, "0", "0.5", "")


def test_a_thumbnail_holds_the_picture():
    image = numpy.array([[0.0, 1.0], [0.5, 0.25]])
    # 8-bit rounding leaves half a level of 255.
    numpy.testing.assert_allclose(pixels(thumbnail(image)), image, atol=0.5 / 255 + 1e-9)
    colour = numpy.random.default_rng(0).random((3, 5, 7))
    colour[0, 0, 0], colour[1, 0, 0] = 0.0, 1.0
    for given in (colour, colour.transpose(1, 2, 0), torch.tensor(colour)):
        got = pixels(thumbnail(given))
        numpy.testing.assert_allclose(got[:, :, :3], colour.transpose(1, 2, 0), atol=0.5 / 255 + 1e-9)


def test_a_large_picture_is_thinned_and_a_flat_or_broken_one_is_shown():
    assert max(pixels(thumbnail(numpy.random.rand(300, 200))).shape[:2]) <= 48
    assert pixels(thumbnail(numpy.full((4, 4), 7.0))).max() == 0
    assert pixels(thumbnail(numpy.array([[numpy.nan, 1.0], [0.0, 2.0]]))).shape == (2, 2)
    assert pixels(thumbnail(numpy.random.rand(16, 6, 6))).shape == (6, 6)


def test_a_picture_of_a_palette():
    palette = [(0, 0, 0, 0), (255, 0, 0, 255)]
    got = pixels(png_uri(numpy.array([[0, 1]], numpy.uint8), palette))
    numpy.testing.assert_array_equal(got[0], [[0, 0, 0, 0], [1, 0, 0, 1]])


def test_texts_are_cut_and_features_ordered_by_magnitude():
    found = examples(
        [(1, Naming(items=[{"row": 1, "text": "x" * 999, "features": {"a": 0.1, "b": -3.0, "c": numpy.nan}}]))]
    )
    (item,) = found["groups"][0]["examples"]
    assert len(item["text"]) == 241
    assert [(f["name"], f["share"]) for f in item["features"]] == [("b", -1.0), ("a", 0.033)]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (ValueError("the rows are gone"), "No examples: ValueError: the rows are gone"),
        ([{"row": 1, "image": numpy.zeros(3)}], "an image has shape (3,); expected (H, W), (C, H, W) or (H, W, C)"),
    ],
)
def test_examples_that_cannot_be_shown_say_why(items, problem):
    found = examples([(1, Naming(items=items))])
    assert found["groups"] == [] and problem in found["problem"]


def test_pictures_are_part_of_the_page_once_and_not_of_the_embedded_data():
    made = document(report_fakes.evidence())
    groups = next(a for a in made["audits"] if a["instrument"] == "opposing")["examples"]["groups"]
    names = [item["image"] for group in groups for item in group["examples"]]
    assert len(set(names)) == 24 and all(made["drawings"][n].startswith("data:image/png") for n in names)
    html = render(made)
    assert all(html.count(made["drawings"][name]) == 1 for name in names)
    bare = document(report_fakes.evidence(), drawings=False)
    assert bare["drawings"] == {} and "data:image" not in str(bare)
