"""The benchmarks: the speed of jaxlora compared with peers and with the machine's limits.

`python -m benchmarks` runs all CPU benchmarks; each module can also be run alone.
"""
