"""Pictures to look at: what colours say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_dist.data.overlays import compared, one_picture
from mtl_dist.specs import TaskInfo

DEPTH = TaskInfo("depth", num_labelled=1, mean=2.0, std=1.0, minimum=1.0, maximum=9.0, unit="m")


def test_one_colour_means_one_value_in_the_label_and_in_the_answer_beside_it() -> None:
    image_CHW = torch.zeros(3, 8, 8, dtype=torch.uint8)
    label_HW, answer_HW = np.full((8, 8), 2.0), np.full((8, 8), 2.0)
    label_HW[:4] = 1.0
    answer_HW[:4] = 9.0  # alone, each map would go from the brightest colour to the darkest
    picture = np.array(compared(image_CHW, label_HW, answer_HW, DEPTH, [], side=16))
    assert picture.shape == (16, 3 * 16 + 2 * 4, 3)
    label, answer = picture[:, 20:36], picture[:, 40:]
    assert (label[12] == answer[12]).all()
    assert (label[2] != answer[2]).any()
    assert picture[:, 16:20].min() == 255  # the gap


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (3, 3), (2, 1), (5, 1)])
def test_a_map_lies_over_one_picture_also_of_an_image_of_many_channels(channels: int, shown: int) -> None:
    image_CHW = torch.zeros(channels, 8, 6, dtype=torch.uint8)
    assert one_picture(image_CHW).shape == (shown, 8, 6)
    picture = compared(image_CHW, np.zeros((8, 6)), np.zeros((8, 6)), DEPTH, [], side=8)
    assert picture.size == (3 * 6 + 2 * 4, 8)
