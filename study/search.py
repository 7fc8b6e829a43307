"""The map of stability, along the axis of the search: how hot and how long it trains, the endpoints all alike.

    python study/search.py --scale cpu

Each search adds its rows to the table as soon as it is measured.
"""
import runs


def main():
    study = runs.study(__doc__)
    cells = [("dense", "preset")]
    for search in study.scale.searches:
        for family in runs.families(study, "imp", "synthetic", "published"):
            runs.find_masks(study, family, search)
            cells.append((family, search))
        runs.write(study, "search", runs.lines(study, cells))


if __name__ == "__main__":
    main()
