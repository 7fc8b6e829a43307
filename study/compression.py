"""Claim (f), Fig. 6: the fewer images, the more stable and the less accurate the masks.

    python study/compression.py --scale cpu
"""
import runs


def main():
    study = runs.study(__doc__)
    sets = [f"{kind}{'' if ipc == 10 else ipc}" for kind in ("synthetic", "published") for ipc in study.scale.ipcs]
    families = runs.families(study, "imp", *sets, "random")
    for family in families:
        runs.find_masks(study, family)
    runs.write(study, "compression", runs.lines(study, [(family, "preset") for family in families]))


if __name__ == "__main__":
    main()
