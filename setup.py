"""Build the compiled ops: python setup.py build_ext --inplace, or pip install --no-build-isolation .

The CPU part always; the CUDA part when nvcc is found, or with FORCE_CUDA=1 (never with FORCE_CUDA=0), for the GPUs in
TORCH_CUDA_ARCH_LIST (unset: those of build.CUDA_ARCHITECTURES). No GPU or driver is needed to build or to import it.
"""
import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common.kernels import build  # noqa: E402

build.set_cuda_home()
with build.quietly():
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

forced = os.environ.get("FORCE_CUDA")
cuda = forced == "1" or (CUDA_HOME is not None and forced != "0")
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.CUDA_ARCHITECTURES)
flags = {"cxx": build.cpu_flags(), "nvcc": build.CUDA_FLAGS}
extension = (CUDAExtension if cuda else CppExtension)(
    build.NAME, build.sources(cuda), extra_compile_args=flags, extra_link_args=build.THREADS)
setup(name="lottery-csrc", version="1", py_modules=[], packages=[], ext_modules=[extension],
      cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)})
