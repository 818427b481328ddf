"""Several labels per text: train, choose each label's threshold on dev, count missed labels.

Takes two minutes on two cores. Lines that begin with `# %%` divide the script into cells for
Jupyter (by Jupytext), VS Code and PyCharm.
"""

import csv
import os
import random
import shlex

import numpy as np

import jaxlora
from jaxlora.__main__ import main

BASE = os.environ.get("BASE", "minilm")
STEPS = os.environ.get("STEPS", "150")
SAYS = {
    "billing": ("I was charged twice", "the invoice is wrong", "please refund the fee"),
    "bug": ("the app crashes at start", "an error appears on save", "the button does nothing"),
    "login": ("I cannot sign in", "my password is not accepted", "the reset mail never came"),
    "shipping": ("the parcel is late", "it went to the old address", "tracking shows no progress"),
}


# %% A table whose label column holds any number of names, separated by `|`
def write_table(path, rows, seed):
    """Write messages about none, one or two of the topics; shipping is rare."""
    rng = random.Random(seed)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["message", "tags"])
        for number in range(rows):
            names = rng.sample(["billing", "bug", "login"], rng.choice((0, 1, 1, 2)))
            names += ["shipping"] * (rng.random() < 0.15)
            said = [rng.choice(SAYS[name]) for name in names] or ["thank you for your help"]
            table.writerow([f"Ticket {number}: {', and '.join(said)}.", "|".join(sorted(names))])


write_table("messages.csv", rows=300, seed=0)
write_table("later.csv", rows=100, seed=1)

# %% Train; the multilabel task is inferred from the data
command = f"train messages.csv --text=message --label=tags --base={BASE} --max-steps={STEPS}"
if code := main(shlex.split(command + " --out=runs/messages")):
    raise SystemExit(code)

# %% Predict the names above their thresholds, which were chosen on the held-out dev set
predictor = jaxlora.load("runs/messages")
task = predictor.tasks["messages"]
print({name: round(cut, 2) for name, cut in zip(task.classes, task.thresholds, strict=True)})
(answer,) = predictor([("messages", "An error appears on save, and I was charged twice.")])
print(f"{answer.label} of {answer.probabilities}")

# %% Which labels are missed on new rows?
with open("later.csv", newline="") as file:
    rows = list(csv.DictReader(file))
found = predictor.predict("messages", [row["message"] for row in rows])
there = np.array([[name in row["tags"].split("|") for name in task.classes] for row in rows])
for name, right, all_there in zip(task.classes, (found * there).sum(0), there.sum(0), strict=True):
    print(f"{name}: {right:.0f} of {all_there} found")
