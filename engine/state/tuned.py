"""Tuned initial states: what stands for the zero state. Knows files, not who begins from them.

State tuning trains the state before the first token and leaves the weights alone. RWKV-PEFT
saves one tensor per layer, `blocks.{i}.att.time_state` [H, N, N], in a `.pth`.

Its rows are values and its columns keys, the transpose of ours: in RWKV-PEFT,
rwkvt/operator/rwkvop.py, `RUN_RWKV7_STATE` transposes it for fla's kernel, whose initial state is
[key, value]; RWKV-Runner, backend-python/utils/rwkv.py, hands it to the RWKV-7 of the `rwkv`
package as it is, whose state is [value, key], and transposes it for RWKV-5 and 6 only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import StateMismatch
from engine.state.layout import PageLayout
from engine.state.pagefile import PageFormat, digest_of, is_finite

_TIME_STATE = re.compile(r"blocks\.(\d+)\.att\.time_state")


@dataclass(frozen=True, slots=True)
class TunedState:
    """A state that requests may begin from instead of zeros."""

    name: str  # of its file, without suffix
    digest: bytes  # of its content, 16 bytes: equal states have equal ones
    tensors: dict[str, Tensor]  # wkv [L, H, N, N], row = key; shift [L, 2, C]; on the CPU


def load_tuned(path: Path, page_format: PageFormat) -> TunedState:
    """Read a `.pth` of RWKV-PEFT or a state that this server exported as `.safetensors`.

    Raises StateMismatch with field `initial_states`: no such file, another model, not a state.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = _load_exported(path, page_format)
        else:
            tensors = _from_time_states(_load_pth(path), page_format.layout)
    except StateMismatch as error:
        raise StateMismatch(f"initial_states: {path}: {error}", field="initial_states") from error
    except OSError as error:
        raise StateMismatch(
            f"initial_states: {path} cannot be read ({error.strerror or error}); correct the path "
            "or take it out of the list",
            field="initial_states",
        ) from error
    return TunedState(path.stem, digest_of(tensors), tensors)


def _load_exported(path: Path, page_format: PageFormat) -> dict[str, Tensor]:
    """The logits are left behind: whoever begins from the state feeds a token first."""
    with path.open("rb", buffering=0) as stream:
        tensors = page_format.load(stream)[1]
    return {name: tensors[name] for name in ("wkv", "shift")}


def _load_pth(path: Path) -> Mapping[str, Tensor]:
    with path.open("rb"):
        pass  # an OSError that says why, rather than one of torch's many
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a file of any content makes torch raise whatever it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StateMismatch(
            f"expected a .pth of torch.save or a .safetensors, found something else ({reason[:200]}"
            "); it may be truncated: copy it again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise StateMismatch(
            "expected a dict of tensors blocks.{i}.att.time_state, found something else; save it "
            "as RWKV-PEFT does"
        )
    return found


def _from_time_states(found: Mapping[str, Tensor], layout: PageLayout) -> dict[str, Tensor]:
    """Pages' tensors of one time_state for each layer."""
    expected = [f"blocks.{i}.att.time_state" for i in range(layout.num_cells)]
    _check_names([str(name) for name in found], expected)
    shape = layout.wkv_shape[1:]
    wkv = torch.empty(layout.wkv_shape, dtype=getattr(torch, layout.wkv_dtype))
    for name, layer_HNN in zip(expected, wkv, strict=True):
        state_HNN = found[name].detach()  # some save parameters
        if tuple(state_HNN.shape) != shape or not state_HNN.is_floating_point():
            raise StateMismatch(
                f"expected {name} as floating point of shape {shape} (heads, head size, head "
                f"size), found {state_HNN.dtype} of shape {tuple(state_HNN.shape)}; use a state "
                "that was tuned for this model"
            )
        layer_HNN.copy_(state_HNN.transpose(-1, -2))
    if not is_finite(wkv):
        raise StateMismatch(
            f"expected finite values in {layout.wkv_dtype}, found infinity or NaN; the tuning "
            "diverged: use an earlier state of it"
        )
    shift = torch.zeros(layout.shift_shape, dtype=getattr(torch, layout.shift_dtype))
    return {"wkv": wkv, "shift": shift}


def _check_names(found: list[str], expected: list[str]) -> None:
    missing = [name for name in expected if name not in found]
    extra = sorted(set(found) - set(expected))
    if not missing and not extra:
        return
    if len(missing) == len(expected):
        remedy = "use the file that state tuning saved, not a checkpoint or an adapter"
    elif missing or any(_TIME_STATE.fullmatch(name) for name in extra):
        remedy = "use a state that was tuned for this model"
    else:
        remedy = "keep the time_state tensors only"
    raise StateMismatch(
        f"expected {expected[0]} to {expected[-1]} and nothing else, found {len(found)} tensors: "
        f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} unexpected "
        f"({', '.join(extra[:3])}); {remedy}"
    )
