"""Claim (d), Fig. 7: IMP that starts from the synthetic mask of 83% finds better tickets than IMP at high sparsity.

    python study/start.py --scale cpu

Next to it IMP (k = 0) and IMP with rewinding to epoch 3, whose endpoints so start with three epochs of training. The
synthetic mask is that of the published set where there is one: its masks come nearest to IMP's.
"""
import runs


def main():
    study = runs.study(__doc__)
    scale = study.scale
    last = max(scale.high)
    first = min(8, scale.high[0] - 1)  # round 8 is 83% sparse
    runs.find_masks(study, "imp", last=last)
    synthetic = runs.synthetic(study)
    runs.find_masks(study, synthetic, last=max(first, *scale.rounds))
    runs.find_masks(study, "random", last=last)
    common = [*scale.prune.split(), "--data", "real", "--data-dir", study.data_dir, "--rounds", last]
    runs.call(study, "prune.py", *common, "--rewind", min(3, epochs(study)), "--seeds", *scale.seeds, "--out",
              runs.folder(study, "rewound"))
    for seed in scale.seeds:
        start = runs.folder(study, synthetic) / f"seed{seed}" / f"r{first}.pt"
        runs.call(study, "prune.py", *common, "--start", start, "--seed", seed, "--out",
                  runs.folder(study, "started") / f"seed{seed}")
    cells = [(family, "preset") for family in ("imp", "started", "rewound", "random")]
    runs.write(study, "start", runs.lines(study, cells, scale.high))


def epochs(study):
    """Of real training, as the masks say."""
    config = runs.folder(study, "imp") / f"seed{study.scale.seeds[0]}" / "config.json"
    return runs.json.loads(config.read_text())["eval_epochs"]


if __name__ == "__main__":
    main()
