"""Question pairs for `para`: the same relation put differently, or with its roles changed.

A frame (`question_frames.FRAMES`) lists ways to ask one thing. Filled with the same entries, all
its ways ask the same: label 1. For label 0 the second question is filled with two slots exchanged
("Can Anna lend …" / "Can Anna borrow …") or one entry replaced. Both labels draw their ways and
synonyms alike, so shared words do not tell them apart; who does what to whom does.
"""

from __future__ import annotations

import random

from jaxlora.data.grammars.question_frames import FRAMES, Frame
from jaxlora.data.grammars.words import Words, sentence_case

# Share of pairs that ask the same, and of the others' exchanges where roles can be exchanged.
POSITIVE = 0.48
SWAPPED = 0.25
Filling = dict[str, tuple[str, ...]]


def question_pair(rng: random.Random, train: bool) -> tuple[str, str, float]:
    """One example `(question, question, label)`.

    >>> question_pair(random.Random(0), train=True)
    ('Would you say Prague is bigger than Paris?', 'Is Paris smaller than Prague?', 1.0)
    """
    frame = rng.choice(FRAMES)
    filling = _fill(frame, rng, train)
    same = rng.random() < POSITIVE
    other = filling if same else _changed(frame, filling, rng, train)
    first = second = _ask(frame, filling, rng)
    while second == first:
        second = _ask(frame, other, rng)
    return first, second, float(same)


def _fill(frame: Frame, rng: random.Random, train: bool) -> Filling:
    """An entry for each slot, no entry twice."""
    filling: Filling = {}
    for slot, vocabulary in frame.slots.items():
        filling[slot] = _other(vocabulary, tuple(filling.values()), rng, train)
    return filling


def _changed(frame: Frame, filling: Filling, rng: random.Random, train: bool) -> Filling:
    """A filling that asks something else."""
    if frame.swap and rng.random() < SWAPPED:
        return {**filling, "a": filling["b"], "b": filling["a"]}
    slot = rng.choice(frame.replace)
    return {**filling, slot: _other(frame.slots[slot], tuple(filling.values()), rng, train)}


def _other(
    vocabulary: Words, taken: tuple[tuple[str, ...], ...], rng: random.Random, train: bool
) -> tuple[str, ...]:
    entry = vocabulary.pick(rng, train)
    while entry in taken:
        entry = vocabulary.pick(rng, train)
    return entry


def _ask(frame: Frame, filling: Filling, rng: random.Random) -> str:
    chosen = {slot: rng.choice(entry) for slot, entry in filling.items()}
    return sentence_case(rng.choice(frame.ways).format(**chosen))
