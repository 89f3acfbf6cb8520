"""InferConfig: what is served and how, config/infer/NAME.toml. Reads no files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from config.bind import BindAddress
from config.errors import ConfigError
from config.key import Key, Name, NonNegativeFloat, NonNegativeInt, Only, PositiveInt, check_only
from config.schema_model import ModelConfig

WORLD_VOCAB = "rwkv_vocab_v20230424"  # a name, not a path: comes with pyrwkv-tokenizer
BURN_SUFFIXES = (".mpk", ".bpk")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """One [[models]] table of config/infer/NAME.toml: a model to serve."""

    model: ModelConfig  # loaded from model_cfg
    model_name: Annotated[Name, Key("the name clients ask for")]
    model_cfg: Annotated[
        Name,
        Key(
            "shape of the model: NAME of config/model/NAME.toml, or a path",
            aliases=("model_cfg_path",),
        ),
    ]
    weights_path: Annotated[
        Path | None,
        Key('official .pth or .safetensors; not needed with load_format = "dummy"', is_path=True),
    ] = None
    tokenizer_vocab_path: Annotated[
        Name,
        Key(
            f'vocabulary file, or "{WORLD_VOCAB}" for the World vocabulary of the'
            " pyrwkv-tokenizer package",
            is_path=True,
        ),
    ]
    device_type: Annotated[
        Literal["auto", "cpu", "cuda"],
        Key(
            'where to compute; "auto" takes a GPU when there is one; 0 means "cuda"',
            synonyms={0: "cuda"},
        ),
    ] = "auto"
    device_ids: Annotated[
        tuple[NonNegativeInt, ...], Key("which device of that type; exactly one for now")
    ] = (0,)
    max_batch_size: Annotated[PositiveInt, Key("sequences that run at once")] = 4
    paragraph_len: Annotated[PositiveInt, Key("tokens in one chunk of a prompt")] = 256
    max_context_len: Annotated[
        NonNegativeInt, Key("tokens of prompt and completion together; 0 = no limit", reload="live")
    ] = 4096
    decode_first: Annotated[
        bool,
        Key("running answers before new prompts; false favours time to first token", reload="live"),
    ] = True
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64", "int8"],
        Key(
            '(new) number format of the matrices; "auto" = bfloat16 on a GPU, and on a CPU what the'
            ' checkpoint has, mostly bfloat16, computed in float32; "int8" = one scale for each 64'
            " inputs, quicker and a little less exact"
        ),
    ] = "auto"
    state_dtype: Annotated[
        Literal["auto", "float32", "float16"],
        Key(
            "(new) number format that states are stored in; float16 halves their memory and"
            ' traffic, and rounds them; "auto" = float32'
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        Literal["auto", "off"],
        Key(
            '(new) "auto" records the steps of running answers on a GPU, so that it need not wait'
            ' for Python; "off" to look for errors'
        ),
    ] = "auto"
    num_threads: Annotated[
        NonNegativeInt,
        Key("(new) threads that compute on a CPU; 0 = as many as there are physical cores"),
    ] = 0
    load_format: Annotated[
        Literal["auto", "dummy"],
        Key('(new) "dummy" = random weights of the right shape, for load tests'),
    ] = "auto"
    max_batch_tokens: Annotated[
        NonNegativeInt,
        Key(
            "(new) tokens in one step of the model; 0 = max_batch_size + 2 * paragraph_len",
            reload="live",
        ),
    ] = 0
    max_waiting: Annotated[
        PositiveInt, Key("(new) requests that may wait; more are refused with 429", reload="live")
    ] = 256
    num_state_slots: Annotated[
        NonNegativeInt,
        Key(
            "(new) states in device memory, of running sequences and snapshots together;"
            " 0 = 2 * max_batch_size, or max_batch_size with enable_prefix_cache = false"
        ),
    ] = 0
    enable_prefix_cache: Annotated[
        bool, Key("(new) leave snapshots of states and begin prompts from them")
    ] = True
    host_state_mib: Annotated[
        NonNegativeInt,
        Key(
            "(new) MiB of host memory for states beside the device's: snapshots that gave way,"
            " answers that wait, states that users keep; 0 = none"
        ),
    ] = 1024
    state_dir: Annotated[
        Path | None,
        Key(
            "(new) folder for states on disk, so that they survive a restart; unset = none",
            is_path=True,
        ),
    ] = None
    disk_state_mib: Annotated[
        PositiveInt, Key("(new) MiB of states in state_dir; the least recently used go first")
    ] = 8192
    state_ttl_s: Annotated[
        NonNegativeFloat,
        Key(
            "(new) seconds that a state kept by a user lasts unless the request says; 0 = until"
            " it is deleted",
            reload="live",
        ),
    ] = 604_800.0
    initial_states: Annotated[
        tuple[Path, ...],
        Key(
            "(new) tuned initial states (.pth with time_state tensors, or exported .safetensors);"
            " requests name them by file name without suffix",
            is_path=True,
        ),
    ] = ()
    initial_state: Annotated[
        Name | None, Key("(new) the one of them that requests begin from which name none")
    ] = None
    time_slice_tokens: Annotated[
        NonNegativeInt,
        Key(
            "(new) an answer of so many tokens gives way to requests that wait, and comes back;"
            " 0 = it runs to its end",
            reload="live",
        ),
    ] = 0
    context_policy: Annotated[
        Literal["reject", "report"],
        Key(
            '(new) beyond max_context_len: refuse and cut ("reject"), or say so in the usage only',
            reload="live",
        ),
    ] = "reject"
    template: Annotated[
        Literal["g1", "rwkv-rs"], Key("(new) how chat messages become a prompt", reload="live")
    ] = "g1"

    def __post_init__(self) -> None:
        check_only(self)
        _check_weights(self.weights_path, self.load_format)
        if len(self.device_ids) != 1:
            reason = "name one device, such as [0]: several devices come later; run one process"
            raise ConfigError(f"{reason} per device", key="device_ids", value=self.device_ids)
        least = self.max_batch_size + self.paragraph_len
        if 0 < self.max_batch_tokens < least:
            reason = f"must be 0 or at least max_batch_size + paragraph_len = {least}"
            raise ConfigError(reason, key="max_batch_tokens", value=self.max_batch_tokens)
        if 0 < self.num_state_slots < self.max_batch_size:
            reason = f"must be 0 or at least max_batch_size = {self.max_batch_size}"
            raise ConfigError(reason, key="num_state_slots", value=self.num_state_slots)
        _check_initial_states(self.initial_states, self.initial_state)
        if self.state_dir is not None and self.host_state_mib == 0:
            reason = "states pass through host memory on their way to state_dir; give it some"
            raise ConfigError(reason, key="host_state_mib", value=0)

    @property
    def resolved_max_batch_tokens(self) -> int:
        return self.max_batch_tokens or self.max_batch_size + 2 * self.paragraph_len

    @property
    def resolved_num_state_slots(self) -> int:
        num_each = 2 if self.enable_prefix_cache else 1  # one to run in, one for a snapshot
        return self.num_state_slots or num_each * self.max_batch_size


def _check_initial_states(paths: tuple[Path, ...], default: str | None) -> None:
    names = [path.stem for path in paths]
    for index, name in enumerate(names):
        if name in names[:index]:
            reason = f"two files are named {name!r}; requests tell them apart by that name"
            raise ConfigError(reason, key="initial_states", value=str(paths[index]))
    if default is not None and default not in names:
        known = ", ".join(names) or "none"
        reason = f"is none of initial_states, which has: {known}"
        raise ConfigError(reason, key="initial_state", value=default)


def _check_weights(path: Path | None, load_format: str) -> None:
    if path is None and load_format != "dummy":
        raise ConfigError('missing (only load_format = "dummy" needs none)', key="weights_path")
    if path is not None and path.suffix in BURN_SUFFIXES:
        reason = "is a Burn record of rwkv-rs; use the official .pth or .safetensors it came from"
        raise ConfigError(reason, key="weights_path", value=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcConfig:
    """[ipc] of rwkv-rs: accepted while it is off."""

    enabled: Annotated[
        bool,
        Key(
            "shared-memory transport of rwkv-rs",
            only=Only(False, 'not supported; use http_bind_addr = "unix:/path"'),
        ),
    ] = False
    service_name: Annotated[str, Key("no effect while off")] = "rwkv.infer.openai"
    max_request_bytes: Annotated[PositiveInt, Key("no effect while off")] = 4 * 1024 * 1024
    max_response_bytes: Annotated[PositiveInt, Key("no effect while off")] = 4 * 1024 * 1024
    max_inflight_requests: Annotated[PositiveInt, Key("no effect while off")] = 128
    require_api_key: Annotated[bool, Key("no effect while off")] = True

    def __post_init__(self) -> None:
        check_only(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """config/infer/NAME.toml: what `python -m api` serves and how."""

    source: Path | None = field(default=None, compare=False)  # the file it was read from
    http_bind_addr: Annotated[
        str,
        Key('"host:port", "[ipv6]:port" (port 0 = any free one) or "unix:/path"', reload="restart"),
    ] = "0.0.0.0:8080"
    request_body_limit_bytes: Annotated[
        PositiveInt, Key("larger request bodies are refused with 413", reload="live")
    ] = 52_428_800
    sse_keep_alive_ms: Annotated[
        PositiveInt, Key("silence on a stream before a keep-alive comment", reload="live")
    ] = 10_000
    allowed_origins: Annotated[
        tuple[str, ...] | None,
        Key('origins ("https://host") that browsers may call from; unset = any', reload="live"),
    ] = None
    api_key: Annotated[
        str | None,
        Key("what clients must send as Bearer token; unset = open", is_secret=True, reload="live"),
    ] = field(default=None, repr=False)
    api_keys: Annotated[
        tuple[str, ...],
        Key(
            "(new) more such keys; each sees only the states and responses made with it",
            is_secret=True,
            reload="live",
        ),
    ] = field(default=(), repr=False)
    admin_api_key: Annotated[
        str | None,
        Key(
            "(new) the key that /admin routes want; it opens the others as well; unset = they want"
            " one of those above",
            is_secret=True,
            reload="live",
        ),
    ] = field(default=None, repr=False)
    drain_timeout_s: Annotated[
        NonNegativeFloat,
        Key("(new) how long running requests may go on after SIGTERM", reload="live"),
    ] = 30.0
    enable_vllm_metrics: Annotated[
        bool, Key("(new) /metrics also under the vllm: names that gateways read", reload="restart")
    ] = True
    ipc: Annotated[IpcConfig, Key("shared-memory transport of rwkv-rs", reload="live")] = field(
        default_factory=IpcConfig
    )
    models: Annotated[
        tuple[ModelTable, ...], Key("the models to serve, one table each", reload="live")
    ]

    def __post_init__(self) -> None:
        check_only(self)
        BindAddress.parse(self.http_bind_addr)
        _check_api_keys(self)
        for origin in self.allowed_origins or ():
            _check_origin(origin)
        if not self.models:
            raise ConfigError("needs at least one [[models]] table", key="models")
        names = [table.model_name for table in self.models]
        for index, name in enumerate(names):
            if name in names[:index]:
                reason = f"is also the name of models[{names.index(name)}]; names must differ"
                raise ConfigError(reason, key=f"models[{index}].model_name", value=name)

    @property
    def client_api_keys(self) -> tuple[str, ...]:
        """All that clients may send; none = open."""
        return (*(() if self.api_key is None else (self.api_key,)), *self.api_keys)

    @property
    def bind_address(self) -> BindAddress:
        return BindAddress.parse(self.http_bind_addr)


def _check_api_keys(config: InferConfig) -> None:
    """Says which key is wrong, and never what it is."""
    keys = {f"api_keys[{index}]": key for index, key in enumerate(config.api_keys)}
    single = {"api_key": config.api_key, "admin_api_key": config.admin_api_key}
    keys |= {name: key for name, key in single.items() if key is not None}
    names: dict[str, str] = {}
    for name, key in keys.items():
        if not re.fullmatch("[!-~]+", key):
            reason = "must be printable ASCII without spaces; leave it out to serve without a key"
            raise ConfigError(reason, key=name)
        if key in names:
            raise ConfigError(f"is the same as {names[key]}; keys must differ", key=name)
        names[key] = name


def _check_origin(origin: str) -> None:
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
        reason = 'expected "https://host" or "http://host:port"; leave the key out to allow any'
        raise ConfigError(reason, key="allowed_origins", value=origin)
