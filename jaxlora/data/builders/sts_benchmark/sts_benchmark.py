"""The builder class, in its own folder, where TFDS looks for checksums and metadata."""

from jaxlora.data.builders.base import RowsBuilder


class StsBenchmark(RowsBuilder):
    """Pairs of sentences with a similarity from 0 (unrelated) to 5 (same meaning)."""

    DESCRIPTION = __doc__
