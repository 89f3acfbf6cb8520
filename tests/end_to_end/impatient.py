"""`python -m tests.end_to_end.impatient`: `python -m api` with seconds instead of half minutes."""

from __future__ import annotations

from api.__main__ import leave, main
from api.guard import GuardedHttp

if __name__ == "__main__":
    GuardedHttp.header_timeout_s = 1.5
    GuardedHttp.body_grace_s = 2.0
    GuardedHttp.stall_timeout_s = 3.0
    leave(main())
