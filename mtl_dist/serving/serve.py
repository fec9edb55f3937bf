"""`mtl serve`: the service in this process, until it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtl_dist.assemble import WhichCheckpoint
from mtl_dist.prediction.predictor import Predictor
from mtl_dist.serving.limits import Limits
from mtl_dist.serving.packages import check_packages

LOOPBACK = ("127.0.0.1", "localhost")


def serve(
    run: Path,
    host: str,
    port: int,
    limits: Limits,
    device: str | None,
    checkpoint: WhichCheckpoint,
    temperature: bool,
    say: Callable[[str], None],
) -> None:
    """Load the model, then answer at host and port.

    On the loopback it answers to names of this machine alone, so that no page of the web can reach it by
    a name of its own that leads here.
    """
    check_packages()
    import uvicorn

    from mtl_dist.serving.app import build_app

    predictor = Predictor(run, device, checkpoint, temperature)
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    app = build_app(predictor, limits, run.resolve().name, hosts)
    if host not in LOOPBACK:
        say(f"warning  {host}: whoever reaches this machine may ask; there is no login and no encryption.")
    say(
        f"{run}: {', '.join(predictor.tasks)} on {predictor.device}, at http://{host}:{port} (Ctrl-C ends it)"
    )
    uvicorn.run(
        app, host=host, port=port, log_level="warning", timeout_keep_alive=5, timeout_graceful_shutdown=5
    )
