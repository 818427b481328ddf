"""Vocabularies of the demo grammars, partly held out of training."""

from __future__ import annotations

import random
from typing import NamedTuple


class Words(NamedTuple):
    """The vocabulary of a slot; an entry is a tuple of synonyms.

    Attributes:
      seen: entries for all splits.
      held: entries for dev and test only.
    """

    seen: tuple[tuple[str, ...], ...]
    held: tuple[tuple[str, ...], ...]

    def pick(self, rng: random.Random, train: bool) -> tuple[str, ...]:
        """Draw an entry, for training only from `seen`."""
        return rng.choice(self.seen if train else self.seen + self.held)


def words(text: str) -> Words:
    """Parse a vocabulary: commas separate entries, slashes synonyms; held-out entries follow a bar.

    >>> words("car, bike/bicycle | tram")
    Words(seen=(('car',), ('bike', 'bicycle')), held=(('tram',),))
    """
    seen, _, held = text.partition("|")
    return Words(_entries(seen), _entries(held))


def _entries(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(entry.strip().split("/")) for entry in text.split(",") if entry.strip())


def with_article(noun: str) -> str:
    """Prefix a noun with its indefinite article.

    >>> with_article("artist"), with_article("dog")
    ('an artist', 'a dog')
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence_case(text: str) -> str:
    """Capitalize the first letter and keep the rest.

    >>> sentence_case("the end of Anna.")
    'The end of Anna.'
    """
    return text[0].upper() + text[1:]
