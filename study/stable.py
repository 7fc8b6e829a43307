"""Claim (b): synthetic subnetworks are stable at initialisation, where the dense network and IMP's are not.

    python study/stable.py --scale cpu

The barriers between endpoints of two data orders; they are those of accuracy.py.
"""
import accuracy
import runs


def main():
    study = runs.study(__doc__)
    cells = accuracy.cells(study)
    for family, _ in cells[1:]:
        runs.find_masks(study, family)
    runs.write(study, "stable", runs.lines(study, cells))


if __name__ == "__main__":
    main()
