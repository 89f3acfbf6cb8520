"""WKV-7 in chunks, forward and backward by hand, as the Triton kernels compute it; no kernels here.

Written to be read and to be exact: any dtype, no packing, no slots. The recurrence is that of
"RWKV-7 Goose", arXiv 2503.14456, with u = Sᵀa, S ← diag(w) S + b uᵀ + k vᵀ, y = Sᵀr; cutting it
into chunks solves the products of diagonal plus rank one matrices as the WY form does for the
delta rule (Yang et al., arXiv 2406.06484).

Legend: T tokens, C tokens of one chunk, N head size. A state is [key, value]. Leading dimensions
are batch. d_x is the gradient of the loss by x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LEN = 16

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # r, lw, k, v, a, b


def substitute(lower_CC: Tensor, x_CN: Tensor) -> Tensor:
    """(I - lower)⁻¹ x for a strictly lower triangular matrix, row after row.

    A product of doublings, (I + A)(I + A²)(I + A⁴)..., is the same on paper; but where one token
    is repeated the powers of A grow like binomials and cancel, and float32 has nothing left.
    """
    rows = [x_CN[..., 0, :]]
    for t in range(1, x_CN.shape[-2]):
        before = torch.stack(rows, dim=-2)
        rows.append(x_CN[..., t, :] + (lower_CC[..., t, None, :t] @ before).squeeze(-2))
    return torch.stack(rows, dim=-2)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What forward and backward of one chunk share.

    With L_t the sum of log decays up to token t, every factor of the form w_{s+1} ... w_t is
    split in e^{L_t} on the side of the reader and e^{-L_s} on that of the writer. DECAY_SCALE
    bounds the latter by e^{0.61 C}, which is 1.6e4 at C = 16.
    """

    read_CN: Tensor  # e^{L_t}: what r and the rest of the chunk sees
    remove_CN: Tensor  # e^{L_t - lw_t}: u is taken before the token's own decay
    write_CN: Tensor  # e^{-L_t}
    whole_N1: Tensor  # e^{L_C}, the decay of the state over the whole chunk
    r_CN: Tensor
    a_CN: Tensor
    b_CN: Tensor
    k_CN: Tensor
    ab_CC: Tensor  # what the removal of token t finds of the u of token s < t
    ak_CC: Tensor  # the same of the value of token s < t
    rb_CC: Tensor  # what token t reads of the u of token s <= t
    rk_CC: Tensor
    u_CN: Tensor

    @staticmethod
    def of(inputs: Inputs, state_NN: Tensor) -> Chunk:
        r, lw, k, v, a, b = inputs
        sums = lw.cumsum(-2)
        read, remove, write = sums.exp(), (sums - lw).exp(), (-sums).exp()
        r, a, b, k = r * read, a * remove, b * write, k * write
        ab, ak = (a @ b.mT).tril(-1), (a @ k.mT).tril(-1)
        return Chunk(
            read_CN=read,
            remove_CN=remove,
            write_CN=write,
            whole_N1=sums[..., -1, :, None].exp(),
            r_CN=r,
            a_CN=a,
            b_CN=b,
            k_CN=k,
            ab_CC=ab,
            ak_CC=ak,
            rb_CC=(r @ b.mT).tril(),
            rk_CC=(r @ k.mT).tril(),
            u_CN=substitute(ab, ak @ v + a @ state_NN),
        )

    def forward(self, v_CN: Tensor, state_NN: Tensor) -> tuple[Tensor, Tensor]:
        """y of the chunk's tokens and the state after them."""
        y = self.r_CN @ state_NN + self.rb_CC @ self.u_CN + self.rk_CC @ v_CN
        state = self.whole_N1 * (state_NN + self.b_CN.mT @ self.u_CN + self.k_CN.mT @ v_CN)
        return y, state

    def backward(
        self, v_CN: Tensor, state_NN: Tensor, d_y_CN: Tensor, d_state_NN: Tensor, d_whole_N: Tensor
    ) -> tuple[Inputs, Tensor]:
        """Gradients of the inputs and of the state before the chunk.

        `d_state_NN` belongs to the state S' after the chunk, `d_whole_N` is Σ_value S' ⊙ dS':
        what the exponent L_C gets, since S' is a multiple of e^{L_C}.
        """
        v, u, d_y = v_CN, self.u_CN, d_y_CN
        d_scaled = self.whole_N1 * d_state_NN  # by the bracket in S' = whole * (...)
        d_u = self.rb_CC.mT @ d_y + self.b_CN @ d_scaled
        # The right-hand side of the system: its gradient solves the transposed one, which is
        # lower triangular again when the chunk is read from its end.
        d_x = substitute(self.ab_CC.mT.flip(-1, -2), d_u.flip(-2)).flip(-2)
        d_v = self.rk_CC.mT @ d_y + self.k_CN @ d_scaled + self.ak_CC.mT @ d_x
        d_ab, d_ak = (d_x @ u.mT).tril(-1), (d_x @ v.mT).tril(-1)
        d_rb, d_rk = (d_y @ u.mT).tril(), (d_y @ v.mT).tril()
        d_a = d_ab @ self.b_CN + d_ak @ self.k_CN + d_x @ state_NN.mT
        d_r = d_rb @ self.b_CN + d_rk @ self.k_CN + d_y @ state_NN.mT
        d_b = d_ab.mT @ self.a_CN + d_rb.mT @ self.r_CN + u @ d_scaled.mT
        d_k = d_ak.mT @ self.a_CN + d_rk.mT @ self.r_CN + v @ d_scaled.mT
        # An exponent gets factor times gradient. lw_s is in L_t for t >= s, and in L_t - lw_t,
        # the exponent of `remove`, for t > s only.
        own = d_a * self.a_CN
        d_sums = d_r * self.r_CN - d_b * self.b_CN - d_k * self.k_CN + own
        d_lw = d_sums.flip(-2).cumsum(-2).flip(-2) - own + d_whole_N.unsqueeze(-2)
        d_state = d_scaled + self.a_CN.mT @ d_x + self.r_CN.mT @ d_y
        d_r, d_a = d_r * self.read_CN, d_a * self.remove_CN
        d_b, d_k = d_b * self.write_CN, d_k * self.write_CN
        return (d_r, d_lw, d_k, d_v, d_a, d_b), d_state


def chunks_of(inputs: Inputs) -> list[Inputs]:
    """The inputs [..., T, N] cut into chunks; the last one may be shorter."""
    split = [x.split(CHUNK_LEN, dim=-2) for x in inputs]
    return [(r, lw, k, v, a, b) for r, lw, k, v, a, b in zip(*split, strict=True)]


def forward(inputs: Inputs, state_NN: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y [..., T, N], the last state, and the checkpoints: the states before each chunk."""
    ys, checkpoints = [], []
    for chunk in chunks_of(inputs):
        checkpoints.append(state_NN)
        y, state_NN = Chunk.of(chunk, state_NN).forward(chunk[3], state_NN)
        ys.append(y)
    return torch.cat(ys, dim=-2), state_NN, checkpoints


def backward(
    inputs: Inputs, checkpoints: list[Tensor], last_NN: Tensor, d_y: Tensor, d_last_NN: Tensor
) -> tuple[Inputs, Tensor]:
    """Gradients of r, lw, k, v, a, b and of the initial state, from the last chunk to the first."""
    d_state, d_whole = d_last_NN, (last_NN * d_last_NN).sum(-1)
    found: list[Inputs] = []
    work = zip(chunks_of(inputs), checkpoints, d_y.split(CHUNK_LEN, dim=-2), strict=True)
    for chunk, state, d_y_CN in reversed(list(work)):
        d_chunk, d_state = Chunk.of(chunk, state).backward(
            chunk[3], state, d_y_CN, d_state, d_whole
        )
        found.append(d_chunk)
        d_whole = (state * d_state).sum(-1)  # this state is S' of the chunk before
    r, lw, k, v, a, b = (torch.cat(parts, dim=-2) for parts in zip(*found[::-1], strict=True))
    return (r, lw, k, v, a, b), d_state
