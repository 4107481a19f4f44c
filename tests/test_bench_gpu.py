"""bench_gpu.py: its CPU path as it stands, so that the command is ready when a GPU is there."""

import json

import pytest
import torch

import bench_gpu
from bench_gpu import BENCHMARKS, CHECKS, Config, FixedStep, main, run_checks, tiny
from minilm import InputError
from minilm.generate import generate


def test_every_check_holds_between_the_cpu_and_itself_and_every_row_is_written(tmp_path):
    path = tmp_path / "bench_gpu.json"
    main(Config(device="cpu", out=str(path)))
    written = json.loads(path.read_text())
    assert list(written) == ["checks", *BENCHMARKS]
    checks = written["checks"]["rows"]
    assert len(checks) == 2 * len(CHECKS) and [c["what"] for c in checks if not c["ok"]] == []
    assert all(written[name]["rows"] for name in BENCHMARKS)
    rows = [r for name in BENCHMARKS for r in written[name]["rows"]]
    assert all(r["ok"] is None for r in rows)  # tiny shapes: no verdict


def test_a_check_that_fails_says_so_and_the_others_go_on(monkeypatch):
    def wrong(device, dtype):
        return bench_gpu.same(torch.ones(3), torch.tensor([1.0, 1.0, 2.0]), dtype)

    monkeypatch.setattr(bench_gpu, "CHECKS", {"wrong": wrong, "right": lambda device, dtype: "0"})
    rows = run_checks("cpu")
    assert [r["ok"] for r in rows] == [False, False, True, True]
    assert "differs by 0.5 of the largest value" in rows[0]["told"]


@torch.no_grad()
def test_a_cache_of_fixed_size_writes_the_same_tokens_also_the_second_time():
    model = tiny().fuse()
    prompt = torch.tensor([[5, 17, 300]])
    fixed = FixedStep(model, prompt, capacity=32)
    expected = generate(model, prompt, max_new_tokens=10)[0]
    assert fixed.generate(10) == expected  # slots behind the place are masked
    assert fixed.generate(10) == expected  # and hold an older text now


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="make gpu DEVICE=cpu"):
        main(Config())
