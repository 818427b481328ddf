"""Question templates for `questions.py`: vocabulary and paraphrases of each relation."""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.data.grammars.words import Words, words

NAMES = words("Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Irene, Jack | Laura, Tom, Nina")
THINGS = words(
    "the car/the automobile, the bike/the bicycle, the sofa/the couch, the laptop/the notebook, "
    "the phone/the mobile, the camera, the guitar, the tent | the piano, the boat/the ship"
)
SKILLS = words("chess, cooking, Spanish, swimming, algebra, painting | pottery, sailing")
CITIES = words("Paris, London, Rome, Berlin, Madrid, Vienna, Prague, Lisbon | Oslo, Athens")
CHORES = words(
    "the laundry/the washing, the homework, the dishes, the shopping, the gardening, "
    "the ironing | the vacuuming, the packing"
)
CAUSES = words(
    "stress, anxiety, insomnia, headaches, back pain, weight gain, fatigue/tiredness "
    "| dizziness, fever"
)
GOALS = words(
    "learn French, lose weight/get slimmer, get fit/get in shape, write a book/write a novel, "
    "find a job/find work, build a website | save money, grow a beard"
)
NUMBERS = words("two, three, four, five, six, eight | seven, nine")
TOOLS = words("a teacher/a tutor, a computer, a credit card, a degree, an agent | a visa, a loan")
POLARITY = words("with/with the help of, without/without the help of")


class Frame(NamedTuple):
    """One relation and the questions about it.

    Attributes:
      ways: templates that have the same meaning if their slots have the same entries.
      slots: vocabulary of each slot.
      swap: whether the entries of `a` and `b` may be swapped to change the meaning.
      replace: slots whose entry may be replaced to change the meaning; repeats raise the odds.
    """

    ways: tuple[str, ...]
    slots: dict[str, Words]
    swap: bool = True
    replace: tuple[str, ...] = ("a", "b")


def _people(*ways: str, **slots: Words) -> Frame:
    return Frame(ways, {"a": NAMES, "b": NAMES, **slots})


def _verb(base: str, participle: str) -> Frame:
    return _people(
        f"Did {{a}} {base} {{b}}?",
        f"Was {{b}} {participle} by {{a}}?",
        f"Is it true that {{a}} {participle} {{b}}?",
        f"Is it {{b}} who was {participle} by {{a}}?",
    )


def _comparison(more: str, less: str, kind: Words) -> Frame:
    ways = ("Is {a} M than {b}?", "Is {b} L than {a}?", "Would you say {a} is M than {b}?",
            "Do people think that {b} is L than {a}?")  # fmt: skip
    filled = tuple(way.replace("M", more).replace("L", less) for way in ways)
    return Frame(filled, {"a": kind, "b": kind})


FRAMES = (
    _people(
        "Can {a} lend {x} to {b}?",
        "Is {a} able to lend {b} {x}?",
        "Can {b} borrow {x} from {a}?",
        "Is it possible for {b} to borrow {x} from {a}?",
        x=THINGS,
    ),
    _people(
        "Will {a} sell {x} to {b}?",
        "Is {a} going to sell {b} {x}?",
        "Will {b} buy {x} from {a}?",
        "Is {b} going to purchase {x} from {a}?",
        x=THINGS,
    ),
    _people(
        "Could {a} teach {b} {x}?",
        "Could {b} learn {x} from {a}?",
        "Could {b} take lessons in {x} from {a}?",
        "Could {a} give {b} lessons in {x}?",
        x=SKILLS,
    ),
    _verb("invite", "invited"),
    _verb("help", "helped"),
    _comparison("older", "younger", NAMES),
    _comparison("bigger", "smaller", CITIES),
    Frame(
        (
            "How do I get from {a} to {b}?",
            "What is the best way to reach {b} from {a}?",
            "How can I travel to {b} if I start in {a}?",
            "I am in {a}; how do I go to {b}?",
        ),
        {"a": CITIES, "b": CITIES},
    ),
    Frame(
        (
            "Should I do {a} before {b}?",
            "Should I do {b} after {a}?",
            "Is it better to start with {a} and do {b} later?",
            "Is it better to do {b} once {a} is done?",
        ),
        {"a": CHORES, "b": CHORES},
    ),
    Frame(
        (
            "Can {a} cause {b}?",
            "Can {b} be caused by {a}?",
            "Can {a} lead to {b}?",
            "Can {b} be a result of {a}?",
        ),
        {"a": CAUSES, "b": CAUSES},
    ),
    Frame(
        (
            "How can I {x} in {n} months?",
            "What is the best way to {x} within {n} months?",
            "Is there a way to {x} if I have only {n} months?",
        ),
        {"x": GOALS, "n": NUMBERS},
        swap=False,
        replace=("n", "n", "x"),
    ),
    Frame(
        (
            "How can I {x} {p} {y}?",
            "What is the best way to {x} {p} {y}?",
            "Is it possible to {x} {p} {y}?",
        ),
        {"x": GOALS, "p": POLARITY, "y": TOOLS},
        swap=False,
        replace=("p", "p", "y"),
    ),
)
