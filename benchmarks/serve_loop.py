"""The engine's own rate, without HTTP: what a server could reach if serving cost nothing.

A process of its own, like the servers that it is compared with, on the same event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

READY = "ready"


class EngineLoop:
    """A context manager. Made like a server: `sets` are those of its command line."""

    def __init__(self, infer_cfg: str, config_dir: Path, sets: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "benchmarks.serve_loop"]
        self._command += ["--infer-cfg", infer_cfg, "--config-dir", str(config_dir)]
        self._command += [part for item in sets for part in ("--set", item)]

    def __enter__(self) -> EngineLoop:
        self._process = subprocess.Popen(
            self._command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as of the servers
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._answer() != READY:
            raise SystemExit("the engine loop did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Seconds until all prompts, begun at once, have got `num_tokens` greedy tokens."""
        assert self._process.stdin is not None
        print(json.dumps([prompts, num_tokens]), file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine loop ended with code {self._process.wait()}")
        return line.strip()


async def answer_lines(args: argparse.Namespace) -> None:
    from engine.engine import Engine  # here, so that whoever starts the process needs no torch
    from engine.types import SamplingParams

    async with Engine.open(args.infer_cfg, args.config_dir, args.sets) as engine:

        async def one(prompt: list[int], num_tokens: int) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, stop_token_ids=())
            async for _ in engine.generate(prompt, params):
                pass

        print(READY, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            prompts, num_tokens = json.loads(line)
            started_s = time.perf_counter()
            await asyncio.gather(*(one(prompt, num_tokens) for prompt in prompts))
            print(time.perf_counter() - started_s, flush=True)


def main() -> None:
    import uvloop

    from api.__main__ import SWITCH_INTERVAL_S

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--infer-cfg", required=True)
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    uvloop.run(answer_lines(parser.parse_args()))


if __name__ == "__main__":
    main()
