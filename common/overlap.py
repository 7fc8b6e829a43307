"""What the masks of two runs share, and how their layers' sparsities compare (the paper, Sec. 6)."""
import math
from pathlib import Path

from . import files
from .errors import UserError
from .figures import draw_comparison
from .tickets import load_ticket, round_files


def overlap(a, b):
    """Surviving weights shared by two masks of one layer against independent masks of the same densities.

    Returns (n, survivors of a, of b, shared, expected, variance); the last two are the hypergeometric ones.
    """
    n, k, m = a.numel(), int(a.sum()), int(b.sum())
    variance = k * m * (n - k) * (n - m) / (n * n * max(n - 1, 1))
    return n, k, m, int((a & b).sum()), k * m / n, variance


def compare_rounds(one, other):
    """Rows, one a layer and one in all, of two tickets' sparsities and overlap. Raises UserError."""
    shapes = [{name: m.shape for name, m in ticket["masks"].items()} for ticket in (one, other)]
    if shapes[0] != shapes[1]:
        raise UserError("the two runs prune different networks or layers: "
                        f"{one['config']['model']}, {other['config']['model']}")
    counts = {name: overlap(one["masks"][name].cpu(), other["masks"][name].cpu()) for name in one["masks"]}
    counts["all"] = [sum(column) for column in zip(*counts.values())]
    rows = []
    for name, (n, k, m, shared, expected, variance) in counts.items():
        rows.append({"round": one["round"], "layer": name, "weights": n, "sparsity_a": 1 - k / n,
                     "sparsity_b": 1 - m / n, "shared": shared, "expected": round(expected, 2),
                     "ratio": shared / expected if expected else math.nan,
                     "z": (shared - expected) / math.sqrt(variance) if variance else 0.})
    return rows


def compare(folder_a, folder_b, out):
    """Sec. 6: overlap of two runs' masks in all rounds they share: compare.csv, compare.png, a table of the last."""
    folders = Path(folder_a), Path(folder_b)
    numbers = [{int(path.stem[1:]) for path in round_files(folder)} for folder in folders]
    shared = sorted((numbers[0] & numbers[1]) - {0})
    if not shared:
        raise UserError(f"{folder_a} and {folder_b} have no pruning round in common (r1.pt, r2.pt, ...)")
    rows = []
    for number in shared:
        one, other = (load_ticket(folder / f"r{number}.pt") for folder in folders)
        rows += compare_rounds(one, other)
    files.save_csv(out / "compare.csv", rows)
    last = [row for row in rows if row["round"] == shared[-1]]
    draw_comparison(rows, last, (folder_a, folder_b), out / "compare.png")
    print(f"round {shared[-1]}; A = {folder_a}, B = {folder_b}")
    print("layer                       weights sparsity A sparsity B    shared    expected  ratio        z")
    for row in last:
        print("{layer:<24} {weights:>10,} {sparsity_a:>10.2%} {sparsity_b:>10.2%} {shared:>9,} {expected:>11,.1f} "
              "{ratio:>6.3f} {z:>8.1f}".format(**row))
    print(f"written: {out / 'compare.csv'}, {out / 'compare.png'}")
