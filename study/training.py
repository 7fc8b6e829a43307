"""The map of stability, along the axis of the endpoints' training: how hot and how long, the masks all the same.

    python study/training.py --scale cpu
"""
import runs


def main():
    study = runs.study(__doc__)
    families = runs.families(study, "imp", "synthetic", "published")
    for family in families:
        runs.find_masks(study, family)
    cells = [(family, "preset") for family in ("dense", *families)]
    rows = []
    for training in runs.TRAININGS:
        rows += [row | {"training": training} for row in runs.lines(study, cells, training=training)]
        runs.write(study, "training", rows)


if __name__ == "__main__":
    main()
