"""Small files with a flipped bit, cut, emptied or of another type: one line or a repaired file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtl_dist.assemble import identified
from mtl_dist.data.loader import open_data
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader, UnreadableSample
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.report.page.build import confusion_of
from mtl_dist.run_folder import RunFolder
from mtl_dist.status import Status, read_status, write_status
from mtl_dist.tracking.files import FilesSink, history_of, read_rows
from mtl_dist.tracking.registry import open_tracker
from tests.tiny_datasets import TASKS, write_dataset

SWAPPED = [b"", b"null", b"[]", b"{}", b"7", b'"text"', b"[[]]", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000]


def spoilt(good: bytes, flips: int, seed: int = 14) -> Iterator[bytes]:
    """`good` with one bit flipped, `flips` times; some cuts of it; other types in its place."""
    draw = random.Random(seed)
    for _ in range(flips):
        content = bytearray(good)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(content)
    for _ in range(flips // 5):
        yield good[: draw.randrange(len(good))]
    yield from SWAPPED


def every_value_swapped(good: bytes) -> Iterator[bytes]:
    """JSON with one of its values replaced by another type, each value once."""

    def swapped(value: object) -> Iterator[object]:
        yield None if value is not None else 1
        yield {} if isinstance(value, list) else []
        if isinstance(value, dict):
            for key, inner in value.items():
                yield {name: found for name, found in value.items() if name != key}
                yield from ({**value, key: other} for other in swapped(inner))
        elif isinstance(value, list):
            for at, inner in enumerate(value):
                yield from ([*value[:at], other, *value[at + 1 :]] for other in swapped(inner))

    for value in swapped(json.loads(good)):
        yield json.dumps(value).encode()


def lines_of(read: Callable[[], object], path: Path) -> list[str]:
    """The lines of the UserError that `read` ends with; none where it reads something."""
    try:
        read()
    except UserError as error:
        lines = str(error).splitlines()
        assert lines and all(lines), str(error)
        assert len(lines) == 1 and str(path) in lines[0] and len(lines[0]) < 1000
        return lines
    return []


def test_every_bit_and_every_value_of_a_manifest_is_read_or_is_one_line(tmp_path: Path) -> None:
    directory = write_dataset(tmp_path / "tiny", {"train": 12, "val": 4})
    path = directory / "dataset.json"
    good = path.read_bytes()
    for content in (*spoilt(good, 400), *every_value_swapped(good)):
        path.write_bytes(content)
        lines_of(lambda: read_manifest(directory), path)


# ---------------------------------------------------------------- of a run
@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with all its small files, as a start and two logged steps leave it."""
    directory = write_dataset(tmp_path / "tiny", {"train": 12, "val": 4})
    settings = DataSettings(train=({"path": str(directory)},), image_size=8)
    folder = RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    folder.write_start("tasks: {}\n", identified(open_data(settings, list(TASKS))), 1, "cpu", "torchvision")
    write_status(folder.directory, Status("running", step=2, metric="val/loss", best=0.5))
    tracker = open_tracker(folder.directory, tracking=())
    for step in (1, 2):
        tracker.record("step", step, step / 2, {"step/loss": 1 / step})
    tracker.record("epoch", 2, 1.0, {"train/loss": 0.5})
    tracker.close()
    folder.write_thresholds({"digit": {"a": 0.4}})
    folder.change_tags(["first"])
    folder.write_metrics("test", {"digit": {"accuracy": 0.5}}, {})
    return folder


READERS: dict[str, Callable[[RunFolder], object]] = {
    "status.json": lambda folder: read_status(folder.directory),
    "data.json": lambda folder: folder.read_data(),
    "environment.json": lambda folder: folder.starts(),
    "evaluation/metrics.json": lambda folder: folder.read_metrics(),
    "evaluation/thresholds.json": lambda folder: folder.read_thresholds(),
    "tags.json": lambda folder: folder.read_tags(),
    "metrics.jsonl": lambda folder: history_of(read_rows(folder.directory)),
}


@pytest.mark.parametrize("name", READERS)
def test_every_bit_of_a_run_s_small_files_is_read_or_is_one_line(run: RunFolder, name: str) -> None:
    path = run.directory / name
    good = path.read_bytes()
    swapped = every_value_swapped(good) if name.endswith(".json") else iter([])
    for content in (*spoilt(good, 100), *swapped):
        path.write_bytes(content)
        lines_of(lambda: READERS[name](run), path)


def test_a_damaged_status_says_so(run: RunFolder) -> None:
    (run.directory / "status.json").write_bytes(b'{"state": "runn')
    status = read_status(run.directory)
    assert status is not None and status.state == "failed" and "status.json is damaged" in status.reason


@pytest.mark.parametrize("content", SWAPPED)
def test_a_start_writes_damaged_files_anew_and_says_so(
    run: RunFolder, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run.read_data()
    assert facts is not None
    for name in ("tracking.json", "environment.json", "data.json"):
        (run.directory / name).write_bytes(content)
    said = run.write_start("tasks: {}\n", facts, 1, "cpu", "torchvision")
    open_tracker(run.directory, tracking=()).close()
    shown = capsys.readouterr().out + "\n".join(said)
    assert run.read_data() == facts and len(run.starts()) == 1
    assert "tracking.json was damaged" in shown
    assert "environment.json" in shown or content == b"[]"


def test_a_record_that_was_cut_is_rebuilt_up_to_the_checkpoint(run: RunFolder) -> None:
    path = run.directory / "metrics.jsonl"
    good = path.read_text()
    rows = read_rows(run.directory)
    for content in (*spoilt(good.encode(), 20), good[: len(good) // 2].encode()):
        path.write_bytes(content)
        sink = FilesSink(run.directory, resumed_step=2, record=good)
        sink.close()
        assert path.read_text() == good
        assert bool(sink.notes) == (content != good.encode())
        assert (run.directory / "history.json").read_text() == json.dumps(history_of(rows), indent=1)


def test_a_damaged_line_of_a_finished_record_is_marked(run: RunFolder) -> None:
    path = run.directory / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{]\n" + lines[2])
    assert [(row["kind"], row.get("line")) for row in read_rows(run.directory)] == [
        ("step", None),
        ("damaged", 2),
        ("epoch", None),
    ]


def test_every_bit_of_a_confusion_matrix_is_counts_or_a_line(tmp_path: Path) -> None:
    task = SimpleNamespace(name="digit", info=TASKS["digit"])
    record = SimpleNamespace(folder=RunFolder(tmp_path))
    path = tmp_path / "evaluation" / "test_digit_confusion.csv"
    path.parent.mkdir()
    good = b"true \\ predicted,a,b,c\na,1,2,3\nb,4,5,6\nc,7,8,9\n"
    cut = good[: len(good) // 2]
    for content in (*spoilt(good, 200), cut):
        path.write_bytes(content)
        lines = lines_of(lambda: confusion_of(record, task, "test"), path)  # type: ignore[arg-type]
        assert lines or content not in (cut, *SWAPPED)
    assert confusion_of(record, task, "val") is None  # type: ignore[arg-type]


# ---------------------------------------------------------------- of a dataset
@pytest.mark.parametrize("name", ["train.index.npy"])
def test_every_bit_of_an_index_is_a_line_or_a_sample_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    directory = write_dataset(tmp_path / "tiny", {"train": 12})
    manifest = read_manifest(directory)
    path = directory / name
    good = path.read_bytes()
    whole = [bytes(SplitReader(directory, manifest, "train").read(row).image) for row in range(12)]

    def read() -> None:
        reader = SplitReader(directory, manifest, "train")
        for row in range(12):
            try:
                sample = reader.read(row)
            except UnreadableSample:
                continue
            assert bytes(sample.image) == whole[row], "other bytes, and nobody says so"

    for content in spoilt(good, 300):
        path.write_bytes(content)
        lines_of(read, path)
