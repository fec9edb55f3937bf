"""Masks as people keep them, and as shards keep them."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.images import open_map
from mtl_dist.kinds.kind import StoredMap, UnreadableMap
from mtl_dist.kinds.masks import store_mask
from mtl_dist.kinds.vocabulary import LabelError
from tests.source_files import encoded

COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def stored_mask(data: bytes, num_classes: int, values: Mapping[int, int]) -> StoredMap:
    with open_map(data) as opened:
        return store_mask(data, opened, num_classes, values)


def grey(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def classes_of(data: bytes, num_classes: int = 2, values: dict[int, int] | None = None) -> list[list[int]]:
    mask = stored_mask(data, num_classes, values or {})
    stored = Image.open(io.BytesIO(mask.data))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "L", (mask.width, mask.height))
    array = np.asarray(stored)
    assert mask.tally.tolist() == [int((array == index).sum()) for index in range(num_classes)]
    return array.tolist()


def palette(values: list[list[int]], colours: list[int]) -> bytes:
    image = Image.fromarray(np.array(values, np.uint8), "P")
    image.putpalette(colours)
    return encoded(image)


def test_class_indices_stay_as_they_are_byte_for_byte() -> None:
    data = encoded(grey([[0, 1, 2], [255, 1, 0]]))
    assert stored_mask(data, 3, {}).data == data


def test_a_binary_mask_may_be_0_and_255_or_have_soft_edges() -> None:
    assert classes_of(encoded(grey([[0, 255]]))) == [[0, 1]]
    assert classes_of(encoded(grey([[0, 127, 128, 255]]))) == [[0, 0, 1, 1]]
    assert classes_of(encoded(grey([[255, 255]]))) == [[1, 1]]
    assert classes_of(encoded(grey([[0, 255]]), "JPEG", quality=100)) == [[0, 1]]


def test_0_1_and_255_are_two_classes_and_ignored_pixels() -> None:
    assert classes_of(encoded(grey([[0, 1, 255]]))) == [[0, 1, 255]]


def test_a_one_bit_mask_is_two_classes() -> None:
    data = encoded(grey([[0, 255]]).convert("1"))
    assert classes_of(data) == [[0, 1]]
    assert stored_mask(data, 2, {}).convention == "either"


def test_a_palette_of_greys_means_its_greys_even_when_white_comes_first() -> None:
    upside_down = [value for grey_level in range(255, -1, -1) for value in [grey_level] * 3]
    assert classes_of(palette([[0, 255]], upside_down)) == [[1, 0]]


def test_a_palette_of_colours_means_its_indices() -> None:
    assert classes_of(palette([[0, 1]], [0, 0, 0, 128, 0, 0])) == [[0, 1]]
    assert classes_of(palette([[0, 2, 1]], [0, 0, 0, 128, 0, 0, 0, 128, 0]), 3) == [[0, 2, 1]]


def test_a_table_of_values_decides_alone() -> None:
    values = {1: 0, 2: 1, 3: 2}
    assert classes_of(encoded(grey([[1, 2, 3, 255]])), 3, values) == [[0, 1, 2, 255]]
    assert classes_of(encoded(grey([[0, 255]])), 2, {0: 0, 255: 1}) == [[0, 1]]
    assert classes_of(encoded(grey([[0, 255]])), 2, {0: 0, 1: 1}) == [[0, 255]]
    with pytest.raises(LabelError, match=r"expected the values 1, 2, 3 .* found 7"):
        stored_mask(encoded(grey([[1, 7]])), 3, values)


def test_a_colour_file_of_greys_is_a_mask_and_one_of_colours_is_not() -> None:
    assert classes_of(encoded(grey([[0, 255]]).convert("RGB"))) == [[0, 1]]
    with pytest.raises(UnreadableMap, match="in colours"):
        stored_mask(encoded(COLOUR), 2, {})


def test_a_value_beyond_the_classes_is_refused() -> None:
    with pytest.raises(LabelError, match=r"expected class indices from 0 to 2 .*, found 3"):
        stored_mask(encoded(grey([[0, 3]])), 3, {})
