"""Pairs of scenes for `sts`: five slots, scored by how well they agree in meaning.

A scene states who does what to whom, where and when. The concept in each slot has synonyms, which
count as equal, and belongs to a kind; two concepts of one kind count half. The score is
`Σ weight · agreement` over the slots (`WEIGHTS`, which sum to 5). Sentences are active or passive,
and the place or the time may come first. Some second scenes swap who and whom, which changes the
meaning but not the words.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from jaxlora.data.grammars.words import Words, sentence_case, with_article, words

WHO = {
    "adult": words("man/gentleman, woman/lady | retiree/pensioner"),
    "child": words("boy/lad, girl | toddler/infant"),
    "job": words("doctor/physician, teacher/tutor, farmer | lawyer/attorney, cook/chef"),
    "animal": words("dog/hound, cat/kitten, horse | goat, donkey/mule"),
    "bird": words("duck, goose | swan"),
}
# "progressive=participle"
DOES = {
    "look": words("watching=watched/observing=observed, filming=filmed | drawing=drawn"),
    "chase": words("chasing=chased/pursuing=pursued, following=followed | hunting=hunted"),
    "like": words("hugging=hugged/embracing=embraced, greeting=greeted | kissing=kissed"),
    "force": words("pushing=pushed/shoving=shoved, pulling=pulled/dragging=dragged"),
    "aid": words("helping=helped/assisting=assisted, feeding=fed | guiding=guided"),
}
WHERE = {
    "green": words("in the garden/in the yard, in the park | in the meadow"),
    "water": words("on the beach/on the shore, by the lake | by the river"),
    "house": words("in the kitchen, in the living room/in the lounge | in the cellar"),
    "town": words("in the street/on the road, at the station | at the market"),
}
WHEN = {
    "light": words("in the morning, at noon/at midday | in the afternoon"),
    "dark": words("in the evening, at night/after dark | at midnight"),
    "warm": words("in summer, in spring"),
    "cold": words("in winter, in autumn/in the fall"),
}
VOCABULARY = {"who": WHO, "does": DOES, "whom": WHO, "where": WHERE, "when": WHEN}
WEIGHTS = {"who": 1.25, "does": 1.25, "whom": 1.25, "where": 0.75, "when": 0.5}


class Concept(NamedTuple):
    """A concept: its kind and its synonyms."""

    kind: str
    names: tuple[str, ...]


Scene = dict[str, Concept]


def agreement(a: Concept, b: Concept) -> float:
    """Return 1 for equal concepts, ½ for two concepts of one kind, else 0."""
    return 1.0 if a == b else 0.5 if a.kind == b.kind else 0.0


def score(first: Scene, second: Scene) -> float:
    """Compute the similarity of two scenes, 0–5."""
    return sum(w * agreement(first[slot], second[slot]) for slot, w in WEIGHTS.items())


def scene_pair(rng: random.Random, train: bool) -> tuple[str, str, float]:
    """Draw an example `(sentence, sentence, score)`.

    >>> first, second, similarity = scene_pair(random.Random(8), train=True)
    >>> first
    'In the yard, a horse is being shoved by a girl in the evening.'
    >>> second
    'A girl is pushing a horse in the yard in the evening.'
    >>> similarity
    5.0
    """
    first = _scene(rng, train)
    second = _variant(first, rng, train)
    a = b = _describe(first, rng)
    while b == a:
        b = _describe(second, rng)
    return a, b, score(first, second)


def _draw(kinds: dict[str, Words], rng: random.Random, train: bool) -> Concept:
    kind = rng.choice(tuple(kinds))
    return Concept(kind, kinds[kind].pick(rng, train))


def _scene(rng: random.Random, train: bool) -> Scene:
    scene = {slot: _draw(kinds, rng, train) for slot, kinds in VOCABULARY.items()}
    while scene["whom"].kind == scene["who"].kind:
        scene["whom"] = _draw(WHO, rng, train)
    return scene


def _variant(scene: Scene, rng: random.Random, train: bool) -> Scene:
    """Redraw the slots of a scene at a random rate, and sometimes swap the roles."""
    rate = 1.3 * rng.random()  # above 1 in about a quarter of the pairs: all slots are redrawn
    other = dict(scene)
    if rng.random() < 0.35:
        other |= {"who": scene["whom"], "whom": scene["who"]}
    for slot, kinds in VOCABULARY.items():
        if rng.random() < rate:
            kind = scene[slot].kind
            near = rng.random() < 0.25
            other[slot] = _draw({kind: kinds[kind]} if near else kinds, rng, train)
    return other


def _describe(scene: Scene, rng: random.Random) -> str:
    """Describe the scene in a sentence with random voice, word order and synonyms."""
    word = {slot: rng.choice(concept.names) for slot, concept in scene.items()}
    who, whom = with_article(word["who"]), with_article(word["whom"])
    progressive, participle = word["does"].split("=")
    if rng.random() < 0.5:
        core = f"{who} is {progressive} {whom}"
    else:
        core = f"{whom} is being {participle} by {who}"
    where, when = word["where"], word["when"]
    order = rng.choice(("{c} {p} {t}", "{t}, {c} {p}", "{p}, {c} {t}"))
    return sentence_case(order.format(c=core, p=where, t=when)) + "."
