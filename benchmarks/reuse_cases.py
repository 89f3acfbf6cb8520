"""Cases in which a server could spare prompt tokens, asked through HTTP. Knows no engine.

Each case gives answers without and with something to reuse: `cold` are the first of their kind,
`warm` those that are counted. How much was reused is what the server itself reports.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks.served import Reply, Server
from benchmarks.words import Words

PROMPT_LEN = 1000
NUM_CONVERSATIONS, FIRST_TURN_LEN, ANSWER_LEN, QUESTION_LEN = 40, 200, 16, 32
NUM_USERS, SYSTEM_LEN, LONG_QUESTION_LEN = 8, 512, 128
BRANCH_LEN = 128
NUM_RESTARTED = 4


@dataclass(slots=True)
class Outcome:
    """Answers of one case by one server, over all repetitions."""

    cold: list[Reply] = field(default_factory=list)
    warm: list[Reply] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        """Medians of seconds; sums of the tokens of the warm prompts."""
        cold_s = statistics.median(reply.first_token_s for reply in self.cold)
        warm_s = statistics.median(reply.first_token_s for reply in self.warm)
        num_prompt = sum(reply.num_prompt_tokens for reply in self.warm)
        num_cached = sum(reply.num_cached_tokens for reply in self.warm)
        return {
            "num_requests": len(self.warm),
            "num_prompt_tokens": num_prompt,
            "num_cached_tokens": num_cached,
            "num_processed_tokens": num_prompt - num_cached,
            "cold_first_token_s": round(cold_s, 5),
            "warm_first_token_s": round(warm_s, 5),
            "ratio": round(cold_s / warm_s, 2),
        }


Case = Callable[[Server, Words, str], Outcome]


def identical(server: Server, words: Words, seed: str) -> Outcome:
    """The same prompt again, twice."""
    prompt = words.document(seed, PROMPT_LEN)
    return Outcome([server.complete(prompt)], [server.complete(prompt) for _ in range(2)])


def continued(server: Server, words: Words, seed: str) -> Outcome:
    """Many times more conversations than slots, each continued once after all others began.

    What the server said goes back to it as the tokens of its text, as from any client.
    """
    outcome, histories = Outcome(), []
    for number in range(NUM_CONVERSATIONS):
        prompt = words.document(f"{seed} conversation {number}", FIRST_TURN_LEN)
        said = server.complete(prompt, ANSWER_LEN).text
        question = words.ids(f"{seed} question {number}", QUESTION_LEN)
        histories.append([*prompt, *words.tokenizer.encode(said), *question])
    outcome.warm = [server.complete(history) for history in histories]
    for number, history in enumerate(histories[:3]):  # others of the same length
        outcome.cold.append(server.complete(words.document(f"{seed} new {number}", len(history))))
    return outcome


def shared_system(server: Server, words: Words, seed: str) -> Outcome:
    """Users one after the other, behind the same system prompt."""
    return _shared_system(server, words, seed, QUESTION_LEN)


def shared_system_long(server: Server, words: Words, seed: str) -> Outcome:
    """The same with longer questions, so that they do not end close behind the shared part."""
    return _shared_system(server, words, seed, LONG_QUESTION_LEN)


def shared_system_chat(server: Server, words: Words, seed: str) -> Outcome:
    """The same as chat messages, from which a server sees where the shared part ends."""
    system = {"role": "system", "content": words.text(f"{seed} system", SYSTEM_LEN)}
    replies = []
    for user in range(NUM_USERS):
        question = words.text(f"{seed} user {user}", LONG_QUESTION_LEN)
        replies.append(server.chat([system, {"role": "user", "content": question}]))
    return Outcome(replies[:1], replies[1:])


def shared_system_at_once(server: Server, words: Words, seed: str) -> Outcome:
    """All users in the same moment, with nothing computed yet."""
    prompts = _prompts_behind_system(words, seed, LONG_QUESTION_LEN)
    cold = server.complete(words.document(f"{seed} alone", len(prompts[0])))
    with ThreadPoolExecutor(NUM_USERS) as pool:
        return Outcome([cold], list(pool.map(server.complete, prompts)))


def early_branch(server: Server, words: Words, seed: str) -> Outcome:
    """A second prompt that shares its first 128 of 1,000 tokens with one before."""
    first, second, _ = _branches(words, seed)
    return Outcome([server.complete(first)], [server.complete(second)])


def early_branch_again(server: Server, words: Words, seed: str) -> Outcome:
    """A third one that shares them, too."""
    first, second, third = _branches(words, seed)
    return Outcome([server.complete(first), server.complete(second)], [server.complete(third)])


def restarted(server: Server, words: Words, seed: str) -> Outcome:
    """The same prompts after the server was stopped and started."""
    prompts = [words.document(f"{seed} {n}", SYSTEM_LEN) for n in range(NUM_RESTARTED)]
    cold = [server.complete(prompt) for prompt in prompts]
    server.restart()
    server.complete(words.document(f"{seed} first", QUESTION_LEN))  # what any first request costs
    return Outcome(cold, [server.complete(prompt) for prompt in prompts])


CASES: dict[str, Case] = {
    "identical prompt": identical,
    "40 conversations continued": continued,
    "shared system prompt, 32 more": shared_system,
    "shared system prompt, 128 more": shared_system_long,
    "shared system prompt, chat": shared_system_chat,
    "shared system prompt, at once": shared_system_at_once,
    "early branch, second prompt": early_branch,
    "early branch, third prompt": early_branch_again,
    "restart": restarted,
}


def run_cases(
    servers: Sequence[Server], words: Words, num_repeats: int, names: Sequence[str]
) -> dict[str, dict[str, object]]:
    """Figures by case and server name. Servers take turns within every case, and with every
    repetition another one begins, so that a drift of the machine meets all of them."""
    figures: dict[str, dict[str, object]] = {}
    print(f"{'':32}{'':20}{'prompt':>8}{'cached':>8}{'cold ms':>10}{'warm ms':>10}{'ratio':>8}")
    for name in names:
        outcomes = {server.name: Outcome() for server in servers}
        for repeat in range(num_repeats):
            shift = repeat % len(servers)
            for server in [*servers[shift:], *servers[:shift]]:
                outcome = CASES[name](server, words, f"{name} {repeat}")
                outcomes[server.name].cold += outcome.cold
                outcomes[server.name].warm += outcome.warm
        figures[name] = {server: outcome.figures() for server, outcome in outcomes.items()}
        for server_name, outcome in outcomes.items():
            _print(name, server_name, outcome.figures())
    return figures


def _print(name: str, server_name: str, row: dict[str, object]) -> None:
    cold_ms, warm_ms = (float(str(row[f"{key}_first_token_s"])) * 1e3 for key in ("cold", "warm"))
    print(
        f"{name:32}{server_name:20}{row['num_prompt_tokens']:>8}{row['num_cached_tokens']:>8}"
        f"{cold_ms:>10.1f}{warm_ms:>10.1f}{row['ratio']:>8}"
    )


def _shared_system(server: Server, words: Words, seed: str, question_len: int) -> Outcome:
    prompts = _prompts_behind_system(words, seed, question_len)
    replies = [server.complete(prompt) for prompt in prompts]
    return Outcome(replies[:1], replies[1:])


def _prompts_behind_system(words: Words, seed: str, question_len: int) -> list[list[int]]:
    system = words.document(f"{seed} system", SYSTEM_LEN)
    questions = [words.ids(f"{seed} user {user}", question_len) for user in range(NUM_USERS)]
    return [[*system, *question] for question in questions]


def _branches(words: Words, seed: str) -> list[list[int]]:
    common = words.document(f"{seed} common", BRANCH_LEN)
    rest = PROMPT_LEN - BRANCH_LEN
    return [[*common, *words.ids(f"{seed} branch {number}", rest)] for number in range(3)]
