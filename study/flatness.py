"""Claim (c): the landscape of synthetic subnetworks is flatter.

    python study/flatness.py --scale cpu

The exact Hessian diagonal of the endpoint of one data order, over surviving and over all weights, and how much the
training loss rises at equal distances from it.
"""
import numpy as np
import runs

FAMILIES = "imp", "synthetic", "published", "subset", "random"
RADII = .5, 1., 2.  # landscape.py's


def main():
    study = runs.study(__doc__)
    families = runs.families(study, *FAMILIES)
    cells = [(family, "preset") for family in ("dense", *families)]
    for family in families:
        runs.find_masks(study, family)
    runs.write(study, "hessian", curvatures(study, cells))
    runs.write(study, "rise", rises(study, cells))


def curvatures(study, cells):
    """Rows of the Hessian diagonal, one a seed and scope."""
    out = study.work / "hessian"
    runs.call(study, "hessian.py", "--mask", *runs.tickets(study, cells), *runs.endpoint_flags(study),
              *study.scale.hessian.split(), "--endpoints", study.work / "endpoints", "--out", out)
    figures = "mean_abs", "max", "min", "trace", "top_eigenvalue"
    return [runs.about(row) | {"scope": row["scope"]} | {figure: runs.number(row[figure]) for figure in figures}
            for row in runs.read(out / "hessian.csv")]


def rises(study, cells):
    """Rows of the mean rise of the training loss on circles around the endpoint, one a seed."""
    rows = []
    for seed in study.scale.seeds:
        paths = [path for path in runs.tickets(study, cells) if path.parent.name == f"seed{seed}"]
        out = study.work / "landscape" / f"seed{seed}"
        runs.call(study, "landscape.py", "--mask", *paths, *runs.endpoint_flags(study),
                  *study.scale.landscape.split(), "--endpoints", study.work / "endpoints", "--out", out)
        with np.load(out / "landscape.npz") as surface:
            losses, count = surface["probes"][:, :, 0], surface["models"].shape[1]
        circles = losses[:, -8 * len(RADII) * count:].reshape(len(paths), count, len(RADII), 8)
        risen = circles.mean(3) - losses[:, :count, None]
        for path, rise in zip(paths, risen.mean(1)):
            row = {"mask": path, "sparsity": sparsity(path)}
            rows.append(runs.about(row) | {f"rise_{radius:g}": runs.number(r) for radius, r in zip(RADII, rise)})
    return rows


def sparsity(path):
    number = path.stem[1:]
    return next(row["sparsity"] for row in runs.read(path.parent / "results.csv") if row["round"] == number)


if __name__ == "__main__":
    main()
