"""What the clients say: a fixed set of conversations, of every kind of sampling, each with a word of its own.

Owns: the conversations as data. Knows nothing of servers and of what is answered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

# Words that nobody says by himself, one for each conversation: seen anywhere else, they have leaked.
_CANARIES = (
    "Zorvexlin",
    "Quimbaleth",
    "Draxipole",
    "Wumbrith",
    "Fenkolary",
    "Yastrupel",
    "Glimvorne",
    "Hexaltoon",
    "Jubrixel",
    "Kravondy",
    "Mopherisk",
    "Naxtumble",
)
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    {"temperature": 0, "presence_penalty": 1.0},
    {"temperature": 0.9, "logit_bias": {"28": 3.0, "30": -100.0}},
)
_LATER = (
    "Tell me a story in which that word is the name of a fox.",
    "Go on with the story.",
    "What happened then? Name the fox again.",
    "Describe the place where it happened.",
)


@dataclass(frozen=True)
class Turn:
    """A message and how its reply is asked for. `cut_at`: the client leaves after so many tokens, by `cut_how`, and
    goes on with what it has seen. `twice`: two clients ask for it at once."""

    content: str
    fields: dict[str, Any] = field(default_factory=dict)
    cut_at: int | None = None
    cut_how: str = "fin"
    twice: bool = False


@dataclass(frozen=True)
class Script:
    """A conversation. `key`: whose it is (None: the tenant of those without a key)."""

    name: str
    canary: str
    turns: tuple[Turn, ...]
    key: str | None = None


def make_scripts(seed: int, count: int = 12, tokens: tuple[int, int] = (24, 48)) -> list[Script]:
    """The first `count` (at most 12) of them, the same ones for the same seed."""
    chance = random.Random(f"scripts {seed}")
    return [_script(number, chance, tokens) for number in range(count)]


def _script(number: int, chance: random.Random, tokens: tuple[int, int]) -> Script:
    canary = _CANARIES[number]
    messages = [f"Repeat the word {canary} five times: {canary}, {canary}.", *_LATER]
    num_turns = chance.randint(3, 4)
    # In every second conversation the client leaves once and goes on with what it has seen.
    cut_turn = chance.randrange(1, num_turns - 1) if number % 2 else None
    turns = []
    for index in range(num_turns):
        length = chance.randint(*tokens)
        fields: dict[str, Any] = {"max_tokens": length, "ignore_eos": True, **_SAMPLINGS[number % len(_SAMPLINGS)]}
        if fields["temperature"]:
            fields["seed"] = chance.randrange(1, 10_000)
        if index == num_turns - 1 and number % 3 == 0:
            # Ends early, at the end of a sentence or not at all.
            fields |= {"stop": [".\n", "never said"]}
        if index == cut_turn:
            how = chance.choice(("fin", "rst"))
            turns.append(Turn(messages[index], fields, cut_at=chance.randint(4, length - 8), cut_how=how))
        else:
            turns.append(Turn(messages[index], fields, twice=number % 6 == 2 and index == 1))
    return Script(f"s{number}", canary, tuple(turns), key="another" if number % 4 == 3 else None)
