"""External tars in a recipe: indexed once, whoever comes first, never passed over when they change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.data.loader import Data, open_data, train_loader
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers import external, tars
from mtl_dist.importers.external import with_indexes
from tests.ranks import shared_pool
from tests.unit.importers.test_tars import samples, write_tar

FIELDS = {
    "label": {"kind": "classification", "from": "cls"},
    "age": {"kind": "regression", "from": "json:age"},
}


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes for two small tars."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture
def web(tmp_path: Path) -> Path:
    write_tar(tmp_path / "web" / "a-000.tar", samples(0, 1, 2, 3))
    write_tar(tmp_path / "web" / "a-001.tar", samples(4, 5, 6))
    return tmp_path / "web"


def settings_for(path: str | Path, **options: Any) -> DataSettings:
    source = {"path": str(path), "fields": FIELDS, "image": "left.png", **options}
    stated = {"train": [source], "image_size": [6, 8], "augment": "none"}
    return DataSettings.model_validate(stated, strict=False)


def opened(path: str | Path, **options: Any) -> Data:
    return open_data(with_indexes(settings_for(path, **options)), ("label", "age"))


def pixels_and_classes(data: Data) -> set[tuple[int, int]]:
    batches = train_loader(
        data, seed=0, global_batch=7, accumulation=1, rank=0, world_size=1, start_position=0, end_position=7,
        workers=0, pin_memory=False,
    )  # fmt: skip
    (batch,) = batches
    return set(zip(batch.images_BCHW[:, 0, 0, 0].tolist(), batch.targets["label"].tolist(), strict=True))


EXPECTED = {(number, number % 3) for number in range(7)}


@pytest.mark.parametrize("path", ["web/*.tar", "web", "web/a-{000..001}.tar", "we?/a-*.tar"])
def test_a_recipe_trains_on_tars_of_others(web: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(web.parent / path)
    assert pixels_and_classes(data) == EXPECTED
    assert data.task_infos["label"].classes == ("0", "1", "2") and data.task_infos["age"].num_labelled == 6
    monkeypatch.setattr(external, "index", None)  # it would be called, were it needed again
    assert pixels_and_classes(opened(web.parent / path)) == EXPECTED


def test_several_ranks_starting_at_once_make_one_index(web: Path) -> None:
    found = shared_pool(2).run(_rank, str(web))
    assert [sorted(classes) for _, classes in found] == [sorted(EXPECTED)] * 2
    assert sum(made for made, _ in found) == 1
    (place,) = [path for path in (web / ".mtl").iterdir() if not path.name.startswith(".")]
    assert place.name.startswith("web-") and not list((web / ".mtl").glob("*.partial"))


def _rank(path: str) -> tuple[int, set[tuple[int, int]]]:
    """How often a process of its own makes the index, and what it reads."""
    alone = patch.object(os, "sched_getaffinity", lambda _: {0})
    with alone, patch.object(external, "_make", side_effect=external._make) as make:
        found = pixels_and_classes(opened(path))
    return make.call_count, found


def test_the_index_goes_where_it_is_told(web: Path, tmp_path: Path) -> None:
    opened(web, index=str(tmp_path / "index"))
    assert (tmp_path / "index" / "dataset.json").is_file() and not (web / ".mtl").exists()


def test_what_a_process_that_died_left_is_done_again(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tars, "write_manifest", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(web)
    assert pixels_and_classes(opened(web)) == EXPECTED


def test_other_fields_beside_the_same_tars_are_another_index(web: Path) -> None:
    opened(web)
    other = {"label": {"kind": "classification", "from": "json:dog.breed", "classes": ["b0", "b1", "b2"]}}
    data = open_data(with_indexes(settings_for(web, fields=other)), ("label",))
    assert data.task_infos["label"].classes == ("b0", "b1", "b2")
    assert len([path for path in (web / ".mtl").iterdir() if path.is_dir()]) == 2


def test_a_recipe_says_how_tars_are_split_and_what_is_no_label(web: Path) -> None:
    indexing = {"val": 0.3, "stratify": "label", "missing": ["0"]}
    data = with_indexes(settings_for(web, indexing=indexing))
    manifest = read_manifest(data.train[0].path)  # type: ignore[arg-type]
    assert list(manifest.splits) == ["train", "val"]
    assert manifest.tasks["label"].classes == ("1", "2")
    with pytest.raises(ValueError, match="indexing: expected none without `fields`"):
        settings_for("web", fields=None, image=None, indexing=indexing)


def test_tars_that_changed_are_refused_and_not_passed_over(web: Path) -> None:
    opened(web)
    write_tar(web / "a-002.tar", samples(7))
    with pytest.raises(UserError, match="expected an index of the tars in the recipe, found one of others"):
        opened(web)


def test_an_index_of_other_fields_in_the_place_named_is_refused(web: Path, tmp_path: Path) -> None:
    opened(web, index=str(tmp_path / "index"))
    with pytest.raises(UserError, match="expected an index of the fields in the recipe"):
        opened(web, index=str(tmp_path / "index"), fields={"age": FIELDS["age"]})


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("web/b-*.tar", {}, "expected tars, found none"),
        ("s3://bucket/web", {}, "expected `index`, a directory for the index of tars at a URL, found none"),
        ("web", {"index": "/proc/no/index"}, "expected a place for the index that can be written"),
        (
            "web",
            {"fields": {"label": {"kind": "classification", "from": "nothing"}}},
            "expected labels, found none",
        ),
    ],
)
def test_mistakes_are_reported(web: Path, path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(path if "://" in path else web.parent / path, **options)


def test_image_and_index_belong_to_fields() -> None:
    with pytest.raises(ValueError, match="index: expected none without `fields`"):
        settings_for("web", fields=None, image=None, index="here")


def test_the_resolved_recipe_says_the_same(tmp_path: Path) -> None:
    stated = settings_for("web", index="index").with_absolute_paths(tmp_path)
    (tmp_path / "recipe.yaml").write_text(to_yaml(stated))
    assert load_settings(DataSettings, tmp_path / "recipe.yaml") == stated
    assert stated.train[0].index == tmp_path / "index"
