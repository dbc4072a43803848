"""Runs before torch is imported: on a busy machine two OpenMP threads are slower than one."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
