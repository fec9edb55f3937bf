"""The made scenes: depth, normals and classes that belong to the stored picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_dist.data.contact_sheet import contact_sheet
from mtl_dist.data.decode import decode_map
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.scenes import made_scene
from mtl_dist.kinds.registry import map_kind
from tests.source_files import prepared

HERE = PackOptions(workers=1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("data") / "scenes"
    return out, prepared("scenes", out, HERE, num=20, size=32)


def test_a_scene_follows_from_its_number_alone() -> None:
    scene, again, other = made_scene(7, 32), made_scene(7, 32), made_scene(8, 32)
    assert (scene.picture == again.picture).all() and (scene.depth == again.depth).all()
    assert (scene.picture != other.picture).any()


def test_depth_and_normals_are_those_of_one_surface() -> None:
    """Between neighbours on one thing the surface's points lie in the plane that the normal says."""
    checked = 0
    for number in range(6):
        scene = made_scene(number, 128)
        across = (np.arange(128) + 0.5) / 128 - 0.5
        floor = scene.classes == 1
        rows = np.nonzero(floor)[0]
        # The floor gives the camera's tilt: its points are all 1.2 m below.
        tilt = np.median(1.2 / scene.depth[floor] - across[rows] / 1.1)
        points = np.stack(
            [
                scene.depth * across[None] / 1.1,
                scene.depth * (across[:, None] / 1.1 + tilt),
                scene.depth,
            ],
            axis=-1,
        )
        for thing in (1, 2, 3):
            inside = scene.classes == thing
            pairs = inside[:, 1:] & inside[:, :-1]
            normals = (scene.normals[:, 1:] + scene.normals[:, :-1]) / 2
            same = pairs & (np.linalg.norm(normals, axis=-1) > 0.995)
            steps = points[:, 1:] - points[:, :-1]
            near = same & (np.linalg.norm(steps, axis=-1) < 0.1)
            rise = (steps * normals).sum(-1)[near]
            assert np.quantile(np.abs(rise), 0.9) < 2e-3 if near.any() else True
            checked += int(near.sum())
        there = scene.classes > 0
        np.testing.assert_allclose(np.linalg.norm(scene.normals[there], axis=-1), 1, atol=1e-9)
        assert (scene.depth[~there] == 0).all() and (scene.depth[there] < 12).all()
        facing = (scene.normals * points).sum(-1)[there]
        assert (facing < 1e-9).all()
    assert checked > 1000


def test_what_is_stored_is_what_was_cast(scenes: tuple[Path, Manifest]) -> None:
    out, manifest = scenes
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 14,
        "val": 3,
        "test": 3,
    }
    info = manifest.tasks["distance"]
    assert info.unit == "m" and 1 < info.mean < 8 and info.facts["pixels"] > 1000
    reader = SplitReader(out, manifest, "train")
    for row in range(reader.num_samples):
        sample = reader.read(row, ("things", "distance", "surface"))
        scene = made_scene(int(sample.key.removeprefix("scene_")), 32)
        there = scene.classes > 0
        read = {
            name: map_kind(manifest.tasks[name].kind).values(decode_map(data), manifest.tasks[name])
            for name, data in sample.masks.items()
        }
        assert (read["things"] == scene.classes).all()
        assert (np.isfinite(read["distance"]) == there).all()
        np.testing.assert_allclose(read["distance"][there], scene.depth[there], atol=6e-4)
        normals = np.moveaxis(read["surface"], 0, 2)
        assert (np.isfinite(normals).all(-1) == there).all()
        np.testing.assert_allclose(normals[there], scene.normals[there], atol=1e-4)


def test_the_contact_sheet_shows_the_maps_beside_the_picture(
    scenes: tuple[Path, Manifest], tmp_path: Path
) -> None:
    contact_sheet(scenes[0], "train", tmp_path / "sheet.png", 2, 3)
    assert (tmp_path / "sheet.png").stat().st_size > 5000


def test_too_few_or_too_small_scenes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num: expected .* 10, found 3"):
        prepared("scenes", tmp_path / "x", HERE, num=3)
    with pytest.raises(UserError, match=r"size: expected .* 16, found 8"):
        prepared("scenes", tmp_path / "x", HERE, size=8)


def test_a_training_batch_holds_the_labels_as_its_images_show_them(scenes: tuple[Path, Manifest]) -> None:
    """Where a flip mirrors half of the images, it mirrors maps, and negates the normals' x."""
    settings = DataSettings.model_validate(
        {"train": ({"path": str(scenes[0])},), "image_size": 32, "augment": {"flip": True}, "workers": 0}
    )
    data = open_data(settings, ["things", "distance", "surface"])
    loader = train_loader(
        data,
        seed=0,
        global_batch=14,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=14,
        workers=0,
        pin_memory=False,
    )
    batch = next(iter(loader))
    flipped = 0
    for i, key in enumerate(batch.keys):
        scene = made_scene(int(key.removeprefix("scene_")), 32)
        image = batch.images_BCHW[i].permute(1, 2, 0).numpy()
        mirrored = not (image == scene.picture).all()
        flipped += mirrored
        way = slice(None, None, -1 if mirrored else 1)
        assert (image == scene.picture[:, way]).all()
        there = scene.classes[:, way] > 0
        depth, normals = batch.targets["distance"][i].numpy(), batch.targets["surface"][i].numpy()
        assert (np.isfinite(depth) == there).all() and (np.isfinite(normals).all(axis=0) == there).all()
        np.testing.assert_allclose(depth[there], scene.depth[:, way][there], atol=6e-4)
        expected = scene.normals[:, way] * [-1 if mirrored else 1, 1, 1]
        np.testing.assert_allclose(np.moveaxis(normals, 0, 2)[there], expected[there], atol=1e-4)
    assert 0 < flipped < 14
