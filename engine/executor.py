"""One step on the device: moves, seats, forward, scores, draws. Knows no threads and no queue.

It asks the device for a step without waiting for the one before; tokens stay on the device.

Legend: R rows that draw, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from engine.cuda_graph import Recorder, used_mib
from engine.decode_graphs import DecodeGraphs
from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.model.served import ServedModel
from engine.plan import ZERO_SLOT, Row, Scores, SeatStart, SlotRef, StepPlan
from engine.sampler import Draws, Sampler
from engine.state.storage import StateStorage
from engine.transfers import mark, to_host
from engine.types import SamplingParams

logger = logging.getLogger(__name__)

SCORED_ROWS = 128  # logits of a prompt at once: 32 MiB for the World vocabulary

Read = Callable[[], Draws]  # waits for the device, on any thread


@dataclass(slots=True)
class _Found:
    """What rows tell beside their draws, by sequence."""

    scores: dict[int, Scores] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)  # [C] of the last token
    are_sound: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)

    @property
    def unsound(self) -> tuple[int, ...]:
        pairs = [zip(ids, sound.tolist(), strict=True) for ids, sound in self.are_sound]
        return tuple(seq_id for part in pairs for seq_id, is_sound in part if not is_sound)


class StepExecutor:
    """All the tensors of one replica. Every call comes from one thread."""

    def __init__(
        self, model: ServedModel, storage: StateStorage, sampler: Sampler, num_seats: int
    ) -> None:
        self._model, self._storage, self._sampler = model, storage, sampler
        self._num_seats = num_seats
        # Sampled tokens stay on the device: the next step may be planned before they are known.
        # One more than there are seats: padding rows draw, too.
        self._next_token = torch.zeros(num_seats + 1, dtype=torch.int64, device=storage.device)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One prefill and one decode step: first calls allocate and choose kernels."""
        zero, first = SlotRef(ZERO_SLOT, 0), SlotRef(ZERO_SLOT + 1, 0)
        start = SeatStart(seat=0, sampling=SamplingParams(temperature=0.0))
        prefill = Row(0, 0, (0, 0), 2, 0, zero, first, sample=True)
        decode = Row(0, 0, None, 1, 2, first, first, sample=True)
        self.issue(StepPlan(0, (prefill,), (start,)))()
        self.issue(StepPlan(1, (decode,)))()

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Replay decode steps from now on; without it, or where it fails, they are computed one
        operation after the other."""
        device, started_s = self._storage.device, time.perf_counter()
        before_mib = used_mib(device)
        assert isinstance(self._model, RWKV7), "only its kernels are recorded"
        try:
            self._graphs = DecodeGraphs(
                self._model,
                self._storage,
                self._next_token,
                self._num_seats,
                recorder,
                self._sampler.on_device,
            )
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            logger.warning("cuda graphs: off (%s: %s)", type(error).__name__, reason)
            return
        logger.info(
            "cuda graphs: %d for 1 to %d rows, %s, recorded in %.1f s, %d MiB",
            self._graphs.num_graphs,
            self._num_seats,
            "with draws" if self._graphs.has_draws else "without draws",
            time.perf_counter() - started_s,
            used_mib(device) - before_mib,
        )

    @torch.inference_mode()
    def issue(self, plan: StepPlan) -> Read:
        """Ask the device for one step, all of it in plan order. What is returned waits for it."""
        for move in plan.moves:
            self._storage.move(move)
        for start in plan.starts:
            self._take_seat(start)
        # Decode rows first: the recurrence then takes them as one batch of single tokens.
        decode = [row for row in plan.rows if row.num_tokens == 1]
        prefill = [row for row in plan.rows if row.num_tokens > 1]
        again = [row for row in plan.rows if row.num_tokens == 0]
        found, parts = _Found(), list[Tensor]()
        drawn: list[tuple[list[Row], Read]] = []
        if decode and self._can_replay_draws(decode):
            drawn.append((decode, self._replay_draws(decode)))
            decode = []
        batches = [decode + prefill] if self._model.mixes_lengths else [decode, prefill]
        parts = [self._forward(rows, found) for rows in batches if rows]
        if again:
            parts.append(self._kept_logits(again))
        rows = [row for row in decode + prefill + again if row.sample]
        if rows:
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            drawn.append((rows, self._draw(rows, logits)))
        returned = [found.hidden[row.seq_id] for row in plan.rows if row.returns_hidden]
        hidden = [to_host(row_C.float()) for row_C in returned]
        return partial(_read, plan, drawn, found, hidden, mark(self._storage.device))

    def _take_seat(self, start: SeatStart) -> None:
        self._sampler.start(start.seat, start.sampling, start.output_ids)
        if start.output_ids:
            self._next_token[start.seat] = start.output_ids[-1]

    def _can_replay_draws(self, rows: list[Row]) -> bool:
        return (
            self._graphs is not None
            and self._graphs.has_draws
            and all(row.sample and not _is_told_more(row) for row in rows)
            and self._sampler.is_on_device([row.seat for row in rows])
        )

    def _replay_draws(self, rows: list[Row]) -> Read:
        """One launch for everything up to the tokens that the next step feeds."""
        assert self._graphs is not None, "nothing was recorded"
        _check_targets(rows)
        self._graphs.to_tokens(rows)
        tokens_R, logprobs_R = self._graphs.tokens[: len(rows)], self._graphs.logprobs[: len(rows)]
        return self._reading(rows, tokens_R, logprobs_R)

    def _forward(self, rows: list[Row], found: _Found) -> Tensor:
        """Run the model; the logits [R, V] of the R sampling rows, in order."""
        _check_targets(rows)
        if self._graphs is not None and all(row.num_tokens == 1 for row in rows):
            self._graphs.to_logits(rows)
            hidden_TC = self._graphs.hidden[: len(rows)]
            logits_TV: Tensor | None = self._graphs.logits[: len(rows)]
        else:
            hidden_TC, logits_TV = self._run_model(rows), None
        ends = list(accumulate(row.num_tokens for row in rows))
        for row, end in zip(rows, ends, strict=True):
            if row.targets:
                part_TC = hidden_TC[end - row.num_tokens : end]
                found.scores[row.seq_id] = self._score(row, part_TC)
        self._look_at_states(rows, ends, hidden_TC, found)
        wanted = [(end - 1, row) for end, row in zip(ends, rows, strict=True) if _has_logits(row)]
        picked = [last for last, _ in wanted]
        if logits_TV is not None:
            logits = self._at(picked, logits_TV)
        else:
            # In the type they are kept in, so that a draw from kept logits is the same draw.
            logits = self._model.head(self._at(picked, hidden_TC)).to(self._storage.logits.dtype)
        found.hidden |= {row.seq_id: hidden_TC[last] for last, row in wanted if row.returns_hidden}
        kept = [i for i, (_, row) in enumerate(wanted) if row.keep_logits]
        if kept:
            slots = self._storage.indices([wanted[i][1].dst.slot for i in kept])
            self._storage.logits[slots] = self._at(kept, logits)
        return self._at([i for i, (_, row) in enumerate(wanted) if row.sample], logits)

    def _at(self, places: list[int], rows: Tensor) -> Tensor:
        """Some of the rows; if all of them, in order, then themselves and no copy."""
        if len(places) == len(rows) and all(i == place for i, place in enumerate(places)):
            return rows
        return rows.index_select(0, self._storage.indices(places))

    def _run_model(self, rows: list[Row]) -> Tensor:
        """Hidden rows [T, C] of all tokens."""
        batch = Batch(
            lengths=tuple(row.num_tokens for row in rows),
            src_slot=self._storage.indices([row.src.slot for row in rows]),
            dst_slot=self._storage.indices([row.dst.slot for row in rows]),
        )
        hidden_TC: Tensor = self._model(self._tokens(rows), batch, self._storage.state)
        return hidden_TC

    def _look_at_states(
        self, rows: list[Row], ends: list[int], hidden_TC: Tensor, found: _Found
    ) -> None:
        """Whether the states are finite of those rows that draw nothing to tell it.

        A token's hidden row reads the whole state that the token leaves.
        """
        pairs = zip(ends, rows, strict=True)
        silent = {end - 1: row.seq_id for end, row in pairs if not row.sample}
        if silent:
            last_RC = self._at([*silent], hidden_TC)
            are_sound = to_host(torch.isfinite(last_RC).all(dim=-1))
            found.are_sound.append((tuple(silent.values()), are_sound))

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
        slots = self._storage.indices([row.src.slot for row in rows])
        return self._storage.logits.index_select(0, slots)

    def _draw(self, rows: list[Row], logits_RV: Tensor) -> Read:
        """On the device alone if that can draw for all of the rows, else waiting for them."""
        seats = [row.seat for row in rows]
        positions = [row.position + row.num_tokens for row in rows]
        seats_R, device = self._storage.indices(seats), self._sampler.on_device
        if device is not None and self._sampler.is_on_device(seats):
            positions_R = self._storage.indices(positions)
            tokens_R, logprobs_R = device.draw(logits_RV, seats_R, positions_R)
            self._next_token.index_copy_(0, seats_R, tokens_R.clamp(min=0))
            return self._reading(rows, tokens_R, logprobs_R)
        draws = self._sampler.sample(logits_RV, seats, positions)
        fed = self._storage.indices([max(token, 0) for token in draws.tokens])
        self._next_token.index_copy_(0, seats_R, fed)
        return lambda: draws

    def _reading(self, rows: list[Row], tokens_R: Tensor, logprobs_R: Tensor) -> Read:
        """Bring what was drawn to the host, behind what the device is doing."""
        asking = [self._sampler.asks_logprobs(row.seat) for row in rows]
        tokens = to_host(tokens_R)
        return partial(_as_draws, tokens, to_host(logprobs_R) if any(asking) else None, asking)

    def _tokens(self, rows: list[Row]) -> Tensor:
        """Ids [T]: those that the plan knows, and what the seats have drawn since."""
        seats = [row.seat for row in rows if row.tokens is None]
        drawn = self._next_token.index_select(0, self._storage.indices(seats)) if seats else None
        if drawn is not None and len(seats) == len(rows):
            return drawn
        known = [row.tokens if row.tokens is not None else (0,) for row in rows]
        tokens = self._storage.indices([token for part in known for token in part])
        if drawn is not None:
            ends = accumulate(len(part) for part in known)
            pairs = zip(rows, ends, strict=True)
            places = [end - 1 for row, end in pairs if row.tokens is None]
            tokens.index_copy_(0, self._storage.indices(places), drawn)
        return tokens


def _read(
    plan: StepPlan,
    drawn: list[tuple[list[Row], Read]],
    found: _Found,
    hidden: list[Tensor],
    wait: Callable[[], None],
) -> Draws:
    """The draws of a step in plan order, and what else it has found, when the device is done.

    Whoever hears of the step may use its frames, from another thread.
    """
    wait()
    draws = joined([read() for _, read in drawn])
    order = [row.seq_id for rows, _ in drawn for row in rows]
    places = {seq_id: place for place, seq_id in enumerate(order)}
    draws = draws.picked([places[row.seq_id] for row in plan.rows if row.sample])
    return draws._replace(
        scores=tuple(found.scores[row.seq_id] for row in plan.rows if row.targets),
        hidden=tuple(row_C.numpy().tobytes() for row_C in hidden),
        unsound=found.unsound,
    )


def joined(parts: Sequence[Draws]) -> Draws:
    """Draws one after the other; who was not asked for log probabilities has NaN among others."""
    has_logprobs, has_tops = any(part.logprobs for part in parts), any(part.tops for part in parts)
    counts = [len(part.tokens) for part in parts]
    pairs = list(zip(parts, counts, strict=True))
    logprobs = [part.logprobs or (math.nan,) * n for part, n in pairs] if has_logprobs else []
    tops = [part.tops or ((),) * n for part, n in pairs] if has_tops else []
    return Draws(
        tuple(token for part in parts for token in part.tokens),
        tuple(logprob for part in logprobs for logprob in part),
        tuple(top for part in tops for top in part),
    )


def _as_draws(tokens: Tensor, logprobs: Tensor | None, asking: list[bool]) -> Draws:
    token_ids: list[int] = tokens.tolist()
    if logprobs is None:
        return Draws(tuple(token_ids))
    values = zip(token_ids, logprobs.tolist(), asking, strict=True)
    told = (value if asks and token >= 0 else math.nan for token, value, asks in values)
    return Draws(tuple(token_ids), tuple(told))


def _check_targets(rows: list[Row]) -> None:
    for row in rows:
        assert row.dst.slot != ZERO_SLOT, f"row of sequence {row.seq_id} writes the zero page"


def _is_told_more(row: Row) -> bool:
    """It needs the hidden row or the logits themselves."""
    return row.keep_logits or row.returns_hidden or row.targets is not None


def _has_logits(row: Row) -> bool:
    return row.sample or row.keep_logits
