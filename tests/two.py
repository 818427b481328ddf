"""One of two processes: `python tests/two.py FAULT FLAGS …`, run by test_processes.py.

It is `jaxlora train`, in which something happens at a known moment: FAULT is JSON, with `at`
(`data`, `group`, a step's number, `save`, `result` or `end`) and a `signal` or what is `raised`.
"""

import errno
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxlora.__main__ import main
from jaxlora.cli import console
from jaxlora.serving import finished_run, tree_files
from jaxlora.training import checkpoint, inputs, run_folder
from jaxlora.utils.errors import UserError

FAULT: dict = {}
RAISED = {
    "user": UserError("sst.csv:3: the label is no number; mend it"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "bug": ZeroDivisionError("division by zero"),
}


def fault(at):
    """Let it happen, if this is the moment."""
    if FAULT.get("at") == at:
        FAULT["at"] = None  # once
        for _ in range(FAULT.get("times", 1)):
            if "signal" in FAULT:
                os.kill(os.getpid(), FAULT["signal"])
        if "raised" in FAULT:
            raise RAISED[FAULT["raised"]]


def before(owner, name, at):
    """Let it happen when a function is called."""
    real = getattr(owner, name)

    def replaced(*args, **kwargs):
        fault(at(*args))
        return real(*args, **kwargs)

    setattr(owner, name, replaced)


if __name__ == "__main__":
    FAULT |= json.loads(sys.argv[1])
    before(inputs, "load_data", lambda *_: "data")
    before(console.ConsoleCallback, "group", lambda *_: "group")
    before(console.ConsoleCallback, "record", lambda _, record: record["step"])
    before(checkpoint, "_sums", lambda *_: "save")
    before(tree_files, "save", lambda *_: "end")
    before(
        run_folder,
        "write_json",
        lambda path, _: "result" if path.name == finished_run.RESULT else "",
    )
    sys.exit(main(["train", *sys.argv[2:]]))
