"""Vocabulary of the demo grammars, part of it held out of training."""

from __future__ import annotations

import random
from typing import NamedTuple


class Words(NamedTuple):
    """A slot's vocabulary; an entry is a tuple of words that mean the same.

    Attributes:
      seen: entries used everywhere.
      held: entries used in dev and test only.
    """

    seen: tuple[tuple[str, ...], ...]
    held: tuple[tuple[str, ...], ...]

    def pick(self, rng: random.Random, train: bool) -> tuple[str, ...]:
        """Draw an entry; held-out ones are drawn outside training only."""
        return rng.choice(self.seen if train else self.seen + self.held)


def words(text: str) -> Words:
    """Read a vocabulary: entries by commas, synonyms by slashes, held out after the bar.

    >>> words("car, bike/bicycle | tram")
    Words(seen=(('car',), ('bike', 'bicycle')), held=(('tram',),))
    """
    seen, _, held = text.partition("|")
    return Words(_entries(seen), _entries(held))


def _entries(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(entry.strip().split("/")) for entry in text.split(",") if entry.strip())


def with_article(noun: str) -> str:
    """The noun with its indefinite article.

    >>> with_article("artist"), with_article("dog")
    ('an artist', 'a dog')
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence_case(text: str) -> str:
    """The first letter made a capital, the rest left alone.

    >>> sentence_case("the end of Anna.")
    'The end of Anna.'
    """
    return text[0].upper() + text[1:]
