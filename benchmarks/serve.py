"""The server under load: what clients feel, by percentiles.

    python -m benchmarks.serve [--rate 4] [--seconds 20] [--url http://127.0.0.1:8080] [--save]
    python -m benchmarks.serve --peer llama.cpp [--dtype int8] [--streams 1 8 32] [--save]

Without --peer, requests come at a fixed rate to one server (serve_open.py). With it, N streams at
once are read from ours, from the engine without HTTP and from llama.cpp's server in turn, on the
same weights and prompts (serve_peer.py): what HTTP costs, and who is faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import serve_open, serve_peer
from benchmarks.record import finish


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="model, and infer config if started: rwkv-lm-tiny, or with"
                      " --peer rwkv-lm-0.1b")  # fmt: skip
    made.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    rate = made.add_argument_group("at a fixed rate")
    rate.add_argument("--rate", type=float, default=4.0, help="requests per second")
    rate.add_argument("--seconds", type=float, default=20.0)
    rate.add_argument("--max-tokens", type=int, default=48)
    rate.add_argument("--url", help="a running server; without it one is started")
    rate.add_argument("--seed", type=int, default=0, help="of the arrival clock")
    peer = made.add_argument_group("beside a peer")
    peer.add_argument(
        "--peer", choices=["llama.cpp", "none"], help="none: only the engine without HTTP"
    )
    peer.add_argument("--dtype", choices=list(serve_peer.PEER_DTYPES), default="int8")
    peer.add_argument("--peer-dtype", help="of its GGUF; else the nearest one to --dtype")
    peer.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    peer.add_argument("--num-tokens", type=int, default=64, help="of each stream")
    peer.add_argument("--prompt-len", type=int, default=16)
    peer.add_argument("--num-rounds", type=int, default=5)
    peer.add_argument("--num-threads", type=int, default=2, help="of each server and engine")
    peer.add_argument("--config-dir", type=Path, default=Path("config"))
    peer.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    return made


def main() -> None:
    args = parser().parse_args()
    if args.peer is not None:
        args.model = args.model or "rwkv-lm-0.1b"
        figures = serve_peer.measure(args)
    else:
        args.model = args.model or "rwkv-lm-tiny"
        figures = serve_open.measure(args)
        for name, value in figures.items():
            print(f"{name:34}{json.dumps(value)}")
    finish("serve", figures, save=args.save)


if __name__ == "__main__":
    main()
