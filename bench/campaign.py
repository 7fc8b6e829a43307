"""A campaign against faults, run once by hand; tests/test_campaign.py runs its last part.

    python bench/campaign.py kill --count 50       kill -9 at random moments over the five scripts
    python bench/campaign.py kill --ranks 2        the same under torchrun: of one rank, or of the whole group
    python bench/campaign.py kill --signal TERM --only prune --count 30    SIGTERM (or INT, or KILL) within rounds
    python bench/campaign.py disk --count 10       a file system that is full at random moments (needs to mount a tmpfs)
    python bench/campaign.py input                 malformed files and flags, one after the other in one process

Each prints what it tried and what went wrong; exit code 1 when anything did.
"""
import argparse
import contextlib
import copy
import functools
import importlib
import io
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import cli, files  # noqa: E402

MASK = ["--mask", "masks/r3.pt", "--epochs", "20"]
ENDPOINTS = ["--endpoints", "runs", "--out", "runs"]
PRUNE = ["prune.py", "--dataset", "digits", "--data", "real", "--width", "8", "--epochs", "30", "--eval-epochs", "10",
         "--train-images", "400", "--rounds", "5", "--evaluate", "--seeds", "0", "1", "--out"]
COMMANDS = {  # with what they write that must be the same bytes whatever happened before
    "prune": (PRUNE + ["runs"], "seed*/r*.pt"),
    "stability": (["stability.py", *MASK, "--out", "runs"], "masks/*"),
    "landscape": (["landscape.py", *MASK, "--grid", "31", "--orders", "3", *ENDPOINTS], "*.npz"),
    "hessian": (["hessian.py", *MASK, "--batch", "100", "--batches", "3", *ENDPOINTS], "masks/*"),
    "distill": (["distill.py", "--dataset", "digits", "--ipc", "2", "--outer", "80", "--repeats", "0",
                 "--out", "runs"], "data.pt"),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000", "--nproc-per-node"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

#############################################
#             Kills and full disks          #
#############################################


def start(name, folder, ranks=1):
    """The command `name` as a process in `folder`, or as a torchrun of several."""
    script, *flags = COMMANDS[name][0]
    launch = [*TORCHRUN, str(ranks)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, str(ROOT / script), *flags], cwd=folder, env=ENVIRONMENT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ask_to_stop(process, number):
    """Send SIGTERM or SIGINT; a complaint unless the process ends in its own words, with the signal's exit code."""
    process.send_signal(number)
    output, errors = process.communicate()
    quiet = process.returncode == -number and ("written:" in output or not errors.strip())  # it was done, or not begun
    if quiet or process.returncode in (0, 128 + number) and "Traceback" not in errors:
        return ""
    return f"exit code {process.returncode}: {errors[-200:]}"


def strike(process, draw):
    """kill -9: a process, or of a torchrun one rank, after which it goes on, or every other time all of it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    family = [int(child) for child in children]
    if family and draw.random() < .5:
        os.kill(draw.choice(family), signal.SIGKILL)
        return
    for pid in process.pid, *family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def prepare(folder):
    """Make masks/r3.pt in `folder`, which the commands read."""
    command = [sys.executable, str(ROOT / PRUNE[0]), *PRUNE[1:-7], "--rounds", "3", "--out", "masks"]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)


def undisturbed(name, workshop, ranks=1):
    """({file: bytes} of an undisturbed run, its seconds)."""
    folder = fresh(workshop, f"{name}_undisturbed")
    began = time.monotonic()
    process = start(name, folder, ranks)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return contents(name, folder), time.monotonic() - began


def fresh(workshop, name):
    folder = workshop / name
    folder.mkdir()
    shutil.copytree(workshop / "masks", folder / "masks")
    return folder


def contents(name, folder):
    paths = sorted((folder / "runs").glob(COMMANDS[name][1]))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix != ".png"}


def stamps(folder):
    """{finished round: when it was written}; a round is written once when found and once more when evaluated."""
    rounds = [path for path in folder.glob("runs/seed*/r*.pt") if path.stem[1:].isdigit()]  # not those in training
    return {path: path.stat().st_mtime_ns for path in rounds if "test_accuracy" in files.load(path)["results"]}


def kill(name, workshop, count, ranks=1, number=signal.SIGKILL, seed=0):
    """End the command `count` times at random moments, going on each time; a list of what went wrong."""
    expected, seconds = undisturbed(name, workshop, ranks)
    folder = fresh(workshop, f"{name}_killed")
    draw = random.Random(f"{name} {seed}")
    process, kills, wrong = None, 0, []
    while kills < count:
        if process is None or process.poll() is not None:
            before, process = stamps(folder), start(name, folder, ranks)
        try:
            process.communicate(timeout=draw.uniform(.3 * seconds, seconds))
        except subprocess.TimeoutExpired:
            kills += 1
            if number == signal.SIGKILL:
                strike(process, draw)
            else:
                complaint = ask_to_stop(process, number)
                if complaint:
                    wrong.append(f"{name}, signal {kills}: {complaint}")
            now = stamps(folder)
            lost = [str(path.relative_to(folder)) for path in before if now.get(path) != before[path]]
            if lost:
                wrong.append(f"{name}, kill {kills}: {', '.join(lost)} written again")
            before = now
        else:  # it was faster than the kill: from the beginning again
            if contents(name, folder) != expected:
                wrong.append(f"{name}, after kill {kills}: not the files of an undisturbed run")
            shutil.rmtree(folder / "runs")
    if process.poll() is not None:
        process = start(name, folder, ranks)
    _, errors = process.communicate()
    if process.returncode or contents(name, folder) != expected:
        wrong.append(f"{name}: not the files of an undisturbed run. {errors[-300:]}")
    print(f"kill {name:<10} {kills} kills in a command of {seconds:.1f} s on {ranks} rank{'s' * (ranks > 1)}: "
          f"{'; '.join(wrong) or 'all as undisturbed'}", flush=True)
    return wrong


def disk(name, workshop, count, seed=0):
    """Run the command `count` times on file systems with room for a random part of its files."""
    expected, _ = undisturbed(name, workshop)
    needed = sum(f.stat().st_size for f in (workshop / f"{name}_undisturbed" / "runs").rglob("*") if f.is_file())
    draw, folder = random.Random(f"{name} {seed}"), fresh(workshop, f"{name}_disk")
    wrong = []
    for _ in range(count):
        size = max(int(draw.uniform(.05, .9) * needed), 4096)
        wrong += [f"{name}, room for {size} bytes{trouble}" for trouble in on_full_disk(name, folder, size, expected)]
    print(f"disk {name:<10} {count} times full: {'; '.join(wrong) or 'file named, then all as undisturbed'}")
    return wrong


def on_full_disk(name, folder, size, expected):
    """What goes wrong when the command has a file system of `size` bytes, and then a larger one."""
    runs, wrong = folder / "runs", []
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", runs], check=True)
    try:
        process = start(name, folder)
        _, errors = process.communicate()
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        if process.returncode != 2 or len(lines) != 1 or "cannot write" not in lines[0] or "Traceback" in errors:
            wrong.append(f": exit code {process.returncode}, {errors[-300:]}")
        subprocess.run(["mount", "-o", "remount,size=100m", runs], check=True)
        process = start(name, folder)
        process.communicate()
        if process.returncode or contents(name, folder) != expected:
            wrong.append(", then more: not the files of an undisturbed run")
    finally:
        subprocess.run(["umount", runs], check=True)
        runs.rmdir()
    return wrong


#############################################
#              Malformed input              #
#############################################


def attempt(script, flags, seconds=60):
    """What is wrong with how `script` refuses these flags, or None. It runs in this process, in the current folder."""
    before = set(Path().rglob("*"))
    code, errors = run_here(script, flags, seconds)
    written = sorted(set(Path().rglob("*")) - before)
    for path in written:
        remove(path)
    if Path("executed") in written:
        return "ran the code in the file"
    if code != 2 or len(errors) != 1:
        return f"exit code {code}, {len(errors)} error lines"
    return f"left {', '.join(map(str, written))}" if written else None


def run_here(script, flags, seconds):
    """(exit code, lines of errors) of a script that runs in this process; instead of a code, an exception's name."""
    out, err, arguments = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script}.py", *map(str, flags)]
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        sys.argv = arguments
    return code, [line for line in err.getvalue().splitlines() if line.startswith("error: ")]


def too_slow(*_):
    raise TimeoutError


def remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Code:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def broken_values():
    """Values that may stand where a tensor or a plain value belongs."""
    huge = torch.zeros(1).expand(10 ** 6, 10 ** 6)
    return [None, -1, 0, 1e30, float("nan"), "x", "", [], {}, b"\0", torch.zeros(0), torch.tensor([True]), huge]


def broken_tickets(good):
    """(name, ticket) with one thing wrong each."""
    for key in ("masks", "init", "config", "round", "format"):
        yield f"without {key}", {k: v for k, v in good.items() if k != key}
    for key in ("masks", "init", "config"):
        for value in broken_values():
            yield f"{key} = {describe(value)}", good | {key: value}
    first = next(iter(good["masks"]))
    for key in ("masks", "init"):
        for value in broken_values():
            yield f"{key}[{first}] = {describe(value)}", good | {key: good[key] | {first: value}}
        yield f"{key} without {first}", good | {key: {k: v for k, v in good[key].items() if k != first}}
        yield f"{key} with one more", good | {key: good[key] | {"other.weight": good[key][first]}}
    nan = {k: v.clone() for k, v in good["init"].items()}
    nan[first][0] = float("nan")
    yield "init with NaN", good | {"init": nan}
    yield "masks of floats", good | {"masks": {k: v.float() for k, v in good["masks"].items()}}
    yield from broken_configs(good)


def broken_configs(good):
    """(name, ticket) whose config lacks a value or has a wrong one."""
    for key in ("model", "dataset", "channels", "image_size", "num_classes"):
        yield f"config without {key}", good | {"config": {k: v for k, v in good["config"].items() if k != key}}
    for key, values in {"model": (None, 3, "vgg", "os:system", "nowhere:net"), "width": (-1, "x", 10 ** 6, 1.5),
                        "norm": ("x", 3), "dataset": ("nowhere", None, 5), "channels": (0, "x", 7),
                        "image_size": (0, -3, "x", 10 ** 6), "num_classes": (0, -1, "x", 10 ** 9),
                        "data": ("x", None), "seed": ("x", None), "eval_epochs": (0, -5, "x", None),
                        "lr": ("x", -1., float("nan")), "batch_size": (0, "x"), "augment": ("x",),
                        "cutmix": ("x",), "train_images": (-1, "x")}.items():
        for value in values:
            yield f"config {key} = {value!r}", good | {"config": good["config"] | {key: value}}


def describe(value):
    return f"tensor {list(value.shape)}" if torch.is_tensor(value) else repr(value)


def broken_bytes(content, draw, count):
    """(name, bytes): cut, changed, foreign and hostile files."""
    for name, value in ("empty", b""), ("text", b"hello\n"), ("zeros", bytes(10_000)), ("zip header", b"PK\x03\x04"):
        yield name, value
    for number in range(count):
        yield f"cut {number}", content[:draw.randrange(len(content))]
    for number in range(count):
        start = draw.randrange(len(content) // 2)
        yield f"a hole {number}", content[:start] + content[start + 100 + draw.randrange(1000):]


def broken_sets():
    """(name, value) of distilled sets with something wrong."""
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(10).repeat_interleave(2)
    many, large = (torch.zeros(1, dtype=torch.uint8).expand(n, 1, s, s) for n, s in ((10 ** 9, 8), (20, 10 ** 5)))
    for name, value in {
        "one class too many": [images, labels + 1], "negative labels": [images, labels - 3], "no labels": [images],
        "labels of floats": [images, labels + .5], "NaN": [images * float("nan"), labels],
        "too few labels": [images, labels[:5]], "too large": [torch.rand(20, 1, 9, 9), labels],
        "three channels": [torch.rand(20, 3, 8, 8), labels], "flat": [images.flatten(1), labels],
        "empty": [images[:0], labels[:0]], "huge labels": [images, labels + 10 ** 12], "large": [large, labels],
        "many": [many, torch.zeros(1, dtype=torch.long).expand(10 ** 9)],
        "KIP of strings": ["a", "b"], "DSA of nothing": {"data": []}, "DSA of a number": {"data": 3},
        "DSA of one": {"data": [[images]]}, "complex": [images + 1j, labels], "sparse": [images.to_sparse(), labels],
        "a number": 3, "nothing": None, "text": "x"}.items():
        yield name, value


def broken_datasets(folder):
    """(name, folder) of datasets with something wrong; written below `folder`."""
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
    cases = {"floats": (images / 2, labels), "three axes": (images[..., 0], labels),
             "fewer labels": (images, labels[:3]), "negative labels": (images, labels - 5),
             "labels of floats": (images, labels + .5), "empty": (images[:0], labels[:0]),
             "objects": (np.array([{}] * 20), labels), "labels of text": (images, labels.astype(str)),
             "not square": (np.zeros((20, 8, 9, 1), np.uint8), labels), "huge labels": (images, labels * 10 ** 12),
             "labels of two axes": (images, np.stack([labels, labels], 1)),
             "no pixels": (np.zeros((20, 0, 0, 1), np.uint8), labels)}
    for name, (bad_images, bad_labels) in cases.items():
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        for part in ("train", "test"):
            np.savez(place / f"{part}.npz", images=bad_images, labels=bad_labels)
        yield name, place
    place = folder / "claims"
    place.mkdir()
    for part in ("train", "test"):  # headers that promise a terabyte
        write_npz(place / f"{part}.npz", {"images": (10 ** 9, 32, 32, 1), "labels": (10 ** 9,)})
    yield "claims a terabyte", place
    for name, file in ("no classes", None), ("no images", "a/readme.txt"), ("text as image", "a/x.png"):
        place = folder / name.replace(" ", "_")
        for part in ("train", "val"):
            (place / part).mkdir(parents=True)
            if file:
                (place / part / file).parent.mkdir()
                (place / part / file).write_text("hello")
        yield name, place


def write_npz(path, shapes):
    """An npz whose arrays' headers promise `shapes` of bytes, and hold a hundred."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in shapes.items():
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(100))


def broken_flags():
    """(script, flags) that no command should take."""
    numbers = {"prune": "rounds rate ipc epochs eval-epochs lr momentum weight-decay batch-size cutmix width "
                        "train-images",
               "stability": "orders points from-epoch eval-images epochs",
               "landscape": "orders grid eval-images epochs",
               "hessian": "batch batches weights probes epochs",
               "distill": "ipc factor outer inner image-lr real-images synthetic-images network-images pretrain "
                          "repeats budget"}
    for script, flags in numbers.items():
        first = {"prune": [], "distill": ["--dataset", "digits"]}.get(script, ["--mask", "good.pt"])
        for flag in flags.split():
            for value in "-1", "x", "nan", "":
                yield script, [*first, f"--{flag}={value}"]
        yield script, [*first, "--no-such-flag"]
        yield script, [*first, "--device", "toaster"]
    for script in ("stability", "landscape", "hessian"):
        yield script, ["--mask", "missing.pt"]
        yield script, ["--mask", "."]
        yield script, ["--mask", "good.pt", "--seed", "x"]
        yield script, ["--mask", "good.pt", "--out", "good.pt"]
        yield script, ["--dataset", "nowhere"]
    yield "stability", ["--mask", "good.pt", "--orders", "1"]
    yield "stability", ["--summary", "missing"]
    yield "landscape", ["--plot", "good.pt"]
    yield "landscape", ["--mask", "good.pt", "--orders", "2"]
    yield "prune", ["--start", "good.pt", "--model", "resnet10", "--dataset", "digits", "--data", "real"]


def malformed_input(folder, count=6):
    """Every script against malformed files and flags in `folder`; (number of cases, what went wrong)."""
    number, wrong, home = 0, [], os.getcwd()
    os.chdir(folder)
    try:
        for what, script, flags in malformed_cases(count):
            number += 1
            trouble = attempt(script, flags)
            if trouble:
                wrong.append(f"{script} {' '.join(map(str, flags))} ({what}): {trouble}")
    finally:
        os.chdir(home)
    return number, wrong


def malformed_cases(count):
    """(what is wrong, script, its flags), one after the other, with the files they name in the current folder.

    `count` random cuts and as many random holes are tried.
    """
    good = files.load("masks/r3.pt")
    torch.save(good, "good.pt")
    yield from ticket_cases(good, count)
    flags = ["--dataset", "digits", "--ipc", "2", "--epochs", "1", "--distilled", "set.pt"]
    for name, value in [*broken_sets(), ("a pickle with code", Code())]:
        torch.save(value, "set.pt")
        yield name, "prune", flags
    for name, place in broken_datasets(Path("sets")):
        yield name, "prune", ["--dataset", place, "--data", "real", "--epochs", "1", "--rounds", "1"]
    for script, flags in broken_flags():
        yield "flags", script, flags


def ticket_cases(good, count):
    """(what is wrong with bad.pt, script, its flags)."""
    scripts = [(script, ["--mask", "bad.pt"]) for script in ("stability", "landscape", "hessian")]
    for number, (name, value) in enumerate(broken_tickets(good)):
        torch.save(copy.copy(value), "bad.pt")
        yield name, *scripts[number % 3]
    scripts.append(("prune", ["--start", "bad.pt", "--data", "real", "--epochs", "1"]))
    torch.save(Code(), "bad.pt")
    for script, flags in scripts:
        yield "a pickle with code", script, flags
    for number, (name, content) in enumerate(broken_bytes(Path("good.pt").read_bytes(), random.Random(0), count)):
        Path("bad.pt").write_bytes(content)
        yield name, *scripts[number % 4]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "disk", "input"))
    parser.add_argument("--count", type=int, default=50, help="kills or full disks in all (50)")
    parser.add_argument("--ranks", type=int, default=1, help="processes, under torchrun when several; for kill (1)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="for kill (KILL)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these scripts (all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        if args.what == "input":
            cases, wrong = malformed_input(folder)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
            print(f"{cases} malformed inputs, {len(wrong)} not refused as they should; peak memory {peak:.2f} GiB")
            print(*wrong, sep="\n")
        else:
            number = getattr(signal, f"SIG{args.signal}")
            test = functools.partial(kill, ranks=args.ranks, number=number) if args.what == "kill" else disk
            wrong = []
            for name in args.only:
                wrong += test(name, folder, math.ceil(args.count / len(args.only)))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
