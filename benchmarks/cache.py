"""What keeping states saves and costs, beside llama.cpp's server on the same weights.

    python -m benchmarks.cache [--infer-cfg rwkv-lm-tiny] [--set key=value] [--save]
    python -m benchmarks.cache --infer-cfg rwkv-lm-0.1b --set load_format=dummy ...

Sections, all of them unless --only names some:
    engine  time to first token with and without reuse, without HTTP
    cases   nine cases through HTTP, ours and llama.cpp's server in turn
    chat    one long chat through HTTP, turn by turn, and a plot
    trace   hit rate against snapshot policy and budget; no model runs
    costs   states per GiB, and the time of fork, swap and disk round trip

With load_format = "dummy" the weights are random, of the right shape: times are those of real
ones, answers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import chat_trace, engine_reuse, long_chat, page_costs
from benchmarks.gguf import write_gguf
from benchmarks.peer_llama import llama_server, version
from benchmarks.record import RESULTS, finish
from benchmarks.reuse_cases import CASES, run_cases
from benchmarks.served import Server, our_server
from benchmarks.words import Words
from config import ModelTable, load_infer
from engine.loading import load
from engine.model.weights import save_safetensors

SECTIONS = ("engine", "cases", "chat", "trace", "costs")
SYSTEM_LENS = (64, 128, 256, 512, 1024, 2048, 4096)
CHAT_LENS = (0, 1024)
BUDGETS = ((8, 0), (16, 0), (64, 0), (8, 56), (256, 0), (8, 248), (1024, 0))  # slots, frames
CONTEXT_LEN = 16384


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config-dir", type=Path, default=Path("config"))
    made.add_argument("--infer-cfg", default="rwkv-lm-tiny")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    made.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    made.add_argument("--num-slots", type=int, default=4, help="requests at once, of each server")
    made.add_argument("--num-threads", type=int, default=1, help="of each server and engine")
    made.add_argument(
        "--num-repeats", type=int, default=3, help="of each case; costs take 10 times"
    )
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    made.add_argument("--system-lens", type=int, nargs="+", default=SYSTEM_LENS)
    made.add_argument("--chat-lens", type=int, nargs="+", default=CHAT_LENS)
    made.add_argument("--num-turns", type=int, default=10, help="of the long chat")
    made.add_argument("--question-len", type=int, default=400, help="in the long chat")
    made.add_argument("--num-chats", type=int, default=400, help="in the trace")
    made.add_argument("--no-peer", action="store_true", help="leave llama.cpp out")
    made.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    return made


class Subjects:
    """What is compared: our server with and without reuse, and llama.cpp's, on one checkpoint.

    Files go to `folder`. A checkpoint of random weights is written there, since every server
    must have the same.
    """

    def __init__(self, args: argparse.Namespace, table: ModelTable, folder: Path) -> None:
        self._args, self._folder = args, folder
        weights = table.weights_path
        if weights is None or table.load_format == "dummy":
            weights = folder / "random.safetensors"
            save_safetensors(weights, load(table, torch.device("cpu"), torch.float32).state_dict())
        self.table = replace(table, weights_path=weights.resolve(), load_format="auto")

    def ours(self, name: str, *sets: str) -> Server:
        """Made as the file and --set say, except for slots, threads and what `sets` say."""
        args = self._args
        sizes = [f"max_batch_size={args.num_slots}", f"num_threads={args.num_threads}"]
        sizes += [f"weights_path={self.table.weights_path}", "load_format=auto"]
        sets = (*args.sets, *sizes, "max_context_len=0", "dtype=float32", *sets)
        log = self._folder / f"{name}.log"
        cfg = args.infer_cfg
        return our_server(name, self.table.model_name, cfg, args.config_dir, sets, log)

    def llama(self) -> Server:
        gguf = self._folder / "model.gguf"
        assert self.table.weights_path is not None, "set by __init__"
        write_gguf(self.table.weights_path, self.table.tokenizer_vocab_path, gguf)
        args = self._args
        return llama_server(
            gguf,
            self._folder / "llama.log",
            num_slots=args.num_slots,
            num_threads=args.num_threads,
            context_len=CONTEXT_LEN,
        )


def through_http(args: argparse.Namespace, table: ModelTable, words: Words) -> dict[str, object]:
    """The sections that compare servers."""
    figures: dict[str, object] = {}
    if not {"cases", "chat"} & set(args.only):
        return figures
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        subjects = Subjects(args, table, Path(name))
        servers = [subjects.ours("ours", f"state_dir={name}/states")]
        if not args.no_peer:
            figures["peer"] = version()
            servers.append(subjects.llama())
        for server in servers:
            stack.enter_context(server)
        if "cases" in args.only:
            figures["cases"] = run_cases(servers, words, args.num_repeats, args.cases)
        if "chat" in args.only:
            without = subjects.ours("ours without reuse", "enable_prefix_cache=false")
            servers.insert(1, stack.enter_context(without))
            turns = long_chat.measure(servers, words, args.num_turns, args.question_len)
            figures["chat"] = turns
            if args.save:
                title = f"{table.model_name}, {args.num_threads} CPU thread"
                long_chat.plot(turns, title, RESULTS / f"cache-{table.model_name}.png")
    return figures


def main() -> None:
    args = parser().parse_args()
    sets = [*args.sets, "max_context_len=0", f"num_threads={args.num_threads}"]
    table = load_infer(args.config_dir, args.infer_cfg, sets).models[0]
    words = Words(table.tokenizer_vocab_path)
    figures: dict[str, object] = {
        "model": table.model_name,
        "weights": "random" if table.load_format == "dummy" else "trained",
        "paragraph_len": table.paragraph_len,
        "num_slots": args.num_slots,
        "num_threads": args.num_threads,
    }
    if "engine" in args.only:
        measured = engine_reuse.measure(table, words, args.system_lens, args.chat_lens)
        figures["engine"] = asyncio.run(measured)
    figures |= through_http(args, table, words)
    if "trace" in args.only:
        shape = chat_trace.TraceShape(num_chats=args.num_chats)
        figures["trace"] = chat_trace.measure(shape, BUDGETS)
    if "costs" in args.only:
        figures["states"] = page_costs.states_per_gib(args.config_dir)
        figures["costs"] = page_costs.measure(table, 10 * args.num_repeats)
    finish("cache", figures, save=args.save)


if __name__ == "__main__":
    main()
