"""Kept states as their users have them: a real process, the embedded model, greedy answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.end_to_end.site import (
    ADDED,
    MODEL,
    STORY,
    SYSTEM,
    Server,
    Site,
    chat_body,
    eventually,
    refusal,
    text_of,
    user,
    well,
)


@pytest.fixture
def server(state_server: Server) -> Server:
    """The shared one, and not the one of random weights."""
    return state_server


class TestMaking:
    """Whatever a state is made of, going on from it is as if the whole text had been sent."""

    def test_from_a_text(self, server: Server) -> None:
        state = server.state(prompt=STORY, label="a story")
        assert state["object"] == "state"
        assert (state["label"], state["model"], state["parent"]) == ("a story", MODEL, None)
        answer = server.complete(ADDED, state=state["id"])
        whole = server.complete(STORY + ADDED)
        assert text_of(answer) == text_of(whole)
        usage = answer["usage"]
        assert usage["prompt_tokens_details"]["state_tokens"] == state["num_tokens"]
        assert usage["prompt_tokens"] + state["num_tokens"] == whole["usage"]["prompt_tokens"]

    def test_from_token_ids(self, server: Server) -> None:
        state = server.state(prompt=[0, 72, 101])
        assert state["num_tokens"] == 3
        answer = server.complete(state=state["id"])
        assert text_of(answer) == text_of(server.complete([0, 72, 101]))

    def test_from_messages_for_a_user_to_speak(self, server: Server) -> None:
        state = server.state(messages=[SYSTEM])
        for question in ("Hello! Who are you?", "What do you like?"):
            answer = server.chat(user(question), state=state["id"])
            assert text_of(answer) == text_of(server.chat(SYSTEM, user(question)))

    def test_from_messages_for_the_assistant_to_speak(self, server: Server) -> None:
        messages = [SYSTEM, user("Tell me a story.")]
        state = server.state(messages=messages)
        assert state["has_logits"]
        for seed in (1, 2):
            answer = server.chat(state=state["id"], temperature=1, seed=seed)
            assert answer["usage"]["prompt_tokens"] == 0
            whole = server.chat(*messages, temperature=1, seed=seed)
            assert text_of(answer).lstrip() == text_of(whole)

    def test_from_a_finished_answer(self, server: Server) -> None:
        question = user("What do you like?")
        first = server.chat(SYSTEM, user("Hello!"))
        state = server.state(response=first["id"])
        answer = server.chat(question, state=state["id"])
        history = (SYSTEM, user("Hello!"), first["choices"][0]["message"], question)
        assert text_of(answer) == text_of(server.chat(*history))

    def test_from_an_answer_that_a_stop_string_has_cut(self, server: Server) -> None:
        words = text_of(server.complete(STORY)).split(" ")
        stop = " " + words[4]
        cut = server.complete(STORY, stop=[stop], return_state=True)
        assert text_of(cut) == " ".join(words[:4])
        later = server.state(response=cut["id"])
        assert later["num_tokens"] == cut["state"]["num_tokens"]
        for state in (cut["state"], later):
            answer = server.complete(ADDED, state=state["id"])
            assert text_of(answer) == text_of(server.complete(STORY + text_of(cut) + ADDED))

    def test_out_of_a_state_and_more(self, server: Server) -> None:
        first = server.state(prompt=STORY)
        second = server.state(state=first["id"], prompt=ADDED)
        assert second["parent"] == first["id"]
        assert text_of(server.complete(state=second["id"])) == text_of(
            server.complete(STORY + ADDED)
        )


def test_five_turns_on_returned_states_are_the_chat_with_all_messages(server: Server) -> None:
    history = [SYSTEM]
    state: Any = server.state(messages=history)
    for question in ("Hello! Who are you?", "What do you like?", "Why?", "Tell me more.", "Bye!"):
        history.append(user(question))
        answer = server.chat(user(question), state=state["id"], return_state=True)
        whole = server.chat(*history)
        assert answer["choices"][0]["message"] == whole["choices"][0]["message"]
        assert answer["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        used = answer["usage"]["prompt_tokens"] + state["num_tokens"]
        assert used == whole["usage"]["prompt_tokens"]
        assert answer["state"]["parent"] == state["id"]
        state = answer["state"]
        history.append(answer["choices"][0]["message"])


def test_streamed_state_is_that_of_the_whole_answer(server: Server) -> None:
    body = chat_body(messages=[user("Hello!")], stream=True, return_state={"label": "streamed"})
    events = server.ask("POST", "/v1/chat/completions", body).events()
    (state,) = [event["state"] for event in events if "state" in event]
    assert events[-1]["choices"][0]["finish_reason"]
    assert state["label"] == "streamed"
    whole = server.chat(user("Hello!"), return_state=True)
    assert state["num_tokens"] == whole["state"]["num_tokens"]
    texts = {text_of(server.chat(user("Why?"), state=one["id"])) for one in (state, whole["state"])}
    assert len(texts) == 1


class TestFiling:
    def test_list_get_change_fork_delete(self, server: Server) -> None:
        state = server.state(prompt=STORY, label="mine", ttl_s=60)
        path = f"/v1/states/{state['id']}"
        assert state["expires_at"] - state["created"] == 60
        assert server.states()[0] == server.get(path)
        changed = well(server.ask("PATCH", path, {"label": "ours", "pinned": True}))
        assert (changed["label"], changed["pinned"], changed["expires_at"]) == ("ours", True, None)
        fork = server.post(f"{path}/fork", {"label": "second"})
        assert (fork["parent"], fork["num_tokens"]) == (state["id"], state["num_tokens"])
        assert [one["id"] for one in server.states()[:2]] == [fork["id"], state["id"]]
        gone = well(server.ask("DELETE", path))
        assert gone == {"id": state["id"], "object": "state", "deleted": True}
        assert refusal(server.ask("GET", path)) == (404, "state_not_found", "state")
        assert text_of(server.complete(ADDED, state=fork["id"])) == text_of(
            server.complete(STORY + ADDED)
        )

    def test_time_to_live_is_kept_unless_pinned(self, server: Server) -> None:
        short = server.state(prompt=STORY, ttl_s=0.3)
        pinned = server.state(prompt=STORY, ttl_s=0.3, pinned=True)
        for_ever = server.state(prompt=STORY, ttl_s=0)
        assert for_ever["expires_at"] is None
        time.sleep(0.4)
        ids = {one["id"] for one in server.states()}
        assert short["id"] not in ids
        assert {pinned["id"], for_ever["id"]} <= ids
        refused = server.ask("POST", "/v1/completions", chat_body(state=short["id"]))
        assert refusal(refused) == (404, "state_not_found", "state")

    def test_deleting_does_not_disturb_who_goes_on_from_it(self, server: Server) -> None:
        state = server.state(prompt=STORY)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.complete, ADDED, state=state["id"], max_tokens=100)
            eventually(lambda: server.gauge("rwkv_requests_running") > 0)
            well(server.ask("DELETE", f"/v1/states/{state['id']}"))
        assert text_of(answer.result()) == text_of(server.complete(STORY + ADDED, max_tokens=100))

    def test_another_key_finds_nothing(self, server: Server, state_site: Site) -> None:
        """The key of the configuration is changed while the server runs."""
        state = server.state(prompt=STORY)
        other = Server(server.process, "sk-two")
        assert refusal(other.ask("GET", "/v1/states")) == (401, "invalid_api_key", None)
        path = f"/v1/states/{state['id']}"
        change_key(state_site, other)
        try:
            assert other.states() == []
            asked = {"prompt": ADDED, "state": state["id"]}
            for reply in (
                other.ask("GET", path),
                other.ask("DELETE", path),
                other.ask("PATCH", path, {"label": "stolen"}),
                other.ask("POST", f"{path}/fork"),
                other.ask("GET", f"{path}/export"),
                other.ask("POST", "/v1/states", asked),
                other.ask("POST", "/v1/completions", chat_body(**asked)),
            ):
                assert refusal(reply) == (404, "state_not_found", "state")
        finally:
            change_key(state_site, server)
        assert server.get(path)["label"] == ""


def change_key(site: Site, server: Server) -> None:
    site.keys["api_key"] = server.key
    site.write()
    eventually(lambda: server.ask("GET", "/v1/models").status == 200)


class TestSeveralAnswers:
    def test_n_answers_differ_by_seed_only(self, server: Server) -> None:
        asked = {"temperature": 1, "seed": 11, "max_tokens": 12}
        both = server.complete(STORY, n=4, **asked)
        alone = [text_of(server.complete(STORY, **asked | {"seed": 11 + i})) for i in range(4)]
        assert [choice["text"] for choice in both["choices"]] == alone
        assert len(set(alone)) > 1
        usage = server.complete(STORY, **asked)["usage"]
        assert both["usage"]["prompt_tokens"] == usage["prompt_tokens"]

    def test_each_of_them_becomes_a_state(self, server: Server) -> None:
        both = server.complete(STORY, n=2, temperature=1, seed=3, max_tokens=8)
        for choice in both["choices"]:
            state = server.state(response=both["id"], choice=choice["index"])
            answer = server.complete(ADDED, state=state["id"])
            assert text_of(answer) == text_of(server.complete(STORY + choice["text"] + ADDED))

    def test_best_of_returns_some_of_all(self, server: Server) -> None:
        asked = {"temperature": 1, "seed": 5, "max_tokens": 12}
        everything = server.complete(STORY, n=4, **asked)["choices"]
        best = server.complete(STORY, best_of=4, n=2, **asked)
        texts = [choice["text"] for choice in best["choices"]]
        assert len(texts) == 2
        assert set(texts) <= {choice["text"] for choice in everything}
        assert best["usage"]["completion_tokens"] == sum(
            choice["generated_tokens"] for choice in everything
        )

    def test_branches_of_one_state(self, server: Server) -> None:
        state = server.state(messages=[SYSTEM, user("Tell me a story.")])
        together = server.chat(state=state["id"], n=3, temperature=1, seed=1)
        alone = [
            text_of(server.chat(state=state["id"], temperature=1, seed=seed)) for seed in (1, 2, 3)
        ]
        assert [choice["message"]["content"] for choice in together["choices"]] == alone


def test_many_conversations_are_open_on_few_slots(server: Server) -> None:
    """Of 16 slots there, 8 compute at once; each conversation goes on from its own state."""

    def talk(number: int) -> tuple[list[dict[str, object]], Any]:
        said = [user(f"My number is {number}."), user("What do you like?")]
        first = server.chat(said[0], max_tokens=8, return_state={"ttl_s": 60})
        second = server.chat(said[1], max_tokens=8, state=first["state"]["id"])
        server.ask("DELETE", f"/v1/states/{first['state']['id']}")
        return [said[0], first["choices"][0]["message"], said[1]], second

    with ThreadPoolExecutor(40) as pool:
        talks = list(pool.map(talk, range(40)))
    for history, answer in talks[::8]:
        assert text_of(server.chat(*history, max_tokens=8)) == text_of(answer)
    assert server.gauge("rwkv_state_slots", use="used") == 0


class TestContextPolicy:
    LEN = 60

    @pytest.fixture
    def limited(self, server: Server) -> Iterator[Server]:
        """max_context_len is a live limit."""
        limit(server, max_context_len=self.LEN)
        yield server
        limit(server, max_context_len=0, context_policy="reject")

    def test_a_chat_on_states_never_ends(self, limited: Server) -> None:
        """As long as each request fits by itself."""
        state: Any = limited.state(messages=[SYSTEM])
        for number in range(8):
            asked = user(f"What do you say to number {number}?")
            answer = limited.chat(asked, state=state["id"], return_state=True)
            assert "context_exceeded" not in answer["usage"]
            state = answer["state"]
        assert state["num_tokens"] > 3 * self.LEN
        refused = limited.ask("POST", "/v1/completions", chat_body(prompt=STORY * 5))
        assert refusal(refused) == (400, "context_length_exceeded", "prompt")

    def test_or_it_is_only_told(self, limited: Server) -> None:
        limit(limited, context_policy="report")
        long = limited.complete(STORY * 5)
        assert long["usage"]["context_exceeded"] is True
        assert text_of(long)
        assert "context_exceeded" not in limited.complete("Hello")["usage"]


def limit(server: Server, **keys: object) -> None:
    upsert = {"upsert": [{"model_name": MODEL, **keys}], "remove_model_names": []}
    assert server.post("/admin/models/reload", upsert)["rebuilt_model_names"] == []
