"""What nvcc alone can tell of the CUDA half: it compiles, no kernel spills, memory is moved 16 bytes at a time."""
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from common.kernels import build

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
LAUNCHERS = list((ROOT / "csrc" / "cuda").glob("*.cu"))
INSTANCES = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "bias_relu.cuh"
#include "combine.cuh"
#include "cross_entropy_top1.cuh"
#include "dsa.cuh"
#include "masked_sgd.cuh"
#include "norm_relu_pool.cuh"
#include "norm_relu_pool_last.cuh"
namespace lottery {
#define INSTANTIATE(T, A) \\
  template __global__ void norm_relu_pool_kernel<T, A, 32>(const T*, const A*, const A*, T*, A*, A*, long long, int, \\
                                                           int, int, A); \\
  template __global__ void norm_relu_pool_backward_kernel<T, A, 256>( \\
      const T*, const T*, const A*, const A*, const A*, const A*, T*, A*, A*, long long, int, int, int); \\
  template __global__ void norm_relu_pool_last_kernel<T, A, kPack<T>>(const T*, const A*, const A*, T*, A*, A*, \\
                                                                      long long, int, int, int, int, A); \\
  template __global__ void norm_relu_pool_last_backward_kernel<T, A, kPack<T>>( \\
      const T*, const T*, const A*, const A*, const A*, const A*, T*, A*, A*, int, int, int); \\
  template __global__ void bias_relu_kernel<T, A, unsigned>(T*, const T*, const T*, unsigned, unsigned, unsigned);
#define INSTANTIATE_FLOAT(T) \\
  INSTANTIATE(T, float) \\
  template __global__ void masked_sgd_kernel<T>(const __grid_constant__ SgdTensors<T>, SgdStep, const float*); \\
  template __global__ void cross_entropy_top1_kernel<T>(const T*, const long long*, long long, int, double*);
INSTANTIATE(double, double)
INSTANTIATE_FLOAT(float)
INSTANTIATE_FLOAT(__half)
INSTANTIATE_FLOAT(__nv_bfloat16)
template __global__ void dsa_kernel<3>(const float*, const DsaColour*, const DsaTransform*, float*, int, int);
template __global__ void dsa_kernel<4>(const float*, const DsaColour*, const DsaTransform*, float*, int, int);
template __global__ void combine_kernel<0>(float*, const float*, const float*, const unsigned char*, long long, int,
                                           int, int);
template __global__ void combine_kernel<2>(float*, const float*, const float*, const unsigned char*, long long, int,
                                           int, int);
}  // namespace lottery
"""
MEMORY_BOUND = ["masked_sgd_kernel", "combine_kernel", "norm_relu_pool_kernel", "norm_relu_pool_backward_kernel",
                "norm_relu_pool_last_kernel", "norm_relu_pool_last_backward_kernel",
                "bias_relu_kernel"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def nvcc(*arguments):
    return subprocess.run(["nvcc", "-std=c++17", "-O3", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    source = tmp_path_factory.mktemp("cuda") / "instances.cu"
    source.write_text(INSTANCES)
    return source


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_spills_or_uses_local_memory(instances, architecture):
    done = nvcc("-arch", architecture, "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings", "-I",
                KERNELS, "-cubin", instances, "-o", instances.with_suffix(f".{architecture}"))
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame", done.stderr)
    assert len(frames) > 15 and set(frames) == {"0"}


def cuobjdump(*arguments):
    """What the disassembler prints; skips where there is none."""
    triton = importlib.util.find_spec("triton")  # brings it along
    folders = triton.submodule_search_locations if triton else []
    search = os.pathsep.join([os.environ["PATH"], *(f"{folder}/backends/nvidia/bin" for folder in folders)])
    if not shutil.which("cuobjdump", path=search) or not shutil.which("nvdisasm", path=search):
        pytest.skip("needs cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    command = [shutil.which("cuobjdump", path=search), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": search}).stdout


def test_memory_bound_kernels_move_16_bytes_at_a_time(instances):
    binary = instances.with_suffix(".cubin")
    assert nvcc("-arch", "sm_80", "-I", KERNELS, "-cubin", instances, "-o", binary).returncode == 0
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", cuobjdump("-sass", binary), re.S))
    for kernel in MEMORY_BOUND:
        bodies = [body for name, body in functions.items() if kernel in name]
        assert bodies, kernel
        for body in bodies:
            assert "LDG.E.128" in body and "STG.E.128" in body, kernel
            assert "LDL" not in body and "STL" not in body, kernel


@pytest.fixture(scope="module")
def extension():
    """The extension that setup.py built: where there is an nvcc with its CUDA half, which loads without a GPU."""
    found = build.prebuilt()
    if found is None or os.environ.get("FORCE_CUDA") == "0" or torch.version.cuda is None:
        pytest.skip("needs python setup.py build_ext --inplace")
    assert found.cuda
    return found


def test_every_launcher_is_registered(extension):
    launchers = re.findall(r'm\.impl\("(\w+)"', "".join(file.read_text() for file in LAUNCHERS))
    assert len(launchers) == 8
    for name in launchers:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lottery::{name}", "CUDA"), name


def test_every_kernel_is_there_for_the_architectures_claimed(extension):
    """Machine code for sm_80 and sm_90, and PTX for those to come, of each file that launches."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST: built for others")
    assert len(re.findall(r"\.sm_90\.ptx", cuobjdump("-lptx", extension.__file__))) == len(LAUNCHERS)
    code = re.findall(r"arch = (sm_\d+)\n(.*?)(?=\narch =|\Z)", cuobjdump("-symbols", extension.__file__), re.S)
    kernels = re.findall(r"(\w+_kernel)\(", "".join(file.read_text() for file in KERNELS.glob("*.cuh")))
    assert len(kernels) == 9
    for architecture in ("sm_80", "sm_90"):
        symbols = "".join(text for name, text in code if name == architecture)
        for kernel in kernels:
            assert kernel in symbols, f"{kernel} for {architecture}"
