"""Semantic search: find the texts of a collection whose vectors are nearest to a question's.

Takes seconds on two cores.
"""

import os

import jax.numpy as jnp
import numpy as np

import jaxlora

BASE = os.environ.get("BASE", "minilm")
ARTICLES = (
    "How to return an item you have bought",
    "Changing the password of your account",
    "When a refund reaches your bank account",
    "Tracking a parcel on its way",
    "What to do if a parcel arrives damaged",
    "Paying by invoice or by credit card",
    "Closing your account and deleting your data",
    "Opening hours of our shops",
)
QUESTIONS = (
    "I forgot how to log in",
    "the box was crushed when it came",
    "when do I get my money back?",
)

# %% Vectors of unit length: their dot products are cosines
encoder = jaxlora.from_pretrained(BASE)


def vectors(texts):
    """Encode texts: `f32[len(texts), H]`."""
    found = encoder.encode(encoder.params, texts)
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)


# %% Store the collection's vectors in a file; later only questions are encoded
np.save("articles.npy", vectors(ARTICLES))

# %% Search: one matmul for all questions
articles = np.load("articles.npy")
cosines = np.asarray(vectors(QUESTIONS)) @ articles.T
for question, row in zip(QUESTIONS, cosines, strict=True):
    print(f"\n{question}")
    for number in np.argsort(-row)[:2]:
        print(f"  {row[number]:.2f}  {ARTICLES[number]}")
