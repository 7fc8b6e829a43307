"""Several scripts one after the other in one group: python one_rank.py '[["prune", "--data", "real"], ...]'

Under torchrun or without: in a small test, starting Python is what costs most. Every rank prints a line of JSON to
stderr for the start and for each script: seconds, of the clock and of its CPU and, with --measure, messages.
"""
import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from common import cli, ranks


class CountingStore(torch.distributed.Store):
    """A rendezvous store that counts what passes."""

    def __init__(self, store, counts):
        super().__init__()
        self.store, self.counts = store, counts

    def count(self, *parts):
        self.counts["store calls"] += 1
        self.counts["store bytes"] += sum(map(len, parts))

    def set(self, key, value):
        self.count(key, value)
        return self.store.set(key, value)

    def get(self, key):
        value = self.store.get(key)
        self.count(key, value)
        return value

    def add(self, key, n):
        self.count(key, bytes(8))
        return self.store.add(key, n)

    def wait(self, keys, *timeout):
        self.count(*keys)
        return self.store.wait(keys, *timeout)

    def check(self, keys):
        self.count(*keys)
        return self.store.check(keys)

    def multi_get(self, keys):
        return [self.get(key) for key in keys]

    def multi_set(self, keys, values):
        for key, value in zip(keys, values):
            self.set(key, value)

    def has_extended_api(self):
        return True


def count_messages(counts):
    """Count every all_reduce and every call of the store, from the first one on."""
    rendezvous, all_reduce, kept = torch.distributed.rendezvous, torch.distributed.all_reduce, []

    def counting_rendezvous(url):
        store, rank, size = next(rendezvous(url))
        counting = CountingStore(store, counts)
        kept.append(counting)  # C++ alone would lose its Python half
        yield counting, rank, size

    def counting_all_reduce(tensor, **options):
        counts["reductions"] += 1
        counts["reduced bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, **options)

    torch.distributed.rendezvous, torch.distributed.all_reduce = counting_rendezvous, counting_all_reduce


def main(commands, counts, stderr=sys.stderr):
    for place, (script, *arguments) in enumerate([["start"], *commands]):
        sys.argv, began, used = [script, *arguments], time.perf_counter(), time.process_time()
        if arguments:
            importlib.import_module(script).main()
        line = {"name": script, "place": place, "rank": ranks.current().rank,
                "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used, **counts}
        print(json.dumps(line) + "\n", end="", file=stderr)
        counts.clear()


if __name__ == "__main__":
    counts = Counter()
    if sys.argv[1] == "--measure":
        count_messages(counts)
    commands = json.loads(sys.argv[-1])
    cli.run(lambda: main(commands, counts))
