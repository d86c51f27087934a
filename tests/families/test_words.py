"""Which of the places of some words a subject means."""

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.families.words import choose, doubts, find

PROMPT = "a star-fish on the left, a star and a red star, a Red  Star again"


def found(prompt, phrases):
    return [(a, prompt[a:b]) for a, b in choose(prompt, phrases)]


def test_words_joined_by_a_hyphen_are_one():
    assert [a for a, _ in find(PROMPT, "star")] == [27, 42, 55]
    assert find(PROMPT, "fish") == [] and find(PROMPT, "Star-Fish") == [(2, 11)]
    assert [a for a, _ in find("the dog's ball - a dog, dog-", "dog")] == [4, 19, 24]
    assert find("a cat", " ") == []


def test_a_number_chooses_a_place():
    assert found(PROMPT, ["star"]) == [(27, "star")]
    assert found(PROMPT, ["star#2"]) == [(42, "star")]
    assert found(PROMPT, ["star", "star#1"]) == [(42, "star"), (27, "star")]
    assert found(PROMPT, ["red star #2", "star"]) == [(50, "Red  Star"), (27, "star")]
    assert found("room#2 and a room", ["room#2"]) == [(0, "room#2")]


@pytest.mark.parametrize(
    ("phrases", "message"),
    (
        (["star#4"], r"subject 1: its words 'star' stand in the prompt 3 time\(s\); there is no #4"),
        (["star#0"], "there is no #0"),
        (["a", "star#1", "star#1"], r"subject 3: its words 'star' stand in the prompt 3 time\(s\), all taken"),
        (["fish"], "'fish' are not in the prompt"),
        (["cup#1"], "'cup' are not in the prompt"),
    ),
)
def test_a_place_that_there_is_not(phrases, message):
    with pytest.raises(UserError, match=message):
        choose(PROMPT, phrases)


def test_words_with_places_left_are_told():
    first = "`words`, subject 1: 'star' stands in the prompt 3 times; #1 is taken; star#2 would name another"
    within = "'star' stands in 'star-fish' too, which is taken for another word"
    assert doubts(PROMPT, ["star"]) == [first, f"`words`, subject 1: {within}"]
    (line,) = doubts(PROMPT, ["red star", "star#1"])
    assert line.endswith("'red star' stands in the prompt 2 times; #1 is taken; red star#2 would name another")
    assert doubts(PROMPT, ["star", "star", "star"]) == [f"`words`, subject {n}: {within}" for n in (1, 2, 3)]
    for phrases in (["star#1"], ["red star", "red star", "star#1"], ["star-fish"]):
        assert doubts(PROMPT, phrases) == []
