"""Claim (a): synthetic masks match IMP's accuracy, from many times fewer images shown.

    python study/accuracy.py --scale cpu

Accuracy on the test set after training on real data, of masks of all families at the same sparsity; IMP and the dense
network beside the controls.
"""
import runs

CELLS = [(family, "preset") for family in ("dense", *runs.FAMILIES)]


def main():
    study = runs.study(__doc__)
    for family in runs.FAMILIES:
        runs.find_masks(study, family)
    runs.write(study, "accuracy", runs.lines(study, CELLS))


if __name__ == "__main__":
    main()
