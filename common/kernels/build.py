"""Finding or building csrc/: chosen once, said once.

load() takes a prebuilt extension (python setup.py build_ext --inplace, or pip install --no-build-isolation .), else
builds csrc/ on first use into torch's cache, else leaves everything to plain PyTorch. The environment variable
LOTTERY_OPS=compiled|fallback forces one or the other. Importing does nothing.
"""
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from ..errors import UserError

NAME = "lottery_csrc"
CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"
# -fno-trapping-math lets comparisons into vector loops; -Wpsabi warns of vectors passed in calls, which are inlined.
THREADS = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a plain loop without
CPU_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *THREADS]
CUDA_FLAGS = ["-O3"]

#############################################
#                  Choosing                 #
#############################################


@functools.cache
def load():
    """Choose between the compiled ops (True) and plain PyTorch (False), and say which on stderr, once.

    Raises UserError when LOTTERY_OPS=compiled and they cannot be had.
    """
    wanted = os.environ.get("LOTTERY_OPS", "")
    if wanted not in ("", "compiled", "fallback"):
        raise UserError(f"LOTTERY_OPS={wanted}: compiled or fallback")
    try:
        if wanted == "fallback":
            raise RuntimeError("LOTTERY_OPS=fallback")
        extension = prebuilt() or build()
    except Exception as error:  # no compiler, a failing one, an extension of another torch: all mean the fallback
        if wanted == "compiled":
            raise UserError(f"LOTTERY_OPS=compiled, but no extension: {reason_of(error)}") from error
        print(f"csrc: not compiled, PyTorch fallback: {reason_of(error)}", file=sys.stderr)
        return False
    print(f"csrc: {'cuda+cpu' if extension.cuda else 'cpu'} ({extension.instruction_set()})", file=sys.stderr)
    return True


def reason_of(error):
    """The one line of an exception's message that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line or "not found" in line), lines[0])[:200]


def has_kernels(device_type):
    """Whether the loaded extension has kernels for "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("lottery::masked_sgd_", device_type.upper())


#############################################
#             Finding, building             #
#############################################


def prebuilt():
    """The extension that setup.py built, here or installed, if it is of these sources and this torch; else None."""
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        return None
    if CSRC.is_dir() and f"lottery-sources:{sources_hash()}".encode() not in Path(spec.origin).read_bytes():
        print(f"csrc: {spec.origin} was built from other sources (python setup.py build_ext --inplace)",
              file=sys.stderr)
        return None
    try:
        return imported(spec)
    except ImportError as error:  # of another torch, or damaged
        print(f"csrc: {spec.origin} cannot be loaded ({reason_of(error)})", file=sys.stderr)
        return None


def imported(spec):
    """The module of an extension, which registers its ops when it is imported."""
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def sources(cuda):
    """Paths of the files to compile, from the folder above csrc/; the longest to compile comes first."""
    files = [CSRC / "bindings.cpp", *(CSRC / "cpu").rglob("*.cpp")]
    if cuda:
        files += (CSRC / "cuda").glob("*.cu")
    return [os.path.relpath(file, CSRC.parent) for file in sorted(files)]


def sources_hash():
    """A word that tells the sources in csrc/ and the flags from others."""
    digest = hashlib.sha256(repr((CPU_FLAGS, CUDA_FLAGS)).encode())
    for file in sorted(CSRC.rglob("*.*")):
        if file.suffix != ".md":
            digest.update(file.relative_to(CSRC).as_posix().encode() + file.read_bytes())
    return f"h{digest.hexdigest()[:12]}"


def cpu_flags():
    """The compiler's flags, among them what the extension is built from."""
    return [*CPU_FLAGS, f"-DLOTTERY_SOURCES={sources_hash()}"]


def build():
    """Build csrc/ into torch's cache of extensions and return the extension. RuntimeError when that fails.

    The folder is named after all that a build depends on: two checkouts, or two versions of torch, share none.
    """
    if not CSRC.is_dir():
        raise RuntimeError("no csrc/ beside common/, and no extension installed")
    set_cuda_home()
    with quietly():
        from torch.utils import cpp_extension  # reads CUDA_HOME when imported

    cuda = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    gpu = torch.cuda.get_device_capability() if cuda else None  # what it is built for
    made_of = repr((sources_hash(), torch.__version__, gpu, compiler_version())).encode()
    folder = cache_folder() / f"{NAME}-{hashlib.sha256(made_of).hexdigest()[:12]}"
    library = folder / f"{NAME}.so"
    with one_build_at_a_time(folder), quietly():
        if not library.exists():
            print(f"csrc: building in {folder}, once, about {'5 min' if cuda else '1 min'}", file=sys.stderr)
            cpp_extension.load(NAME, [str(CSRC.parent / file) for file in sources(cuda)],
                               extra_cflags=cpu_flags(), extra_ldflags=THREADS,
                               extra_cuda_cflags=CUDA_FLAGS, build_directory=str(folder), is_python_module=False)
    try:
        return imported(importlib.util.spec_from_file_location(NAME, library))
    except ImportError:  # left behind by a build that was killed: the next command builds again
        library.unlink()
        raise


def cache_folder():
    """Torch's cache of extensions."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def compiler_version():
    """What the C++ compiler says of itself, or "" where there is none."""
    try:
        return subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


@contextlib.contextmanager
def one_build_at_a_time(folder):
    """Wait for other processes building in `folder`. A lock of torch's that a killed one left behind is removed."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system, however the process ends
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def quietly():
    """Keep torch's advice on compilers to itself; what fails is raised."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def set_cuda_home():
    """Set CUDA_HOME to the toolkit of the nvcc on the PATH, which may be a wrapper in a folder of its own."""
    nvcc = shutil.which("nvcc")
    if nvcc and not os.environ.get("CUDA_HOME"):
        steps = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = next((line.split("=", 1)[1] for line in steps.splitlines() if line.startswith("#$ TOP=")), None)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top)
