"""A task as a PEFT folder: the adapter for everybody, its head and what it is beside it.

PEFT reads `adapter_config.json` and `adapter_model.safetensors` and nothing else; we also read
`jaxlora.json` and `head.safetensors`, so a task that was exported comes back bit for bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxlora import bert, head_files, peft_files, pretrained
from jaxlora.errors import UserError
from jaxlora.folders import whole
from jaxlora.json_files import read_object
from jaxlora.plain import build
from jaxlora.rundir import write_json
from jaxlora.tasks import Task
from jaxlora.trained import (
    OF_BASE,
    Served,
    Trained,
    check_plain,
    from_of_base,
    of_base,
    upgrade_base,
)

ABOUT = "jaxlora.json"
_FIELDS = {*OF_BASE, "task", "pair_features", "facts"}


def save(folder: str | Path, trained: Trained, name: str) -> None:
    """Write a task for `PeftModel.from_pretrained`, and for `load`.

    Args:
      folder: new or empty; appears whole or not at all.
      trained: where the task comes from.
      name: the task.

    Raises:
      UserError: if the task has no adapter, or the folder is not empty.
    """
    served = trained.find(name)
    adapter = trained.trees[served.tree].get("lora")
    if not adapter:
        raise UserError(f"{trained.origin}: {name} has no adapter; use export merged")
    hub = pretrained.MINILM_HUB if trained.base == pretrained.MINILM else trained.base
    about = of_base(trained) | {
        "task": dataclasses.asdict(served.task),
        "pair_features": served.pair_features,
        "facts": dict(served.facts),
    }
    with whole(folder) as temporary:
        peft_files.write(temporary, adapter, trained.configs[served.tree], hub)
        head_files.write(temporary, served.head)
        write_json(temporary / ABOUT, about)


def described(folder: str | Path) -> bool:
    """Whether a PEFT folder says itself what its task and its base are."""
    return (Path(folder).expanduser() / ABOUT).exists()


def load(
    folder: str | Path, name: str, like: Trained | None = None, base: str | None = None
) -> Trained:
    """Read a task from a PEFT folder.

    A folder that others wrote has no head that we know of: its task compares two texts by the
    cosine of their vectors (0 to 1), which needs none.

    Args:
      folder: `save` or PEFT wrote it.
      name: what to call the task.
      like: says the base and the pooling where the folder does not.
      base: where the base is now; None: where the folder, or `like`, says.

    Raises:
      UserError: naming the file and what is missing, broken, or cannot be honoured.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    about = _read_about(folder / ABOUT) if described(folder) else _about_others(folder, like)
    task = dataclasses.replace(about["task"], name=name)
    trained = Trained(
        **from_of_base(about), served={}, trees={}, configs={}, origin=str(folder)
    ).at(base)
    found = trained.load_base()
    config = found.config
    adapter, lora_config = peft_files.load(folder, bert.param_shapes(config))
    served = Served(task, name, {}, about["pair_features"], about["facts"])
    head = head_files.read(folder, served.head_shapes(config.hidden_size))
    served = dataclasses.replace(served, head=head)
    return dataclasses.replace(
        trained,
        fingerprint=trained.fingerprint.completed(found.fingerprint),
        served={name: served},
        trees={name: {"lora": adapter}},
        configs={name: lora_config},
    )


def _about_others(folder: Path, like: Trained | None) -> dict[str, Any]:
    if like is None:
        raise UserError(f"{folder}: has no {ABOUT} to say its base; name one with --base")
    task = Task("imported", "similarity", pair=True, title=f"similarity, {folder.name}")
    return of_base(like) | {
        "task": task,
        "pair_features": "concat",
        "facts": {"imported from": str(folder)},
    }


def _read_about(path: Path) -> dict[str, Any]:
    about = upgrade_base(read_object(path))
    try:
        if about.keys() != _FIELDS:
            raise ValueError(f"fields {', '.join(sorted(about.keys() ^ _FIELDS))}")
        check_plain(about)
        return about | {"task": build(Task, about["task"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: was changed by hand or damaged ({error})") from error
