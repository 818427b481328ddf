"""Every family against transformers' own classes, on random weights that transformers saved."""

import dataclasses
import json
import shutil

import family_bases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_bases import FAMILIES
from safetensors.numpy import load_file, save_file

from jaxlora import lora
from jaxlora.formats import families, huggingface
from jaxlora.lora import LoraConfig
from jaxlora.nn import ops
from jaxlora.nn.bert import param_shapes
from jaxlora.utils.errors import UserError

every = pytest.mark.parametrize("family", FAMILIES)
IDS = family_bases.sentences()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family → its folder and its torch model, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, family_bases.save(folder, family)
        return made[family]

    return get


@pytest.fixture
def folder(saved, tmp_path):
    """Copy a family's folder, so that a test may damage it."""
    return lambda family: shutil.copytree(saved(family)[0], tmp_path / family)


def hidden(base, rows):
    run = jax.jit(base.config.network().apply)
    return np.asarray(run({"params": base.params}, *rows[:3]))


def error(base, model, ids):
    rows = family_bases.packed(ids)
    found = hidden(base, rows)
    wanted = family_bases.torch_hidden(model, ids)
    return max(
        np.abs(found[rows.segment_ids == n + 1] - one).max() for n, one in enumerate(wanted)
    )


@every
def test_equals_torch(family, saved):
    folder, model = saved(family)
    base = huggingface.load(str(folder))
    assert max(np.abs(x).max() for x in family_bases.torch_hidden(model, IDS)) > 1
    found = error(base, model, IDS)
    print(f"\nFIGURE torch {family} {found:.1e}")
    assert found <= 5e-5
    assert base.left_out == ()


# ---- config.json


@every
def test_every_field_of_transformers_is_known(family):
    """Of its config class and what it inherits: a new one must be looked at before it passes."""
    transformers = pytest.importorskip("transformers")
    config, entry = family_bases.config(family), families.FAMILIES[family]
    theirs = {field.name for field in dataclasses.fields(config)} | config.to_dict().keys()
    theirs |= {"torch_dtype", "num_labels", "name_or_path", "output_attentions"}
    theirs |= {"per_layer_config", "attn_implementation", "experts_implementation"}
    theirs |= transformers.GenerationConfig._get_default_generation_params().keys()
    known = huggingface.known_fields(entry)
    assert theirs - known - huggingface.HARMLESS - entry.harmless == set()
    assert not entry.harmless & known
    assert known & huggingface.HARMLESS <= {"pad_token_id"}  # RoBERTa's positions
