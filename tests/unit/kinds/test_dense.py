"""Maps of numbers and of directions: read from every file, counted, and moved with their image."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.decode import decode_map
from mtl_dist.data.images import open_map
from mtl_dist.errors import UserError
from mtl_dist.kinds.depth import Depth
from mtl_dist.kinds.kind import StoredMap
from mtl_dist.kinds.normals import Normals, coloured
from mtl_dist.kinds.registry import map_kind
from mtl_dist.kinds.view import View
from mtl_dist.specs import TaskInfo
from tests.tiny_datasets import npy


def saved(array: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def stored(data: bytes, info: TaskInfo) -> tuple[np.ndarray, StoredMap]:
    """What is read of a map that was stored."""
    kind = map_kind(info.kind)
    with open_map(data) as opened:
        result = kind.store(data, opened, info, {})
    return kind.values(decode_map(result.data), info), result


METRES = np.array([[0.0, 1.5, 2.25], [4.0, 0.5, 3.0]])


@pytest.mark.parametrize(
    ("data", "facts", "same_bytes"),
    [
        (saved((METRES * 1000).astype(np.uint16), "PNG"), {"scale": 0.001}, True),
        (saved((METRES * 1000).astype(np.uint16), "TIFF"), {"scale": 0.001}, False),
        (saved((METRES * 4).astype(np.uint8), "PNG"), {"scale": 0.25}, True),
        (saved(METRES.astype(np.float32), "TIFF"), {}, False),
        (npy(METRES.astype(np.float32)), {}, True),
        (npy(METRES), {}, False),
        (npy(METRES[..., None].astype(np.float32)), {}, False),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "8-bit PNG", "float TIFF", "npy", "double npy", "npy with a channel"],
)
def test_depth_is_the_same_from_every_file(data: bytes, facts: dict[str, float], same_bytes: bool) -> None:
    values, result = stored(data, TaskInfo("depth", unit="m", facts=facts))
    expected = np.where(METRES == 0, np.nan, METRES)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert (result.data == data) == same_bytes
    assert (result.width, result.height) == (3, 2)


def test_what_counts_as_no_value_is_said_by_the_facts() -> None:
    data = npy(np.array([[0.0, -1.0, np.inf], [np.nan, 2.0, 90.0]], np.float32))
    values, _ = stored(data, TaskInfo("depth", facts={"invalid": None}))
    assert np.isfinite(values).tolist() == [[True, True, False], [False, True, True]]
    values, _ = stored(data, TaskInfo("depth", facts={"invalid": -1.0, "range": [0.0, 80.0]}))
    assert np.isfinite(values).tolist() == [[True, False, False], [False, True, False]]


def test_the_facts_of_numbers_are_those_of_all_their_pixels() -> None:
    kind, info = Depth(), TaskInfo("depth", num_labelled=3)
    maps = [np.random.default_rng(i).uniform(1000, 1001, (4, 5)).astype(np.float32) for i in range(3)]
    tally = kind.tally(info)
    for values in maps:
        tally = kind.add(tally, stored(npy(values), info)[1].tally)
    found = kind.facts(tally, info)
    pixels = np.concatenate([values.ravel() for values in maps]).astype(np.float64)
    assert (found.mean, found.std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)
    assert (found.minimum, found.maximum) == (pixels.min(), pixels.max())
    assert found.facts["log_std"] == pytest.approx(np.log(pixels).std(), rel=1e-4)
    parts = []
    for some in (maps[:1], maps[1:]):
        tally = kind.tally(info)
        for values in some:
            tally = kind.add(tally, stored(npy(values), info)[1].tally)
        parts.append(kind.facts(tally, info))
    merged = kind.merge(parts)
    assert (merged.mean, merged.std) == pytest.approx((found.mean, found.std), rel=1e-9)
    assert merged.facts == pytest.approx(found.facts)


def test_another_scale_changes_what_was_counted_and_other_values_are_refused() -> None:
    def counted(scale: float) -> TaskInfo:
        info = TaskInfo("depth", unit="m", facts={"scale": scale})
        return Depth().facts(stored(npy(METRES.astype(np.float32)), info)[1].tally, info)

    found, expected = Depth().restated(counted(1.0), {"scale": 0.25, "metric": True}), counted(0.25)
    for key in ("mean", "std", "minimum", "maximum"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key)), key
    assert found.facts == pytest.approx({**expected.facts, "metric": True})
    for stated in ({"range": [0, 1]}, {"invalid": None}):
        with pytest.raises(UserError, match="expected invalid and range as they were"):
            Depth().restated(counted(1.0), stated)
    assert Depth().restated(TaskInfo("depth"), {"range": [0, 1]}).facts == {"range": [0, 1]}


def directions() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(3, 4, 5))
    vectors /= np.linalg.norm(vectors, axis=0)
    vectors[:, 1, 2] = 0
    return vectors.astype(np.float32)


@pytest.mark.parametrize(
    ("data", "same_bytes", "error"),
    [
        (npy(directions()), True, 1e-6),
        (npy(np.moveaxis(directions(), 0, 2)), True, 1e-6),
        (npy((7 * np.moveaxis(directions(), 0, 2)).astype(np.float64)), False, 1e-6),
        (npy((32767 * directions()).astype(np.int16)), True, 1e-4),
        (saved(coloured(directions()), "PNG"), True, 0.02),
        (saved(coloured(directions()), "TIFF"), False, 0.02),
    ],
    ids=["3HW", "HW3", "longer vectors", "integers", "PNG", "TIFF"],
)
def test_normals_are_the_same_from_every_file(data: bytes, same_bytes: bool, error: float) -> None:
    values, result = stored(data, TaskInfo("normals"))
    expected = directions()
    expected[:, 1, 2] = np.nan
    np.testing.assert_allclose(values, expected, atol=error)
    assert (result.data == data) == same_bytes
    assert result.tally[0] == 19


def view(matrix: list[list[float]], zoom: float = 1.0) -> View:
    return View(np.array(matrix), (4, 5), zoom)


def test_a_flip_negates_x_and_a_rotation_turns_normals() -> None:
    kind, info = Normals(), TaskInfo("normals")
    values = directions()
    flipped = kind.moved(values, view([[-1, 0, 5], [0, 1, 0]]), info)
    np.testing.assert_allclose(flipped, values * np.array([-1, 1, 1]).reshape(3, 1, 1), atol=1e-6)
    stretched = kind.moved(values, view([[2, 0, 1], [0, 0.7, 0]]), info)
    np.testing.assert_array_equal(stretched, values)
    # A quarter to the right, as it is seen: what pointed right points down.
    turned = kind.moved(values, view([[0, -1, 4], [1, 0, 0]]), info)
    np.testing.assert_allclose(turned, np.stack([-values[1], values[0], values[2]]), atol=1e-6)
    # Where y points up: what pointed right points to negative y.
    turned = kind.moved(values, view([[0, -1, 4], [1, 0, 0]]), TaskInfo("normals", facts={"y": "up"}))
    np.testing.assert_allclose(turned, np.stack([values[1], -values[0], values[2]]), atol=1e-6)


def test_zoom_scales_depth_where_it_is_metric() -> None:
    values = np.array([[2.0, np.nan]], np.float32)
    closer = view([[2, 0, 0], [0, 2, 0]], zoom=2.0)
    assert Depth().moved(values, closer, TaskInfo("depth", facts={"metric": True}))[0, 0] == 1.0
    assert Depth().moved(values, closer, TaskInfo("depth"))[0, 0] == 2.0


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (TaskInfo("depth", facts={"metrc": 2.0}), "range, metric, found 'metrc'. Did you mean metric"),
        (TaskInfo("normals", facts={"x": "up"}), "expected y, found 'x'. Remove it"),
        (TaskInfo("depth", facts={"scale": "mm"}), "expected scale to be a number > 0, found 'mm'"),
        (TaskInfo("depth", facts={"range": [1]}), r"expected range to be \[LOW, HIGH\], found \[1\]"),
        (TaskInfo("depth", facts={"metric": "yes"}), "expected metric to be true or false, found 'yes'"),
        (TaskInfo("normals", facts={"y": "left"}), "expected y to be down or up, found 'left'"),
    ],
)
def test_facts_that_say_nothing_are_refused(info: TaskInfo, message: str) -> None:
    with pytest.raises(UserError, match=message):
        map_kind(info.kind).tally(info)


def test_missing_maps_hold_nan() -> None:
    assert math.isnan(Depth.missing) and math.isnan(Normals.missing)
