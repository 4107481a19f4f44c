"""bench_memory.py: what its table says of larger models, worked out by hand."""

from bench import row
from bench_memory import TASKS, WAYS, table


def test_the_table_holds_what_was_measured_and_multiplies_the_bytes_a_weight_needs():
    rows = []
    for i, way in enumerate(WAYS):
        rows += [row(f"{task}: {way}", 10 * i + j, "bytes") for j, task in enumerate(TASKS)]
    head, _, whole, adapter, answer = table(rows).splitlines()
    assert "1.8B, 7B, 13B" in head and "on each of 8" in head
    # 16 bytes a weight: 28.8, 112 and 208 GB; over eight processes 3.6, 14 and 26
    assert whole == (
        "| train every weight | 1.0 | 11.0 | 21.0 | 29, 112, 208 GB (16) | 4, 14, 26 GB (16 / N) |"
    )
    assert adapter.endswith("| 7, 28, 52 GB (4) | 1, 4, 6 GB (4 / N) |")
    # who answers holds 4 bytes a weight beside the share of 4 / 8
    assert answer.endswith("| 7, 28, 52 GB (4) | 8, 32, 58 GB (4 + 4 / N) |")
