"""What runs here: the version of the server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNKNOWN_VERSION = "unknown"  # run from a checkout that is not installed


def own_version() -> str:
    try:
        return version("rwkv-async-engine")
    except PackageNotFoundError:
        return UNKNOWN_VERSION
