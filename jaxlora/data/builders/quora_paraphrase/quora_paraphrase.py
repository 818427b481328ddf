"""The builder class; TFDS looks for a builder's checksums and metadata in its own folder."""

from jaxlora.data.builders.base import RowsBuilder


class QuoraParaphrase(RowsBuilder):
    """Pairs of questions; 1 where they ask the same, else 0."""

    DESCRIPTION = __doc__
