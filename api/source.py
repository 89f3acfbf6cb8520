"""ConfigSource: where the running configuration came from, so that it can be read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import InferConfig, config_path, load_infer, parse_infer


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """The command line's part of the configuration; `overrides` are its --set arguments."""

    config_dir: Path
    infer_cfg: str
    overrides: tuple[str, ...] = ()

    def load(self) -> InferConfig:
        """Raises ConfigError."""
        return load_infer(self.config_dir, self.infer_cfg, self.overrides)

    def parse(self, text: str) -> InferConfig:
        """As `load`, as if `text` were in the file. Raises ConfigError."""
        return parse_infer(text, self.config_dir, self.path, self.overrides)

    @property
    def path(self) -> Path:
        """The infer TOML. Raises ConfigError when it is not there."""
        return config_path(self.config_dir, "infer", self.infer_cfg)

    def folders(self) -> set[Path]:
        """Folders where a change of the configuration shows; links are followed."""
        folders = {self.config_dir / kind for kind in ("infer", "model")}
        files = [file for folder in folders for file in folder.glob("*.toml")]
        return {path.resolve() for path in folders} | {file.resolve().parent for file in files}
