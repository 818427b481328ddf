"""TFDS builders, one folder each. Import this lazily, since it imports TFDS."""

from jaxlora.data.builders.base import RowsBuilder, SourceConfig, load
from jaxlora.data.builders.quora_paraphrase.quora_paraphrase import QuoraParaphrase
from jaxlora.data.builders.sst_five.sst_five import SstFive
from jaxlora.data.builders.sts_benchmark.sts_benchmark import StsBenchmark

BUILDERS: dict[str, type[RowsBuilder]] = {
    "sst": SstFive,
    "para": QuoraParaphrase,
    "sts": StsBenchmark,
}

__all__ = ["BUILDERS", "SourceConfig", "load"]
