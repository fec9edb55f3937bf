"""`mtl serve`: the service in this process, until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_dist.errors import UserError
from mtl_dist.serving.limits import Limits
from mtl_dist.serving.packages import check_packages

if TYPE_CHECKING:
    from mtl_dist.assemble import WhichCheckpoint

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

    Raises:
        UserError: a package is missing, the address cannot be had, or there is no such model.
    """
    check_packages()
    place = bound(host, port)
    import uvicorn

    from mtl_dist.prediction.predictor import Predictor
    from mtl_dist.serving.app import build_app

    predictor = Predictor(run, device, checkpoint, temperature)
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    app = build_app(predictor, limits, run.resolve().name, hosts)
    if host not in LOOPBACK:
        say(f"warning  {host}: whoever reaches this machine may ask; there is no login and no encryption.")
    say(
        f"{run}: {', '.join(predictor.tasks)} on {predictor.device}, at "
        f"http://{host}:{place.getsockname()[1]} (Ctrl-C ends it)"
    )
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=5, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[place])


def bound(host: str, port: int) -> socket.socket:
    """The address, taken before anything slow begins: who asks already waits for the model.

    Raises:
        UserError: another program has it, or it is none of this machine.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen()
    except OSError as error:
        place.close()
        raise UserError(
            f"--host {host} --port {port}: expected an address of this machine and a free port, found: "
            f"{error.strerror}. Choose another; --port 0 finds a free one."
        ) from None
    return place
