"""`python -m api`: arguments, logging and exit codes; the rest is api/server.py."""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import json
import logging
import os
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import uvloop

from api.server import serve
from api.source import ConfigSource
from config import ConfigError, ModelTable, check_files
from engine.client import EngineClient
from engine.errors import EngineError
from engine.types import StatsSink

DEFAULT_INFER_CFG = "rwkv-lm-tiny"
SWITCH_INTERVAL_S = 5e-4  # the device thread holds the interpreter at most so long at a time
MODEL_DIED = 1
USAGE_ERROR = 2
INTERRUPTED = 130

EPILOG = """\
examples:
  python -m api                                      the small model that comes with the project
  python -m api --infer-cfg rwkv-lm-7.2b             config/infer/rwkv-lm-7.2b.toml
  python -m api --set max_batch_size=8               a key of every [[models]] table
  python -m api --set models.NAME.device_type=cpu    a key of one of them
  python -m api --http-bind-addr unix:/run/rwkv.sock

Every key is explained in docs/config.md. Editing the TOML file reloads it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    raise_file_limit()
    overrides = list(options.set)
    if options.http_bind_addr is not None:
        overrides.append(f"http_bind_addr={json.dumps(options.http_bind_addr)}")
    source = ConfigSource(options.config_dir, options.infer_cfg, tuple(overrides))
    try:
        config = source.load()
        check_files(config)
        is_well = uvloop.run(serve(config, source, build_engine, announce))
    except (ConfigError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if is_well else MODEL_DIED


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m api",
        description="Serve RWKV-7 models with the OpenAI protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--config-dir",
        type=Path,
        default=default_config_dir(),
        metavar="DIR",
        help="folder with model/ and infer/ (default: ./config or the installed one; %(default)s)",
    )
    made.add_argument(
        "--infer-cfg",
        default=DEFAULT_INFER_CFG,
        metavar="NAME",
        help="which DIR/infer/NAME.toml to serve (default: %(default)s)",
    )
    made.add_argument(
        "--http-bind-addr",
        metavar="ADDR",
        help="HOST:PORT, [IPV6]:PORT or unix:/PATH instead of the file's",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the file, as often as needed",
    )
    made.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="info has a line per request (default: %(default)s)",
    )
    return made


def default_config_dir() -> Path:
    """./config where there is one, else the folder that was installed with the package."""
    local = Path("config")
    if (local / "infer").is_dir():
        return local
    return Path(str(importlib.resources.files("config")))


def build_engine(table: ModelTable, stats: StatsSink) -> EngineClient:
    """Torch is imported here, in the thread that loads the weights."""
    from engine.engine import build

    return build(table, stats)


def raise_file_limit() -> None:
    """As many connections as the system lets us have; shells set a low limit for old programs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def leave(code: int) -> None:
    """End the process. A thread that is still inside torch, as when a signal came while weights
    were loading, would make the interpreter abort if it were taken down with it.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.daemon for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def announce(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    leave(main())
