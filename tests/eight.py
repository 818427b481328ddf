"""What eight devices compute: `JAX_NUM_CPU_DEVICES=8 python tests/eight.py COMMAND …`.

The number of devices is fixed when JAX starts, so test_sharding.py runs this in a process of its
own. It prints JSON.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from compiled import analyses, collectives, compile_step, mesh_of, shapes, wide
from tiny import Silent, short

from jaxlora import lora
from jaxlora.formats import huggingface
from jaxlora.training import inputs, predictions, task_group
from jaxlora.training import run as train
from jaxlora.training import sharding as meshes
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions

STEPS = 5


def settings(variant, base, data, **more):
    return make_settings(variant, base=base, data_dir=Path(data), **short(variant, **more))


def curves(variant, base, data, *texts):
    """The losses of five steps of each cohort on each mesh."""
    meshes.LEAST_SPLIT = 64  # the tiny model has no large leaf
    # One epoch is four steps of sts by itself.
    chosen = inputs.fit_to_base(settings(variant, base, data, epochs=2))
    loaded = huggingface.load(base)
    examples = inputs.load_data(chosen, loaded)
    found = {}
    for text in texts:
        losses = []
        for groups in chosen.cohorts:
            made = task_group.make_cohort(chosen, loaded, examples, groups, meshes.make_mesh(text))
            states, train_step = made.states, made.compile()
            for _, batch in itertools.islice(made.prefetch(0), STEPS):
                states, metrics = train_step(states, made.frozen, batch)
                step = [np.asarray(metrics[group.name].losses) for group in made.groups]
                losses.append(np.concatenate(step).tolist())
            leaves = jax.tree.leaves([state.trainable for state in states.values()])
            split = not all(x.sharding.is_fully_replicated for x in leaves)
        found[text] = {"losses": losses, "split": split}
    return found


def resumed(base, data, out):
    """A run stopped on eight devices goes on upon one, four and eight."""
    meshes.LEAST_SPLIT = 64
    chosen, first = settings("lora3", base, data), Path(out)
    train.run(chosen, first / "whole", Silent(), RunOptions(mesh="data=1"))
    for text in ("data=1", "fsdp=4", "data=4,fsdp=2"):
        run = first / text
        try:
            train.run(chosen, run, Silent(("sst+para+sts", 6)), RunOptions(mesh="data=4,fsdp=2"))
        except KeyboardInterrupt:
            callback = Silent()
            train.run(chosen, run, callback, RunOptions(resume=True, mesh=text))
            assert callback.started == ("sst+para+sts", 4, 7)
    return [str(path) for path in sorted(first.iterdir())]


def predicted(base, data, out):
    """The part of the encoder's tree on a device, for each split that a run predicts at its end."""
    meshes.LEAST_SPLIT = 64
    splits, parts, outputs = [], [], predictions.outputs

    def noting(cohort, task, trainable, heads, split):
        splits.append((task.name, split))
        leaves = [x for x in jax.tree.leaves(trainable) if x.size > 64]
        there = sum(x.addressable_shards[0].data.nbytes for x in map(jax.numpy.asarray, leaves))
        parts.append(there / sum(x.nbytes for x in leaves))
        return outputs(cohort, task, trainable, heads, split)

    predictions.outputs = noting
    train.run(settings("baseline2", base, data), Path(out), Silent(), RunOptions(mesh="fsdp=8"))
    return {"splits": splits, "parts": parts}


def memory():
    """Bytes a device holds, and collectives, of full fine-tuning and adapters on some meshes."""
    found = {}
    for adapt in ("full", "lora"):
        for text in ("data=1", "data=8", "fsdp=2", "fsdp=4", "fsdp=8"):
            compiled = compile_step(wide(adapt, text))
            analysis = compiled.memory_analysis()
            found[f"{adapt} {text}"] = {
                "state": analysis.argument_size_in_bytes,
                "temporary": analysis.temp_size_in_bytes,
                "collectives": collectives(compiled.as_text()),
            }
    return found


def planned(*texts):
    """What XLA says of some steps on some meshes."""
    found = {}
    for text in texts:
        for adapt, rows in (("full", 16), ("lora", 48)):
            work = wide(adapt, text, rows=rows, adapter=lora.LoraConfig())
            found[f"{adapt} {text}"] = analyses(compile_step(work))
    return found


def update():
    """The collectives of the update alone: gradients in, parameters and moments out."""
    work = wide("full", "fsdp=8")
    mesh = mesh_of(work)
    setup, _, states = shapes(work)
    state = states["all"]
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
        updates, opt_state = setup.groups["all"].tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(run, out_shardings=(where.trainable, where.opt_state)).lower(
        stack, placed.opt_state, placed.trainable
    )
    moments = sum(x.size * 4 for x in jax.tree.leaves(state.opt_state))
    return {"moments": moments, "collectives": collectives(compiled.compile().as_text())}


if __name__ == "__main__":
    commands = {f.__name__: f for f in (curves, resumed, predicted, memory, planned, update)}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
