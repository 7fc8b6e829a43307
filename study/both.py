"""The map of stability along both axes at once: masks of every search, endpoints trained hot.

    python study/both.py --scale cpu
"""
import runs


def main():
    study = runs.study(__doc__)
    families = runs.families(study, "imp", "synthetic", "published")
    cells = [(family, search) for search in study.scale.searches for family in families]
    for cell in cells:
        runs.find_masks(study, *cell)
    runs.write(study, "both", runs.lines(study, [("dense", "preset"), *cells], study.scale.rounds[:1], "hot"))


if __name__ == "__main__":
    main()
