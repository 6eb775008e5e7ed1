"""Splicing: what a new prompt takes over from what was said."""

import dataclasses
import random
import time

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.transcript import Match, Transcript

KEY = SessionKey("t", "s")
FIRST = "<u>Hi<a>Hello!<e>"
SECOND = "<u>More<a>Yes.<e>"


@pytest.fixture
def spoken(kit):
    """Two turns: prompt, reply, end token each."""
    transcript = Transcript()
    transcript.apply(kit.turn(KEY, 1, FIRST, range(8), boundaries=((8, 3), (14, 7), (17, 8))))
    transcript.apply(kit.turn(KEY, 2, SECOND, range(10, 20), kept=(17, 8), boundaries=((27, 12), (31, 17), (34, 18))))
    return transcript


def test_what_was_applied_is_there(spoken):
    assert spoken.text == FIRST + SECOND
    assert list(spoken.token_ids) == [*range(8), *range(10, 20)]
    assert spoken.boundaries == [(8, 3), (14, 7), (17, 8), (27, 12), (31, 17), (34, 18)]
    assert (spoken.num_chars, spoken.num_tokens) == (34, 18)
    assert spoken.last_prompt_chars == 27


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (FIRST + SECOND + "<u>Next<a>", Match(34, 18)),
        (FIRST + SECOND, Match(34, 18)),
        (FIRST + SECOND[:-3] + "\n", Match(31, 17)),
        (FIRST + "<u>More<a>No.", Match(27, 12)),
        (FIRST + "<u>Mori", Match(17, 8)),
        (FIRST[:-1], Match(14, 7)),
        ("<u>Hi<a>", Match(8, 3)),
        ("<u>Hi<a", Match(0, 0)),
        ("", Match(0, 0)),
        ("<s>" + FIRST, Match(0, 0)),
    ],
)
def test_the_last_boundary_of_the_common_text_counts(spoken, prompt, expected):
    assert spoken.match(prompt) == expected


def test_a_match_holds_no_more_tokens_than_asked_for(spoken):
    prompt = FIRST + SECOND
    assert spoken.match(prompt, 17) == Match(31, 17)
    assert spoken.match(prompt, 16) == Match(27, 12)
    assert spoken.match(prompt, 0) == Match(0, 0)


def test_an_empty_transcript_matches_nothing():
    assert Transcript().match("anything") == Match(0, 0)


def test_break_characters_are_characters(kit):
    transcript = Transcript()
    transcript.apply(kit.turn(KEY, 1, "a<\ufdd0|end|>", [1, 2]))
    assert transcript.match("a<\ufdd0|end|>b") == Match(9, 2)
    assert transcript.match("a<|end|>b") == Match(0, 0)


def test_an_edit_truncates_and_appends(spoken, kit):
    spoken.apply(kit.turn(KEY, 3, "<u>Else<a>Ok.", [50, 51], kept=(17, 8)))
    assert spoken.text == FIRST + "<u>Else<a>Ok."
    assert list(spoken.token_ids) == [*range(8), 50, 51]
    assert spoken.match(FIRST + SECOND) == Match(17, 8)


def test_ids_may_be_kept_beyond_the_boundary_but_never_before_it(spoken, kit):
    beyond = kit.turn(KEY, 3, "<u>More?", [99], kept=(17, 10))
    spoken.check(beyond)
    with pytest.raises(ValueError, match="num_kept_chars is 17"):
        spoken.check(kit.turn(KEY, 3, "x", [99], kept=(17, 7)))
    spoken.apply(beyond)
    assert list(spoken.token_ids) == [*range(8), 10, 11, 99]
    assert spoken.boundaries[-2:] == [(17, 8), (25, 11)]


def test_a_boundary_beyond_the_kept_tokens_goes(kit):
    transcript = Transcript()
    # An end token without text: two boundaries at the same character.
    transcript.apply(kit.turn(KEY, 1, "abc", [1, 2, 3], boundaries=((3, 2), (3, 3))))
    assert transcript.match("abcd") == Match(3, 3)
    transcript.apply(kit.turn(KEY, 2, "d", [4], kept=(3, 2)))
    assert transcript.boundaries == [(3, 2), (4, 3)]
    assert list(transcript.token_ids) == [1, 2, 4]


def test_text_behind_the_last_boundary_is_no_place_to_splice(kit):
    transcript = Transcript()
    transcript.apply(kit.turn(KEY, 1, "promptrep", [1, 2, 3], boundaries=((6, 1),)))
    assert transcript.text == "promptrep"
    assert transcript.match("promptrep and on") == Match(6, 1)
    assert transcript.last_prompt_chars == 6
    transcript.apply(kit.turn(KEY, 2, "reply", [9], kept=(6, 1)))
    assert transcript.text == "promptreply"
    assert list(transcript.token_ids) == [1, 9]


def test_a_turn_may_leave_no_boundary_at_all(kit):
    transcript = Transcript()
    transcript.apply(kit.turn(KEY, 1, "abc", [1], boundaries=()))
    assert transcript.match("abcd") == Match(0, 0)
    assert transcript.num_tokens == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kept_tokens": 19}, "num_kept_tokens is 19"),
        ({"num_kept_tokens": -1}, "num_kept_tokens is -1"),
        ({"num_kept_chars": 33}, "num_kept_chars is 33"),
        ({"num_kept_chars": 35}, "num_kept_chars is 35"),
        ({"num_kept_chars": -1}, "num_kept_chars is -1"),
        ({"token_ids": b"12345"}, "5 bytes"),
        ({"boundaries": ((37, 20),)}, r"boundary \(37, 20\)"),
        ({"boundaries": ((38, 19),)}, r"boundary \(38, 19\)"),
        ({"boundaries": ((33, 18),)}, r"boundary \(33, 18\)"),
        ({"boundaries": ((36, 19), (35, 19))}, r"boundary \(35, 19\)"),
        ({"boundaries": ((36, 19), (36, 18))}, r"boundary \(36, 18\)"),
    ],
)
def test_impossible_turns_are_refused_and_change_nothing(spoken, kit, change, message):
    turn = dataclasses.replace(kit.turn(KEY, 3, "abc", [1], kept=(34, 18)), **change)
    before = (spoken.text, list(spoken.token_ids), spoken.boundaries)
    with pytest.raises(ValueError, match=message):
        spoken.apply(turn)
    assert (spoken.text, list(spoken.token_ids), spoken.boundaries) == before


def test_replay_gives_the_same_transcript(spoken, kit):
    turns = [
        kit.turn(KEY, 1, FIRST, range(8), boundaries=((8, 3), (14, 7), (17, 8))),
        kit.turn(KEY, 2, "<u>Wrong", [1], kept=(8, 3)),
        kit.turn(KEY, 3, FIRST[8:], range(3, 8), kept=(8, 3), boundaries=((14, 7), (17, 8))),
        kit.turn(KEY, 4, SECOND, range(10, 20), kept=(17, 8), boundaries=((27, 12), (31, 17), (34, 18))),
    ]
    replayed = Transcript.replay(turns)
    assert replayed.text == spoken.text
    assert replayed.token_ids == spoken.token_ids
    assert replayed.boundaries == spoken.boundaries
    with pytest.raises(ValueError, match="num_kept"):
        Transcript.replay(turns[1:])


def test_random_edits_agree_with_plain_strings(kit):
    """The reference keeps whole strings and tries every boundary."""
    rng = random.Random(5)
    transcript = Transcript()
    text, token_ids, boundaries = "", [], [(0, 0)]
    for epoch in range(300):
        prompt = text[: rng.randint(0, len(text))] if rng.random() < 0.3 else text
        prompt += "".join(rng.choice("ab") for _ in range(rng.randint(0, 12)))
        expected = max(b for b in boundaries if prompt.startswith(text[: b[0]]) and b[0] <= len(prompt))
        match = transcript.match(prompt)
        assert (match.num_kept_chars, match.num_kept_tokens) == expected
        added = prompt[expected[0] :] + "r" * rng.randint(0, 3)
        new_ids = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
        middle = (expected[0] + len(added) // 2, expected[1] + len(new_ids) // 2)
        end = (expected[0] + len(added), expected[1] + len(new_ids))
        transcript.apply(kit.turn(KEY, epoch, added, new_ids, kept=expected, boundaries=(middle, end)))
        text, token_ids = text[: expected[0]] + added, token_ids[: expected[1]] + new_ids
        boundaries = [b for b in boundaries if b[0] <= expected[0] and b[1] <= expected[1]] + [middle, end]
        assert transcript.text == text
        assert list(transcript.token_ids) == token_ids


def test_hundreds_of_long_turns_cost_milliseconds(kit):
    transcript = Transcript()
    text = ""
    started = time.process_time()
    for epoch in range(500):
        assert transcript.match(text).num_kept_chars == len(text)
        added = f"turn {epoch} " + "x" * 1000
        transcript.apply(kit.turn(KEY, epoch, added, range(300), kept=(transcript.num_chars, transcript.num_tokens)))
        text += added
    # 500,000 characters; copying or comparing piece by piece in Python would take many seconds.
    assert time.process_time() - started < 2.0
