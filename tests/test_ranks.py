"""Two processes under torchrun against one process, through the scripts; and a process that is killed."""
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import landscape
from common import cli, files
from common.errors import UserError
from conftest import ROOT
from samples import equal

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DATA = ["--dataset", "digits", "--data", "real", "--width", "8", "--train-images", "100", "--lr", ".1"]
SEARCH = [*DATA, "--epochs", "2", "--eval-epochs", "1", "--rounds", "2", "--seeds", "0", "1", "2", "--evaluate"]
MASK = ["--mask", "masks/seed0/r2.pt", "--epochs", "1", "--endpoints", "ends"]
COMMANDS = [
    ["prune", *SEARCH, "--out", "masks"],
    ["stability", "--mask", "masks/seed0", "--epochs", "2", "--points", "3", "--from-epoch", "1", "--out", "stability"],
    ["landscape", *MASK, "--orders", "3", "--grid", "9", "--eval-images", "50", "--out", "landscape"],
    ["hessian", *MASK, "--batch", "7", "--out", "exact"],
    ["hessian", *MASK, "--batch", "7", "--method", "estimate", "--probes", "4", "--weights", "9", "--out", "estimate"],
    ["distill", "--dataset", "digits", "--ipc", "2", "--method", "idm", "--outer", "2", "--inner", "2", "--epochs", "2",
     "--eval-width", "8", "--out", "distilled"],
]


def finish(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forget_half(path):
    """Make a finished survey an interrupted one."""
    surface = files.load(path)
    scores, done = landscape.unpack(surface)
    done[:, 1::2], scores[:, 1::2] = False, np.nan
    about = {key: value for key, value in surface.items() if key not in ("probes", "done")}
    files.save(path, landscape.pack(scores, done, about, len(surface["xs"][0])))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and what two leave behind, with what they print."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    driver = [str(ROOT / "tests" / "one_rank.py"), json.dumps(COMMANDS)]
    said = finish([sys.executable, *driver], one)
    (two / "landscape").mkdir()
    (two / "landscape" / "landscape.npz").write_bytes((one / "landscape" / "landscape.npz").read_bytes())
    forget_half(two / "landscape" / "landscape.npz")  # of one process, for two to go on with
    return one, two, said, finish([*TORCHRUN, *driver], two)


def assert_same_files(one, two, pattern):
    names = sorted(path.relative_to(one) for path in one.glob(pattern))
    assert names and names == sorted(path.relative_to(two) for path in two.glob(pattern))
    for name in names:
        assert equal(files.load(one / name), files.load(two / name)), name


def test_masks_of_all_seeds_are_the_same_bit_for_bit(folders):
    assert_same_files(*folders[:2], "masks/seed*/r*.pt")


def test_end_points_and_lines_are_the_same_bit_for_bit(folders):
    assert_same_files(*folders[:2], "stability/**/*.pt")
    assert_same_files(*folders[:2], "stability/**/*.json")
    assert_same_files(*folders[:2], "ends/**/*.pt")


def test_a_survey_begun_by_one_process_is_finished_by_two(folders):
    one, two = (landscape.read_surface(folder / "landscape" / "landscape.npz") for folder in folders[:2])
    assert two["done"].all()
    for key in ("probes", "losses", "accuracies"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5)


@pytest.mark.parametrize("method", ["exact", "estimate"])
def test_hessians_are_the_same_within_rounding(folders, method):
    one, two = ([files.load(path) for path in sorted(folder.glob(f"{method}/**/*.pt"))] for folder in folders[:2])
    for a, b in zip(one, two, strict=True):
        for scope in a["scopes"]:
            for name, (mean, *_) in a["scopes"][scope].items():
                assert b["scopes"][scope][name][0] == pytest.approx(mean, rel=1e-3, abs=1e-5), name
        for name, h in a.get("diagonal", {}).items():
            torch.testing.assert_close(b["diagonal"][name], h, rtol=1e-3, atol=1e-4)


def test_distilled_sets_are_the_same_bit_for_bit(folders):
    one, two = (files.load(folder / "distilled" / "checkpoint.pt") for folder in folders[:2])
    assert equal(*({key: saved[key] for key in ("images", "losses", "network")} for saved in (one, two)))
    assert equal(*(files.load(folder / "distilled" / "config.json")["accuracy"] for folder in folders[:2]))


def test_two_processes_print_what_one_prints_once(folders):
    *_, one, two = folders
    before = [re.sub(r", \d+ s\n", "\n", text.split("landscape")[0]).splitlines() for text in (one, two)]
    # A training says its lines where it is done: ahead of the others' tables when ranks share it out.
    tables = [[line for line in lines if ": epoch " not in line] for lines in before]
    assert tables[0] == tables[1] and sorted(before[0]) == sorted(before[1])
    assert two.count("written:") == one.count("written:")


def test_killed_rank_is_restarted_and_nothing_is_done_twice(folders, tmp_path):
    command = [*TORCHRUN, "--max-restarts", "3", str(ROOT / "prune.py"), *SEARCH, "--out", "masks"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = (tmp_path / "masks" / "seed1" / f"r{number}.pt" for number in (0, 1))
    while not second.exists():
        time.sleep(.01)
    written = first.stat().st_mtime_ns
    time.sleep(random.uniform(0, .3))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", f"-{signal.SIGKILL:d}", random.choice(children)], check=True)
    assert process.wait(300) == 0
    assert_same_files(folders[0], tmp_path, "masks/seed*/r*.pt")
    assert first.stat().st_mtime_ns == written


def test_a_mistake_is_said_once(tmp_path):
    command = [*TORCHRUN, str(ROOT / "prune.py"), "--rate", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("error: --rate 2: must lie") == 1 and not list(tmp_path.iterdir())


def test_ranks_without_a_gpu_of_their_own_are_refused(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert cli.choose_device() == torch.device("cuda") and chosen.pop() == rank
    assert cli.choose_device("cuda:0").index == 0 and chosen.pop() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="more ranks than GPUs.* --nproc-per-node=2, or --device cpu"):
        cli.choose_device()
    assert cli.choose_device("cpu").type == "cpu" and not chosen
