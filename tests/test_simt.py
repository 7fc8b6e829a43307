"""The source of the CUDA kernels, executed on the CPU by tests/simt/: three builds, each with planted bugs to catch."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SIMT = Path(__file__).resolve().parent / "simt"
FLAGS = {
    "plain": ["-O1"],
    "sanitizers": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "race": ["-O1", "-fsanitize=thread"],
}
SEEDS = {"plain": 4, "sanitizers": 1, "race": 1}
WAITING = {"divergent_barrier", "barrier_after_exit", "shuffle_without_all", "shuffle_from_outside",
           "too_much_shared_memory"}
UNORDERED = {"no_barrier", "overwritten", "no_syncwarp", "uninitialised"}
CAUGHT_BY = {
    "plain": WAITING | UNORDERED,
    "sanitizers": {"beyond_global", "beyond_shared", "misaligned"},
    "race": WAITING | UNORDERED | {"blocks_race"},
}

here = shutil.which("g++") and os.uname().sysname == "Linux"
pytestmark = pytest.mark.skipif(not here, reason="needs g++ on Linux")


def compile_race_detector(folder):
    subprocess.run(["g++", "-std=c++20", "-O2", "-c", SIMT / "race.cpp", "-o", folder / "race.o"], check=True)
    return folder / "race.o"


def compile_program(program, build, folder, race_detector, sources=SIMT):
    """Build sources/<program>.cpp in one of the three ways, as folder/<program>_<build>."""
    thing = folder / f"{program}_{build}"
    command = ["g++", "-std=c++20", "-w", *FLAGS[build], "-c", sources / f"{program}.cpp", "-o", f"{thing}.o"]
    subprocess.run(command, check=True)
    link = {"plain": [], "race": [race_detector], "sanitizers": FLAGS["sanitizers"]}[build]
    subprocess.run(["g++", f"{thing}.o", *link, "-o", thing], check=True)
    return thing


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simt")
    race_detector = compile_race_detector(folder)
    jobs = [(program, build) for program in ("test_kernels", "planted") for build in FLAGS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: compile_program(*job, folder, race_detector), jobs))
    return folder


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("build", FLAGS)
def test_every_kernel_agrees_with_double_precision(programs, build):
    done = run(programs / f"test_kernels_{build}", SEEDS[build])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", FLAGS)
def test_each_build_catches_the_planted_bugs_of_its_kind(programs, build):
    missed = [bug for bug in sorted(CAUGHT_BY[build]) if run(programs / f"planted_{build}", bug, 1).returncode == 0]
    assert not missed


@pytest.mark.parametrize("build", FLAGS)
def test_mended_twins_pass(programs, build):
    for bug in sorted(UNORDERED):
        done = run(programs / f"planted_{build}", f"{bug}_mended", 1)
        assert done.returncode == 0, bug + done.stdout + done.stderr
