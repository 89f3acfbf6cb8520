"""llama.cpp's server, from the wheel `xllamacpp`, as a process to compare with.

    python -m benchmarks.peer_llama FILE.gguf --num-slots 4 --num-threads 1

Prints its address and runs until SIGTERM. Its options are its defaults, except for what the
comparison fixes: slots, threads, a context long enough.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from benchmarks.served import Server

PACKAGE = "xllamacpp"


def version() -> str:
    """Raises SystemExit with the command that installs it."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"{PACKAGE} is not installed: run `pip install {PACKAGE}`, or leave llama.cpp out "
            "with --no-peer"
        ) from None


def llama_server(
    gguf: Path, log: Path, *, num_slots: int, num_threads: int, context_len: int
) -> Server:
    """Not started yet. `context_len` is that of each slot."""
    command = [sys.executable, "-m", "benchmarks.peer_llama", str(gguf)]
    command += ["--num-slots", str(num_slots), "--num-threads", str(num_threads)]
    command += ["--context-len", str(context_len)]
    return Server("llama.cpp", gguf.name, command, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--num-slots", type=int, default=4)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--context-len", type=int, default=16384, help="of each slot")
    args = parser.parse_args()

    import xllamacpp  # here, so that the others of this module need no wheel

    params = xllamacpp.CommonParams()
    params.model.path = str(args.gguf)
    params.n_parallel = args.num_slots
    params.n_ctx = args.num_slots * args.context_len
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.num_threads
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    stopped.wait()


if __name__ == "__main__":
    main()
