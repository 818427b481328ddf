"""The builder class, in its own folder, where TFDS looks for checksums and metadata."""

from jaxlora.data.builders.base import RowsBuilder


class QuoraParaphrase(RowsBuilder):
    """Pairs of questions; 1 where they ask the same, else 0."""

    DESCRIPTION = __doc__
