"""Claim (e), Sec. 6: sparsity per layer is alike, and which weights go is independent.

    python study/overlap.py --scale cpu

Two masks of the same seed, so of the same initial weights: what they share against what independent masks of the same
densities would. The masks of untrained networks say how much of that is magnitude at initialisation, which the search
has not moved; the hot search, what moving further does.
"""
import sys

import runs

sys.path.insert(0, str(runs.ROOT))

from common.overlap import compare_rounds  # noqa: E402
from common.tickets import load_ticket  # noqa: E402

PAIRS = [(("imp", "preset"), ("synthetic", "preset")), (("imp", "preset"), ("random", "preset")),
         (("imp", "preset"), ("subset", "preset")), (("imp", "preset"), ("tiles", "preset")),
         (("imp", "preset"), ("untrained", "preset")), (("synthetic", "preset"), ("untrained", "preset")),
         (("imp", "hot"), ("untrained", "preset")), (("synthetic", "hot"), ("untrained", "preset")),
         (("imp", "long"), ("untrained", "preset")), (("synthetic", "long"), ("untrained", "preset")),
         (("imp", "preset"), ("imp", "hot")), (("synthetic", "preset"), ("synthetic", "hot")),
         (("imp", "preset"), ("imp", "long")), (("synthetic", "preset"), ("synthetic", "long"))]


def main():
    study = runs.study(__doc__)
    pairs = [(a, b) for a, b in PAIRS if {a[1], b[1]} <= set(study.scale.searches)]
    for cell in dict.fromkeys(cell for pair in pairs for cell in pair):
        runs.find_masks(study, *cell)
    rows = []
    for a, b in pairs:
        for seed in study.scale.seeds:
            rows += compared(study, a, b, seed)
    runs.write(study, "overlap", rows)


def compared(study, a, b, seed):
    """Rows, one a layer and measured round, of what the masks of two cells share: those of prune.py --compare."""
    pair = {"family": a[0], "search": a[1], "other_family": b[0], "other_search": b[1], "seed": seed}
    rows = []
    for number in study.scale.rounds:
        one, other = (load_ticket(runs.folder(study, *cell) / f"seed{seed}" / f"r{number}.pt") for cell in (a, b))
        for row in compare_rounds(one, other):
            shared = {key: runs.number(row[key]) for key in ("sparsity_a", "sparsity_b", "ratio", "z")}
            rows.append(pair | {"round": number, "layer": row["layer"]} | shared)
    return rows


if __name__ == "__main__":
    main()
