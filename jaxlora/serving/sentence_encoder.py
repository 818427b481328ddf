"""A pretrained encoder as a pure function of parameters and texts or packed tokens."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlora.data import packing
from jaxlora.data.tokenized import Examples, tokenize, truncating, unlabelled
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import Adapter, LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.bert import NO_ADAPTER, EncoderConfig
from jaxlora.nn.encode import Encode, PackedTokens, encoder, make_encode
from jaxlora.serving import inference
from jaxlora.serving.task_models import Pooling
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS = typing.get_args(Pooling)
LEAST_LENGTH = 32  # shortest row length; others are powers of two, to compile few programs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SentenceEncoder:
    """A pretrained encoder with its tokenizer and pooling.

    Attributes:
      base: the base model, with its fingerprint.
      pooling: `mean`, the mean of the token vectors, or `cls`, the vector of the first token.
      max_length: maximum number of tokens of a text; longer texts are truncated.
      dtype: dtype of matmul inputs; sums and sentence vectors are float32.
    """

    base: Pretrained
    pooling: str
    max_length: int
    dtype: str

    @property
    def config(self) -> EncoderConfig:
        """The configuration of the network."""
        return self.base.config

    @property
    def params(self) -> Tree:
        """The pretrained parameters: nested dicts of float32 NumPy arrays, with stacked layers."""
        return self.base.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without truncation or padding."""
        return self.base.tokenizer

    def pack(
        self,
        texts: Sequence[str | tuple[str, str]],
        rows: int | None = None,
        length: int | None = None,
    ) -> PackedTokens:
        """Tokenize texts and pack them into rows, several to a row.

        Args:
          texts: N strings, or pairs (tuples) that are read together as `[CLS] a [SEP] b [SEP]`;
            truncated to `max_length` tokens.
          rows: number of rows R; None: as many as needed. Fix it to compile a single program.
          length: row length S; None: that of the longest text, rounded up to a power of two.

        Returns:
          Packed NumPy arrays for `encode`.

        Raises:
          UserError: if `texts` is not a list of strings or pairs, or does not fit into the rows.
        """
        examples = self._examples(texts)
        numbers = range(len(texts))
        sentences = [examples.sentence(n) for n in numbers]
        types = None if examples.types is None else examples.types_of(numbers)
        length = length or self._row_length(examples)
        try:
            needed = packing.place(examples.lengths, length).rows
            shape = packing.Shape(needed if rows is None else rows, length)
            return packing.fill(sentences, numbers, len(texts), shape, types=types)
        except ValueError as error:
            raise UserError(f"these texts do not fit: {error}; give more rows or length") from error

    def encode(
        self,
        params: Tree,
        inputs: Sequence[str | tuple[str, str]] | PackedTokens,
        *,
        adapter: Adapter | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Compute sentence vectors, as a pure function.

        With packed tokens it can be transformed by `jax.grad`, `jax.jit` and `jax.vmap`. Texts are
        tokenized first and encoded by jitted programs of a few shapes.

        Args:
          params: parameters with the structure of `self.params`, trained or not.
          inputs: N texts or pairs of texts, or the result of `pack`.
          adapter: `(adapter, LoraConfig)` to apply without merging; None: no adapter.
          key: PRNG key for dropout, only with packed tokens; None: no dropout.

        Returns:
          `f32[N, H]`.

        Raises:
          UserError: if `inputs` is not a list of strings or pairs, or if texts come with a key.
        """
        tree, config = adapter or ({}, NO_ADAPTER)
        trainable = {"lora": tree} if tree else {}
        if isinstance(inputs, PackedTokens):
            return self._function(config)({"params": params}, trainable, inputs, key)
        if key is not None:
            raise UserError("encode: dropout is for training; pack the texts first")
        examples = self._examples(inputs)
        if not len(examples):
            return jnp.zeros((0, self.config.hidden_size))
        frozen = {"params": bert.matmul_ready(params, jnp.dtype(self.dtype))}
        length = self._row_length(examples)
        program = self._compiled(config)
        return jnp.asarray(inference.encode(program, frozen, trainable, examples, length))

    def _examples(self, texts: Sequence[str | tuple[str, str]]) -> Examples:
        if isinstance(texts, str) or not all(map(_is_text, texts)):
            raise UserError("encode: give a list of strings or pairs, or what pack() made of them")
        if any(isinstance(text, tuple) for text in texts):
            huggingface.check_pairs(self.base)
        return unlabelled(tokenize(self._truncating, texts))

    def _row_length(self, examples: Examples) -> int:
        longest = int(examples.lengths.max(initial=LEAST_LENGTH))
        return min(1 << (longest - 1).bit_length(), max(self.max_length, longest))

    @functools.cached_property
    def _truncating(self) -> Tokenizer:
        return truncating(self.tokenizer, self.max_length)

    def _function(self, config: LoraConfig) -> Encode:
        return encoder(self.config, jnp.dtype(self.dtype), config, self.pooling)

    @functools.cached_property
    def _compiled(self) -> Any:
        return functools.lru_cache(8)(lambda config: make_encode(self._function(config)))


def _is_text(text: Any) -> bool:
    """Return whether `text` is a string or a tuple of two strings."""
    pair = isinstance(text, tuple) and len(text) == 2
    return isinstance(text, str) or (pair and all(isinstance(part, str) for part in text))


def from_pretrained(
    base: str,
    *,
    pooling: str = "mean",
    max_length: int | None = None,
    dtype: str = "float32",
    sha256: str | None = None,
) -> SentenceEncoder:
    """Load a pretrained encoder: BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, ModernBERT and others.

    Args:
      base: `minilm`, a local Hugging Face folder, or a hub id such as `bert-base-uncased`,
        optionally with a revision (commit, tag or branch) as in `name@revision`.
      pooling: `mean` or `cls`.
      max_length: number of tokens to truncate texts to; None: 512, or the model's limit if lower.
      dtype: dtype of matmul inputs, `float32` or `bfloat16`.
      sha256: the required checksum of the weights; None: any.

    Returns:
      The encoder: configuration, parameters, tokenizer and a pure `encode`.

    Raises:
      UserError: if the base cannot be found or is not supported, or an argument is invalid.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16")
    found = huggingface.load(base, sha256)
    limit = found.config.max_length
    length = min(512, limit) if max_length is None else max_length
    if not 3 <= length <= limit:
        raise UserError(f"max_length {length}: {base} takes from 3 to {limit} tokens")
    return SentenceEncoder(found, pooling, length, dtype)
