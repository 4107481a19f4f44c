"""One thread per test process: two pytest workers then use two cores, and sums have
the same order everywhere."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
SHARED = Path(os.environ.get("MINILM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture
def shared():
    """The folder of real files; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the real files are not here ({SHARED}; set MINILM_SHARED)")
    return SHARED
