"""The specification: every RWKV-7 operation in plain torch, differentiable, never tuned.

Other backends are tested against this file; this file is tested against the `rwkv` package and
float64. Formulas: "RWKV-7 Goose", arXiv 2503.14456, and BlinkDL/RWKV-LM (RWKV-v7/train_temp).

Legend: T packed tokens of all sequences, S sequences, H heads, N head size, C = H*N channels,
V vocabulary, M rows. A state matrix is stored [key, value]: row j belongs to key channel j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.kernels.backend import INT8_GROUP, Batch, LoraWeights, TimeMixRows, TimeMixWeights
from engine.kernels.fused_adamw import adamw as adamw
from engine.kernels.optimizer import clip_factor as clip_factor

DECAY_SCALE = -math.exp(-0.5)  # log decay = DECAY_SCALE * sigmoid(d), so w lies in (0.545, 1)
GROUP_NORM_EPS = 64e-5
LAYER_NORM_EPS = 1e-5
KEY_NORM_EPS = 1e-12  # a key of zeros stays zero
CHUNK_LEN = 32
DEQUANTIZED_ELEMENTS = 1 << 22  # at once: 16 MiB of float32
L2WRAP_FACTOR = 1e-4


def norm_mix(
    x_TC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    mus_C: Sequence[Tensor],
    batch: Batch,
    shift_pool: Tensor,
) -> Tensor:
    x_TC = F.layer_norm(x_TC, weight_C.shape, weight_C, bias_C, LAYER_NORM_EPS)
    previous_TC = shift_tokens(x_TC, batch.lengths, shift_pool[batch.src_slot])
    _store(shift_pool, batch, last_tokens(x_TC, batch.lengths))
    mu_J1C = torch.stack([mu.reshape(1, -1) for mu in mus_C])
    return mix(x_TC, previous_TC, mu_J1C)


def lora(
    x_w: Tensor, x_a: Tensor, x_v: Tensor | None, x_g: Tensor, weights: LoraWeights
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    d = weights.w0 + torch.tanh(x_w @ weights.w1) @ weights.w2
    a = weights.a0 + (x_a @ weights.a1) @ weights.a2
    m = None if x_v is None else weights.v0 + (x_v @ weights.v1) @ weights.v2
    g = torch.sigmoid(x_g @ weights.g1) @ weights.g2
    return d, a, m, g


def time_mix(rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor) -> Tensor:
    dtype = torch.promote_types(wkv_pool.dtype, torch.promote_types(rows.r.dtype, torch.float32))
    heads = (rows.r.shape[0], *weights.r_k.shape)
    k, v, rate = rows.k, rows.v, torch.sigmoid(rows.a)
    if rows.v_first is not None and rows.m is not None:
        v = v + (rows.v_first - v) * torch.sigmoid(rows.m)
    kk = F.normalize((k * weights.k_k).view(heads), dim=-1, eps=KEY_NORM_EPS).to(dtype)
    k = k * (1 + (rate - 1) * weights.k_a)
    lw = log_decay(rows.d.to(dtype)).view(heads)
    r_, k_, v_, rate_ = (x.to(dtype).view(heads) for x in (rows.r, k, v, rate))
    state = wkv_pool[batch.src_slot].to(dtype)
    y, state = wkv7(r_, lw, k_, v_, -kk, kk * rate_, batch.lengths, state)
    _store(wkv_pool, batch, state)
    norm = (weights.norm_weight.to(dtype), weights.norm_bias.to(dtype))
    y = readout(y, r_, k_, v_, weights.r_k.to(dtype), *norm)
    return y.to(rows.r.dtype) * rows.g


def channel_mix(hidden_TF: Tensor, value_CF: Tensor) -> Tensor:
    return F.linear(squared_relu(hidden_TF), value_CF)


def int8_channel_mix(hidden_TF: Tensor, value_CF: Tensor, scale_CG: Tensor) -> Tensor:
    return int8_linear(squared_relu(hidden_TF), value_CF, scale_CG)


def int8_linear(x: Tensor, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    num_outputs, num_inputs = weight_OI.shape
    step = max(1, DEQUANTIZED_ELEMENTS // num_inputs)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    for first in range(0, num_outputs, step):
        rows = slice(first, first + step)
        y[..., rows] = F.linear(x, dequantize(weight_OI[rows], scale_OG[rows], x.dtype))
    return y


def dequantize(weight_OI: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale [O, I], exact in float32 with scales of half precision, then rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    groups_OGJ = weight_OI.unflatten(1, (-1, INT8_GROUP)).to(wide)
    weight_OI = (groups_OGJ * scale_OG.to(wide).unsqueeze(-1)).flatten(1)
    return weight_OI.to(dtype)


def _store(pool: Tensor, batch: Batch, value: Tensor) -> None:
    """Write each sequence's slot; padding rows write nothing."""
    if torch.is_grad_enabled():
        return
    slots, value = batch.dst_slot, value.to(pool.dtype)
    # Without a look at the slots, which a GPU has not got ready: it writes slot 0 over itself.
    if slots.device.type != "cpu" or bool((slots < 0).any()):
        is_padding = (slots < 0).view(-1, *[1] * (pool.dim() - 1))
        value, slots = torch.where(is_padding, pool[0], value), slots.clamp(min=0)
    pool[slots] = value


def log_decay(d: Tensor) -> Tensor:
    """log w of the raw decay activation `d`: w = exp(-exp(-1/2) * sigmoid(d))."""
    return DECAY_SCALE * torch.sigmoid(d)


def shift_tokens(x_TC: Tensor, lengths: tuple[int, ...], last_SC: Tensor) -> Tensor:
    """The token before each token: x moved down by one, `last_SC` at the head of each sequence."""
    last_SC = last_SC.to(x_TC.dtype)
    if max(lengths) == 1:
        return last_SC
    previous = torch.cat([x_TC[:1], x_TC[:-1]])
    sizes = torch.tensor(lengths, device=x_TC.device)
    return previous.index_copy(0, sizes.cumsum(0) - sizes, last_SC)


def last_tokens(x_TC: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The rows [S, C] of each sequence's last token."""
    if max(lengths) == 1:
        return x_TC
    return x_TC[torch.tensor(lengths, device=x_TC.device).cumsum(0) - 1]


def mix(x_TC: Tensor, previous_TC: Tensor, mu_J1C: Tensor) -> Tensor:
    """Each channel moved towards the token before, J ways at once: [J, T, C]."""
    return torch.addcmul(x_TC, previous_TC - x_TC, mu_J1C)


def wkv7(
    r: Tensor,
    lw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: tuple[int, ...],
    state_SHNN: Tensor,
) -> tuple[Tensor, Tensor]:
    """The WKV-7 recurrence over packed sequences.

    Six inputs [T, H, N] of the state's dtype, `lw` the log decay; state [S, H, N, N].
    Returns y [T, H, N] and the states after each sequence's last token.
    Single tokens take one step of the recurrence, longer sequences the chunked form.
    """
    if max(lengths) == 1:
        return wkv7_step(r, lw, k, v, a, b, state_SHNN)
    if len(set(lengths)) == 1:
        B, T = len(lengths), lengths[0]
        r, lw, k, v, a, b = (x.view(B, T, *x.shape[1:]) for x in (r, lw, k, v, a, b))
        y, state = wkv7_chunked(r, lw, k, v, a, b, state_SHNN)
        return y.flatten(0, 1), state
    # Padding with zeros is exact: w = 1, k = v = a = b = 0 leaves the state as it is.
    r, lw, k, v, a, b = (
        pad_sequence(list(x.split(lengths)), batch_first=True) for x in (r, lw, k, v, a, b)
    )
    y, state = wkv7_chunked(r, lw, k, v, a, b, state_SHNN)
    return torch.cat([y[i, :n] for i, n in enumerate(lengths)]), state


def wkv7_step(
    r: Tensor, lw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; inputs [..., H, N], state [..., H, N, N].

    u = Sᵀa;  S ← diag(w) S + b uᵀ + k vᵀ;  y = Sᵀr    (S is [key, value])
    """
    u = (a.unsqueeze(-2) @ state).squeeze(-2)
    state = (
        lw.exp().unsqueeze(-1) * state
        + b.unsqueeze(-1) * u.unsqueeze(-2)
        + k.unsqueeze(-1) * v.unsqueeze(-2)
    )
    return (r.unsqueeze(-2) @ state).squeeze(-2), state


def wkv7_recurrent(
    r: Tensor, lw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; inputs [B, T, H, N], state [B, H, N, N]."""
    ys = []
    for t in range(r.shape[1]):
        y, state = wkv7_step(r[:, t], lw[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
        ys.append(y)
    return torch.stack(ys, dim=1), state


def wkv7_chunked(
    r: Tensor,
    lw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Tensor, Tensor]:
    """The same result by matrix products within chunks; inputs [B, T, H, N].

    With L the running sum of log decays inside a chunk, tokens of the chunk see each other
    through strictly lower triangular products and the past through the state at its start:
    U = (I - AB)⁻¹ (AK V + A S),  Y = R S + RB U + RK V,  S' = e (S + Bᵀ U + Kᵀ V).
    e^{-L} stays below e^{0.61 * chunk_len}, within float32 for chunks of 32.
    The inverse is a forward substitution: doubling products overflow on repeated tokens.
    """
    num_tokens = r.shape[1]
    chunk_len = min(chunk_len, num_tokens)
    padding = -num_tokens % chunk_len
    num_chunks = (num_tokens + padding) // chunk_len

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [B, H, chunk, token, N]
        x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        batch, _, heads, size = x.shape
        return x.reshape(batch, num_chunks, chunk_len, heads, size).permute(0, 3, 1, 2, 4)

    r, lw, k, v, a, b = (chunks(x) for x in (r, lw, k, v, a, b))
    sums = lw.cumsum(-2)
    grow = (-sums).exp()
    a_in, r_in = a * (sums - lw).exp(), r * sums.exp()
    bk = torch.cat([b * grow, k * grow], dim=-2)
    total = sums[..., -1:, :].exp()  # decay over the whole chunk
    ab, ak = (a_in @ bk.mT).split(chunk_len, dim=-1)
    rb, rk = (r_in @ bk.mT).split(chunk_len, dim=-1)
    ab, ak, rb, rk = ab.tril(-1), ak.tril(-1), rb.tril(), rk.tril()
    # U = solved_v + solved_a @ S for whatever state S the chunk begins with
    solved = torch.linalg.solve_triangular(
        torch.eye(chunk_len, dtype=r.dtype, device=r.device) - ab,
        torch.cat([ak @ v, a_in], dim=-1),
        upper=False,
        unitriangular=True,
    )
    solved_v, solved_a = solved.chunk(2, dim=-1)
    bk_out = (bk * total).mT
    b_out, k_out = bk_out.chunk(2, dim=-1)
    kv, total = k_out @ v, total.mT
    states, us = [], []
    for i in range(num_chunks):
        states.append(state)
        u = torch.baddbmm(
            solved_v[:, :, i].flatten(0, 1), solved_a[:, :, i].flatten(0, 1), state.flatten(0, 1)
        ).view_as(solved_v[:, :, i])
        us.append(u)
        state = total[:, :, i] * state + b_out[:, :, i] @ u + kv[:, :, i]
    y = r_in @ torch.stack(states, dim=2) + rb @ torch.stack(us, dim=2) + rk @ v
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :num_tokens], state


def readout(
    y_THN: Tensor,
    r_THN: Tensor,
    k_THN: Tensor,
    v_THN: Tensor,
    r_k_HN: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
) -> Tensor:
    """Group norm of y per head, plus the bonus (Σ r k r_k) v of the current token; [T, C]."""
    T, H, N = y_THN.shape
    normed = F.group_norm(y_THN.reshape(T, H * N), H, weight_C, bias_C, GROUP_NORM_EPS)
    bonus = (r_THN * k_THN * r_k_HN).sum(-1, keepdim=True) * v_THN
    return normed + bonus.reshape(T, H * N)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


class _CrossEntropyL2Wrap(torch.autograd.Function):
    """Loss and both gradients in row chunks, so [M, V] logits never exist at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        l2wrap: bool,
        rows_per_chunk: int,
    ) -> Tensor:
        num_rows = hidden.shape[0]
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        loss = loss.to(hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        product = weight.to(hidden.dtype)
        for rows in torch.arange(num_rows, device=hidden.device).split(rows_per_chunk):
            x, y = hidden[rows], targets[rows].unsqueeze(-1)
            logits = (x @ product.T).to(loss.dtype)
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(-1, y)).sum()
            grad = (logits - log_sum).exp_()
            grad.scatter_add_(-1, y, -torch.ones_like(y, dtype=grad.dtype))
            if l2wrap:
                top, index = logits.max(-1, keepdim=True)
                grad.scatter_add_(-1, index, top * L2WRAP_FACTOR)
            grad = (grad / num_rows).to(hidden.dtype)
            grad_hidden[rows] = grad @ product
            grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / num_rows

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream, grad_weight * upstream, None, None, None


def cross_entropy_l2wrap(
    hidden_MC: Tensor,
    weight_VC: Tensor,
    targets_M: Tensor,
    l2wrap: bool = True,
    rows_per_chunk: int = 512,
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T`, in nats.

    Products are in the type of `hidden`, the rest in float32 at least, and each gradient in the
    type of its tensor. Logits of `rows_per_chunk` rows exist at once.
    L2Wrap (RWKV-LM) changes only the gradient: the largest logit z of each row gets
    1e-4 * z / M on top, times the upstream gradient, which keeps logits from drifting away.
    """
    loss: Tensor = _CrossEntropyL2Wrap.apply(  # type: ignore[no-untyped-call]
        hidden_MC, weight_VC, targets_M, l2wrap, rows_per_chunk
    )
    return loss
