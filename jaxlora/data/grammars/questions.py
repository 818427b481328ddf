"""Question pairs for `para`: the same relation phrased differently, or with its roles changed.

A frame (`question_frames.FRAMES`) lists several ways to ask one question. Filled with the same
entries, they all have the same meaning: label 1. For label 0, two entries of the second question
are swapped ("Can Anna lend …" / "Can Anna borrow …") or one entry is replaced. Ways and synonyms
are drawn from the same distribution for both labels, so the label depends on who does what to whom,
not on the number of shared words.
"""

from __future__ import annotations

import random

from jaxlora.data.grammars.question_frames import FRAMES, Frame
from jaxlora.data.grammars.words import Words, sentence_case

# Fraction of pairs with label 1, and of the other pairs made by a swap if the frame allows it.
POSITIVE = 0.48
SWAPPED = 0.25
Filling = dict[str, tuple[str, ...]]


def question_pair(rng: random.Random, train: bool) -> tuple[str, str, float]:
    """Draw an example `(question, question, label)`.

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
    """Draw an entry for each slot, all different."""
    filling: Filling = {}
    for slot, vocabulary in frame.slots.items():
        filling[slot] = _other(vocabulary, tuple(filling.values()), rng, train)
    return filling


def _changed(frame: Frame, filling: Filling, rng: random.Random, train: bool) -> Filling:
    """Change a filling so that the question has a different meaning."""
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
