"""An HTTP server on the loopback that misbehaves as it is asked: it stalls, cuts off, answers 500."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LONGEST_STALL = 20.0  # seconds; a stalled request ends with the server at the latest


class BadServer(ThreadingHTTPServer):
    """Serves the files below `root`.

    `faults` are taken one per GET: "ok", "500", "403", "stall" (nothing comes), "cut" (half of the bytes
    come), "short" (half of the bytes, said to be all); afterwards all is well. `ranges` is whether it
    understands ranges. `requests` counts GETs by path. `delay` makes every answer take so many seconds, and
    `most_at_once` is how many were under way at a time.
    """

    daemon_threads = True

    def __init__(self, root: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges = ranges
        self.faults: list[str] = []
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self.delay = 0.0
        self.most_at_once = self.at_once = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Be silent when a client gives up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadServer

    def do_HEAD(self) -> None:
        self._answer(b"", head=True)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            fault = self.server.faults.pop(0) if self.server.faults else "ok"
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        self.server.closing.wait(self.server.delay)
        # Before the answer: who has it may ask again at once.
        with self.server.lock:
            self.server.at_once -= 1
        self._respond(fault)

    def _respond(self, fault: str) -> None:
        if fault == "stall":
            self.server.closing.wait(LONGEST_STALL)
            self.close_connection = True
        elif fault in ("500", "403"):
            self.send_error(int(fault))
        else:
            self._answer(fault.encode())

    def _answer(self, fault: bytes, head: bool = False) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        size = len(data)
        if fault in (b"cut", b"short"):
            data = data[: size // 2]
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data) if fault == b"short" else size))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not head:
            # Counted first: who has read them may look at once.
            with self.server.lock:
                self.server.bytes_sent += len(data)
            self.wfile.write(data)
        if fault == b"cut":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@contextmanager
def serving(root: Path, ranges: bool = True) -> Iterator[BadServer]:
    """The server, running."""
    server = BadServer(root, ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
