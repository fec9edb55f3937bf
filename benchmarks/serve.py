"""The service under load, with batching and without: images per second, how long an answer takes, memory."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
import uvicorn
from rich.console import Console

from benchmarks.tables import Findings, Row
from mtl_dist.prediction.predictor import Predictor
from mtl_dist.serving.app import build_app
from mtl_dist.serving.limits import Limits

BATCHES = (1, 16)
"""The most images that the model sees at once; 1 is the service without batching."""


def bench_serve(run: Path, image: Path, clients: list[int], requests: int, repeats: int) -> None:
    """Measure, and print a table."""
    console = Console(width=110)
    predictor = Predictor(run)
    data = image.read_bytes()
    rows: list[Row] = []
    for num_clients in clients:
        turns: dict[int, list[tuple[float, list[float]]]] = {batch: [] for batch in BATCHES}
        grown: dict[int, float] = {}
        for _ in range(repeats):
            for batch in BATCHES:
                images_per_s, seconds, grown[batch] = under_load(
                    predictor, data, num_clients, requests, batch
                )
                turns[batch].append((images_per_s, seconds))
        alone = statistics.median(speed for speed, _ in turns[1])
        for batch in BATCHES:
            speed = statistics.median(speed for speed, _ in turns[batch])
            p50, p99 = np.percentile([s for _, seconds in turns[batch] for s in seconds], [50, 99])
            rows.append(
                {
                    "clients": num_clients,
                    "batches of": "1" if batch == 1 else f"up to {batch}",
                    "images/s": speed,
                    "of 1": speed / alone,
                    "p50 ms": 1e3 * float(p50),
                    "p99 ms": 1e3 * float(p99),
                    "memory grown MiB": grown[batch],
                }
            )
    how = f"medians of {repeats} turns of {requests} requests of one image ({len(data)} bytes)"
    Findings(f"{torch.get_num_threads()} threads, {how}", rows).show(console)


def under_load(
    predictor: Predictor, data: bytes, num_clients: int, requests: int, max_batch: int
) -> tuple[float, list[float], float]:
    """Images per second, the seconds of every answer, and the MiB that the process grew by; each client waits
    for its answer before it asks again."""
    limits = replace(Limits(), max_batch=max_batch, max_queue=4 * num_clients)
    app = build_app(predictor, limits, "load", ("127.0.0.1",))
    process = psutil.Process(os.getpid())
    # Named TCP, as uvicorn makes its own: else asyncio leaves Nagle's algorithm on, and answers wait 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            asyncio.run(_asked(port, data, num_clients, 2 * num_clients))  # to warm up
            before, begin = process.memory_info().rss, time.perf_counter()
            seconds = asyncio.run(_asked(port, data, num_clients, requests))
            elapsed = time.perf_counter() - begin
            grown = (process.memory_info().rss - before) / 2**20
        finally:
            server.should_exit = True
            thread.join()
    return requests / elapsed, seconds, grown


async def _asked(port: int, data: bytes, num_clients: int, requests: int) -> list[float]:
    left = iter(range(requests))
    seconds: list[float] = []

    async def client(session: httpx.AsyncClient) -> None:
        for _ in left:
            begin = time.perf_counter()
            response = await session.post("/predict", files={"files": ("image", data)})
            response.raise_for_status()
            seconds.append(time.perf_counter() - begin)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as session:
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
    return seconds
