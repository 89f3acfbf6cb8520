"""ModelConfig: the shape of a model, config/model/NAME.toml. Reads no files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from config.errors import ConfigError
from config.key import Key, Only, PositiveFloat, PositiveInt, check_only


class LoraRanks(NamedTuple):
    """Inner sizes of the low-rank parts of a time mix: decay, in-context rate, value, gate."""

    w: int
    a: int
    v: int
    g: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """config/model/NAME.toml: the shape of a model."""

    name: str = ""  # the file's name without suffix
    model_type: Annotated[
        Literal["auto_regressive", "sequence_embedding"],
        Key(
            "what the model predicts",
            only=Only("auto_regressive", 'only "auto_regressive" is supported'),
        ),
    ] = "auto_regressive"
    num_cells: Annotated[PositiveInt, Key("number of layers")]
    vocab_size: Annotated[PositiveInt, Key("rows of the embedding and of the head")]
    embedded_dim: Annotated[PositiveInt, Key("width of the residual stream")]
    num_heads: Annotated[PositiveInt, Key("heads; must divide embedded_dim")]
    channel_mix_dim_scale: Annotated[
        PositiveFloat, Key("width of the channel mix, in multiples of embedded_dim")
    ] = 4.0
    dropout_prob: Annotated[
        float,
        Key(
            "RWKV-7 has no dropout",
            only=Only(0.0, "RWKV-7 has no dropout (rwkv-rs reads this key and ignores it); use 0"),
        ),
    ] = 0.0
    with_token_shift: Annotated[
        bool,
        Key(
            "blend each token with the one before",
            only=Only(True, "RWKV-7 always has token shift; use true"),
        ),
    ] = True
    with_deep_embed_att: Annotated[
        bool, Key("DeepEmbed in the time mix", only=Only(False, "DeepEmbed is not supported"))
    ] = False
    with_deep_embed_ffn: Annotated[
        bool, Key("DeepEmbed in the channel mix", only=Only(False, "DeepEmbed is not supported"))
    ] = False
    w_lora_rank: Annotated[
        PositiveInt | None, Key("(new) rank of the decay; unset = formula of RWKV-LM")
    ] = None
    a_lora_rank: Annotated[
        PositiveInt | None, Key("(new) rank of the in-context learning rate; unset = formula")
    ] = None
    v_lora_rank: Annotated[
        PositiveInt | None, Key("(new) rank of the value residual; unset = formula")
    ] = None
    g_lora_rank: Annotated[PositiveInt | None, Key("(new) rank of the gate; unset = formula")] = (
        None
    )

    def __post_init__(self) -> None:
        check_only(self)
        if self.embedded_dim % self.num_heads:
            reason = f"must divide embedded_dim = {self.embedded_dim}"
            raise ConfigError(reason, key="num_heads", value=self.num_heads)
        if not float(self.channel_mix_dim_scale * self.embedded_dim).is_integer():
            reason = f"times embedded_dim = {self.embedded_dim} must be a whole number"
            raise ConfigError(reason, key="channel_mix_dim_scale", value=self.channel_mix_dim_scale)

    @property
    def head_size(self) -> int:
        return self.embedded_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.channel_mix_dim_scale * self.embedded_dim)

    @property
    def lora_ranks(self) -> LoraRanks:
        """The ranks written in the file, else those of RWKV-LM's formula."""
        return LoraRanks(
            w=self.w_lora_rank or _formula_rank(2.5, self.embedded_dim),
            a=self.a_lora_rank or _formula_rank(2.5, self.embedded_dim),
            v=self.v_lora_rank or _formula_rank(1.7, self.embedded_dim),
            g=self.g_lora_rank or _formula_rank(5.0, self.embedded_dim),
        )


def _formula_rank(factor: float, embedded_dim: int) -> int:
    """RWKV-LM (RWKV-v7/train_temp/src/model.py); released checkpoints often differ from it."""
    return max(32, round(factor * math.sqrt(embedded_dim) / 32) * 32)
