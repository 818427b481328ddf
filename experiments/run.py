"""Train and evaluate one variant: `python experiments/run.py` is `jaxlora train`."""

import sys

from jaxlora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
