"""ConfigError: what is wrong in a configuration, where, and what to do. Knows no schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_VALUE = object()  # None is a value that a key can have
MAX_SHOWN_CHARS = 200


class ConfigError(ValueError):
    """A configuration that cannot be used.

    `reason` says what is wrong and what would be right, `key` is the path of the key inside
    the file ("models[1].paragraph_len"), `file` the TOML file or the name of another source.
    The message is "file: key = value: reason" with the parts that are known.
    """

    def __init__(
        self, reason: str, *, key: str = "", value: object = NO_VALUE, file: str | Path = ""
    ) -> None:
        self.reason = reason
        self.key = key
        self.value = value
        self.file = str(file)
        place = f"{key} = {shown(value)}" if key and value is not NO_VALUE else key
        super().__init__(": ".join(part for part in (self.file, place, reason) if part))

    def located(self, file: str | Path, table: str = "") -> ConfigError:
        """The same error with the place that its raiser did not know; a known one stays."""
        if self.file:
            return self
        key = ".".join(part for part in (table, self.key) if part)
        return ConfigError(self.reason, key=key, value=self.value, file=file)


@contextmanager
def at(file: str | Path, table: str = "") -> Iterator[None]:
    """Errors raised inside are about this table of this file, unless they know better."""
    try:
        yield
    except ConfigError as error:
        raise error.located(file, table) from None


def shown(value: object) -> str:
    """The value as TOML writes it (or close to it), cut to a readable length.

    Not what is in tables: under a header that is spelled wrongly they hold secrets, too.
    """
    tables = value if isinstance(value, list) else [value]
    if any(isinstance(table, dict) for table in tables):
        return "[{...}]" if value is tables else "{...}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
