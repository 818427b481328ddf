"""The compiled train step of a made-up group: its analyses, and what its devices send."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.cli import cost_table
from jaxlora.data.batches import Batch
from jaxlora.nn import bert
from jaxlora.nn.encode import PackedTokens
from jaxlora.tasks.task import paper_tasks
from jaxlora.training import cost, optimizer
from jaxlora.training import sharding as meshes
from jaxlora.training.adaptation import make_adaptation
from jaxlora.training.step import GroupStep, make_train_step

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def wide(adapt, text, **more):
    """A step of a wider network, 16 rows of each task or 48 of all."""
    config = bert.BertConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=64,
    ).with_dropout(0.0)  # fmt: skip
    asked = {"batch_size": 16, "rows": 16, "adapter": lora.LoraConfig(8, 8.0)} | more
    return cost.Work(config, adapt, paper_tasks("mse"), **asked, **cost_table.find_mesh(text))


def shapes(work):
    """A `cost.Work`'s step, and the shapes of (frozen, states)."""
    optimizers = optimizer.optimizers(len(work.tasks), 1e-4, 1e-3, weight_decay=0.01)
    groups = {"all": GroupStep(work.tasks, *optimizers)}
    if work.groups > 1:  # one of each task
        optimizers = optimizer.optimizers(1, 1e-4, 1e-3, weight_decay=0.01)
        groups = {task.name: GroupStep((task,), *optimizers) for task in work.tasks}
    made = make_train_step(
        groups, work.config,
        make_adaptation(work.adapt, work.adapter),
        dtype=jnp.dtype(work.dtype), pair_features=work.pair_features,
    )  # fmt: skip

    def start():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), bert.param_shapes(work.config))
        return made.freeze(params), made.init(dict.fromkeys(groups, jax.random.key(0)), params)

    return made, *jax.eval_shape(start)


def mesh_of(work):
    return meshes.make_mesh(f"data={work.data},fsdp={work.fsdp}")


def compile_step(work):
    """XLA's program for it, on so many of the devices there are; nothing is run."""
    mesh = mesh_of(work)
    made, frozen, states = shapes(work)
    shardings = {name: meshes.of_state(mesh, state) for name, state in states.items()}
    batch = batch_shapes(work)
    placed = [
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
        )
        for tree, where in (
            (states, shardings), (frozen, meshes.of_tree(mesh, frozen)),
            (batch, meshes.of_batch(mesh, batch)),
        )
    ]  # fmt: skip
    return made.compile((shardings, meshes.replicated(mesh))).lower(*placed).compile()


def batch_shapes(work):
    count, size = len(work.tasks), 2 * work.batch_size
    numbers = jax.ShapeDtypeStruct((count, work.batch_size), jnp.float32)
    vectors = jax.ShapeDtypeStruct((count, size, work.config.hidden_size), jnp.float32)
    lead = (count,) if work.adapt == "full" else ()
    rows = jax.ShapeDtypeStruct((*lead, work.rows, work.row_length), jnp.int32)
    starts = jax.ShapeDtypeStruct((*lead, size) if lead else (count * size,), jnp.int32)
    inputs = vectors if work.adapt == "frozen" else PackedTokens(rows, rows, rows, starts)
    return Batch(inputs, numbers, numbers)


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


def analyses(compiled):
    """FLOPs, bytes and collectives of a device, as XLA sees them."""
    memory = compiled.memory_analysis()
    sent = {name: sum(sizes) for name, sizes in collectives(compiled.as_text()).items()}
    return {
        "flops": compiled.cost_analysis()["flops"],
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": sent,
    }
