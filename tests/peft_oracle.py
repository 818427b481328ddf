"""Hugging Face's peft as the oracle: our adapters in its models."""

import json

import numpy as np
import pytest
from flax import traverse_util

from jaxlora.formats import peft_config


def bert(folder, classifier=False):
    """The folder's weights in transformers' BertModel, or in its classifier."""
    torch = pytest.importorskip("torch")
    from transformers import BertForSequenceClassification, BertModel

    kind = BertForSequenceClassification if classifier else BertModel
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def adapt(model, config):
    """A fresh peft adapter with our configuration's values."""
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules),
        use_rslora=config.rslora, rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern), exclude_modules=["pooler.dense"],
    )  # fmt: skip
    return peft.get_peft_model(model, theirs).eval()


def factors(model):
    """A peft model's factors by name, without what differs between models."""
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    prefixes = ("base_model.model.", "bert.")
    for prefix in prefixes:
        named = {n.removeprefix(prefix): p for n, p in named.items()}
    return {n.replace(".default.weight", ""): p for n, p in named.items()}


def copy_into(model, adapter):
    """Our numbers into a peft model; the two must have the same factors."""
    import torch

    named, used = factors(model), set()
    for path, value in traverse_util.flatten_dict(adapter).items():
        for layer, factor in enumerate(np.asarray(value)):
            name = f"encoder.layer.{layer}.{'.'.join(path[1:-1])}.lora_{path[-1]}"
            with torch.no_grad():
                named[name].copy_(torch.tensor(factor.T))
            used.add(name)
    assert used == named.keys()


def vectors(model, tokenizer, sentences, pooling="cls"):
    """Sentence vectors, padded together; `f32[N, H]`."""
    import torch

    encoded = [tokenizer.encode(s).ids for s in sentences]
    longest = max(map(len, encoded))
    ids = torch.tensor([e + [0] * (longest - len(e)) for e in encoded])
    mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in encoded])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    hidden = found.hidden_states[-1]
    if pooling == "mean":
        return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    return hidden[:, 0].numpy()


def edit_config(folder, **values):
    """Change fields of a PEFT folder's configuration."""
    path = folder / peft_config.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
