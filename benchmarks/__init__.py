"""The benchmarks: the speed of jaxlora compared with a peer and with the machine's limits.

`python -m benchmarks` runs all that a CPU can; each module runs alone, too.
"""
