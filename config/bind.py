"""Where the server listens: a TCP address or a Unix socket. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

from config.errors import ConfigError

EXPECTED = 'expected "host:port", "[ipv6]:port" or "unix:/absolute/path"'
MAX_PORT = 65535
MAX_UNIX_PATH_BYTES = 107  # sun_path of sockaddr_un on Linux, without its final NUL


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Either `unix_path` is set, or `host` and `port` are (port 0 = the system picks one)."""

    host: str = ""
    port: int = 0
    unix_path: str | None = None

    @classmethod
    def parse(cls, text: str) -> BindAddress:
        """Raises ConfigError, with key http_bind_addr, for anything that is not an address."""
        if text.startswith("unix:"):
            return cls(unix_path=_unix_path(text))
        host, colon, port = text.rpartition(":")
        is_bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if is_bracketed else host
        if not colon or not host or host.strip() != host or (":" in host) != is_bracketed:
            raise _error(text, EXPECTED)
        if not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
            raise _error(text, f"the port must be a number from 0 to {MAX_PORT}; {EXPECTED}")
        return cls(host=host, port=int(port))


def _unix_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if not path.startswith("/"):
        raise _error(text, "the path of a Unix socket must be absolute: unix:/run/rwkv.sock")
    if len(path.encode()) > MAX_UNIX_PATH_BYTES:
        raise _error(text, f"a Unix socket path has at most {MAX_UNIX_PATH_BYTES} bytes")
    return path


def _error(text: str, reason: str) -> ConfigError:
    return ConfigError(reason, key="http_bind_addr", value=text)
