"""The texts of the embedded model, in the User/Assistant form: `python -m train.corpus`.

Knows the two public sources it wraps (Synthetic-Persona-Chat, TinyStories) and the small talk of
train/smalltalk.py. Knows no tokens: train/data.py makes a dataset of what this writes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from train.binidx import DatasetError
from train.data import read_jsonl
from train.smalltalk import TALK, Exchange, conversation

ASSISTANT_NAME = "Tiny"
USER_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate",
    "Leo", "Maria", "Nick", "Olivia", "Paul", "Rose", "Sam", "Tom", "Zoe",
)  # fmt: skip
THANKS = next(entry for entry in TALK if "thanks" in entry[0])
VALIDATION_EVERY = 32  # every 32nd document of each source is held out

# What a story can be about: asked for when the word is in the story at least three times.
TOPICS = (
    "ant", "apple", "baby", "ball", "balloon", "bear", "bee", "bike", "bird", "birthday", "boat",
    "book", "box", "boy", "bug", "bunny", "butterfly", "cake", "car", "castle", "cat", "chicken",
    "clown", "cookie", "cow", "crab", "dinosaur", "doctor", "dog", "doll", "dolphin", "dragon",
    "duck", "elephant", "fairy", "farm", "farmer", "fish", "flower", "fox", "frog", "garden",
    "ghost", "giant", "girl", "goat", "hat", "horse", "house", "kite", "king", "kitten",
    "ladybug", "lamp", "lion", "lizard", "magic", "mermaid", "mirror", "mole", "monkey",
    "monster", "moon", "mouse", "octopus", "owl", "park", "parrot", "pencil", "penguin", "pig",
    "pirate", "plane", "pony", "princess", "pumpkin", "puppy", "queen", "rabbit", "rainbow",
    "robot", "rocket", "shark", "sheep", "ship", "sister", "snail", "snake", "snowman", "spider",
    "squirrel", "star", "stone", "sun", "swing", "teddy", "tiger", "toy", "tractor", "train",
    "treasure", "tree", "truck", "turtle", "unicorn", "whale", "witch", "wizard", "wolf", "worm",
    "zebra",
)  # fmt: skip

_OWN_NAME = re.compile(r"(?:I'm|I am|[Nn]ame is|[Nn]ame's|[Cc]all me) (?=[\[(])")
_BRACKET = re.compile(
    r"[\[(]\s*(?:(user ?[12])(?:'s)?|your|insert)?\s*(?:user)?(?:name)?\s*[\])]", re.I
)
_SAYS_NAME = re.compile(r"Assistant: [^\n]*?(?:[Mm]y name is|[Mm]y name's|, I'm) ([A-Z][a-z]+)\b")
_TAKEN = {"Tiny", "User", "Just", "Little", "Doctor", "Dr", "Both"}
_MOJIBAKE = {
    "â€œ": '"',
    "â€™": "'",
    "â€˜": "'",
    "â€“": "-",
    "â€”": "-",
    "â€": '"',
    "—": ", ",
    "–": "-",
}


def chat(exchanges: Iterable[Exchange]) -> str:
    """Turns separated by one blank line, none inside a turn."""
    return "\n\n".join(f"User: {ask}\n\nAssistant: {answer}" for ask, answer in exchanges)


def persona_documents(texts: Iterable[str], rng: random.Random) -> list[str]:
    """Conversations, with placeholders for names filled in; those with other gaps are dropped."""
    documents = []
    for unfilled in texts:
        text = _fill_names(unfilled, rng.choice(USER_NAMES))
        spoken = _SAYS_NAME.search(text)
        if spoken and spoken[1] not in _TAKEN:
            text = re.sub(rf"\b{spoken[1]}\b", ASSISTANT_NAME, text)
        if not re.search(r"[\[(<{]|[Uu]ser ?[12]", text):
            documents.append(text.strip())
    return documents


def story_documents(text: str, rng: random.Random) -> list[str]:
    """Each story as the answer to a request for it, about a half with its topic in the request."""
    documents = []
    for raw in text.split("<|endoftext|>"):
        story = raw.strip()
        for wrong, right in _MOJIBAKE.items():
            story = story.replace(wrong, right)
        story = re.sub(r"\s*\n\s*", "\n", story)
        if story and story.isascii():
            exchanges = [(_ask_for(story, rng), story)]
            if rng.random() < 0.2:
                exchanges.append((rng.choice(THANKS[0]), rng.choice(THANKS[1])))
            documents.append(chat(exchanges))
    return documents


def small_talk_documents(count: int, rng: random.Random) -> list[str]:
    return [chat(conversation(rng)) for _ in range(count)]


def hold_out(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(for training, held out), the same for every run."""
    held = [x for i, x in enumerate(documents) if i % VALIDATION_EVERY == 0]
    return [x for i, x in enumerate(documents) if i % VALIDATION_EVERY], held


def write_jsonl(path: Path, documents: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in documents)


def _fill_names(text: str, user_name: str) -> str:
    turns = []
    for turn in text.split("\n\n"):
        is_user = turn.startswith("User:")
        own, other = (user_name, ASSISTANT_NAME) if is_user else (ASSISTANT_NAME, user_name)

        def name(match: re.Match[str], own: str = own, other: str = other, turn: str = turn) -> str:
            who = (match[1] or "").lower()
            if who:
                return user_name if who.endswith("1") else ASSISTANT_NAME
            says_own = any(m.end() == match.start() for m in _OWN_NAME.finditer(turn))
            return own if says_own else other

        turns.append(_BRACKET.sub(name, turn))
    return "\n\n".join(turns)


def _ask_for(story: str, rng: random.Random) -> str:
    lower = story.lower()
    topics = [t for t in TOPICS if len(re.findall(rf"\b{t}\b", lower)) >= 3]
    named = re.search(r"\bnamed ([A-Z][a-z]+)\b", story)
    share = rng.random()
    if topics and share < 0.45:
        topic = rng.choice(topics)
        about = f"{'an' if topic[0] in 'aeiou' else 'a'} {topic}"
    elif named and share < 0.6:
        about = named[1]
    else:
        short = "short " if len(story) < 650 else ""
        return rng.choice((
            f"Tell me a {short}story.", f"tell me a {short}story",
            f"Can you tell me a {short}story?",
            f"Please tell me a {short}story.", f"I want to hear a {short}story.",
            "Once upon a time", "Do you know a story?", f"Write a {short}story.",
        ))  # fmt: skip
    return rng.choice((
        f"Tell me a story about {about}.", f"Tell me a story about {about}.",
        f"tell me a story about {about}", f"Can you tell me a story about {about}?",
        f"Write a story about {about}.", f"I want to hear a story about {about}.",
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.corpus", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train.jsonl and the held-out files")
    parser.add_argument("--persona", type=Path, required=True, help='jsonl of {"text": chat}')
    parser.add_argument("--stories", type=Path, required=True, help="text, <|endoftext|> between")
    parser.add_argument("--small-talk", type=int, default=2500, help="documents to make up")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    try:
        chats = [document.text for document in read_jsonl(args.persona)]
        texts = args.stories.read_text("utf-8")
    except (DatasetError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    persona, held_persona = hold_out(persona_documents(chats, rng))
    stories, held_stories = hold_out(story_documents(texts, rng))
    small_talk = small_talk_documents(args.small_talk, rng)
    train = persona + stories + small_talk
    rng.shuffle(train)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": train,
        "val": held_persona + held_stories,
        "val-persona": held_persona,
        "val-stories": held_stories,
    }
    for name, documents in parts.items():
        write_jsonl(args.out / f"{name}.jsonl", documents)
        size = sum(len(x.encode()) for x in documents)
        print(f"{name}.jsonl: {len(documents)} documents, {size} bytes")  # noqa: T201
    print(f"train: {len(persona)} persona, {len(stories)} stories, {len(small_talk)} small talk")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
