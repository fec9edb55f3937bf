"""Tars that cannot be indexed: read by webdataset, with the labels and pixels that an index would give."""

from __future__ import annotations

import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl_dist.config.trust import parts_of
from mtl_dist.data.loader import Data, eval_loader, open_data, train_loader
from mtl_dist.data.settings import DataSettings, SkipBadSamples
from mtl_dist.errors import UserError
from mtl_dist.importers.external import with_indexes
from tests.unit.importers.test_tars import samples, write_tar

FIELDS = {
    "label": {"kind": "classification", "from": "cls", "classes": ["0", "1", "2"]},
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


def settings_for(web: Path, **options: Any) -> DataSettings:
    source = {
        "path": f"pipe:cat '{web}/a-{{000..001}}.tar'", "stream": True, "epoch_samples": 7, "fields": FIELDS,
        "image": "left.png", "index": str(web.parent / "head"), **options,
    }  # fmt: skip
    return DataSettings.model_validate(
        {"train": [source], "image_size": [6, 8], "augment": "none"}, strict=False
    )


def opened(web: Path, **options: Any) -> Data:
    return open_data(with_indexes(settings_for(web, **options)), ("label", "age"))


def seen(
    data: Data, rank: int = 0, world_size: int = 1, start: int = 0, end: int = 14
) -> list[tuple[int, int]]:
    batches = train_loader(
        data, seed=0, global_batch=2, accumulation=1, rank=rank, world_size=world_size, start_position=start,
        end_position=end, workers=0, pin_memory=False,
    )  # fmt: skip
    return [
        (int(pixel), int(label))
        for batch in batches
        for pixel, label in zip(batch.images_BCHW[:, 0, 0, 0], batch.targets["label"], strict=True)
    ]


EXPECTED = [(number, number % 3) for number in range(7)]


def test_a_stream_gives_every_sample_of_its_tars_with_its_labels_again_and_again(web: Path) -> None:
    data = opened(web)
    assert data.num_train_samples == 7 and data.task_infos["label"].classes == ("0", "1", "2")
    found = seen(data)
    assert sorted(found[:7]) == sorted(found[7:]) == EXPECTED
    assert "train a stream, 7 to the epoch" in data.describe()


def test_ranks_share_the_tars_of_a_stream(web: Path) -> None:
    data = opened(web)
    assert set(seen(data, 0, 2)) == set(EXPECTED[:4]) and set(seen(data, 1, 2)) == set(EXPECTED[4:])
    with pytest.raises(UserError, match="expected a tar for each of 3 ranks x 1 worker, found 2"):
        train_loader(
            data, seed=0, global_batch=3, accumulation=1, rank=2, world_size=3, start_position=0,
            end_position=6, workers=1, pin_memory=False,
        )  # fmt: skip


def test_the_same_start_sees_the_same_samples_and_another_start_another_order(web: Path) -> None:
    data = opened(web)
    assert seen(data) == seen(data)
    assert [seen(data, start=start, end=start + 14) for start in (14, 28, 42)] != [seen(data)] * 3


def test_a_stream_goes_to_workers_that_are_not_forked(web: Path) -> None:
    batches = train_loader(
        opened(web), seed=0, global_batch=7, accumulation=1, rank=0, world_size=1, start_position=0,
        end_position=7, workers=0, pin_memory=False,
    ).batches  # fmt: skip
    (batch,) = list(pickle.loads(pickle.dumps(batches)))
    assert not isinstance(batch, UserError) and batch.valid.all()


def test_a_label_that_is_none_is_a_bad_sample_and_no_other_one(web: Path) -> None:
    data = opened(web)
    write_tar(web / "a-001.tar", [(n, b"9" if n.endswith("5.cls") else d) for n, d in samples(4, 5, 6)])
    with pytest.raises(UserError, match=r"a-001\.tar'?, sample \S+5: .*expected a class"):
        seen(data)
    skipping = replace(
        data, settings=data.settings.model_copy(update={"on_bad_sample": SkipBadSamples(max_fraction=0.9)})
    )
    assert sorted(set(seen(skipping)) - {(0, 0)}) == [pair for pair in EXPECTED if pair[0] not in (0, 5)]


def test_a_command_that_fails_is_one_line(web: Path) -> None:
    with pytest.raises(UserError, match=r"pipe:false: expected a stream .*, found: exit code 1 of"):
        opened(web, path="pipe:false")
    data = opened(web)
    (web / "a-001.tar").unlink()
    with pytest.raises(UserError, match="expected a stream of whole tars, found"):
        seen(data)


def test_a_command_that_fails_late_between_two_samples_loses_none_silently(web: Path) -> None:
    with tarfile.open(web / "a-000.tar") as tar:
        cut = next(member.offset for member in tar if member.name.startswith("part.v1/00003"))
    late = f"pipe:head -c {cut} '{web}/a-000.tar'; exec 1>&-; sleep 0.2; exit 3"
    with pytest.raises(UserError, match="expected a stream of whole tars, found: exit code 3 of the command"):
        opened(web, path=late)


def test_what_a_stream_cannot_promise_is_refused(web: Path, tmp_path: Path) -> None:
    for options, reason in {
        "epoch_samples": ({"epoch_samples": None}, "epoch_samples: expected it with `stream: true`"),
        "fields": ({"fields": None, "image": None, "index": None}, "fields: expected it"),
        "val": ({"indexing": {"val": 0.1}}, "what is evaluated must be indexed"),
        "stream": ({"stream": False, "epoch_samples": None}, "expected `stream: true` with a command"),
    }.values():
        with pytest.raises(ValueError, match=reason):
            settings_for(web, **options)
    with pytest.raises(UserError, match="expected val or test"):
        eval_loader(opened(web), "train", batch_size=2, rank=0, world_size=1, workers=0)


def test_a_strangers_run_opens_no_stream_without_a_word(web: Path, tmp_path: Path) -> None:
    with parts_of(tmp_path, "recipe.yaml"), pytest.raises(ValueError, match="found the stream pipe:cat"):
        settings_for(web)
