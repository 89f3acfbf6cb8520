"""A body and its prompts -> what engines are asked: one request for each answer to be computed.

Knows no HTTP; nothing is submitted here.
"""

from __future__ import annotations

from dataclasses import replace

from api.encode import ChoicePrompt
from api.errors import invalid
from api.generation_body import GenerationBody
from api.logprobs import candidate_ids
from api.placement import Placed, PlacedPrompt, initial_state_of
from config import ModelTable
from engine.types import EngineRequest, SamplingParams

NUM_SEEDS = 2**64
MAX_PROMPT_LOGPROBS = 1_000_000  # of one HTTP request: about 100 MB, on the way and in the answer


def check_room(body: GenerationBody, table: ModelTable) -> None:
    """Raise ApiError 400 for more answers than can ever be queued together."""
    num_answers = body.num_prompts * body.num_candidates
    most = table.max_batch_size + table.max_waiting
    if num_answers > most:
        raise invalid(
            f"{num_answers} answers are asked for at once, but {table.model_name} runs "
            f"max_batch_size = {table.max_batch_size} and lets max_waiting = {table.max_waiting} "
            f"wait: ask for {most} at most",
            "n" if body.num_prompts == 1 else "prompt",
        )


def engine_requests(
    body: GenerationBody, placed: Placed, owner: str, request_id: str
) -> list[EngineRequest]:
    """All candidates of the first prompt, then those of the next. Raises ApiError 400.

    The candidates of a prompt differ by their seed, so that its answers are the same beside
    other prompts as they are alone.
    """
    _check_resumable(body, placed.replica.table)
    sampling = _sampling(body, placed)
    scores_from = 0 if body.echoes and body.num_top_logprobs is not None else None
    if scores_from is not None:
        _check_num_scores(body, placed)
    requests = []
    for prompt in placed.prompts:
        request = _request(body, placed, prompt, sampling, owner, request_id, scores_from)
        for number in range(body.num_candidates):
            seed = (sampling.seed + number) % NUM_SEEDS
            requests.append(replace(request, sampling=replace(sampling, seed=seed)))
    if len(requests) == 1:
        return requests
    return [
        replace(request, request_id=f"{request_id}-{number}")
        for number, request in enumerate(requests)
    ]


def choice_prompts(placed: Placed, num_choices: int) -> list[ChoicePrompt]:
    """What each choice continues, as the client sees it: without what was put in front."""
    tokenizer = placed.replica.client.tokenizer
    prompts = []
    for one in placed.prompts:
        content, ids = one.prompt.content, one.encoded.ids
        if not isinstance(content, str):
            content = tokenizer.decode(filter(tokenizer.has_text, ids))
        prompts += [ChoicePrompt(content, ids)] * num_choices
    return prompts


def _request(
    body: GenerationBody,
    placed: Placed,
    prompt: PlacedPrompt,
    sampling: SamplingParams,
    owner: str,
    request_id: str,
    scores_from: int | None,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt.encoded.ids,
        sampling=sampling,
        priority=body.rank,
        timeout_s=body.timeout_s,
        cache_salt=body.cache_salt or "",
        snapshot_hints=prompt.encoded.hints,
        owner=owner,
        state_id=body.state,
        initial_state=initial_state_of(placed.replica, body.initial_state, body.state),
        keep_state=body.keep_state(placed.replica.table.state_ttl_s),
        is_resumable=body.resumable or False,
        scores_from=scores_from,
        memo="" if prompt.prompt.form is None else prompt.prompt.form.memo(),
    )


def _sampling(body: GenerationBody, placed: Placed) -> SamplingParams:
    prompt = placed.prompts[0].prompt  # the others are like it
    sampling = body.to_params(prompt.default_stop)
    if prompt.grammars:
        sampling = replace(sampling, grammar=prompt.grammars[-1].source)
    if body.num_top_logprobs is not None:
        tokenizer = placed.replica.client.tokenizer
        return replace(
            sampling,
            has_logprobs=True,
            num_top_logprobs=body.num_top_logprobs,
            candidate_token_ids=candidate_ids(body.candidate_token_texts or [], tokenizer),
        )
    if body.num_candidates > body.num_choices:
        return replace(sampling, has_logprobs=True)
    return sampling


def _check_num_scores(body: GenerationBody, placed: Placed) -> None:
    num_tokens = sum(len(one.encoded.ids) for one in placed.prompts) * body.num_candidates
    num_each = 1 + (body.num_top_logprobs or 0) + len(body.candidate_token_texts or ())
    if num_tokens * num_each > MAX_PROMPT_LOGPROBS:
        raise invalid(
            f"'echo' with 'logprobs' asks for {num_each} log probabilities of each of {num_tokens} "
            f"prompt tokens, at most {MAX_PROMPT_LOGPROBS} are given at once; send fewer prompts, "
            "or ask for less",
            "echo",
        )


def _check_resumable(body: GenerationBody, table: ModelTable) -> None:
    if body.resumable and table.state_dir is None:
        raise invalid(
            f"'resumable' = true needs a disk, and {table.model_name} has no state_dir in its "
            "configuration; leave it out",
            "resumable",
        )
