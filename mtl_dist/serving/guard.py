"""Bounds of a request as a whole, before the application sees it: its bytes, and its time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException

from mtl_dist.serving.limits import Limits

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """Ends a request that is larger, or takes longer, than it may."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0
        has_begun = is_whole = False

        async def counted() -> Message:
            nonlocal seen, is_whole
            message = await receive()
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if seen > self._limits.max_bytes:
                raise HTTPException(413, too_large(self._limits))
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self._limits.max_bytes:
            await _say(send, 413, too_large(self._limits))
            return
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._app(scope, counted, noted)
        except TimeoutError:
            if not has_begun:
                what = "an answer" if is_whole else "the whole request"
                await _say(
                    send, 503 if is_whole else 408, f"expected {what} within {self._limits.timeout_s:g} s."
                )


def too_large(limits: Limits) -> str:
    return f"expected a request of at most {limits.max_bytes:,} bytes, found more."


async def _say(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
