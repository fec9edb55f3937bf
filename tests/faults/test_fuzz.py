"""Damaged files: what reads them answers with a value or its own error, and with nothing else.

Seeded: the same cases every time. `make fuzz` tries a hundred times as many. No case may take more than 20 s
of processor time or 2 GiB more memory than there was, or write anything but below its own folder.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from mtl_dist.assemble import identified, read_trained
from mtl_dist.checkpoint import MANIFEST, known_bests, newest_good
from mtl_dist.config.yaml_text import YamlError, parse
from mtl_dist.data.decode import decode_image, decode_map, open_picture
from mtl_dist.data.images import UnreadableImage, examine_image
from mtl_dist.data.inspect import inspect_dataset
from mtl_dist.data.loader import open_data
from mtl_dist.data.manifest import MANIFEST_NAME, read_manifest
from mtl_dist.data.reader import SplitReader, UnreadableSample
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shards import scan_shard
from mtl_dist.durable import sha256_of
from mtl_dist.engine.connect import connect_without_engine
from mtl_dist.engine.settings import EngineSettings
from mtl_dist.errors import UserError
from mtl_dist.face import Run
from mtl_dist.importers.sources import Source
from mtl_dist.importers.tars import Tars, index
from mtl_dist.recipe import load_recipe
from mtl_dist.report.run_list import list_runs
from mtl_dist.run_folder import RunFolder
from mtl_dist.runs.verification import verify
from tests.tiny_datasets import TASKS, write_dataset
from tests.tiny_runs import RECIPE, train_run

CASES = int(os.environ.get("FUZZ_CASES", "150"))
_CPU_S = 20.0
_MEMORY = 2 << 30


class Hung(BaseException):
    """A case took too long."""


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory within bounds, and nothing written where no case has anything to do."""
    elsewhere = tmp_path / "elsewhere"
    for name, variable in (("home", "HOME"), ("tmp", "TMPDIR"), ("cwd", "")):
        (elsewhere / name).mkdir(parents=True)
        if variable:
            monkeypatch.setenv(variable, str(elsewhere / name))
    monkeypatch.chdir(elsewhere / "cwd")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + _MEMORY, before[1]))

    def hung(number: int, frame: object) -> None:
        raise Hung(f"more than {_CPU_S:g} s of processor time")

    handler = signal.signal(signal.SIGPROF, hung)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file gone wrong: bits, cuts, runs of one byte, pieces moved, lengths blown up."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(1, len(content)))
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at:]
            case 2:
                content[at : at + rng.randrange(1, 64)] = bytes([rng.choice((0, 255))]) * rng.randrange(1, 64)
            case 3:
                piece = content[at : at + rng.randrange(1, 200)]
                to = rng.randrange(max(1, len(content)))
                content[to:to] = piece
            case 4:
                content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
            case 5:
                del content[at : at + rng.randrange(1, 64)]
    return bytes(content)


def cases(data: bytes, name: str, count: int = CASES) -> Iterator[bytes]:
    for number in range(count):
        yield damaged(data, random.Random(f"{name} {number}"))


def survives(call: Callable[[], Any], data: object, *expected: type[Exception]) -> None:
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)
    try:
        call()
    except expected as error:
        assert str(error).strip()
    except (Exception, Hung) as error:
        raise AssertionError(f"{type(error).__name__}: {error}, of {data!r:.400}") from error


# ---------------------------------------------------------------- images
def image(format: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 17, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((9, 7, 3), np.float32))
    return file.getvalue()


def deep_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(file, "PNG")
    return file.getvalue()


IMAGES = {
    "jpeg": image("JPEG"),
    "png": image("PNG"),
    "palette": image("PNG", "P"),
    "deep png": deep_png(),
    "gif": image("GIF"),
    "bmp": image("BMP"),
    "tiff": image("TIFF"),
    "webp": image("WEBP"),
    "npy": array(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IMAGES)
def test_a_damaged_image_is_unreadable_or_an_image(name: str) -> None:
    for data in cases(IMAGES[name], name):
        survives(lambda data=data: decode_image(data, 3), data, UnreadableImage)
        survives(lambda data=data: open_picture(memoryview(data), 3), data, UnreadableImage)
        survives(lambda data=data: examine_image(data), data, UnreadableImage)
        survives(lambda data=data: decode_map(data), data, UnreadableImage)


# ---------------------------------------------------------------- text
def test_a_damaged_recipe_is_a_recipe_or_lines_about_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for data in cases(RECIPE.encode(), "recipe"):
        path.write_bytes(data)
        survives(lambda: load_recipe(path), data, UserError)
        text = data.decode("utf-8", errors="replace")
        survives(lambda text=text: parse(text), text, YamlError)


def test_a_damaged_manifest_is_a_manifest_or_one_line_about_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 3})
    path = tmp_path / "tiny" / MANIFEST_NAME
    for data in cases(path.read_bytes(), "manifest"):
        path.write_bytes(data)
        survives(lambda: read_manifest(path.parent), data, UserError)


def test_a_manifest_with_values_of_other_types_is_one_line(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 3})
    path = tmp_path / "tiny" / MANIFEST_NAME
    whole = json.loads(path.read_text())
    rng = random.Random(0)
    for _ in range(CASES):
        content = json.loads(json.dumps(whole))
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = rng.choice(list(keys))
            if isinstance(at[key], dict | list) and rng.random() < 0.7:
                at = at[key]
                continue
            at[key] = rng.choice((None, "x", -1, 1e300, [], {}, True, "../../etc", ["a"]))
            break
        path.write_text(json.dumps(content))
        survives(lambda: read_manifest(path.parent), content, UserError)


# ---------------------------------------------------------------- archives
def test_a_damaged_zip_is_read_or_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"abc" * 100)
        archive.writestr("../b.txt", b"abc")
    for number, data in enumerate(cases(file.getvalue(), "zip")):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        survives(lambda path=path: Source("a.txt", 0, 0, str(path)).read(), data, UserError)
    assert not (tmp_path.parent / "b.txt").exists()


# ---------------------------------------------------------------- datasets
def damaged_files(directory: Path, names: str, name: str, count: int) -> Iterator[str]:
    """One file of a folder damaged at a time, and put back; which it was, and by which case."""
    files = sorted(path for path in directory.rglob(names) if path.is_file())
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        before = sorted(directory.rglob("*"))
        yield f"{path.name}, case {number} of {name}"
        assert sorted(directory.rglob("*")) == before, "files were added or removed"
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("fuzz") / "tiny", {"train": 12, "val": 4})


def read_all(directory: Path) -> None:
    """Every sample of a dataset, as a training reads them."""
    settings = DataSettings.model_validate(
        {"train": [{"path": str(directory)}], "image_size": 8}, strict=False
    )
    data = open_data(settings, list(TASKS))
    for source in (one for group in data.sources.values() for one in group):
        for row in range(source.reader.num_samples):
            try:
                sample = source.reader.read(
                    row, ("shape",) if source.reader.labelled("shape", np.array([row])) else ()
                )
                decode_image(sample.image, 3)
            except (UnreadableSample, UnreadableImage) as error:
                assert str(error) and source.reader.where(row)
    identified(data)


def test_a_dataset_with_a_damaged_file_is_read_or_refused(tiny: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    for case in damaged_files(directory, "*", "dataset", CASES):
        survives(lambda: read_all(directory), case, UserError)
        survives(lambda: inspect_dataset(directory, verify=True), case, UserError)
        survives(lambda: inspect_dataset(directory), case, UserError)


def test_a_damaged_index_is_an_index_or_one_line(tiny: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    manifest = read_manifest(directory)
    for case in damaged_files(directory, "*.npy", "index", CASES):

        def read() -> None:
            reader = SplitReader(directory, manifest, "train")
            for row in range(reader.num_samples):
                try:
                    reader.read(row)
                except UnreadableSample as error:
                    assert str(error) and reader.where(row)

        survives(read, case, UserError)


def test_a_damaged_tar_is_scanned_or_refused(tiny: Path, tmp_path: Path) -> None:
    """Ours by its headers, somebody else's by all it has."""
    kinds = {name: info.kind for name, info in TASKS.items()}
    path = tmp_path / "tars" / "some.tar"
    path.parent.mkdir()
    whole = (tiny / "train-000000.tar").read_bytes()
    for number, data in enumerate(cases(whole, "tar", CASES // 3)):
        path.write_bytes(data)
        survives(lambda: scan_shard(path, kinds), data, UserError)
        tars = Tars((str(path),), ("npy",), {"value": "regression:json:value"})
        survives(lambda tars=tars, number=number: index(tars, tmp_path / f"{number}"), data, UserError)


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("DATA", str(tiny)))
    train_run(recipe, folder / "run", ["train.epochs=2", "train.evaluate_at_end=true"])
    return folder / "run"


def look_at(run: Path) -> None:
    """All that is known of a run without its weights."""
    list_runs([run])
    opened = Run(run)
    assert repr(opened)
    for name in ("status", "tags", "rows", "history", "best"):
        getattr(opened, name)


def test_a_run_folder_with_a_damaged_file_is_read_or_one_line(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for case in damaged_files(run, "*", "run folder", CASES // 6):
        survives(lambda: look_at(run), case, UserError)
        survives(lambda: Run(run).metrics, case, UserError)
        survives(lambda: Run(run).recipe, case, UserError)
        survives(lambda: verify(run), case, UserError)


def test_a_damaged_checkpoint_is_passed_over(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for case in damaged_files(run / "checkpoints", "*", "checkpoint", CASES // 3):
        survives(lambda: newest_good(run / "checkpoints", lambda line: None), case, UserError)
        survives(lambda: known_bests(run / "checkpoints"), case, UserError)


def test_a_checkpoint_that_is_damaged_behind_its_hashes_is_read_or_one_line(
    trained: Path, tmp_path: Path
) -> None:
    """As somebody who knows what he does could make one."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    world = connect_without_engine(EngineSettings())
    folder = max((run / "checkpoints").glob("step_*"))
    manifest = (folder / MANIFEST).read_bytes()
    for case in damaged_files(folder, "[!m]*", "behind hashes", CASES // 6):
        content = json.loads(manifest)
        for name, facts in content["files"].items():
            facts.update(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        (folder / MANIFEST).write_text(json.dumps(content))
        survives(lambda: verify(run), case, UserError)
        survives(lambda: known_bests(run / "checkpoints"), case, UserError)
        survives(lambda: read_trained(RunFolder(run), lambda line: None, "last").root(world), case, UserError)
        (folder / MANIFEST).write_bytes(manifest)
