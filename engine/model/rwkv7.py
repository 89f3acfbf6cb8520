"""RWKV-7 ("Goose", x070) as a torch module with the official parameter names.

One forward for serving and training: packed sequences of any lengths, states read from one set
of slots and written to another. It knows shapes and formulas, not schedules or files.

Legend: T packed tokens, S sequences in the batch, L layers, C channels, H heads, N head size,
V vocabulary. Slots index the first dimension of a `State`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.schema import ModelConfig
from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, LoraWeights, TimeMixRows, TimeMixWeights
from engine.model.quantize import Int8Linear
from engine.state.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Everything that fixes the shapes of a checkpoint."""

    num_cells: int
    vocab_size: int
    embedded_dim: int
    head_size: int
    ffn_dim: int
    w_lora_rank: int
    a_lora_rank: int
    v_lora_rank: int
    g_lora_rank: int

    @property
    def num_heads(self) -> int:
        return self.embedded_dim // self.head_size

    @staticmethod
    def from_config(cfg: ModelConfig) -> ModelDims:
        return ModelDims(
            num_cells=cfg.num_cells,
            vocab_size=cfg.vocab_size,
            embedded_dim=cfg.embedded_dim,
            head_size=cfg.head_size,
            ffn_dim=cfg.ffn_dim,
            w_lora_rank=cfg.lora_ranks.w,
            a_lora_rank=cfg.lora_ranks.a,
            v_lora_rank=cfg.lora_ranks.v,
            g_lora_rank=cfg.lora_ranks.g,
        )


@dataclass(frozen=True, slots=True)
class State:
    """Recurrent states of many sequences, one per slot.

    wkv [slots, L, H, N, N], row = key; shift [slots, L, 2, C], the last token seen by the time
    mix (0) and by the channel mix (1).
    """

    wkv: Tensor
    shift: Tensor


class TimeMix(nn.Module):
    x_r: nn.Parameter
    x_w: nn.Parameter
    x_k: nn.Parameter
    x_v: nn.Parameter
    x_a: nn.Parameter
    x_g: nn.Parameter
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter

    def __init__(self, dims: ModelDims, layer: int) -> None:
        super().__init__()
        C, H, N = dims.embedded_dim, dims.num_heads, dims.head_size
        self.layer, self.num_heads, self.head_size = layer, H, N
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, C)))
        for name, rank in (
            ("w", dims.w_lora_rank),
            ("a", dims.a_lora_rank),
            ("v", dims.v_lora_rank),
            ("g", dims.g_lora_rank),
        ):
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(C, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, C)))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=reference.GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        v_first: Tensor | None,
        batch: Batch,
        state: State,
        kernels: Backend,
    ) -> tuple[Tensor, Tensor]:
        """x [T, C] -> (output [T, C], the values of the first layer [T, C])."""
        mus = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        shift_pool = state.shift[:, self.layer, 0]
        mixed = kernels.norm_mix(x, norm.weight, norm.bias, mus, batch, shift_pool)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed.unbind()
        x_m = None if v_first is None else x_v
        d, a, m, g = kernels.lora(x_w, x_a, x_m, x_g, self._lora_weights())
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        rows = TimeMixRows(r=r, k=k, v=v, d=d, a=a, g=g, v_first=v_first, m=m)
        y = kernels.time_mix(rows, self._recurrence_weights(), batch, state.wkv[:, self.layer])
        return self.output(y), v if v_first is None else v_first

    def _lora_weights(self) -> LoraWeights:
        return LoraWeights(
            w0=self.w0.flatten(),
            w1=self.w1,
            w2=self.w2,
            a0=self.a0.flatten(),
            a1=self.a1,
            a2=self.a2,
            v0=self.v0.flatten(),
            v1=self.v1,
            v2=self.v2,
            g1=self.g1,
            g2=self.g2,
        )

    def _recurrence_weights(self) -> TimeMixWeights:
        return TimeMixWeights(
            k_k=self.k_k.flatten(),
            k_a=self.k_a.flatten(),
            r_k=self.r_k,
            norm_weight=self.ln_x.weight,
            norm_bias=self.ln_x.bias,
        )


class ChannelMix(nn.Module):
    def __init__(self, dims: ModelDims, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.x_k = nn.Parameter(torch.empty(1, 1, dims.embedded_dim))
        self.key = nn.Linear(dims.embedded_dim, dims.ffn_dim, bias=False)
        self.value: nn.Linear | Int8Linear = nn.Linear(dims.ffn_dim, dims.embedded_dim, bias=False)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, batch: Batch, state: State, kernels: Backend
    ) -> Tensor:
        shift_pool = state.shift[:, self.layer, 1]
        (x_k,) = kernels.norm_mix(x, norm.weight, norm.bias, (self.x_k,), batch, shift_pool)
        hidden, value = self.key(x_k), self.value
        if isinstance(value, Int8Linear):
            return kernels.int8_channel_mix(hidden, value.weight, value.scale)
        return kernels.channel_mix(hidden, value.weight)


class Block(nn.Module):
    def __init__(self, dims: ModelDims, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(dims.embedded_dim)
        self.ln1 = nn.LayerNorm(dims.embedded_dim, eps=reference.LAYER_NORM_EPS)
        self.ln2 = nn.LayerNorm(dims.embedded_dim, eps=reference.LAYER_NORM_EPS)
        self.att = TimeMix(dims, layer)
        self.ffn = ChannelMix(dims, layer)

    def forward(
        self, x: Tensor, v_first: Tensor | None, batch: Batch, state: State, kernels: Backend
    ) -> tuple[Tensor, Tensor]:
        mixed, v_first = self.att(x, self.ln1, v_first, batch, state, kernels)
        x = x + mixed
        return x + self.ffn(x, self.ln2, batch, state, kernels), v_first


class RWKV7(nn.Module):
    """The whole network. Parameters are uninitialised until weights are loaded or drawn.

    `kernels` may be set to another backend at any time between two steps.
    """

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        self.dims = dims
        self.mixes_lengths = False  # single tokens take one step, prompts the chunked form
        self._kernels: Backend = reference
        self.emb = nn.Embedding(dims.vocab_size, dims.embedded_dim)
        self.blocks = nn.ModuleList(Block(dims, layer) for layer in range(dims.num_cells))
        self.ln_out = nn.LayerNorm(dims.embedded_dim)
        self.head = nn.Linear(dims.embedded_dim, dims.vocab_size, bias=False)

    @property
    def kernels(self) -> Backend:
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Backend) -> None:
        self._kernels = kernels
        for module in self.modules():
            if isinstance(module, Int8Linear):
                module.kernels = kernels

    @property
    def num_parameters(self) -> int:
        quantized = (x.weight for x in self.modules() if isinstance(x, Int8Linear))
        return sum(x.numel() for x in (*self.parameters(), *quantized))

    def forward(
        self, tokens_T: Tensor, batch: Batch, state: State, grad_checkpoint: bool = False
    ) -> Tensor:
        """Hidden rows [T, C] after ln_out; `state` is read at src and written at dst in place.

        Rows that need logits go through `head`. Under autograd nothing is written: training
        starts every sequence from the state in `src_slot` and keeps no state.
        """
        first = self.blocks[0]
        assert isinstance(first, Block)
        x = first.ln0(self.emb(tokens_T))
        v_first: Tensor | None = None
        for block in self.blocks:
            if grad_checkpoint and torch.is_grad_enabled():
                x, v_first = checkpoint(
                    block, x, v_first, batch, state, self.kernels, use_reentrant=False
                )
            else:
                x, v_first = block(x, v_first, batch, state, self.kernels)
        out: Tensor = self.ln_out(x)
        return out

    def hidden(self, tokens_BT: Tensor, grad_checkpoint: bool = False) -> Tensor:
        """The training form: B sequences of equal length from the zero state -> [B, T, C]."""
        B, T = tokens_BT.shape
        zero = self.new_state(1, tokens_BT.device)
        slots = torch.zeros(B, dtype=torch.int64, device=tokens_BT.device)
        batch = Batch(lengths=(T,) * B, src_slot=slots, dst_slot=slots)
        x: Tensor = self(tokens_BT.reshape(-1), batch, zero, grad_checkpoint)
        return x.view(B, T, -1)

    @property
    def layout(self) -> PageLayout:
        """Of this model's states: float32, or float64 for a float64 model."""
        dims, dtype = self.dims, self.emb.weight.dtype
        wkv_dtype = torch.promote_types(dtype, torch.float32)
        return PageLayout(
            num_cells=dims.num_cells,
            num_heads=dims.num_heads,
            head_size=dims.head_size,
            vocab_size=dims.vocab_size,
            wkv_dtype=str(wkv_dtype).removeprefix("torch."),
            shift_dtype=str(dtype).removeprefix("torch."),
        )

    def new_state(self, num_slots: int, device: torch.device | str) -> State:
        """Zero states."""
        wkv, shift = (
            torch.zeros(num_slots, *tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)
            for tensor in (self.layout.tensors["wkv"], self.layout.tensors["shift"])
        )
        return State(wkv=wkv, shift=shift)
