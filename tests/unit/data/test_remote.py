"""Data at URLs: bad servers are outlasted or named, and a cache holds whole files within its bounds."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

import mtl_dist.data.remote as remote
from mtl_dist.batch import Batch
from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.data.cache import Cache, CacheSettings
from mtl_dist.data.inspect import inspect_dataset
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.remote import Url, UrlReader, beside, location
from mtl_dist.data.settings import DataSettings
from mtl_dist.durable import locked
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from tests.bad_server import BadServer, serving
from tests.source_files import index_tars
from tests.tiny_datasets import TASKS, write_dataset

pytest.importorskip("aiohttp", reason="needs aiohttp to read http URLs")

CONTENT = bytes(range(256)) * 40
SIZE = len(CONTENT)
HASH = hashlib.sha256(CONTENT).hexdigest()
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits that suit the loopback."""
    monkeypatch.setattr(remote, "_TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "_ATTEMPTS", 4)
    monkeypatch.setattr(remote, "PART", 4096)
    monkeypatch.setattr("mtl_dist.data.cache.PART", 4096)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BadServer]:
    (tmp_path / "served").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / "served" / name).write_bytes(CONTENT)
    with serving(tmp_path / "served") as running:
        yield running


def cache_in(directory: Path, num_files: float = 100) -> Cache:
    return Cache(CacheSettings(dir=directory, max_gb=num_files * SIZE / 1e9))


def content(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def held(directory: Path) -> int:
    """The bytes that a cache's directory holds."""
    return sum(path.stat().st_size for path in directory.iterdir())


# ---------------------------------------------------------------- requests
def test_a_range_and_a_whole_file_are_read(server: BadServer) -> None:
    url = Url(server.url) / "a"
    assert url.read(100, 50) == CONTENT[100:150]
    assert server.bytes_sent == 50
    assert url.size() == SIZE
    assert url.read_all() == CONTENT
    reader = UrlReader(url)
    assert b"".join(iter(lambda: reader.read(999), b"")) == CONTENT


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "short"])
def test_a_server_that_fails_for_a_while_is_outlasted(
    server: BadServer, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [fault, fault]
    with caplog.at_level(logging.WARNING):
        assert (Url(server.url) / "a").read(100, 50) == CONTENT[100:150]
    assert server.requests["/a"] == 3
    assert sum("trying again" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_server_that_keeps_failing_is_named_in_one_line(server: BadServer, fault: str) -> None:
    server.faults = [fault] * 9
    with pytest.raises(UserError, match=r"/a: expected to read it, found after 4 attempts: .") as error:
        (Url(server.url) / "a").read(100, 50)
    assert len(str(error.value).splitlines()) == 1
    assert server.requests["/a"] == 4


def test_what_repeating_does_not_mend_is_told_at_once(server: BadServer) -> None:
    with pytest.raises(UserError, match="/none: expected to read it, found: "):
        (Url(server.url) / "none").read(0, 5)
    assert server.requests["/none"] == 1
    server.faults = ["403"]
    with pytest.raises(UserError, match=r"/a: expected to read it, found: 403"):
        (Url(server.url) / "a").read(0, 5)
    with pytest.raises(UserError, match=r"expected a URL that can be read, found: .*nosuch"):
        Url("nosuch://bucket/a").read(0, 5)


def test_a_server_that_sends_whole_files_only_needs_a_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with serving(tmp_path, ranges=False) as server:
        url = Url(server.url) / "a"
        with pytest.raises(UserError, match=r"the server sends whole files only\. Set `data\.cache`"):
            url.read(100, 50)
        assert url.read_all() == CONTENT
        assert content(cache_in(tmp_path / "cache").open(url, SIZE, HASH)) == CONTENT


def test_places_are_told_apart_and_joined() -> None:
    assert location("s3://b/x") == Url("s3://b/x")
    assert location("data/x") == Path("data/x")
    assert beside(Url("s3://b/x/"), "t.tar") == Url("s3://b/x/t.tar")
    assert beside(Path("d"), "gs://b/t.tar") == Url("gs://b/t.tar")
    assert beside(Url("s3://b/x"), "/abs/t.tar") == Path("/abs/t.tar")
    assert beside(Path("d"), "t.tar") == Path("d/t.tar")
    assert Url("s3://b/x/").name == "x"


# ---------------------------------------------------------------- the cache
def test_a_file_is_fetched_once_and_found_whole(server: BadServer, tmp_path: Path) -> None:
    url = Url(server.url) / "a"
    for _ in range(3):
        assert content(cache_in(tmp_path / "cache").open(url, SIZE, HASH)) == CONTENT
    assert server.requests["/a"] == -(-SIZE // 4096)
    assert content(cache_in(tmp_path / "cache").open(url)) == CONTENT  # of unknown size and hash


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "short"])
def test_a_fetch_goes_on_after_a_fault(server: BadServer, tmp_path: Path, fault: str) -> None:
    server.faults = ["ok", fault]
    assert content(cache_in(tmp_path / "cache").open(Url(server.url) / "a", SIZE, HASH)) == CONTENT


def test_a_fetch_that_fails_leaves_no_file(server: BadServer, tmp_path: Path) -> None:
    server.faults = ["ok", *["500"] * 9]
    cache, url = cache_in(tmp_path / "cache"), Url(server.url) / "a"
    with pytest.raises(UserError, match="after 4 attempts"):
        cache.open(url, SIZE, HASH)
    assert all(path.suffix == ".partial" or path.name == "lock" for path in (tmp_path / "cache").iterdir())
    server.faults = []
    assert content(cache.open(url, SIZE, HASH)) == CONTENT


def test_another_content_than_was_said_is_refused(server: BadServer, tmp_path: Path) -> None:
    (server.root / "a").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match="/a: expected the 10,240 bytes in the manifest, found"):
        cache_in(tmp_path / "cache").open(Url(server.url) / "a", SIZE, HASH)


def test_files_not_opened_for_longest_make_room(server: BadServer, tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache", num_files=2.5)
    for name in ("a", "b", "a", "c"):  # b was not opened for longest when c comes
        os.close(cache.open(Url(server.url) / name, SIZE, HASH))
        time.sleep(0.01)
        assert held(tmp_path / "cache") <= 2.5 * SIZE
    before = server.requests.copy()
    for name, fetched in (("a", False), ("c", False), ("b", True)):
        os.close(cache.open(Url(server.url) / name, SIZE, HASH))
        assert (server.requests[f"/{name}"] > before[f"/{name}"]) == fetched
        time.sleep(0.01)


def test_what_is_open_is_read_on_after_its_removal(server: BadServer, tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache", num_files=1)
    descriptor = cache.open(Url(server.url) / "a", SIZE, HASH)
    os.close(cache.open(Url(server.url) / "b", SIZE, HASH))
    assert held(tmp_path / "cache") <= SIZE
    assert content(descriptor) == CONTENT


def test_a_file_larger_than_the_cache_is_refused(server: BadServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache\.max_gb: expected room for a file of 10,240 bytes"):
        cache_in(tmp_path / "cache", num_files=0.5).open(Url(server.url) / "a", SIZE, HASH)


def test_a_file_cut_off_by_a_crash_is_fetched_again(server: BadServer, tmp_path: Path) -> None:
    cache, url = cache_in(tmp_path / "cache"), Url(server.url) / "a"
    os.close(cache.open(url, SIZE, HASH))
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name != "lock")
    os.truncate(path, 100)
    assert content(cache.open(url, SIZE, HASH)) == CONTENT


def test_a_file_that_another_fetched_between_look_and_lock_is_not_fetched_again(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, url = cache_in(tmp_path / "cache"), Url(server.url) / "a"
    others = [cache_in(tmp_path / "cache")]

    def after_the_other(path: Path, wait: bool = True) -> AbstractContextManager[int]:
        if others:
            os.close(others.pop().open(url, SIZE, HASH))
        return locked(path, wait=wait)

    monkeypatch.setattr("mtl_dist.data.cache.locked", after_the_other)
    assert content(cache.open(url, SIZE, HASH)) == CONTENT
    assert server.requests["/a"] == -(-SIZE // 4096)
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache\.dir: expected .*/file/cache to be a directory"):
        cache_in(tmp_path / "file" / "cache")


PROCESS = f"""
import os, sys
from pathlib import Path
import mtl_dist.data.remote as remote
remote.PART = 4096
import mtl_dist.data.cache as cache
from mtl_dist.data.remote import Url
opened = cache.Cache(cache.CacheSettings(dir=Path(sys.argv[2]), max_gb=float(sys.argv[3])))
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[4:]:
    with os.fdopen(opened.open(Url(sys.argv[1]) / name, {SIZE}, "{HASH}"), "rb") as file:
        assert file.read() == bytes(range(256)) * 40
print("done", flush=True)
"""


def process(server: BadServer, directory: Path, num_files: float, *names: str) -> subprocess.Popen[str]:
    arguments = [server.url, str(directory), str(num_files * SIZE / 1e9), *names]
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def started(processes: list[subprocess.Popen[str]]) -> None:
    """Let all of them go at once."""
    for each in processes:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()


@pytest.mark.parametrize(("num_files", "once"), [(100, True), (2.2, False)])
def test_several_processes_share_a_cache(
    server: BadServer, tmp_path: Path, num_files: float, once: bool
) -> None:
    names = ["a", "b", "c", "d"]
    orders = (names, names[::-1], [*names[2:], *names[:2]])
    processes = [process(server, tmp_path / "cache", num_files, *(order * 3)) for order in orders]
    started(processes)
    while any(each.poll() is None for each in processes):
        # Under the lock of the cache: a file that makes room for the next is not seen beside it.
        with suppress(FileNotFoundError), locked(tmp_path / "cache" / "lock"):
            assert held(tmp_path / "cache") <= num_files * SIZE
        time.sleep(0.01)
    assert [each.communicate()[0] for each in processes] == ["done\n"] * 3
    assert [each.returncode for each in processes] == [0, 0, 0]
    if once:
        assert set(server.requests.values()) == {-(-SIZE // 4096)}


def test_what_a_killed_process_had_fetched_never_counts(server: BadServer, tmp_path: Path) -> None:
    server.faults = ["ok", "stall"]
    victim = process(server, tmp_path / "cache", 1, "a")
    started([victim])
    while server.requests["/a"] < 2:
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    assert [path.stat().st_size for path in (tmp_path / "cache").glob("*.partial")] == [SIZE]
    cache = cache_in(tmp_path / "cache", num_files=1)
    assert content(cache.open(Url(server.url) / "b", SIZE, HASH)) == CONTENT  # the room is free again
    assert content(cache.open(Url(server.url) / "a", SIZE, HASH)) == CONTENT
    assert list((tmp_path / "cache").glob("*.partial")) == []


# ---------------------------------------------------------------- training
def batches_of(directory: str, root: Path, workers: int = 0, **options: Any) -> list[Batch]:
    stated = {"train": [{"path": directory}], "image_size": [8, 10], "augment": "strong", **options}
    data = open_data(DataSettings.model_validate(stated, strict=False), TASKS, root)
    return list(
        train_loader(
            data,
            seed=7,
            global_batch=6,
            accumulation=1,
            rank=0,
            world_size=1,
            start_position=0,
            end_position=46,
            workers=workers,
            pin_memory=False,
        )
    )


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        assert one.images_BCHW.equal(other.images_BCHW)
        for name, target in one.targets.items():
            assert target.equal(other.targets[name])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_over_http_sees_what_it_would_see_here(tmp_path: Path, workers: int, cached: bool) -> None:
    write_dataset(tmp_path / "served" / "tiny", {"train": 23, "val": 4})
    expected = batches_of("served/tiny", tmp_path)
    options = {"cache": {"dir": str(tmp_path / "cache"), "max_gb": 1}} if cached else {}
    with serving(tmp_path / "served") as server:
        server.faults = ["500", "cut"]
        assert_same(batches_of(f"{server.url}/tiny", tmp_path, workers, **options), expected)
        if cached:
            before = Counter(server.requests)
            assert_same(batches_of(f"{server.url}/tiny", tmp_path, workers, **options), expected)
            # Only the manifest, which says whether all is as it was.
            parts = -(-(tmp_path / "served" / "tiny" / "dataset.json").stat().st_size // 4096)
            assert server.requests - before == {"/tiny/dataset.json": parts}


def test_the_samples_of_a_batch_are_asked_for_at_once(tmp_path: Path) -> None:
    write_dataset(tmp_path / "served" / "tiny", {"train": 23})
    with serving(tmp_path / "served") as server:
        server.delay = 0.1
        server.faults = ["ok"] * 2 + ["500", "short", "cut"]
        ours = batches_of(f"{server.url}/tiny", tmp_path)
        assert server.most_at_once == 6
        tars = sum(count for path, count in server.requests.items() if path.endswith(".tar"))
        assert tars == 46 + 3  # one for each sample and for each fault
    assert_same(ours, batches_of("served/tiny", tmp_path))


def test_a_shared_disk_is_cached_as_a_file_url(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 23})
    cache = {"dir": str(tmp_path / "cache"), "max_gb": 1}
    ours = batches_of(f"file://{tmp_path / 'tiny'}", tmp_path, cache=cache)
    assert_same(ours, batches_of("tiny", tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 1 + 1 + 5  # lock, index, shards


def test_a_server_that_dies_ends_the_run_with_one_line_and_is_no_bad_sample(tmp_path: Path) -> None:
    write_dataset(tmp_path / "served" / "tiny", {"train": 23})
    with serving(tmp_path / "served") as server:
        server.faults = ["ok"] * 3 + ["500"] * 99
        skip = {"kind": "skip", "max_fraction": 0.9}
        with pytest.raises(
            UserError, match=r"\.tar: expected to read it, found after 4 attempts: 500"
        ) as error:
            batches_of(f"{server.url}/tiny", tmp_path, on_bad_sample=skip)
    assert len(str(error.value).splitlines()) == 1


def test_no_dataset_at_a_url_is_one_line(server: BadServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/tiny/dataset\.json: expected to read it, found: ") as error:
        batches_of(f"{server.url}/tiny", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_urls_are_stated_in_a_recipe_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(
        "train: [{path: s3://bucket/cats}]\nimage_size: 64\ncache: {dir: /scratch/x, max_gb: 2}\n"
    )
    read = load_settings(DataSettings, path)
    assert read.train[0].path == Url("s3://bucket/cats")
    assert read.with_absolute_paths(tmp_path).train[0].path == Url("s3://bucket/cats")
    path.write_text(to_yaml(read))
    assert load_settings(DataSettings, path) == read


def test_tars_at_urls_are_indexed_where_they_are(tmp_path: Path) -> None:
    write_dataset(tmp_path / "served", {"train": 23})
    mapping = dict(classification={"digit": "json:digit"}, classes={"digit": ("a", "b", "c")})
    options = PackOptions(workers=1)
    with serving(tmp_path / "served") as server:
        server.faults = ["500", "cut"]
        tars = f"{server.url}/train-{{000000..000004}}.tar"
        manifest = index_tars([tars], tmp_path / "there", mapping, options=options)
        index_tars([str(tmp_path / "served")], tmp_path / "here", mapping, options=options)
        for name in ("train.index.npy", "train.labels.npy", "train.hashes.npy"):
            assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
        assert manifest.splits["train"].shards[4].path == f"{server.url}/train-000004.tar"
        assert inspect_dataset(tmp_path / "there", verify=True).problems == ()
        reader = SplitReader(tmp_path / "there", manifest, "train")
        assert reader.read(22).key == "sample00022"
        (tmp_path / "served" / "train-000004.tar").write_bytes(b"")
        (problem,) = inspect_dataset(tmp_path / "there", verify=True).problems or ()
        assert "train-000004.tar: expected " in problem


# ---------------------------------------------------------------- S3
def test_a_run_over_s3_sees_what_it_would_see_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto's server")
    import boto3  # type: ignore[import-untyped]

    monkeypatch.setattr(remote, "_TIMEOUT", 20.0)
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        directory = write_dataset(tmp_path / "tiny", {"train": 23})
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in directory.iterdir():
            client.upload_file(str(path), "bucket", f"sets/tiny/{path.name}")
        expected = batches_of("tiny", tmp_path)
        assert_same(batches_of("s3://bucket/sets/tiny", tmp_path, workers=1), expected)
        mapping = dict(classification={"digit": "json:digit"})
        one = PackOptions(workers=1)
        index = index_tars(["s3://bucket/sets/tiny/"], tmp_path / "index", mapping, options=one)
        paths = [shard.path for shard in index.splits["train"].shards]
        assert paths == [f"s3://bucket/sets/tiny/train-00000{i}.tar" for i in range(5)]
        cache = {"dir": str(tmp_path / "cache"), "max_gb": 1}
        assert_same(batches_of("s3://bucket/sets/tiny", tmp_path, cache=cache), expected)
        client.delete_object(Bucket="bucket", Key="sets/tiny/train-000000.tar")
        assert_same(batches_of("s3://bucket/sets/tiny", tmp_path, cache=cache), expected)
        with pytest.raises(UserError, match=r"s3://bucket/none/dataset\.json: expected to read it, found"):
            batches_of("s3://bucket/none", tmp_path)
    finally:
        server.stop()
