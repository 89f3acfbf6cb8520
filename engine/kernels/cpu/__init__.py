"""Kernels in numba. Importing the package settles where compiled code is kept.

numba looks at the file of the function it is asked for, not at those of the functions called from
there, and would go on with old code after a change to one of them. So compiled code lies in a
folder named after the sources of all. NUMBA_CACHE_DIR, where set, is taken instead as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from numba.core import config

KEPT_DAYS = 30  # of code for sources that nobody has used since


def _digest() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _cache_home() -> Path:
    """A folder of this user's that can be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-async-engine"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return home
    except (OSError, RuntimeError):
        user = os.getuid() if hasattr(os, "getuid") else 0
        home = Path(tempfile.gettempdir()) / f"rwkv-async-engine-{user}"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return home


def _settle() -> None:
    home = _cache_home()
    folder = home / f"kernels-{_digest()}"
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    for other in home.glob("kernels-*"):
        try:
            is_old = time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400
        except FileNotFoundError:  # another process has removed it
            continue
        if is_old:
            shutil.rmtree(other, ignore_errors=True)
    config.CACHE_DIR = str(folder)


if not os.environ.get("NUMBA_CACHE_DIR"):
    _settle()
