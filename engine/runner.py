"""The device thread: takes plans from one FIFO, runs the model, sends results back.

Tensors live here and nowhere else. It knows slots, seats and tokens, not requests or text.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.plan import ZERO_SLOT, Row, Scores, SeatStart, StepPlan, StepResult
from engine.sampler import Draws, Sampler
from engine.state.storage import StateStorage

logger = logging.getLogger(__name__)

SCORED_ROWS = 128  # logits of a prompt at once: 32 MiB for the World vocabulary


class ModelRunner:
    """Runs one model on one device. A plain thread: device and inference mode are thread-local."""

    def __init__(
        self,
        model: RWKV7,
        storage: StateStorage,
        sampler: Sampler,
        num_seats: int,
        num_threads: int = 1,
    ) -> None:
        """`num_threads` compute on a CPU. More than there are idle cores is many times slower:
        torch's threads wait for each other by spinning."""
        self._num_threads = num_threads
        self._model = model
        self._storage = storage
        self._sampler = sampler
        # Sampled tokens stay on the device: the next step may be planned before they are known.
        self._next_token = torch.zeros(num_seats, dtype=torch.int64, device=storage.device)
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        assert self._thread is None, "the runner is started once"
        self._thread = threading.Thread(
            target=self._run, args=(on_result,), name="device", daemon=True
        )
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        if self._thread is not None:
            self._plans.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, on_result: Callable[[StepResult], None]) -> None:
        torch.set_num_threads(self._num_threads)
        while (plan := self._plans.get()) is not None:
            started = time.perf_counter()
            try:
                draws = self.execute(plan)
            except BaseException as error:  # the loop decides what a failed step means
                logger.exception("step %d failed", plan.step_id)
                result = StepResult(
                    step_id=plan.step_id,
                    tokens=(),
                    duration_s=time.perf_counter() - started,
                    error=f"{type(error).__name__}: {error}",
                    is_fatal=self._is_fatal(error),
                )
            else:
                result = StepResult(
                    step_id=plan.step_id,
                    tokens=draws.tokens,
                    duration_s=time.perf_counter() - started,
                    logprobs=draws.logprobs,
                    tops=draws.tops,
                    scores=draws.scores,
                    hidden=draws.hidden,
                    unsound=draws.unsound,
                )
            on_result(result)

    def _is_fatal(self, error: BaseException) -> bool:
        """CUDA errors are sticky; and what is no Exception was to end this thread."""
        return self._storage.device.type == "cuda" or not isinstance(error, Exception)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Draws:
        """One step: moves, seats, forward, scores, draws. All of them in plan order."""
        for move in plan.moves:
            self._storage.move(move)
        for start in plan.starts:
            self._take_seat(start)
        # Decode rows first: the recurrence then takes them as one batch of single tokens.
        decode = [row for row in plan.rows if row.num_tokens == 1]
        prefill = [row for row in plan.rows if row.num_tokens > 1]
        again = [row for row in plan.rows if row.num_tokens == 0]
        scores: dict[int, Scores] = {}  # by seq_id
        hidden: dict[int, Tensor] = {}  # likewise
        unsound: list[int] = []  # likewise
        parts = [self._forward(rows, scores, hidden, unsound) for rows in (decode, prefill) if rows]
        if again:
            parts.append(self._kept_logits(again))
        drawn = [row for row in decode + prefill + again if row.sample]
        draws = self._draw(drawn, parts) if drawn else Draws(())
        if plan.moves:  # whoever hears of the step may use its frames, from another thread
            self._storage.synchronize()
        places = {row.seq_id: i for i, row in enumerate(drawn)}
        draws = draws.picked([places[row.seq_id] for row in plan.rows if row.sample])
        returned = [hidden[row.seq_id] for row in plan.rows if row.returns_hidden]
        return draws._replace(
            scores=tuple(scores[row.seq_id] for row in plan.rows if row.targets),
            hidden=tuple(map(_float32_bytes, returned)),
            unsound=tuple(unsound),
        )

    def _take_seat(self, start: SeatStart) -> None:
        self._sampler.start(start.seat, start.sampling, start.output_ids)
        if start.output_ids:
            self._next_token[start.seat] = start.output_ids[-1]

    def _forward(
        self,
        rows: list[Row],
        scores: dict[int, Scores],
        hidden: dict[int, Tensor],
        unsound: list[int],
    ) -> Tensor:
        """Run the model; the logits [R, V] of the R sampling rows, in order.

        Fills in `scores`, `hidden` with the row [C] of the last token of those that return it, and
        `unsound` with those that give no logits and could not.
        """
        for row in rows:
            assert row.dst.slot != ZERO_SLOT, f"row of sequence {row.seq_id} writes the zero page"
        batch = Batch(
            lengths=tuple(row.num_tokens for row in rows),
            src_slot=self._storage.indices([row.src.slot for row in rows]),
            dst_slot=self._storage.indices([row.dst.slot for row in rows]),
        )
        hidden_TC = self._model(self._tokens(rows), batch, self._storage.state)
        ends = list(accumulate(batch.lengths))
        for row, end in zip(rows, ends, strict=True):
            if row.targets:
                scores[row.seq_id] = self._score(row, hidden_TC[end - row.num_tokens : end])
        unsound += self._unsound(rows, ends, hidden_TC)
        wanted = [(end - 1, row) for end, row in zip(ends, rows, strict=True) if _has_logits(row)]
        picked = self._storage.indices([last for last, _ in wanted])
        # In the type they are kept in, so that a draw from kept logits is the same draw.
        logits: Tensor = self._model.head(hidden_TC[picked]).to(self._storage.logits.dtype)
        hidden |= {row.seq_id: hidden_TC[last] for last, row in wanted if row.returns_hidden}
        kept = [i for i, (_, row) in enumerate(wanted) if row.keep_logits]
        if kept:
            slots = self._storage.indices([wanted[i][1].dst.slot for i in kept])
            self._storage.logits[slots] = logits[kept]
        drawn = [i for i, (_, row) in enumerate(wanted) if row.sample]
        return logits if len(drawn) == len(wanted) else logits[drawn]

    def _unsound(self, rows: list[Row], ends: list[int], hidden_TC: Tensor) -> list[int]:
        """Whose state is not finite, of the rows that draw nothing to tell it.

        A token's hidden row reads the whole state that the token leaves.
        """
        silent = {
            end - 1: row.seq_id for end, row in zip(ends, rows, strict=True) if not row.sample
        }
        if not silent:
            return []
        last_RC = hidden_TC[self._storage.indices([*silent])]
        are_sound = torch.isfinite(last_RC).all(dim=-1).tolist()
        pairs = zip(silent.values(), are_sound, strict=True)
        return [seq_id for seq_id, is_sound in pairs if not is_sound]

    def _score(self, row: Row, hidden_TC: Tensor) -> Scores:
        """How probable the targets of a row are, from its hidden states; part by part, since
        logits are much larger than those."""
        assert row.targets is not None, f"row of sequence {row.seq_id} has no targets"
        begin, token_ids = row.targets
        hidden_TC = hidden_TC[begin : begin + len(token_ids)]
        parts = []
        for first in range(0, len(token_ids), SCORED_ROWS):
            part = slice(first, first + SCORED_ROWS)
            logits = self._model.head(hidden_TC[part]).to(self._storage.logits.dtype)
            parts.append(self._sampler.score(row.seat, logits, token_ids[part]))
        return Scores(
            tuple(logprob for part in parts for logprob in part.logprobs),
            tuple(top for part in parts for top in part.tops),
        )

    def _kept_logits(self, rows: list[Row]) -> Tensor:
        """Copies [R, V] of the logits that rows of no tokens draw from."""
        for row in rows:
            assert row.sample, f"row of sequence {row.seq_id} feeds nothing and draws nothing"
            assert not row.keep_logits, f"row of sequence {row.seq_id} has no page to write"
        return self._storage.logits[self._storage.indices([row.src.slot for row in rows])]

    def _draw(self, rows: list[Row], parts: list[Tensor]) -> Draws:
        """Draw from the logits of all parts, whose rows are `rows`."""
        seats = [row.seat for row in rows]
        positions = [row.position + row.num_tokens for row in rows]
        draws = self._sampler.sample(torch.cat(parts), seats, positions)
        tokens = self._storage.indices(draws.tokens).clamp_(min=0)
        self._next_token[self._storage.indices(seats)] = tokens
        return draws

    def _tokens(self, rows: list[Row]) -> Tensor:
        known = [row.tokens if row.tokens is not None else (0,) for row in rows]
        tokens = self._storage.indices([token for part in known for token in part])
        waiting = [(i, row.seat) for i, row in enumerate(rows) if row.tokens is None]
        if waiting:
            starts = torch.tensor([0, *(len(part) for part in known)]).cumsum(0)
            places = starts[[i for i, _ in waiting]].to(tokens.device)
            seats = self._storage.indices([seat for _, seat in waiting])
            tokens[places] = self._next_token[seats]
        return tokens


def _has_logits(row: Row) -> bool:
    return row.sample or row.keep_logits


def _float32_bytes(row_C: Tensor) -> bytes:
    data: bytes = row_C.float().cpu().numpy().tobytes()
    return data
