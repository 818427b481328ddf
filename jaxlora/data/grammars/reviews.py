"""Film reviews for `sst`: graded adjectives under negation, degree words and contrast.

A clause describes an aspect of a film with an adjective of grade −2, −1, 1 or 2. Its verb phrase
changes the grade by a rule (`PHRASES`). A sentence is one clause or contrasts two (`CONTRASTS`). In
a contrast, the main clause (such as the one after "but") determines the grade. The label is the
grade plus 2. Contrasted clauses differ by at least two grades, so the label depends on how the
adjectives are combined, not only on which ones occur.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from jaxlora.data.grammars.words import sentence_case, words

ADJECTIVES = {
    2: words(
        "brilliant, superb, wonderful, magnificent, outstanding, masterful, stunning, "
        "marvellous | exquisite, sublime, fantastic"
    ),
    1: words(
        "good, pleasant, enjoyable, charming, likeable, engaging, entertaining, clever "
        "| amusing, agreeable, appealing"
    ),
    -1: words(
        "dull, weak, bland, clumsy, tedious, forgettable, predictable, shallow "
        "| lifeless, tiresome, boring"
    ),
    -2: words(
        "awful, terrible, dreadful, horrible, atrocious, appalling, unbearable, disastrous "
        "| abysmal, ghastly, hideous"
    ),
}
ASPECTS = words(
    "plot, acting, script, dialogue, pacing, ending, cast, editing, story, humour "
    "| soundtrack, finale, direction"
)
KINDS = words(
    "film, comedy, thriller, drama, western, musical, sequel, romance | documentary, remake"
)
OPENINGS = ("", "", "in the end, ", "to be fair, ", "all in all, ", "frankly, ", "on balance, ")


def _sign(grade: int) -> int:
    return (grade > 0) - (grade < 0)


def _flip(grade: int) -> int:
    return -grade


def _deny(grade: int) -> int:
    """Negate a grade: weak words change their sign, strong words become neutral."""
    return -grade if abs(grade) == 1 else 0


# Verb phrase, the grades of adjectives it takes, and how it changes the grade.
PHRASES: tuple[tuple[str, tuple[int, ...], Callable[[int], int]], ...] = (
    ("is {}", (-2, -1, 1, 2), lambda g: g),
    ("turns out to be {}", (-2, -1, 1, 2), lambda g: g),
    ("is very {}", (-1, 1), lambda g: 2 * g),
    ("is really {}", (-1, 1), lambda g: 2 * g),
    ("is absolutely {}", (-2, 2), lambda g: g),
    ("is almost {}", (-2, 2), _sign),
    ("comes close to being {}", (-2, 2), _sign),
    ("is only mildly {}", (-1, 1), lambda g: 0),
    ("is not {}", (-2, -1, 1, 2), _deny),
    ("is never {}", (-2, -1, 1, 2), _deny),
    ("is not exactly {}", (-2, -1, 1, 2), _deny),
    ("is not at all {}", (-1, 1), lambda g: -2 * g),
    ("is not in the least {}", (-1, 1), lambda g: -2 * g),
    ("is anything but {}", (-2, -1, 1, 2), _flip),
    ("is the opposite of {}", (-2, -1, 1, 2), _flip),
    ("should have been {}", (1, 2), lambda g: -1),
    ("fails to be {}", (1, 2), lambda g: -1),
    ("manages to avoid being {}", (-2, -1), lambda g: 1),
)
# `{main}` determines the grade; `{side}` has a different grade, which is ignored.
CONTRASTS = (
    "{side}, but {main}",
    "{side}, yet {main}",
    "although {side}, {main}",
    "even though {side}, {main}",
    "{main}, although {side}",
    "{main}, even if {side}",
    "I had heard that {side}, but {main}",
    "some critics say that {side}, but in truth {main}",
    "{main}, whereas I had been told that {side}",
)


def clause(rng: random.Random, train: bool, subject: str) -> tuple[str, int]:
    """Draw a clause about a subject; return it and its grade, −2 … 2."""
    phrase, grades, change = rng.choice(PHRASES)
    grade = rng.choice(grades)
    adjective = ADJECTIVES[grade].pick(rng, train)[0]
    return f"{subject} {phrase.format(adjective)}", change(grade)


def review(rng: random.Random, train: bool) -> tuple[str, str, float]:
    """Draw an example `(sentence, "", label)`; all labels are equally likely.

    >>> text, _, label = review(random.Random(4), train=True)
    >>> text
    'Even though the pacing is likeable, the acting of this sequel is almost atrocious.'
    >>> label
    1.0
    """
    grade = rng.randrange(-2, 3)
    one, other = _subjects(rng, train)
    text = _clause_of(rng, train, one, lambda g: g == grade)
    if rng.random() < 0.6:
        side = _clause_of(rng, train, other, lambda g: abs(g - grade) >= 2)
        text = rng.choice(CONTRASTS).format(main=text, side=side)
    return sentence_case(f"{rng.choice(OPENINGS)}{text}."), "", float(grade + 2)


def _subjects(rng: random.Random, train: bool) -> list[str]:
    """Draw two different subjects from one film."""
    first = second = ASPECTS.pick(rng, train)[0]
    while second == first:
        second = ASPECTS.pick(rng, train)[0]
    film = f"this {KINDS.pick(rng, train)[0]}"
    return rng.sample((f"the {first}", f"the {second} of {film}", film), 2)


def _clause_of(rng: random.Random, train: bool, subject: str, wanted: Callable[[int], bool]) -> str:
    """Draw clauses until one has a wanted grade."""
    while True:
        text, grade = clause(rng, train, subject)
        if wanted(grade):
            return text
