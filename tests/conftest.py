"""One thread for all tests: their models are tiny, and several threads on a busy machine wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
