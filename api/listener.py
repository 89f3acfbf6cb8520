"""The listening socket, taken before weights are loaded: a taken address is known at once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import replace

from config import BindAddress, ConfigError

MAX_UNSENT_BYTES = 64 * 1024


class Listener:
    """A bound TCP socket, or the path of a Unix socket that nobody else listens on."""

    def __init__(self, address: BindAddress) -> None:
        """Raises ConfigError naming the address and what to do."""
        self.sock: socket.socket | None = None
        if address.unix_path is not None:
            _clear_stale_socket(address)
            self.address = address
            return
        self.sock = _bound_socket(address)
        self.address = replace(address, port=self.sock.getsockname()[1])

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        elif self.address.unix_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.unix_path)


def bind_error(address: BindAddress, error: OSError) -> ConfigError:
    """What a failed bind or listen means to the user."""
    remedy = "choose another with --http-bind-addr HOST:PORT (port 0 = any free one)"
    if error.errno == errno.EADDRINUSE:
        reason = f"is in use by another program; stop that, or {remedy}"
    else:
        reason = f"cannot be opened: {error.strerror or error}; {remedy}"
    shown = address.unix_path or f"{address.host}:{address.port}"
    return ConfigError(reason, key="http_bind_addr", value=shown)


def _bound_socket(address: BindAddress) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        reason = f"is not a known host: {error.strerror}"
        raise ConfigError(reason, key="http_bind_addr", value=address.host) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Connections inherit it. Else the kernel takes megabytes for a client that has
            # stopped to read, and minutes go by before anybody notices.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        sock.bind(place)
    except OSError as error:
        sock.close()
        raise bind_error(address, error) from None
    return sock


def _clear_stale_socket(address: BindAddress) -> None:
    """Remove a socket file whose server is gone; refuse one that answers, and other files."""
    path = address.unix_path
    assert path is not None, "an address of a Unix socket"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        reason = "is a file and not a socket; choose another path"
        raise ConfigError(reason, key="http_bind_addr", value=f"unix:{path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise bind_error(address, OSError(errno.EADDRINUSE, "in use"))
