"""A pretrained encoder as a function: parameters and texts, or packed tokens, to vectors."""

from __future__ import annotations

import dataclasses
import functools
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
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS = ("mean", "cls")
LEAST_LENGTH = 32  # of rows; longer ones have a power of two, so that there are few programs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SentenceEncoder:
    """A pretrained encoder, its tokenizer, and how the tokens' vectors become a sentence's.

    Attributes:
      base: what `from_pretrained` read, with its fingerprint.
      pooling: `mean` of a sentence's tokens, or `cls`, the first token.
      max_length: the most tokens of a sentence; longer ones are cut.
      dtype: of matmul inputs; sums, and vectors, are float32.
    """

    base: Pretrained
    pooling: str
    max_length: int
    dtype: str

    @property
    def config(self) -> EncoderConfig:
        """The shape of the network."""
        return self.base.config

    @property
    def params(self) -> Tree:
        """The pretrained parameters: nested dicts of float32 NumPy arrays, layers stacked."""
        return self.base.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        return self.base.tokenizer

    def pack(
        self,
        texts: Sequence[str | tuple[str, str]],
        rows: int | None = None,
        length: int | None = None,
    ) -> PackedTokens:
        """Tokenise texts and pack them into rows, several to a row.

        Args:
          texts: N strings, or tuples of two that are read together, as in `[CLS] a [SEP] b [SEP]`;
            one with more tokens than `max_length` is cut.
          rows: R; None: as many as are needed. A fixed shape is compiled once.
          length: S; None: a power of two.

        Returns:
          NumPy arrays, which `encode` takes.

        Raises:
          UserError: for what is no list of strings, or more than the rows can hold.
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
        """Compute sentence vectors: a pure function of its arguments.

        With packed tokens it can be differentiated, compiled and mapped like any other. Texts are
        tokenised first, and encoded by compiled programs of a few shapes.

        Args:
          params: as `params`, trained or not.
          inputs: N texts, or pairs of them, or what `pack` made of them.
          adapter: an adapter and its configuration, applied beside the parameters; None: none.
          key: PRNG key of dropout; None: no dropout. Only with packed tokens.

        Returns:
          `f32[N, H]`.

        Raises:
          UserError: for what is no list of strings, or a key with texts.
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
    """Return whether it is a string, or a tuple of two."""
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
      base: `minilm`, a local Hugging Face folder, or a hub id such as `bert-base-uncased`, which
        `@` and a revision (a commit, a tag, a branch) may follow.
      pooling: `mean` or `cls`.
      max_length: where sentences are cut; None: 512 tokens, or as many as the model can take.
      dtype: of matmul inputs, `float32` or `bfloat16`.
      sha256: the checksum that its weights must have; None: any.

    Returns:
      Its configuration, parameters, tokenizer, and a pure `encode`.

    Raises:
      UserError: if it cannot be found, is of a kind that cannot be run exactly, or does not take
        such values.
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
