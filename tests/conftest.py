"""What holds for every run of pytest here."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported: on a busy machine
    os.environ.setdefault(name, "1")  # two OpenMP threads are slower than one
os.environ.pop(
    "PYTHONWARNINGS", None
)  # it would make errors of what the libraries of a kernel warn


def pytest_collectstart(collector):
    """A notebook: what a first run prints to stderr (a font cache is being built) fails no cell."""
    if hasattr(collector, "skip_compare"):  # nbval's
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    """The notebooks come last: they take longest."""
    items.sort(key=lambda item: item.path.suffix == ".ipynb")
