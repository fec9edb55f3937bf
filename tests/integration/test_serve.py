"""The service over a trained run: it answers as the run does, and bad input is a sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_dist.prediction.predictor import Predictor
from mtl_dist.prediction.records import plain
from mtl_dist.serving.limits import Limits
from tests.browser import chromium
from tests.tiny_datasets import image_of, npy, png
from tests.tiny_runs import train_run

pytestmark = pytest.mark.slow
pytest.importorskip("python_multipart", reason="the extra serve is not installed")
testing = pytest.importorskip("fastapi.testclient", reason="the extra serve is not installed")

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def predictor(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    directory = tmp_path_factory.mktemp("run")
    train_run(recipe, directory / "run", ["train.max_steps=1"])
    return Predictor(directory / "run", "cpu")


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[Any]:
    from mtl_dist.serving.app import build_app

    limits = Limits(max_bytes=200_000, max_files=3, max_pixels=5_000)
    app = build_app(predictor, limits, "tiny", ("127.0.0.1", "localhost"))
    with testing.TestClient(app, base_url=HERE, raise_server_exceptions=False) as client:
        yield client


def asked(client: Any, *images: bytes, maps: bool = False) -> Any:
    files = [("files", (f"{number}.png", data)) for number, data in enumerate(images)]
    return client.post(f"/predict?maps={str(maps).lower()}", files=files)


def test_several_files_are_answered_as_the_run_does(client: Any, predictor: Predictor) -> None:
    images = [image_of(number) for number in range(3)]
    response = asked(client, *map(png, images))
    assert response.status_code == 200
    for found, answer in zip(response.json()["predictions"], predictor.predict_many(images), strict=True):
        assert found["answers"].keys() == answer.keys()
        for task, values in answer.items():
            for key, value in plain(values).items():
                assert found["answers"][task][key] == (
                    pytest.approx(value, abs=1e-5) if isinstance(value, float | dict) else value
                )


def test_masks_and_overlays_come_as_pictures(client: Any, predictor: Predictor) -> None:
    (found,) = asked(client, png(image_of(1)), maps=True).json()["predictions"]
    assert found["maps"].keys() == {"shape"}
    mask = found["maps"]["shape"]["mask"].removeprefix("data:image/png;base64,")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(mask))))
    assert np.array_equal(pixels, predictor.predict(image_of(1))["shape"]["mask"])
    assert all(colour.startswith("#") for colour in found["maps"]["shape"]["legend"].values())
    overlay = found["maps"]["shape"]["overlay"].removeprefix("data:image/png;base64,")
    # Outlines are 2 pixels wide, which in the image's own size would hide it.
    assert max(Image.open(io.BytesIO(base64.b64decode(overlay))).size) == 512


def test_each_request_has_its_own_threshold_also_where_they_share_a_batch(
    client: Any, predictor: Predictor
) -> None:
    """As `mtl predict --threshold` answers: labels, and the pixels of a mask of two classes."""
    thresholds = [None, 0.01, 0.99] * 4
    with ThreadPoolExecutor(len(thresholds)) as pool:
        found = pool.map(
            lambda given: client.post(
                "/predict",
                params={} if given is None else {"threshold": given},
                files=[("files", ("a.png", png(image_of(1))))],
            ),
            thresholds,
        )
        answers = [response.json()["predictions"][0]["answers"] for response in found]
    for given, answer in zip(thresholds, answers, strict=True):
        expected = predictor.predict(image_of(1), given)
        assert answer["tags"]["labels"] == expected["tags"]["labels"]
        assert answer["shape"] == pytest.approx(plain(expected["shape"]), abs=1e-3)
    assert answers[1]["tags"]["labels"] != answers[2]["tags"]["labels"]
    assert answers[1]["shape"]["area_ratio"] > answers[2]["shape"]["area_ratio"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header asks for many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = bytearray(png(image_of(1)))
    data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    return bytes(data)


def float_tiff_without_data(width: int, height: int) -> bytes:
    """A TIFF of floats whose strips hold nothing that can be decoded."""
    buffer = io.BytesIO()
    Image.new("F", (width, height), 1.0).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    with Image.open(buffer) as image:
        places = list(zip(image.tag_v2[273], image.tag_v2[279], strict=True))  # type: ignore[attr-defined]
    data = bytearray(buffer.getvalue())
    for at, length in places:
        data[at : at + length] = bytes(length)
    return bytes(data)


@pytest.mark.parametrize(
    ("images", "code", "says"),
    [
        ([b"no image"], 422, "0.png: expected a readable image, found"),
        ([b""], 422, "0.png: expected a readable image, found"),
        ([png(image_of(1))[:45]], 422, "0.png: expected a readable image, found"),
        ([png(image_of(1)), b"\x00"], 422, "1.png: expected a readable image, found"),
        ([png(np.zeros((100, 90, 3), np.uint8))], 413, "expected at most 5,000 pixels, found 90 x 100."),
        ([bomb(60_000, 60_000)], 422, "pixels"),
        ([bomb(9_000, 9_000)], 413, "expected at most 5,000 pixels, found 9,000 x 9,000."),
        ([float_tiff_without_data(300, 400)], 413, "expected at most 5,000 pixels, found 300 x 400."),
        ([npy(np.array([object()], dtype=object))], 422, "0.png: expected a readable image, found"),
        ([b"x" * 300_000], 413, "expected a request of at most 200,000 bytes, found more."),
        ([b"x"] * 4, 413, "expected at most 3 files, found 4."),
    ],
    ids=["text", "empty", "cut", "second", "pixels", "bomb", "header", "floats", "pickle", "bytes", "files"],
)
def test_bad_input_is_one_sentence(client: Any, images: list[bytes], code: int, says: str) -> None:
    response = asked(client, *images)
    assert response.status_code == code
    assert says in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


def test_a_body_without_a_length_is_counted_too(client: Any) -> None:
    chunks = (b"x" * 50_000 for _ in range(9))
    response = client.post(
        "/predict", content=chunks, headers={"Content-Type": "multipart/form-data; boundary=a"}
    )
    assert response.status_code in (400, 413)


def test_what_is_no_form_or_goes_elsewhere_is_a_4xx(client: Any) -> None:
    assert client.post("/predict").json() == {
        "detail": "files: expected one file or more, found nothing. With curl: -F files=@NAME"
    }
    assert client.post("/predict", json={"files": 1}).status_code == 422
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing").status_code == 404
    stranger = client.get("/health", headers={"Host": "evil.example"})
    assert stranger.status_code == 400
    assert "expected a Host header of 127.0.0.1, localhost, found 'evil.example'" in stranger.json()["detail"]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (
            {"data": {"files": "hello"}},
            "files: expected one file or more, found text. With curl: -F files=@NAME",
        ),
        (
            {"files": [("file", b"x")]},
            "files: expected one file or more, found 'file'. With curl: -F files=@NAME",
        ),
        (
            {"files": [("files", png(image_of(1))), ("file", b"x")]},
            "expected files as the only field of the form, found 'file'.",
        ),
        (
            {"files": [("files", png(image_of(1)))], "params": {"thresh": "0.9"}},
            "expected maps and threshold as the only parameters of the query, found 'thresh'.",
        ),
        (
            {"files": [("files", png(image_of(1)))], "params": {"threshold": ["0.3", "0.9"]}},
            "threshold: expected one value, found 2.",
        ),
        *(
            (
                {"files": [("files", png(image_of(1)))], "params": {"threshold": given}},
                f"threshold: expected a probability between 0 and 1, found '{given}'.",
            )
            for given in ("half", "0", "1.0", "nan", "1e400", "")
        ),
        (
            {"files": [("files", png(image_of(1)))], "params": {"maps": "loud"}},
            "maps: expected true or false, found 'loud'.",
        ),
    ],
)
def test_what_else_is_sent_is_named(client: Any, sent: dict[str, Any], says: str) -> None:
    response = client.post("/predict", **sent)
    assert (response.status_code, response.json()) == (422, {"detail": says})


def test_model_health_metrics_schema_and_page_are_there(client: Any) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert set(client.get("/model").json()["tasks"]) == {"digit", "value", "tags", "shape"}
    assert 'mtl_requests_total{status="200"}' in client.get("/metrics").text
    assert set(client.get("/openapi.json").json()["paths"]) == {"/predict", "/model", "/health", "/metrics"}
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text  # it asks nobody else for anything


@pytest.fixture(scope="module")
def address(predictor: Predictor) -> Iterator[str]:
    """Where the service really listens."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from mtl_dist.serving.app import build_app

    app = build_app(predictor, Limits(), "tiny", ("127.0.0.1",))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.mark.parametrize(("width", "colours"), [(390, "light"), (1200, "dark")])
def test_a_browser_that_is_given_pictures_shows_their_answers(
    address: str, predictor: Predictor, width: int, colours: str
) -> None:
    named = [("first.png", png(image_of(1))), ("<b>second.png", png(image_of(2)))]
    files = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in named]
    with chromium(address, width, colours) as shown:
        shown.page.set_input_files("input", files)
        shown.page.locator("#state", has_text="done").wait_for()
        assert shown.page.locator("h2").all_inner_texts() == ["<b>second.png", "first.png"]
        tasks = shown.page.locator("section").first.locator("h3").all_inner_texts()
        assert tasks == list(predictor.tasks)
        words = shown.page.locator("section").nth(1).inner_text()
        assert plain(predictor.predict(image_of(1))["digit"])["class_name"] in words
        shown.check()

        broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no image"}
        shown.page.set_input_files("input", [broken])
        shown.page.wait_for_selector(".error")
        assert "broken.png: expected a readable image" in shown.page.locator(".error").inner_text()


def test_mutated_images_are_answered_or_refused_and_never_a_5xx(client: Any) -> None:
    draws = random.Random(0)
    formats = [png(image_of(1)), npy(image_of(2))]
    for kind in ("JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(image_of(3)).save(buffer, format=kind)
        formats.append(buffer.getvalue())
    codes = set()
    for _ in range(150):
        data = bytearray(draws.choice(formats))
        for _ in range(draws.randint(1, 8)):
            data[draws.randrange(len(data))] = draws.randrange(256)
        codes.add(asked(client, bytes(data[: draws.randint(1, len(data))])).status_code)
    assert codes <= {200, 413, 422}


def test_no_request_that_the_schema_allows_or_forbids_is_a_5xx(address: str) -> None:
    """Made by schemathesis from /openapi.json; every answer has a status and form that the schema names."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance as no_image

    schema = schemathesis.openapi.from_url(f"{address}openapi.json")
    codes: dict[str, set[int]] = {}

    def answer(case: Any) -> None:
        response = case.call()
        codes.setdefault(case.path, set()).add(response.status_code)
        case.validate_response(response, excluded_checks=[no_image])

    for each in schema.get_all_operations():
        made = given(case=each.ok().as_strategy())(answer)
        few = settings(
            max_examples=40,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(0)(few(made))()
    assert {"/predict", "/model", "/health", "/metrics"} <= codes.keys()
    assert max(max(each) for each in codes.values()) < 500


def test_a_request_that_takes_too_long_ends() -> None:
    from mtl_dist.serving.guard import Guard

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def run(more: bool) -> int:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"x", "more_body": more}

        async def send(message: Any) -> None:
            sent.append(message)

        await Guard(slow, Limits(timeout_s=0.01))({"type": "http", "headers": []}, receive, send)
        return int(sent[-2]["status"])

    assert asyncio.run(run(True)) == 408
    assert asyncio.run(run(False)) == 503
