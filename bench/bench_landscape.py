"""Sixteen points of a plane through four networks: landscape.py's evaluation against the released code's loop.

    python bench/bench_landscape.py --images 1000

The released loop is that of bench_stability.py: a fresh network, a deep copy and a pass over the data in batches of 64
for each point, autograd on. The same points, the same images, in one run; the fastest of --repeats counts.
"""
import numpy as np
from bench_stability import compare, parse

if __name__ == "__main__":
    plane = np.random.default_rng(0).normal(size=(16, 3))
    points = np.column_stack([1 - plane.sum(1), plane]).tolist()
    compare(parse(__doc__), 4, points)
