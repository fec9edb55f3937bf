"""Points: read from every cell, kept as they were said, and moved with the pixels of their image."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.data.images import ImageFacts, upright
from mtl_dist.data.pictures import DecodedPicture
from mtl_dist.data.transforms import AugmentSettings, CentreCrop, Transform
from mtl_dist.errors import UserError
from mtl_dist.importers.orientation import STORED, as_given
from mtl_dist.kinds.cells import parse_cells
from mtl_dist.kinds.keypoints import Keypoints, labelled, swapped_names
from mtl_dist.kinds.view import View
from mtl_dist.kinds.vocabulary import Declared, LabelError
from mtl_dist.randomness import Draws
from mtl_dist.specs import TaskInfo

KIND = Keypoints()
INFO = TaskInfo("keypoints", ("left_eye", "right_eye", "nose"))


def label(*points: list[float], size: tuple[int, int] = (0, 0)) -> Any:
    return labelled(points, size)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (["1", "2", "3", "4", "5.5", "6"], label([1, 2, 2], [3, 4, 2], [5.5, 6, 2])),
        (["1", "2", "2", "", "", "0", "5", "6", "1"], label([1, 2, 2], [0, 0, 0], [5, 6, 1])),
        (["1", "2", "2", "7", "7", "0", "5", "6", "1"], label([1, 2, 2], [0, 0, 0], [5, 6, 1])),
        (["1", "2", "", "", "5", "-6e-1"], label([1, 2, 2], [0, 0, 0], [5, -0.6, 2])),
        ("1 2; 3 4; 5 6", label([1, 2, 2], [3, 4, 2], [5, 6, 2])),
        ("[[1, 2, 2], [3, 4, 1], [0, 0, 0]]", label([1, 2, 2], [3, 4, 1], [0, 0, 0])),
        (["['1', '2', '2']", "['3', '4', '1']", "['0', '0', '0']"], label([1, 2, 2], [3, 4, 1], [0, 0, 0])),
        ("", None),
        (["", "", "", "", "", ""], None),
        (["", "", "0", "", "", "0", "", "", "0"], None),
    ],
)
def test_a_cell_or_several_hold_points(cell: Any, expected: Any) -> None:
    assert parse_cells(KIND, [cell], str, Declared(INFO.classes)).labels == [expected]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["1", "2", "3", "4"], "of 3 points .left_eye, right_eye, nose., found 4 values"),
        (["1", "", "3", "4", "5", "6"], "expected x and y of left_eye, or neither, found one of them"),
        (["1", "2", "3", "3", "4", "2", "5", "6", "2"], "visibility 0, 1 or 2 of left_eye, found 3"),
        (["1", "2", "", "3", "4", "2", "5", "6", "2"], "visibility 0, 1 or 2 of left_eye, found nothing"),
        ("1 2 x 4 5 6", "expected numbers x, y"),
    ],
)
def test_what_are_no_such_points_is_refused(cell: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_cells(KIND, [cell], lambda at: f"row {at}", Declared(INFO.classes))


def test_points_without_names_have_numbers_where_it_is_clear_how_many_there_are() -> None:
    parsed = parse_cells(KIND, ["1 2 3 4", "5 6 7 8"], str, Declared())
    assert parsed.classes == ("1", "2")
    with pytest.raises(
        UserError, match="6 values, which are x and y of 3 points, or x, y and visibility of 2"
    ):
        parse_cells(KIND, ["1 2 3 4 5 6"], str, Declared())


def test_columns_are_named_by_points_or_one_by_one() -> None:
    columns = ["file", "a_x", "a_y", "b_x", "b_y", "b_v", "lefteye_x", "lefteye_y"]
    assert KIND.cell_columns("a,b", columns) == (("a_x", "a_y", "b_x", "b_y"), ("a", "b"))
    assert KIND.cell_columns("b", columns) == (("b_x", "b_y", "b_v"), ("b",))
    assert KIND.cell_columns("lefteye_x,lefteye_y", columns)[1] == ("lefteye",)
    assert KIND.cell_columns("u,v", ["u", "v"]) == (("u", "v"), ())


def test_labels_come_back_from_their_column_and_are_counted() -> None:
    labels = [label([1.25, 2, 2], [0, 0, 0], [5, 6, 1], size=(40, 30)), None]
    column = KIND.encode(labels, INFO)
    assert KIND.decode(column[0], INFO) == labels[0]
    assert KIND.counts(column, INFO) == (1, 0, 1)
    positions = KIND.facts(column, INFO).facts["positions"]
    assert positions[0] == [1, 2 * 1.75 / 40 - 1, 2 * 2.5 / 30 - 1] and positions[1] == [0, 0, 0]
    other = TaskInfo("keypoints", INFO.classes, facts={"positions": [[3, 0.5, 0.5]] * 3})
    merged = KIND.merge([KIND.facts(column, INFO), other]).facts["positions"]
    assert merged[0] == [
        4,
        pytest.approx((positions[0][1] + 1.5) / 4),
        pytest.approx((positions[0][2] + 1.5) / 4),
    ]


def test_points_outside_of_their_image_are_missing_and_counted() -> None:
    found: Counter[str] = Counter()
    facts = ImageFacts("png", 40, 30, 3, "uint8")
    given = label([39.4, 2, 2], [39.5, 3, 2], [-0.5, 29.4, 1])
    kept = KIND.beside(given, as_given(facts, ""), INFO, found)
    assert kept == label([39.4, 2, 2], [0, 0, 0], [-0.5, 29.4, 1], size=(40, 30))
    assert dict(found) == {"points outside of their image, taken as missing": 1}
    assert KIND.beside(label([50, 2, 2], [0, 0, 0], [0, 0, 0]), as_given(facts, ""), INFO, found) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_on_stored_pixels_turn_as_exif_turns_the_image(orientation: int) -> None:
    stored = np.zeros((30, 40, 1), np.uint8)
    stored[4, 7] = 1
    shown = upright(stored, orientation)
    facts = ImageFacts("jpg", shown.shape[1], shown.shape[0], 3, "uint8", orientation=orientation)
    kept = KIND.beside(label([7, 4, 2], [0, 0, 0], [0, 0, 0]), as_given(facts, STORED), INFO, Counter())
    x, y, _ = kept["points"][0]
    assert shown[int(y), int(x), 0] == 1 and kept["size"] == [shown.shape[1], shown.shape[0]]


AUGMENTED: dict[str, dict[str, Any]] = {
    "none": {},
    "crop": {"crop_scale": (0.4, 0.8)},
    "flip": {"flip": True},
    "vertical": {"flip_vertical": True},
    "turn": {"rotate": 40.0},
    "shift": {"translate": 0.2},
    "zoom": {"zoom": (0.7, 1.4)},
    "all": {
        "crop_scale": (0.6, 1.0),
        "flip": True,
        "flip_vertical": True,
        "rotate": 30.0,
        "zoom": (0.8, 1.2),
    },
    "rand_augment": {"rand_augment": {}},
}


@pytest.mark.parametrize("augment", AUGMENTED)
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad", "centre"])
def test_a_dot_and_its_point_are_in_one_place_after_every_augmentation(augment: str, resize: Any) -> None:
    how = CentreCrop(short_side=70) if resize == "centre" else resize
    settings = AugmentSettings.model_validate(AUGMENTED[augment], strict=False)
    transform = Transform((64, 56), how, settings)
    image = torch.zeros(1, 80, 100, dtype=torch.float32)
    y, x = np.mgrid[:80, :100]
    dot = (44.0, 35.0)
    image[0] = torch.from_numpy(255 * np.exp(-((x - dot[0]) ** 2 + (y - dot[1]) ** 2) / 18))
    if augment == "rand_augment":
        image = image.round().to(torch.uint8)
    info = TaskInfo("keypoints", ("dot",))
    target = KIND.target(label([*dot, 2], size=(100, 80)), info)
    seen = 0
    for seed in range(8):
        draws = Draws(seed)
        source = transform.source((80, 100), draws)
        resizing = transform.decode(DecodedPicture(image), source)
        moved_CHW, _, _, view = transform.finish(resizing, source, (80, 100), {}, {}, draws)
        found = KIND.moved(target, view(), info)
        if found is None:
            continue
        place = ((found[0, :2] + 1) * np.array([56, 64]) / 2 - 0.5).astype(float)
        pixels = moved_CHW[0].double().numpy()
        pixels = pixels - np.median(pixels) if augment != "rand_augment" else _bright(pixels, place)
        rows, columns = np.mgrid[:64, :56]
        near = (np.abs(rows - place[1]) < 9) & (np.abs(columns - place[0]) < 9)
        if min(place[0], place[1], 55 - place[0], 63 - place[1]) < 9:
            continue  # cut off: it has no centroid
        weights = np.where(near, np.maximum(pixels, 0), 0)
        if weights.sum() == 0:
            continue
        centroid = [(weights * columns).sum(), (weights * rows).sum()] / weights.sum()
        assert np.abs(centroid - place).max() < 0.5, (seed, centroid, place)
        back = KIND.label_of(found, info)["points"][0]
        assert back[:2] == pytest.approx(dot, abs=1e-3)
        seen += 1
    assert seen >= 2


def _bright(pixels: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The dot of an image whose values were changed as well: what stands out in the way its centre does."""
    x, y = np.rint(place).astype(int).clip(0, [55, 63])
    centre, ground = pixels[y, x], np.median(pixels)
    away = np.abs(pixels - ground)
    return np.where(away > 0.5 * abs(centre - ground), 1.0, 0.0) if abs(centre - ground) > 20 else 0 * pixels


def view(flipped: bool, matrix: list[list[float]]) -> View:
    return View(np.array(matrix), (30, 40), image=(30, 40), flipped=flipped)


POINTS = KIND.target(label([5, 2, 2], [30, 3, 1], [18, 20, 2], size=(40, 30)), INFO)
MIRROR = [[-1.0, 0.0, 40.0], [0.0, 1.0, 0.0]]
UPSIDE_DOWN = [[1.0, 0.0, 0.0], [0.0, -1.0, 30.0]]


def test_a_flip_exchanges_left_and_right_and_a_vertical_one_does_not() -> None:
    flipped = KIND.moved(POINTS, view(True, MIRROR), INFO)
    x_of = dict(zip(INFO.classes, (flipped[:3, 0] + 1) * 20 - 0.5, strict=True))
    assert x_of == {"left_eye": pytest.approx(9), "right_eye": pytest.approx(34), "nose": pytest.approx(21)}
    assert flipped[:3, 2].tolist() == [1, 2, 2]  # visibility goes along
    vertical = KIND.moved(POINTS, view(False, UPSIDE_DOWN), INFO)
    assert ((vertical[:3, 0] + 1) * 20 - 0.5).tolist() == pytest.approx([5, 30, 18])
    stated = TaskInfo("keypoints", INFO.classes, facts={"swap": []})
    assert ((KIND.moved(POINTS, view(True, MIRROR), stated)[:3, 0] + 1) * 20 - 0.5).tolist() == pytest.approx(
        [34, 9, 21]
    )


def test_what_leaves_the_view_is_missing() -> None:
    shifted = KIND.moved(POINTS, view(False, [[1, 0, -10], [0, 1, 0]]), INFO)
    assert shifted[:3, 2].tolist() == [0, 1, 2] and shifted[0].tolist() == [0, 0, 0]
    assert KIND.moved(POINTS, view(False, [[1, 0, -100], [0, 1, 0]]), INFO) is None


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("left_eye", "right_eye", "nose"), [("left_eye", "right_eye")]),
        (("eye.L", "eye.R", "RightHip", "LeftHip"), [("eye.L", "eye.R"), ("LeftHip", "RightHip")]),
        (("lefteye", "righteye", "leftmouth"), [("lefteye", "righteye")]),
        (("eye_l", "eye_r", "l_ear", "r_ear"), [("eye_l", "eye_r"), ("l_ear", "r_ear")]),
        (("lips_top", "rips_top", "a"), []),
    ],
)
def test_names_that_differ_in_left_and_right_are_a_pair(names: tuple[str, ...], pairs: list[Any]) -> None:
    assert swapped_names(TaskInfo("keypoints", names)) == pairs


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"swp": []}, "expected swap, skeleton, found 'swp'. Did you mean swap"),
        ({"swap": [["left_eye"]]}, "expected swap to be pairs of points"),
        ({"swap": [["left_eye", "right_ey"]]}, "found 'right_ey'. Did you mean right_eye?"),
        ({"swap": [["left_eye", "nose"], ["nose", "right_eye"]]}, "each point in one swap, found nose twice"),
    ],
)
def test_facts_that_say_nothing_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        KIND.check_facts(TaskInfo("keypoints", INFO.classes, facts=facts))


@pytest.mark.parametrize(
    "stored", [[[1, 2, 2]] * 3, {"points": [[1, 2, 2]], "size": [4, 4]}, {"points": 3}, 7]
)
def test_what_is_no_label_in_a_shard_is_refused(stored: Any) -> None:
    with pytest.raises(LabelError, match=r"expected 3 points \(x, y, visibility\) and a size"):
        KIND.target(stored, INFO)
