"""The builder class; TFDS looks for a builder's checksums and metadata in its own folder."""

from jaxlora.data.builders.base import RowsBuilder


class SstFive(RowsBuilder):
    """SST-5: sentences of film reviews, sentiment 0 (very negative) to 4 (very positive)."""

    DESCRIPTION = __doc__
