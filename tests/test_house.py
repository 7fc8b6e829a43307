"""The plan of the house, read from the imports: rooms in one order, scripts apart, nothing else at the top."""
import ast
import graphlib

import common
from conftest import ROOT

SCRIPTS = ["prune", "stability", "landscape", "hessian", "distill"]
LADDER = ["errors", "interrupts", "bars", "ranks", "files", "curves", "streams", "networks", "masks", "kernels.build",
          "kernels.ops", "augment", "arrays", "pictures", "data", "graph", "distilled", "kernels.dense",
          "kernels.sparse", "kernels.crossover", "kernels.views", "kernels.points", "captured", "together", "training",
          "evaluation", "scores", "tangents", "spectrum", "symmetries", "matching", "planes", "tickets", "runs",
          "figures", "overlap", "endpoints", "cli"]
ROOMS = [f"common.{room}" for room in LADDER]


def dotted(file):
    """common/kernels/ops.py -> common.kernels.ops; of __init__.py, the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {dotted(file): file for file in (*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py"))}


def imports(file):
    """The project's modules that `file` imports, at its top or within a function; packages not counted."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            source = source_of(node, file)
            found.update([source, *(f"{source}.{alias.name}" for alias in node.names)])
    return {name for name in found if name in FILES and FILES[name].name != "__init__.py"}


def source_of(node, file):
    """The dotted name that stands between `from` and `import`, written out when it is relative."""
    if not node.level:
        return node.module
    package = file.relative_to(ROOT).parts[:-node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def test_every_file_has_its_place():
    rooms = {name for name, file in FILES.items() if name.startswith("common") and file.name != "__init__.py"}
    assert rooms == set(ROOMS)
    assert {name for name in FILES if "." not in name} == {"common", "setup", *SCRIPTS}


def test_there_is_no_circle():
    graphlib.TopologicalSorter({name: imports(file) for name, file in FILES.items()}).prepare()


def test_every_import_goes_to_an_earlier_room():
    wrong = [f"{name} imports {other}" for name in ROOMS for other in imports(FILES[name])
             if other not in ROOMS[:ROOMS.index(name)]]
    assert wrong == []


def test_scripts_and_packages_keep_to_themselves():
    wrong = [f"{name} imports {other}" for name in SCRIPTS for other in imports(FILES[name]) if other not in ROOMS]
    wrong += [f"{name} imports {other}" for name in ("common", "common.kernels") for other in imports(FILES[name])]
    assert wrong == []


def test_the_package_describes_this_order():
    rows = common.__doc__.split("those above it:\n\n")[1].splitlines()
    described = ", ".join(row.strip().split("  ")[0] for row in rows).split(", ")
    rooms = dict.fromkeys("kernels/" if room.startswith("kernels.") else room for room in LADDER)
    assert described == [*rooms, "embedded/"]


def test_no_line_is_longer_than_120_columns():
    files = [*ROOT.glob("*.py")]
    for folder in ("common", "study", "tests", "bench"):
        files += (ROOT / folder).rglob("*.py")
    for file in files:
        longest = max(map(len, file.read_text().splitlines()), default=0)
        assert longest <= 120, file
