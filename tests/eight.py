"""What eight devices compute: `python tests/eight.py COMMAND …`, run by test_mesh.py.

The number of devices is fixed when JAX starts, so this needs a process of its own. It prints JSON.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import Silent, short

from jaxlora import bert, group, lora, prepare, pretrained, step, train
from jaxlora import mesh as meshes
from jaxlora.settings import Flags, resolve
from jaxlora.tasks import paper_tasks

STEPS = 5
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def settings(variant, base, data):
    return resolve(Flags(variant, base=base, data_dir=Path(data), **short(variant)))


def curves(variant, base, data, *texts):
    """The losses of five steps of each group on each mesh, and the rows of a batch."""
    meshes.LEAST_SPLIT = 64  # the tiny model has no large leaf
    chosen = settings(variant, base, data)
    loaded = pretrained.load(base)
    examples = prepare.load_data(chosen, loaded)
    found = {}
    for text in texts:
        losses = []
        for names in chosen.groups:
            made = group.make_group(chosen, loaded, examples, names, meshes.make_mesh(text))
            state, train_step = made.state, made.train_step()
            for batch, _ in zip(made.prefetch(0), range(STEPS), strict=False):
                state, metrics = train_step(state, made.frozen, batch)
                losses.append(np.asarray(metrics.losses).tolist())
            leaves = jax.tree.leaves(state.trainable)
            split = not all(x.sharding.is_fully_replicated for x in leaves)
        found[text] = {"losses": losses, "split": split}
    return found


def resumed(base, data, out):
    """A run stopped on eight devices goes on upon one, four and eight."""
    meshes.LEAST_SPLIT = 64
    chosen, first = settings("lora3", base, data), Path(out)
    train.run(chosen, first / "whole", Silent(), mesh="data=1")
    for text in ("data=1", "fsdp=4", "data=4,fsdp=2"):
        run = first / text
        try:
            train.run(chosen, run, Silent(("sst+para+sts", 6)), mesh="data=4,fsdp=2")
        except KeyboardInterrupt:
            listener = Silent()
            train.run(chosen, run, listener, resume=True, mesh=text)
            assert listener.started == ("sst+para+sts", 4, 7)
    return [str(path) for path in sorted(first.iterdir())]


def wide_group(adapt, mesh):
    """The compiled step of a wider network, and its state's shapes."""
    config = bert.BertConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=64,
    )  # fmt: skip
    tasks = paper_tasks("mse")
    adapter = lora.LoraConfig(8, 8.0)
    encode = step.encoder(config, jnp.float32, adapter, "mean")
    setup = step.Setup(
        tasks, step.task_encoder(adapt, encode, len(tasks)),
        *step.optimizers(len(tasks), 1e-4, 1e-3, weight_decay=0.01), config.hidden_size,
    )  # fmt: skip

    def start():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), bert.param_shapes(config))
        frozen, trainable = step.split_params(
            adapt, params, adapter, jax.random.key(0), jnp.float32
        )
        return frozen, step.init_state(setup, trainable, jax.random.key(1))

    frozen, state = jax.eval_shape(start)
    lead = (3,) if adapt == "full" else ()
    rows = jax.ShapeDtypeStruct((*lead, 16, 64), jnp.int32)
    sentences = jax.ShapeDtypeStruct((*lead, 32 if lead else 96), jnp.int32)
    numbers = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    batch = step.Batch(step.Rows(rows, rows, rows, sentences), numbers, numbers)
    shardings = meshes.of_state(mesh, state)
    placed = [
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
        )
        for tree, where in (
            (state, shardings), (frozen, meshes.of_tree(mesh, frozen)),
            (batch, meshes.of_batch(mesh, batch)),
        )
    ]  # fmt: skip
    compiled = step.make_train_step(setup, (shardings, meshes.whole(mesh))).lower(*placed).compile()
    return setup, state, compiled


def collectives(text):
    """Operation → bytes of each result, of a compiled program's text."""
    found = {}
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
    for shapes, name in re.findall(pattern, text):
        size = sum(
            BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        found.setdefault(name, []).append(size)
    return found


def memory():
    """Bytes a device holds, and collectives, of full fine-tuning and adapters on some meshes."""
    found = {}
    for adapt in ("full", "lora"):
        for text in ("data=1", "data=8", "fsdp=2", "fsdp=4", "fsdp=8"):
            _, _, compiled = wide_group(adapt, meshes.make_mesh(text))
            analysis = compiled.memory_analysis()
            found[f"{adapt} {text}"] = {
                "state": analysis.argument_size_in_bytes,
                "temporary": analysis.temp_size_in_bytes,
                "collectives": collectives(compiled.as_text()),
            }
    return found


def update():
    """The collectives of the update alone: gradients in, parameters and moments out."""
    mesh = meshes.make_mesh("fsdp=8")
    setup, state, _ = wide_group("full", mesh)
    where = meshes.of_state(mesh, state)
    stack = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            (3, *x.shape), x.dtype,
            sharding=jax.NamedSharding(mesh, jax.P(None, *s.spec)),
        ),
        state.trainable, where.trainable,
    )  # fmt: skip
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )

    def run(grads, opt_state, params):
        updates, opt_state = setup.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(run, out_shardings=(where.trainable, where.opt_state)).lower(
        stack, placed.opt_state, placed.trainable
    )
    moments = sum(x.size * 4 for x in jax.tree.leaves(state.opt_state))
    return {"moments": moments, "collectives": collectives(compiled.compile().as_text())}


if __name__ == "__main__":
    commands = {f.__name__: f for f in (curves, resumed, memory, update)}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
