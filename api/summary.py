"""What people read when the server is up: model, device, sizes, address, and a line to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from config import BindAddress
from engine.types import ModelInfo

ANY_HOSTS = ("0.0.0.0", "::")


def summary(infos: Iterable[ModelInfo], address: BindAddress, has_api_key: bool) -> str:
    """`address` with the port that was really taken."""
    infos = list(infos)
    lines = ["RWKV-7 server"]
    for info in infos:
        lines += [
            f"  model    {info.model_name} ({info.num_parameters / 1e6:,.1f} M parameters)",
            f"  device   {info.device}, weights {info.dtype}, state {info.state_dtype}",
            f"  states   {_states(info)}",
        ]
    if address.unix_path is not None:
        lines.append(f"  address  unix:{address.unix_path}")
    else:
        lines.append(f"  address  {url_of(address)}")
    lines += ["", "Try it:", curl_for(address, infos[0].model_name, has_api_key), ""]
    return "\n".join(lines)


def _states(info: ModelInfo) -> str:
    """How many states fit where."""
    places = [f"{info.num_slots:,} on the device", f"{info.num_frames:,} in host memory"]
    if info.num_files > 0:
        places.append(f"{info.num_files:,} on disk")
    return f"{', '.join(places)}, of {info.page_bytes:,} bytes each"


def url_of(address: BindAddress) -> str:
    """Where a browser on this machine finds a TCP address."""
    host = "127.0.0.1" if address.host in ANY_HOSTS else address.host
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"


def curl_for(address: BindAddress, model_name: str, has_api_key: bool = False) -> str:
    """A command that works when it is pasted into a shell."""
    if address.unix_path is None:
        return curl_example(url_of(address), model_name, has_api_key)
    options = f" --unix-socket {shlex.quote(address.unix_path)}"
    return curl_example("http://localhost", model_name, has_api_key, options)


def curl_example(
    base_url: str, model_name: str, has_api_key: bool = False, options: str = ""
) -> str:
    body = {
        "model": model_name,
        "messages": [{"role": "user", "content": "Hello! How are you?"}],
        "stream": True,
        "top_p": 0.3,  # RWKV's model cards; drawn from the whole vocabulary, small models ramble
    }
    key = ' -H "Authorization: Bearer $API_KEY"' if has_api_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return (
        f"curl -N{options} {shlex.quote(base_url + '/v1/chat/completions')}"
        f" -H 'Content-Type: application/json'{key} -d {data}"
    )
