"""Plants mistakes in the kernels' source, one at a time, and shows that the SIMT tests catch each. Run by hand.

    python bench/mutants.py              # all of them, about 25 s each, two at a time
    python bench/mutants.py aligned      # those with this text in their line

One line each: which build caught it (test_simt.py), and what it said first. Exit code 1 when one survives.
"""
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_simt import SEEDS, SIMT, compile_program, compile_race_detector, run  # noqa: E402

KERNELS = ROOT / "csrc" / "kernels"

# file: [(what stands there once, the mistake)]
MUTANTS = {
    "masked_sgd": [
        ("aligned<N>(p) && ", ""),
        ("aligned<N>(g) && ", ""),
        ("aligned<N>(m) && ", ""),
        (" && (!mask || aligned<N>(mask))", ""),
        ("const long long start = (long long)(", "const int start = ("),
        ("const long long left", "const int left"),
        ("done = n / N * N;", "done = n;"),
        ("i = done + threadIdx.x", "i = threadIdx.x"),
        ("<= blockIdx.x", "< blockIdx.x"),
        ("mask ? keep.v[j] != 0 : true", "true"),
        ("mask ? mask[i] != 0 : true", "true"),
        ("left < kSgdBlock ? int(left) : kSgdBlock", "kSgdBlock"),
        ("  step.lr = *lr;\n", ""),
    ],
    "combine": [
        ("size % 4 == 0 && ", ""),
        ("aligned<4>(points) && ", ""),
        ("aligned<4>(states) && ", ""),
        (" && (!keep || aligned<4>(keep))", ""),
        ("points += first * size;", "points += first * int(size);"),
        ("  __syncthreads();\n", ""),
        ("  if (chunk > total - first) chunk = total - first;\n", ""),
        ("for (long long i = 4 * thread;", "for (int i = 4 * thread;"),
        ("for (long long i = thread;", "for (int i = thread;"),
        ("x[m] = masked<N>(states + m * size + i, kept)", "x[m] = masked<N>(states + m * int(size) + i, kept)"),
        ("x[0] = masked<N>(states + m * size + i, kept)", "x[0] = masked<N>(states + m * int(size) + i, kept)"),
        ("kept.v[j] ? x.v[j] : 0.f", "x.v[j]"),
    ],
    "cross_entropy_top1": [
        ("label >= 0 && ", ""),
        (" && label < classes", ""),
        ("logits + (blockIdx.y", "logits + (unsigned)(blockIdx.y"),
        ("if (top == classes || better(v, best)) best", "if (better(v, best)) best"),
        (" || (equal && c < top)", ""),
        ("  __syncthreads();\n", ""),
        ("expf(float(row[c]) - best)", "expf(float(row[c]))"),
        ("warp; b < images", "0; b < images"),
    ],
    "norm_relu_pool": [
        ("size % N == 0 && aligned<N>(x)", "aligned<N>(x)"),
        ("size % N == 0 && aligned<N>(x)", "size % N == 0"),
        ("width % (2 * N) == 0 && aligned<N>(x) && aligned<N>(pooled)", "aligned<N>(x) && aligned<N>(pooled)"),
        ("&& aligned<N>(x) && aligned<N>(pooled)", "&& aligned<N>(pooled)"),
        ("&& aligned<N>(x) && aligned<N>(pooled)", "&& aligned<N>(x)"),
        ("width % (2 * N) == 0 && aligned<N>(x) && aligned<N>(dx)", "aligned<N>(x) && aligned<N>(dx)"),
        ("&& aligned<N>(x) && aligned<N>(dx)", "&& aligned<N>(dx)"),
        ("&& aligned<N>(dx) && aligned<N>(grad)", "&& aligned<N>(grad)"),
        ("&& aligned<N>(dx) && aligned<N>(grad)", "&& aligned<N>(dx)"),
        ("if (height % 2 || width % 2)", "if (width % 2)"),
        ("if (height % 2 || width % 2)", "if (height % 2)"),
        ("i / width >= height / 2 * 2 || ", ""),
        (" || i % width >= width / 2 * 2", ""),
        ("= v;\n    __syncthreads();", "= v;"),
        ("v += shared[w];\n    __syncthreads();", "v += shared[w];"),
        ("  x += plane * size;\n  pooled", "  x += int(plane) * size;\n  pooled"),
        ("  pooled += plane *", "  pooled += int(plane) *"),
        ("  x += plane * size;\n  dx", "  x += int(plane) * size;\n  dx"),
        ("  dx += plane *", "  dx += int(plane) *"),
        ("  grad += plane *", "  grad += int(plane) *"),
        ("  if (plane >= planes) return;\n  constexpr", "  constexpr"),
        ("  if (plane >= planes) return;  //", "  //"),
        ("0x7fffffff - kNormThreads * kPack<short>", "0x7fffffff"),
        ("/ A(size) + eps", "/ A(size)"),
        ("kPack<T>;\n  const int size = height * width, channel = int(plane % channels);\n  x += plane * size;\n"
         "  pooled",
         "kPack<T>;\n  const int size = height * width, channel = 0;\n  x += plane * size;\n  pooled"),
    ],
    "norm_relu_pool_last": [
        ("channels / groups % N == 0 && ", "channels % N == 0 && "),
        ("aligned<N>(x) && ", ""),
        ("aligned<N>(pooled) && ", ""),
        (" && aligned<N>(dx)", ""),
        ("inside = channel < channels;", "inside = true;"),
        ("step >= kLastLanes", "step > kLastLanes"),
        ("= v[j];\n  }\n  __syncthreads();", "= v[j];\n  }"),
        ("+ first + j];\n  }\n  __syncthreads();", "+ first + j];\n  }"),
        ("/ (width / 2) * 2 * width", "/ (width / 2) * width"),
        ("  x += lane.image * height", "  x += int(lane.image) * height"),
        ("const long long at_image = lane.image", "const int at_image = int(lane.image)"),
        ("lane.channel / of_group * images", "lane.channel / of_group"),
        (" + lane.channel % of_group", " + lane.channel"),
        ("row < height / 2 && ", ""),
        (" && column < width / 2", ""),
        ("size = lane.inside ? height * width : 0", "size = height * width"),
        ("lane.inside ? height : 0", "height"),
        (" / A(height * width) + eps", " / A(height * width)"),
        ("  if (!lane.inside) return;\n  Channel", "  Channel"),
        ("  if (!lane.inside) return;\n  if (lane.row", "  if (lane.row"),
        ("    if (lane.row == 0) {\n      means", "    {\n      means"),
    ],
    "dsa": [
        ("images + (long long)blockIdx.x", "images + int(blockIdx.x)"),
        ("results + (long long)blockIdx.x", "results + int(blockIdx.x)"),
        ("  __syncthreads();\n", ""),
        ("row < 0 || ", ""),
        ("row >= height || ", ""),
        ("column < 0 || ", ""),
        (" || column >= width", ""),
        ("int(floorf(x))", "int(x)"),
        ("int(floorf(y))", "int(y)"),
        ("left + 1, (1 - below)", "left, (1 - below)"),
        ("top + 1, left, below", "top, left, below"),
        ("(1 - by.contrast) * mean", "mean"),
        ("__shfl_xor_sync(~0u, sum, step)", "0"),
        ("* (1 - saturation) / float(channels)", "* (1 - saturation)"),
        (" + by.brightness", ""),
        ("t.a * column + t.b * row + t.c, -1.f", "t.a * column + t.b * row + t.c, 0.f"),
        ("t.d * column + t.e * row + t.f, -1.f", "t.d * column + t.e * row + t.f, 0.f"),
        ("-1.f), float(width)", "-1.f), float(width - 1)"),
        ("-1.f), float(height)", "-1.f), float(height - 1)"),
    ],
    "bias_relu": [
        ("% N == 0 && ", "% N >= 0 && "),
        ("aligned<N>(x) && ", ""),
        (" && aligned<N>(shortcut)", ""),
        (" &&\n                      (inner > 1 || aligned<N>(bias))", ""),
        ("for (I i = thread * N;", "for (int i = thread * N;"),
        ("for (I i = thread;", "for (int i = thread;"),
        ("i / inner % channels", "i / inner"),
    ],
    "scalar": [
        ("return z < A(0) ? A(0) : z;", "return z > A(0) ? z : A(0);"),
        (" || (v != v && best == best)", ""),
        ("v > best", "v >= best"),
        ("affine(x) > A(0) ? grad", "affine(x) < A(0) ? grad"),
        ("(1.f - s.dampening) * g", "g"),
        ("m = keep ? velocity : 0.f", "m = velocity"),
        ("keep ? p - s.lr * step : 0.f", "p - s.lr * step"),
    ],
}


def said(done):
    """The line in which a failing run says what is wrong."""
    lines = (done.stdout + done.stderr).splitlines()
    told = [line for line in lines if "FAIL" in line or "error:" in line or "ERROR" in line or "what():" in line]
    return told[0].strip()[:100] if told else f"exit code {done.returncode}"


def caught(folder, race_detector):
    """By which build, and what it said; None when the mistake in `folder` survives."""
    for build in ("sanitizers", "plain", "race"):
        program = compile_program("test_kernels", build, folder, race_detector, folder / "tests" / "simt")
        try:
            done = run(program, SEEDS[build])
        except subprocess.TimeoutExpired:
            return build, "does not end"
        if done.returncode:
            return build, said(done)
    return None


def try_one(name, before, after, race_detector):
    text = (KERNELS / f"{name}.cuh").read_text()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(KERNELS, folder / "csrc" / "kernels")
        shutil.copytree(SIMT, folder / "tests" / "simt")
        (folder / "csrc" / "kernels" / f"{name}.cuh").write_text(text.replace(before, after))
        result = caught(folder, race_detector)
    print(f"{'SURVIVES' if result is None else result[0]:10}  {name}: {before!r} -> {after!r}"
          f"{'' if result is None else '  ' + result[1]}", flush=True)
    return result is not None


def main(words):
    jobs = [(name, *pair) for name, pairs in MUTANTS.items() for pair in pairs]
    jobs = [job for job in jobs if not words or any(word in " ".join(job) for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        race_detector = compile_race_detector(Path(folder))
        results = list(pool.map(lambda job: try_one(*job, race_detector), jobs))
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
