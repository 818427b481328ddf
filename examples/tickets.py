"""From a table of support tickets to a bank that answers requests: train, evaluate, store, predict.

Takes two minutes on two cores. `tickets.py` is a script whose lines that begin with `# %%` start
cells in VS Code and PyCharm; `tickets.ipynb` is the same program as a notebook.
"""

import csv
import os
import random
import shlex

import jaxlora
from jaxlora.__main__ import main

BASE = os.environ.get("BASE", "minilm")
STEPS = os.environ.get("STEPS", "120")


def shell(command):
    """Run a command as it would be typed in a terminal."""
    print(f"\n$ {command}")
    if code := main(shlex.split(command)[1:]):
        raise SystemExit(code)


# %% A table: any CSV with a text column and a label column
SUBJECTS = {
    "billing": ("I was charged twice for {}", "the invoice for {} is wrong", "{} costs too much"),
    "delivery": ("where is my {}", "the parcel with my {} is late", "has {} been sent yet"),
    "damage": ("{} arrived broken", "there is a crack in my {}", "{} stopped working"),
    "account": ("cannot log in to order {}", "reset my password for {}", "delete my {} profile"),
}
THINGS = ("the lamp", "desk", "blue chair", "phone case", "kettle", "garden hose", "bike", "tent")
OPENINGS = ("", "hello, ", "please help: ", "urgent! ", "second try: ")


def write_table(path, rows, seed):
    """Write tickets; their order and wording depend only on the seed."""
    rng = random.Random(seed)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", "topic"])
        for _ in range(rows):
            topic = rng.choice(list(SUBJECTS))
            subject = rng.choice(SUBJECTS[topic]).format(rng.choice(THINGS))
            label = topic if rng.random() < 0.95 else rng.choice(list(SUBJECTS))  # mistakes
            table.writerow([rng.choice(OPENINGS) + subject, label])


write_table("tickets.csv", rows=300, seed=0)
write_table("later.csv", rows=100, seed=1)

# %% Train an adapter and a head; classes are inferred from the table, and a dev set is held out
shell(
    "jaxlora train tickets.csv --text=subject --label=topic "
    f"--base={BASE} --max-steps={STEPS} --out=runs/tickets"
)

# %% Evaluate it on new rows
shell("jaxlora evaluate runs/tickets --input=later.csv --page=tickets.html")

# %% Add it to a bank, which stores any number of tasks on one base
shell("jaxlora bank add bank --run=runs/tickets")
shell("jaxlora bank list bank")

# %% Predict
predictor = jaxlora.load("bank")
requests = [("tickets", "my tent has not arrived"), ("tickets", "I paid two times")]
for (_, text), answer in zip(requests, predictor(requests), strict=True):
    print(f"{text}: {answer.label} ({answer.probabilities[answer.label]:.2f})")
