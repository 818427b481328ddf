"""The builder class; TFDS looks for a builder's checksums and metadata in its own folder."""

from jaxlora.data.builders.base import RowsBuilder


class StsBenchmark(RowsBuilder):
    """Pairs of sentences with a similarity from 0 (unrelated) to 5 (same meaning)."""

    DESCRIPTION = __doc__
