"""The builder class, in its own folder, where TFDS looks for checksums and metadata."""

from jaxlora.data.builders.base import RowsBuilder


class SstFive(RowsBuilder):
    """SST-5: sentences of film reviews, sentiment 0 (very negative) to 4 (very positive)."""

    DESCRIPTION = __doc__
