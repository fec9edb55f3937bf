"""The service: a trained model behind HTTP.

    bytes -> bounds -> decoded in a thread -> batch -> model -> answer

It is imported where FastAPI is installed (`mtl serve` says so).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated, Any, TypeAlias

from fastapi import FastAPI, File, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from torch import Tensor

from mtl_dist import __version__
from mtl_dist.data.images import UnreadableImage, examine_image, image_size
from mtl_dist.errors import ImageError
from mtl_dist.prediction.predictor import Answers, Predictor
from mtl_dist.printable import printable
from mtl_dist.serving.answers import as_json, maps_of
from mtl_dist.serving.batching import Batcher, QueueFull
from mtl_dist.serving.guard import Guard, KnownHosts
from mtl_dist.serving.limits import Limits

_DECODERS = 2
"""Images that are decoded, or drawn, at once: each may be of `max_pixels`."""
_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LONGEST_NAME = 120
_PARAMETERS = {"maps": "true or false", "threshold": "a probability between 0 and 1"}
"""Of the query of POST /predict, and what each may be."""

Asked: TypeAlias = tuple[Tensor, float | None]
"""An image, and the threshold that is to decide in place of the run's."""


class Service:
    """A predictor, its batches, and what has been counted."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor = predictor
        self.limits = limits
        self.batcher: Batcher[Asked, Answers] = Batcher(self._answer, limits.max_batch, limits.max_queue)
        self.decoding = asyncio.Semaphore(_DECODERS)
        self.num_requests: Counter[int] = Counter()
        self.seconds = 0.0

    def _answer(self, asked: Sequence[Asked]) -> list[Answers]:
        images, thresholds = zip(*asked, strict=True)
        return list(self.predictor.answers(images, thresholds))

    async def answered(self, name: str, data: bytes, maps: bool, threshold: float | None) -> dict[str, Any]:
        """One image's record."""
        async with self.decoding:
            image_CHW = await asyncio.to_thread(self._decoded, name, data)
        try:
            answers = await asyncio.wrap_future(self.batcher.submit((image_CHW, threshold)))
        except QueueFull:
            raise HTTPException(
                429,
                f"expected at most {self.limits.max_queue} images waiting, found more. Try again.",
                {"Retry-After": "1"},
            ) from None
        record: dict[str, Any] = {"name": name, "answers": as_json(answers)}
        if maps:
            async with self.decoding:
                record["maps"] = await asyncio.to_thread(maps_of, answers, image_CHW, self.predictor.tasks)
        return record

    def _decoded(self, name: str, data: bytes) -> Tensor:
        try:
            width, height = image_size(data)
            if width * height > self.limits.max_pixels:
                raise HTTPException(
                    413,
                    f"{name}: expected at most {self.limits.max_pixels:,} pixels, found {width:,} x "
                    f"{height:,}.",
                )
            examine_image(data, decode=False)
            return self.predictor.decoded(data, name)
        except UnreadableImage as error:
            raise HTTPException(
                422, f"{name}: expected a readable image, found: {printable(str(error))}"
            ) from None
        except ImageError as error:
            raise HTTPException(422, printable(str(error))) from None

    def metrics(self) -> str:
        """What was counted, as Prometheus reads it."""
        lines = ["# TYPE mtl_requests_total counter"]
        lines += [
            f'mtl_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.num_requests.items())
        ]
        for name, kind, value in (
            ("mtl_request_seconds_total", "counter", f"{self.seconds:.6f}"),
            ("mtl_images_total", "counter", self.batcher.num_answered),
            ("mtl_batches_total", "counter", self.batcher.num_batches),
            ("mtl_images_waiting", "gauge", self.batcher.num_waiting),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"


def build_app(predictor: Predictor, limits: Limits, name: str, hosts: Sequence[str]) -> FastAPI:
    """The application for a loaded model, called `name`, under these names of hosts alone ("*": any)."""
    service = Service(predictor, limits)
    page = (files("mtl_dist.serving") / "page.html").read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title=f"mtl_dist: {name}", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )

    @app.post("/predict", responses=_bad(400, 408, 413, 422, 429))
    async def predict(
        request: Request,
        files: Annotated[list[UploadFile], File(description="Images, as files.", min_length=1)],
        maps: Annotated[bool, Query(description="Masks and overlays as PNGs too.")] = False,
        threshold: Annotated[
            float | None,
            Query(
                gt=0,
                lt=1,
                description="Above which probability a label, positive class or pixel counts, in place of "
                "the run's.",
            ),
        ] = None,
    ) -> dict[str, Any]:
        """Every task's answer for each image, in their order."""
        for given, known, what in (
            (request.query_params, list(_PARAMETERS), "parameters of the query"),
            (await request.form(), ["files"], "field of the form"),
        ):
            if others := [name for name in given if name not in known]:
                raise HTTPException(
                    422, f"expected {' and '.join(known)} as the only {what}, found {_shown(others)}."
                )
        given_names = [name for name, _ in request.query_params.multi_items()]
        if twice := [name for name in _PARAMETERS if given_names.count(name) > 1]:
            raise HTTPException(422, f"{twice[0]}: expected one value, found {given_names.count(twice[0])}.")
        if len(files) > limits.max_files:
            raise HTTPException(413, f"expected at most {limits.max_files} files, found {len(files)}.")
        named = [(_name_of(file, number), await file.read()) for number, file in enumerate(files)]
        found = await asyncio.gather(
            *(service.answered(each, data, maps, threshold) for each, data in named), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return {"predictions": found}

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What is asked of an image, and what images it takes."""
        return {"name": name, **predictor.describe()}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether it answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counts, as Prometheus reads them."""
        return service.metrics()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.middleware("http")
    async def counted(request: Request, call_next: Any) -> Any:
        begin = time.monotonic()
        response = await call_next(request)
        service.num_requests[response.status_code] += 1
        service.seconds += time.monotonic() - begin
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _unreadable(error)}, 422)

    app.add_middleware(Guard, limits=limits)
    app.add_middleware(KnownHosts, hosts=hosts)
    app.state.service = service
    return app


def _unreadable(error: RequestValidationError) -> str:
    """What is wrong with the parameters of a request, in words."""
    first = error.errors()[0]
    place, *names = first["loc"]
    if place == "query":
        return f"{names[0]}: expected {_PARAMETERS[names[0]]}, found {_shown([str(first['input'])])}."
    given = error.body or {}
    found = "text" if "files" in given else _shown(list(given)) or "nothing"
    return f"files: expected one file or more, found {found}. With curl: -F files=@NAME"


def _shown(names: Sequence[str]) -> str:
    """Names that somebody sent, as they may be shown."""
    return printable(", ".join(map(repr, dict.fromkeys(names))))[:_LONGEST_NAME]


def _name_of(file: UploadFile, number: int) -> str:
    """A file's name without its folders, as it may be shown; its number where it has none."""
    return printable(PurePath(file.filename or "").name)[-_LONGEST_NAME:] or f"image {number}"


def _bad(*codes: int) -> dict[int | str, dict[str, Any]]:
    detail = {"type": "object", "properties": {"detail": {}}, "required": ["detail"]}
    return {
        code: {"content": {"application/json": {"schema": detail}}, "description": "Said in `detail`."}
        for code in codes
    }
