"""The embedded model served with matrices of int8 and states of float16."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.process import ServerProcess

NUM_PARAMETERS = 2_817_024  # as of every other dtype


def test_embedded_model_answers_in_int8_on_states_of_float16_and_health_says_so(tmp_path: Path):
    given = ["--http-bind-addr", "127.0.0.1:0", "--set", "dtype=int8"]
    given += ["--set", "state_dtype=float16"]
    server = ServerProcess([*given, "--set", "device_type=cpu"], tmp_path / "log")
    try:
        (model,) = server.request("GET", "/health").json()["models"]
        assert (model["dtype"], model["state_dtype"]) == ("int8", "float16")
        assert model["num_parameters"] == NUM_PARAMETERS
        body = {
            "model": "rwkv-lm-tiny",
            "messages": [{"role": "user", "content": "Who are you?"}],
            "temperature": 0,
            "max_tokens": 40,
        }
        answers = [server.request("POST", "/v1/chat/completions", body).json() for _ in range(2)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert "RWKV-7" in texts[0]
        assert texts[0] == texts[1]
        assert "kernels: reference" in server.log.read_text()
    finally:
        server.kill()
