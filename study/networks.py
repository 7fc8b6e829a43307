"""Do the corners of the map look alike in other networks? Batch norm instead of instance norm, and other widths.

    python study/networks.py --scale cpu

Dense, IMP and synthetic masks of the preset and of the hot search. Each network adds its rows to the table as soon as
it is measured.
"""
import runs


def cells(study):
    families = "imp", runs.synthetic(study)
    return [("dense", "preset"), *((family, search) for search in ("preset", "hot") for family in families)]


def main():
    study = runs.study(__doc__)
    rows = []
    for network in study.scale.networks:
        other = runs.with_network(study, network)
        for cell in cells(other)[1:]:
            runs.find_masks(other, *cell)
        rows += [row | {"network": network} for row in runs.lines(other, cells(other), study.scale.rounds[:1])]
        runs.write(study, "networks", rows)


if __name__ == "__main__":
    main()
