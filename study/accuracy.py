"""Claim (a): synthetic masks match IMP's accuracy, from many times fewer images shown.

    python study/accuracy.py --scale cpu

Accuracy on the test set after training on real data, of masks of all families at the same sparsity; IMP and the dense
network beside the controls.
"""
import runs


def cells(study):
    return [(family, "preset") for family in ("dense", *runs.families(study, *runs.FAMILIES))]


def main():
    study = runs.study(__doc__)
    for family, _ in cells(study)[1:]:
        runs.find_masks(study, family)
    runs.write(study, "accuracy", runs.lines(study, cells(study)))


if __name__ == "__main__":
    main()
