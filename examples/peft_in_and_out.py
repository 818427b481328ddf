"""Import a Hugging Face PEFT adapter into a bank and export it; both sides compute the same.

Needs torch, peft, and a base as a folder or a hub id. Takes a minute on two cores.
"""

import os
import shlex

import numpy as np
import peft
import torch
import transformers

import jaxlora
from jaxlora.__main__ import main

BASE = os.environ.get("BASE", "sentence-transformers/all-MiniLM-L6-v2")
TEXTS = ["a film", "the dog runs", "the dog runs, not the film"]


def shell(command):
    """Run a command as it would be typed in a terminal."""
    print(f"\n$ {command}")
    if code := main(shlex.split(command)[1:]):
        raise SystemExit(code)


@torch.no_grad()
def peft_vectors(model):
    """Encode texts in torch: the mean of each text's token vectors."""
    batch = transformers.AutoTokenizer.from_pretrained(BASE)(
        TEXTS, padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model.eval()(**batch).last_hidden_state
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


# %% An adapter as PEFT saves it; this one is random instead of trained
torch.manual_seed(0)
config = peft.LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights=False)
theirs = peft.get_peft_model(transformers.AutoModel.from_pretrained(BASE), config)
theirs.save_pretrained("from-peft")

# %% Import: without a head, the task compares two texts by the cosine of their vectors
shell(f"jaxlora import peft from-peft --bank=bank --as=similar --base={BASE}")
ours = jaxlora.load("bank").encode("similar", TEXTS)
print(f"largest difference from PEFT's vectors: {np.abs(ours - peft_vectors(theirs)).max():.1e}")

# %% Export: a folder for `PeftModel.from_pretrained`, with the same factors
shell("jaxlora export peft to-peft --bank=bank --task=similar")
again = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(BASE), "to-peft")
print(f"largest difference after the round trip: {np.abs(ours - peft_vectors(again)).max():.1e}")
