"""One thread for all tests: their models are tiny, and several threads on a busy machine wait for each other."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
# Assertions of the helpers say as much as those of the tests.
pytest.register_assert_rewrite(
    *(f"{name}_helpers" for name in ("cli", "data", "hub", "losses", "model_card", "student", "trainer"))
)

from cli_helpers import things, undrawn_figures  # noqa: E402, F401
