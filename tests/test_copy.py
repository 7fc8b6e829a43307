"""One script and the folder common/ work anywhere, whatever lies around them, and under another name."""
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT
from test_house import LADDER, SCRIPTS

STRANGERS = {name for room in LADDER for name in room.split(".")} | {"common", "kernels", "splits", "lottery_csrc"}


def put_strangers(folder):
    """Modules of our names that nobody may import."""
    for name in STRANGERS:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('a stranger called {name} was imported')\n")


def run(arguments, folder, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          env=os.environ | environment)


def test_a_copy_works_among_strangers(tmp_path):
    copy, elsewhere = tmp_path / "x", tmp_path / "elsewhere"
    copy.mkdir()
    elsewhere.mkdir()
    put_strangers(copy)
    put_strangers(elsewhere)
    shutil.copy(ROOT / "prune.py", copy)
    shutil.copytree(ROOT / "common", copy / "common")
    command = [copy / "prune.py", *"--data distilled --ipc 10 --dataset digits --rounds 1 --epochs 1".split()]
    done = run(command, elsewhere, PYTHONPATH=str(elsewhere), LOTTERY_OPS="")
    assert done.returncode == 0, done.stderr
    assert "csrc: not compiled, PyTorch fallback" in done.stderr
    assert (elsewhere / "masks" / "r1.pt").exists()


def test_the_package_may_have_another_name(tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "lottery_common")
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        (tmp_path / f"{script}.py").write_text(re.sub(r"\b(from|import) common\b", r"\1 lottery_common", text))
    done = run(["-c", f"import {', '.join(SCRIPTS)}"], tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
