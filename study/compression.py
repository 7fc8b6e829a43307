"""Claim (f), Fig. 6: the fewer images, the more stable and the less accurate the masks.

    python study/compression.py --scale cpu
"""
import runs


def main():
    study = runs.study(__doc__)
    families = ["imp", *("synthetic" if ipc == 10 else f"synthetic{ipc}" for ipc in study.scale.ipcs), "random"]
    for family in families:
        runs.find_masks(study, family)
    runs.write(study, "compression", runs.lines(study, [(family, "preset") for family in families]))


if __name__ == "__main__":
    main()
