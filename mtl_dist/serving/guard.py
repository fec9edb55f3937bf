"""Bounds of a request as a whole, before the application sees it: its bytes, and its time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from mtl_dist.printable import printable
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


class KnownHosts:
    """Refuses a request under a name of the host that is none of `hosts`; "*" is any."""

    def __init__(self, app: App, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._hosts:
            host = host_of(scope)
            if host not in self._hosts:
                await _say(
                    send,
                    400,
                    f"expected a Host header of {', '.join(self._hosts)}, found {printable(host[:80])!r}. "
                    "mtl serve --host serves under any name.",
                )
                return
        await self._app(scope, receive, send)


def host_of(scope: Message) -> str:
    """The name of the host that a request was sent to, without its port; "" where it is none."""
    stated = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    try:
        return urlsplit(f"//{stated}").hostname or ""
    except ValueError:
        return ""


def too_large(limits: Limits) -> str:
    return f"expected a request of at most {limits.max_bytes:,} bytes, found more."


async def _say(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
