"""What a number was measured on: every benchmark prints this line above its table."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import keep_freed_memory  # noqa: E402


def processor():
    """The processor's model name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def describe(same_malloc):
    """One line: processor, instruction set, threads, and which memory allocator PyTorch had."""
    malloc = "freed memory kept for both sides" if same_malloc else "glibc's malloc as it is"
    return (f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, {malloc}")
