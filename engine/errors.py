"""Errors a user of the engine can cause or meet. Broken invariants are assertions instead.

EngineError
├── InvalidRequest      the request can never be served; the message names field and remedy
│   ├── ContextTooLong
│   ├── StateNotFound   no state of that id for this owner
│   └── StateMismatch   a state of another model, layout or format
├── Overloaded          try again after `retry_after_s`
├── StatesFull          no room for another kept state: delete some or raise the budget
├── Draining            the replica takes nothing new
├── EngineDead          the device failed; the replica is out of service
├── RequestFailed       this request failed inside the engine, others go on
└── WeightsError        a checkpoint is missing, corrupt or of another shape
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all of them."""


class InvalidRequest(EngineError):
    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextTooLong(InvalidRequest):
    pass


class StateNotFound(InvalidRequest):
    pass


class StateMismatch(InvalidRequest):
    pass


class StatesFull(EngineError):
    pass


class Overloaded(EngineError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(EngineError):
    pass


class EngineDead(EngineError):
    pass


class RequestFailed(EngineError):
    pass


class WeightsError(EngineError):
    pass
