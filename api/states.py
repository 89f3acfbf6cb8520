"""Kept states on the wire: the fields that file one, and the object that describes one.

Knows no route and no engine; api/state_body.py is the body that creates one.
"""

from __future__ import annotations

import math

import msgspec

from api.errors import invalid
from api.sampling import Number
from engine.types import StateInfo, StateOptions

MAX_LABEL_CHARS = 256
MAX_TTL_S = 1e10  # three centuries; JSON has no numbers for much more
FOR_EVER = 0  # as in the configuration's state_ttl_s


class StateFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a state is filed; null = absent."""

    label: str | None = None
    ttl_s: Number | None = None  # from now; 0 = until it is deleted
    pinned: bool | None = None  # does not expire while it is

    def check_filing(self, place: str = "") -> None:
        """Raises ApiError 400; `place` is what precedes the names of the fields."""
        if self.label is not None and len(self.label) > MAX_LABEL_CHARS:
            raise invalid(
                f"'{place}label' has {len(self.label)} characters, at most {MAX_LABEL_CHARS} are "
                "kept",
                f"{place}label",
            )
        if self.ttl_s is not None and not 0 <= self.ttl_s <= MAX_TTL_S:
            raise invalid(
                f"'{place}ttl_s' = {self.ttl_s} must be seconds from now (at most {MAX_TTL_S:g}), "
                "or 0 for a state that stays until it is deleted",
                f"{place}ttl_s",
            )

    def options(self, default_ttl_s: float) -> StateOptions:
        """For a new state, after `check_filing`; `default_ttl_s` is the configuration's."""
        ttl_s = default_ttl_s if self.ttl_s is None else self.ttl_s
        return StateOptions(
            label=self.label or "",
            ttl_s=None if ttl_s == FOR_EVER else float(ttl_s),
            is_pinned=self.pinned or False,
        )

    def new_ttl_s(self) -> float | None:
        """For a state that there is: None = as it was, inf = until it is deleted."""
        return math.inf if self.ttl_s == FOR_EVER else self.ttl_s


def state_object(info: StateInfo, model_name: str) -> dict[str, object]:
    """The JSON object of a kept state; times are unix seconds."""
    expires_s = info.expires_unix_s
    return {
        "id": info.state_id,
        "object": "state",
        "model": model_name,
        "num_tokens": info.num_tokens,
        "bytes": info.num_bytes,
        "created": int(info.created_unix_s),
        "expires_at": None if expires_s is None else int(expires_s),
        "label": info.label,
        "pinned": info.is_pinned,
        "has_logits": info.has_logits,
        "parent": info.parent_id,
        "tier": info.tier,
    }
