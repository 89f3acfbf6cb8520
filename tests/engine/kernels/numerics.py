"""What the chunk algorithm loses where its matrix products round their operands; no kernels here.

`python -m tests.engine.kernels.numerics` prints the table of docs/architecture.md: the errors of
y, of the last state, and of the worst gradient. Tensor cores
are emulated: operands are rounded, products are summed in float32 (the order of the sum is not
that of a GPU). Everything else is float32, as in the kernels, and so is the inverse of a chunk,
which they make by substitution; the product that applies it may have a precision of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.engine.kernels import chunk_math
from tests.engine.kernels.chunk_math import Inputs
from tests.engine.kernels.wkv_cases import KINDS, apply, relative_error, wkv_inputs, wkv_states

NUM_TOKENS, NUM_HEADS, HEAD_SIZE = 128, 2, 64


def tf32(x: Tensor) -> Tensor:
    """The nearest number of 10 bits after the first, even where two are as near."""
    bits = x.contiguous().view(torch.int32)
    last = (bits >> 13) & 1
    return ((bits + 0xFFF + last) & ~0x1FFF).view(torch.float32)


def cut_tf32(x: Tensor) -> Tensor:
    """The bits after the tenth left out, as tensor cores do with float32 that nobody rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rounded(to: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: torch.matmul(to(x), to(y))


def tf32x3(x: Tensor, y: Tensor) -> Tensor:
    """Operands as a large and a small part; the product of two small ones is left out."""
    large_x, large_y = tf32(x), tf32(y)
    small_x, small_y = tf32(x - large_x), tf32(y - large_y)
    return small_x @ large_y + large_x @ small_y + large_x @ large_y


PRODUCTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ieee": torch.matmul,
    "tf32x3": tf32x3,
    "tf32": rounded(tf32),
    "tf32 cut": rounded(cut_tf32),
    "bf16": rounded(bf16),
}


class Precision(NamedTuple):
    """Names of `PRODUCTS`."""

    products: str
    solve: str  # that which applies the inverse


class Errors(NamedTuple):
    """Relative, in the 2-norm of the whole."""

    y: float
    state: float
    gradients: float  # the worst of seven: six inputs and the state before


class Emulated(TorchFunctionMode):
    """`x @ y` as `precision` has it, and `chunk_math.substitute` as the kernels solve."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self._precision = precision

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Here the mode is off, so that the products below are float32.
        if function in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
            return PRODUCTS[self._precision.products](*args)
        return function(*args, **(kwargs or {}))

    def solve(self, lower_CC: Tensor, x_CN: Tensor) -> Tensor:
        """What takes the place of `substitute`: the inverse in float32, then one product."""
        with torch._C.DisableTorchFunction():
            eye = torch.eye(lower_CC.shape[-1]).expand_as(lower_CC)
            return PRODUCTS[self._precision.solve](_SUBSTITUTE(lower_CC, eye), x_CN)


_SUBSTITUTE = chunk_math.substitute


def outputs(
    inputs: Inputs, state: Tensor, d_y: Tensor, d_last: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the last state, and all gradients."""
    y, last, checkpoints = chunk_math.forward(inputs, state)
    gradients, d_state = chunk_math.backward(inputs, checkpoints, last, d_y, d_last)
    return y, last, [*gradients, d_state]


def errors_of(
    kind: str, precision: Precision, num_tokens: int = NUM_TOKENS, size: int = HEAD_SIZE
) -> Errors:
    """Against float64 of the same inputs, which are rounded to float32 before."""
    inputs = apply(
        lambda x: x.float().transpose(0, 1), wkv_inputs(num_tokens, kind, NUM_HEADS, size)
    )
    state, d_last = wkv_states(2, NUM_HEADS, size).float()
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    y, last, gradients = outputs(
        apply(Tensor.double, inputs), state.double(), d_y.double(), d_last.double()
    )
    mode = Emulated(precision)
    with patch.object(chunk_math, "substitute", mode.solve), mode:
        got_y, got_last, got_gradients = outputs(inputs, state, d_y, d_last)
    pairs = zip(got_gradients, gradients, strict=True)
    return Errors(
        y=relative_error(got_y, y),
        state=relative_error(got_last, last),
        gradients=max(relative_error(got, wanted) for got, wanted in pairs),
    )


# What the kernels do: Triton rounds the parts of tf32x3, and hands plain operands over as they are.
KERNELS = Precision("tf32 cut", "tf32x3")
ROWS = (
    Precision("ieee", "ieee"),
    KERNELS,
    Precision("tf32", "tf32x3"),
    Precision("tf32 cut", "tf32 cut"),
    Precision("bf16", "bf16"),
)


def main() -> None:
    print("| products | solution | " + " | ".join(KINDS) + " |")
    print("|---" * (2 + len(KINDS)) + "|")
    for precision in ROWS:
        cells = [" / ".join(f"{x:.0e}" for x in errors_of(kind, precision)) for kind in KINDS]
        print("| " + " | ".join([*precision, *cells]) + " |")


if __name__ == "__main__":
    main()
