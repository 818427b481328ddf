"""Two real processes end together: by a signal to one of them, or by the fault of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import leaves_equal, short, trained_trees

from jaxlora.training import run_folder
from jaxlora.utils import distributed
from jaxlora.utils import process as host
from jaxlora.utils.errors import Stopped

ROOT = Path(__file__).parents[2]
GROUP = "sst+para+sts"
STEPS = 7 * 3  # evaluated after 10, 20 and 21
SHORT = short("lora3", epochs=3, eval_every=10)
slow = pytest.mark.slow


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def two(base, data, out, faults, *more):
    """Run two processes, each with its fault: (exit code, what it said, when it ended) of each."""
    flags = {"variant": "lora3", "base": base, "data_dir": data, **SHORT}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    joined = [f"--coordinator=localhost:{free_port()}", "--processes=2", f"--out={out}", *more]
    command = [sys.executable, str(ROOT / "tests" / "two.py")]
    both = [
        subprocess.Popen(
            [*command, json.dumps(faults.get(n, {})), *flags, *joined, f"--process={n}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for n in (0, 1)
    ]  # fmt: skip
    ended = {}
    deadline = time.monotonic() + 240
    while len(ended) < 2 and time.monotonic() < deadline:
        for n, process in enumerate(both):
            if process.poll() is not None:
                ended.setdefault(n, time.monotonic())
        time.sleep(0.05)
    for process in both:
        process.kill()
    said = [process.communicate()[1] for process in both]
    assert len(ended) == 2, f"hanging: {said}"
    assert abs(ended[0] - ended[1]) < 10, said
    return [process.returncode for process in both], said


@pytest.mark.parametrize(
    ("processes", "due", "received", "agreed"),
    [(1, False, 15, 15), (1, True, 0, 0), (2, False, 15, 0), (2, True, 15, 15), (2, True, 0, 2)],
)
def test_only_where_it_is_due_processes_ask_one_another(
    monkeypatch, processes, due, received, agreed
):
    """The other one has received signal 2."""
    monkeypatch.setattr(distributed.jax, "process_count", lambda: processes)
    monkeypatch.setattr(
        distributed.multihost_utils,
        "process_allgather",
        lambda x: np.array([x, 2]) if due else pytest.fail("asked"),
    )
    assert distributed.agreed_signal(received, due) == agreed


def test_sigterm_ends_what_is_not_trained():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="immediately") as stopped, host.ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.signal == signal.SIGTERM and not stopped.value.saved
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(scope="module")
def whole(tiny_base, data_dir, tmp_path_factory):
    """The parameters of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, said = two(tiny_base, data_dir, out, {})
    assert codes == [0, 0], said
    return trained_trees(out)


@pytest.mark.parametrize(
    ("number", "process", "at"),
    [
        pytest.param(signal.SIGTERM, 1, "group", id="early", marks=slow),
        pytest.param(signal.SIGINT, 0, "group", marks=slow),
        pytest.param(signal.SIGTERM, 0, 10, marks=slow),
        pytest.param(signal.SIGINT, 1, 10, marks=slow),
        pytest.param(signal.SIGTERM, 1, STEPS - 1, marks=slow),
    ],
)
def test_a_signal_to_one_stops_both(tiny_base, data_dir, tmp_path, request, number, process, at):
    out, fault = tmp_path / "run", {"at": at, "signal": number}
    codes, said = two(tiny_base, data_dir, out, {process: fault})
    assert codes == [128 + number] * 2, said
    assert all("saved; go on with the same settings and --resume" in text for text in said)
    saved = sorted(int(p.name) for p in (out / run_folder.STATES / GROUP).iterdir() if p.is_dir())
    assert saved[-1] >= (at if isinstance(at, int) else 1)
    if at == "group":
        assert saved == [1]
        return
    codes, said = two(tiny_base, data_dir, out, {}, "--resume")
    assert codes == [0, 0], said
    leaves_equal(trained_trees(out), request.getfixturevalue("whole"))


MESSAGE = {
    "user": "error: sst.csv:3: the label is no number; mend it",
    "disk": "No space left on device",
    "bug": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize(
    ("process", "at", "raised"),
    [
        pytest.param(0, "data", "user", id="the first refuses the data"),
        pytest.param(1, "data", "user", marks=slow),
        pytest.param(0, 10, "disk", marks=slow, id="the log"),
        pytest.param(0, "save", "disk", marks=slow, id="a checkpoint"),
        pytest.param(1, "end", "disk", marks=slow, id="the model"),
        pytest.param(0, "result", "disk", marks=slow, id="the result"),
        pytest.param(1, 10, "bug", marks=slow, id="a bug"),
    ],
)
def test_what_one_raises_ends_both(tiny_base, data_dir, tmp_path, process, at, raised):
    fault = {"at": at, "raised": raised}
    codes, said = two(tiny_base, data_dir, tmp_path / "run", {process: fault})
    assert codes == [1 if raised == "bug" else 2] * 2, said
    assert all(MESSAGE[raised] in text for text in said), said
    assert "Traceback" not in said[1 - process] and "Gloo" not in "".join(said)


@pytest.mark.parametrize(
    ("process", "at", "times"),
    [
        pytest.param(1, "data", 1, marks=slow, id="before training"),
        pytest.param(0, "end", 1, marks=slow, id="after training"),
        pytest.param(1, 10, 2, marks=slow, id="the second signal"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_nothing_can_be_saved_a_signal_ends_both(
    tiny_base, data_dir, tmp_path, number, process, at, times
):
    fault = {"at": at, "signal": number, "times": times}
    codes, said = two(tiny_base, data_dir, tmp_path / "run", {process: fault})
    assert codes == [128 + number] * 2, said
