"""Two processes against one, a thread each; and what collection and start-up cost with more of them, by counting.

    python bench/bench_ranks.py                  seconds: four seeds, a landscape, exact Hessian entries
    python bench/bench_ranks.py --messages       calls and bytes of each rank at 1, 2, 4 and 8 ranks

The seconds are those of the whole command, of its work alone, without the start of Python and torchrun (main() of the
scripts), and of the CPU in the work of the busiest rank, which other work on the machine disturbs least. More ranks
than cores make seconds worthless, but not counts: calls and bytes of the rendezvous store and of all_reduce, for the
start and for each script, of the rank with the most.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

DRIVER = str(Path(__file__).resolve().parent.parent / "tests" / "one_rank.py")
DATA = ["--dataset", "digits", "--data", "real"]
TIMED = {
    "seeds": ["prune", *DATA, "--width", "32", "--rounds", "4", "--epochs", "24", "--seeds", "0", "1", "2", "3"],
    "landscape": ["landscape", "--dataset", "digits", "--width", "32", "--grid", "25", "--epochs", "1",
                  "--endpoints", "../narrow"],
    "hessian": ["hessian", "--dataset", "digits", "--width", "128", "--batch", "192", "--epochs", "1",
                "--endpoints", "../wide"],
}
COUNTED = [
    ["prune", *DATA, "--width", "8", "--train-images", "64", "--epochs", "1", "--rounds", "10", "--seeds", *"01234567"],
    ["stability", "--dataset", "digits", "--width", "8", "--epochs", "5", "--orders", "8", "--eval-images", "9"],
    ["landscape", "--dataset", "digits", "--width", "8", "--epochs", "5", "--eval-images", "9", "--grid", "25"],
    ["hessian", "--dataset", "digits", "--width", "8", "--epochs", "5", "--batch", "16"],
    ["distill", "--dataset", "digits", "--ipc", "1", "--method", "dm", "--width", "8", "--outer", "20",
     "--repeats", "0"],
]


def launch(commands, ranks, folder, *flags):
    """(seconds, lines of one_rank.py) of a group of processes; one without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *torchrun, DRIVER, *flags, json.dumps(commands)], cwd=folder, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began, [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def time_two_against_one(folder, parts, device):
    first = [*TIMED["landscape"], "--grid", "9", "--eval-images", "2"], [*TIMED["hessian"], "--batch", "1"]
    launch([[*command, "--device", device] for command in first], 0, folder / "prepare")  # trains the end points
    print(f"{'':<9} {'whole command':^27}   {'work alone':^27}   {'CPU of the busiest rank':^27}")
    for name in parts:
        runs = []
        for ranks in (0, 2):
            whole, lines = launch([[*TIMED[name], "--device", device]], ranks, folder / f"{name} {ranks}")
            runs.append((whole, *(max(line[key] for line in lines) for key in ("seconds", "cpu_seconds"))))
        cells = (f"{one:7.1f} s {two:7.1f} s {one / two:5.2f} x" for one, two in zip(*runs))
        print(f"{name:<9} {'   '.join(cells)}", flush=True)


def count_messages(folder):
    print(f"{'':<10} ranks   store calls    bytes   all_reduces          bytes")
    for ranks in (1, 2, 4, 8):
        _, lines = launch(COUNTED, ranks, folder / str(ranks), "--measure")
        scripts = defaultdict(list)
        for line in lines:
            scripts[line["name"], line["place"]].append(line)
        for (name, _), group in scripts.items():
            most = [max(line.get(key, 0) for line in group)
                    for key in ("store calls", "store bytes", "reductions", "reduced bytes")]
            print("{:<10} {:>5} {:>13,} {:>8,} {:>13,} {:>14,}".format(name, ranks, *most), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(TIMED), help=f"of {', '.join(TIMED)} (all)")
    parser.add_argument("--messages", action="store_true", help="count, instead of timing")
    parser.add_argument("--device", default="cpu", help="cuda: a GPU each for two processes (cpu)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count_messages(folder) if args.messages else time_two_against_one(folder, args.parts, args.device)
