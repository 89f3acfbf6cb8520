"""lm-eval's `local-completions` against a real server, and the model alone to say what is right.

What it does is done without it in test_loglikelihood.py, in every run of the suite.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.site import MODEL, Server
from tests.end_to_end.test_loglikelihood import TOLERANCE, expected
from tests.engine.real_engines import Oracle, real_table

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: it has an environment of its own, `make clients`"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BEGIN = "<|rwkv_tokenizer_end_of_text|>"
QUESTIONS = [
    {"text": "Once upon a time there was", "choices": ["a little dog", "7 qubits", "the sea."]},
    {"text": "Max liked to play in the", "choices": ["park", "park with his friends", "zzz xq"]},
    {"text": "User: Hello!\n\nAssistant:", "choices": ["Hello", "Ünïcödé 语言", "Go away."]},
]


def task(name: str, file: Path, **fields: object) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        **fields,
    }


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, object]]:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(item | {"label": 0}) + "\n" for item in QUESTIONS))
    text, until = "{{text}}", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    choice = {"doc_to_text": text, "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    rolling = {"doc_to_text": "", "doc_to_target": text}
    written = {"doc_to_text": text, "doc_to_target": "x", "generation_kwargs": until}
    return [
        task("choice", file, output_type="multiple_choice", **choice),
        task("rolling", file, output_type="loglikelihood_rolling", **rolling),
        task("written", file, output_type="generate_until", **written),
    ]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(real_table("embedded-float64", tmp_path_factory.mktemp("oracle")))


@pytest.mark.parametrize(
    ("batch_size", "num_concurrent", "system"), [(1, 1, None), (2, 1, BEGIN), (4, 3, BEGIN)]
)
def test_what_it_finds_is_what_the_model_says(
    quiet_server: Server,
    oracle: Oracle,
    tasks: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    num_concurrent: int,
    system: str | None,
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{quiet_server.process.address}/v1/completions",
            "auth_token": "sk-one",
            "num_concurrent": num_concurrent,
        },
        tasks=tasks,
        batch_size=batch_size,
        system_instruction=system,
        log_samples=True,
        bootstrap_iters=0,
    )
    encode = oracle._tokenizer.encode
    num_checked = 0
    for sample in found["samples"]["choice"]:
        for (context, text), (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            plain = context.removeprefix(BEGIN)
            assert (plain != context) == (system is not None)
            begin = [0] if system else []
            whole = [*begin, *encode(plain + text)]
            context_ids = [*begin, *encode(plain)]
            total, is_greedy = expected(oracle, context_ids, whole[len(context_ids) :])
            assert answer == (pytest.approx(total, abs=TOLERANCE), is_greedy)
            num_checked += 1
    for sample, question in zip(found["samples"]["rolling"], QUESTIONS, strict=True):
        total, _ = expected(oracle, [0], encode(question["text"]))
        assert sample["resps"][0][0] == pytest.approx(total, abs=TOLERANCE)
    for sample in found["samples"]["written"]:
        (context, _), ((text,),) = *sample["arguments"], sample["resps"]
        prompt: Any = context.removeprefix(BEGIN) if system else encode(context)
        whole = quiet_server.complete(prompt, max_tokens=12, stop=["\n\n", BEGIN])
        assert text == whole["choices"][0]["text"]
    assert num_checked == 9
    assert found["results"]["choice"]["acc,none"] == 1
