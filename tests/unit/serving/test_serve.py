"""What `mtl serve` is asked for and cannot be is one line, before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from mtl_dist.errors import UserError
from mtl_dist.serving.serve import bound


def test_a_port_that_another_program_has_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .* found: Address already in use"):
            bound("127.0.0.1", port)


@pytest.mark.parametrize("host", ["300.1.1.1", "192.0.2.1", "no-such-host.invalid", "::zz"])
def test_an_address_of_no_machine_or_another_one_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=f"--host {host} --port 0: expected an address of this machine"):
        bound(host, 0)


def test_a_free_port_is_held() -> None:
    with bound("127.0.0.1", 0) as place, pytest.raises(UserError):
        bound("127.0.0.1", place.getsockname()[1])
