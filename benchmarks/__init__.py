"""The bench suite: what jaxlora costs, beside a peer and beside the machine's limit.

`python -m benchmarks` runs all that a CPU can; each module runs alone, too.
"""
