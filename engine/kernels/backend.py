"""What the model asks of its kernels: the interface that every backend has. Knows no formulas.

A backend is a module with the functions of `Backend`: `reference`, the specification, or
`gpu.backend`. `engine.kernels.choice` picks one.

Legend: T packed tokens, S sequences in the batch, C = H*N channels, H heads, N head size,
F width of the channel mix, J ways of mixing at once. A pool is one layer of all slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from engine.kernels.optimizer import AdamWStep

INT8_GROUP = 64  # inputs of an int8 matrix that share a scale


@dataclass(frozen=True, slots=True)
class Batch:
    """Which tokens belong to which sequence, and where states come from and go to.

    `lengths` on the host, `src_slot` and `dst_slot` [S] int64 on the device. No two sequences
    may share a dst, and none may write a slot that another one of the batch reads. In `notes` a
    backend keeps, by type, what it works out for one layer and needs in all.

    A sequence whose dst is negative is padding, its src 0: what comes of it is undefined, and it
    leaves all slots as they are. Slot 0 is nobody's dst where there is padding.
    """

    lengths: tuple[int, ...]
    src_slot: Tensor
    dst_slot: Tensor
    notes: dict[type, object] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeMixRows:
    """What the time mix has computed for each token before the recurrence, all [T, C].

    `d`, `a` and `m`, for decay, rate and value residual, are as they were before their sigmoid;
    `v` is before the residual, and `g` is the gate as it is. The first layer has neither
    `v_first` nor `m`.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    d: Tensor
    a: Tensor
    g: Tensor
    v_first: Tensor | None
    m: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeMixWeights:
    """The parameters that the recurrence needs: r_k [H, N], the others [C]."""

    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """The low-rank products of a time mix, of ranks R of their own.

    `w0`, `a0` and `v0` [C] are added; `w1`, `a1`, `v1` and `g1` [C, R] lead into the rank, and
    `w2`, `a2`, `v2` and `g2` [R, C] out of it.
    """

    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    g1: Tensor
    g2: Tensor


class Backend(Protocol):
    """Everything of a layer that is not a matrix product of its own.

    Pools are written in place, except under autograd: training keeps no state.
    """

    def norm_mix(
        self,
        x_TC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mus_C: Sequence[Tensor],
        batch: Batch,
        shift_pool: Tensor,
    ) -> Tensor:
        """LayerNorm, then each token moved towards the one before it, J ways: [J, T, C].

        `mus_C` are the J weights, C values each in any shape. J is 1 or 6.

        The pool [slots, C] holds the normalised token before each sequence, and then its last.
        """
        ...

    def lora(
        self, x_w: Tensor, x_a: Tensor, x_v: Tensor | None, x_g: Tensor, weights: LoraWeights
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """`d`, `a`, `m` and `g` of `TimeMixRows`, of inputs [T, C].

        The first layer has no `m`, and gives no `x_v` for it.
        """
        ...

    def time_mix(
        self, rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor
    ) -> Tensor:
        """The recurrence and all around it, ready for the output matrix: [T, C] as `rows.r`.

        The pool is [slots, H, N, N], row = key. It is computed in the pool's type, and in float32
        where the pool stores less than that.
        """
        ...

    def channel_mix(self, hidden_TF: Tensor, value_CF: Tensor) -> Tensor:
        """Squared ReLU, then the matrix down: [T, C]."""
        ...

    def int8_channel_mix(self, hidden_TF: Tensor, value_CF: Tensor, scale_CG: Tensor) -> Tensor:
        """The same with a matrix of int8; see `int8_linear`."""
        ...

    def int8_linear(self, x: Tensor, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """x [..., I] times (weight * scale)ᵀ: [..., O] in the type of x.

        The weight is int8, and its scale, of any float type, is one for each `INT8_GROUP` inputs
        of an output. Not differentiable.
        """
        ...

    def cross_entropy_l2wrap(
        self, hidden_MC: Tensor, weight_VC: Tensor, targets_M: Tensor, l2wrap: bool = True
    ) -> Tensor:
        """Mean cross-entropy of the head's logits, in nats; L2Wrap changes only the gradient."""
        ...

    def clip_factor(self, grads: Tensor, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """What gradients are to be multiplied by, NaN to skip the step; and their norm."""
        ...

    def adamw(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        factor: Tensor,
        step: AdamWStep,
    ) -> None:
        """One step of AdamW on flat buffers in place, of gradients times `factor` on the device."""
        ...
