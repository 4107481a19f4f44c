"""bench.py: its arithmetic by hand, and every benchmark once with tiny shapes. No assertion on a
time: that is bench.py's own job."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import bench
from bench import (
    BENCHMARKS,
    Classical,
    Config,
    alternate,
    compare,
    first_below,
    interval,
    main,
    medians,
    merge,
    products,
    ratio,
    row,
    time_row,
)
from minilm import InputError
from minilm.data import generator
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

# --- arithmetic


def test_a_row_meets_its_target_on_the_right_side_and_at_the_limit():
    assert row("speed", 1.3, "x", ">= 1.3")["ok"] is True
    assert row("speed", 1.29, "x", ">= 1.3")["ok"] is False
    assert row("memory", 0.25, "of 1", "<= 0.25")["ok"] is True
    assert row("memory", 0.26, "of 1", "<= 0.25")["ok"] is False
    assert row("no target", 5.0)["ok"] is None


def test_what_could_not_be_measured_misses_its_target_and_stays_valid_json():
    missed = row("time", math.nan, "of 1", "<= 0.125")
    assert missed["value"] is None and missed["ok"] is False
    json.dumps(missed, allow_nan=False)


def test_a_ratio_is_the_median_over_rounds_so_one_disturbed_round_does_not_count():
    # rounds 4/2 = 2, 40/20 = 2 (both slowed together), 6/2 = 3: the median is 2;
    # the ratio of the medians would be 6/2 = 3
    times = {"a": [4.0, 40.0, 6.0], "b": [2.0, 20.0, 2.0]}
    assert ratio(times, "a", "b") == 2.0 and ratio(times, "b", "a") == 0.5
    assert medians({"ours": [0.002, 0.001, 0.009]}) == "ours 2 ms"


def test_the_interval_of_a_median_leaves_out_what_the_sign_test_allows():
    # n = 5: P(all on one side) = 2/32 > 5%, so nothing may go;
    # n = 6: 2/64 < 5%, still the extremes themselves;
    # n = 9: P(at most 1 of 9) = 10/512 < 2.5%, P(at most 2) = 46/512: one goes on either side
    assert interval([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 5.0)
    assert interval([float(i) for i in range(6)]) == (0.0, 5.0)
    assert interval([float(i) for i in range(9)]) == (1.0, 7.0)
    assert compare("speed", {"a": [4.0, 6.0, 9.0], "b": [2.0, 2.0, 3.0]}, "a", "b")["interval"] == [
        2.0,
        3.0,
    ]


def test_functions_take_turns_and_the_first_turn_does_not_count():
    calls = []
    times = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, desc="turns"
    )
    assert calls == list("abababab") and [len(t) for t in times.values()] == [3, 3]


def test_the_time_to_a_loss_is_the_first_point_at_or_below_it():
    curve = [(1.0, 3.0), (2.0, 1.88), (3.0, 1.9), (4.0, 1.7)]
    assert (
        first_below(curve, 1.88) == 2.0
        and first_below(curve, 1.8) == 4.0
        and first_below(curve, 1.0) is None
    )


def test_a_peer_that_never_arrives_gives_a_bound_and_a_run_of_ours_that_does_not_gives_none():
    curves = {"minilm": [(1.0, 3.0), (2.0, 1.8)], "classical": [(10.0, 2.5), (20.0, 1.9)]}
    both, bound = (time_row(curves, loss, "<= 0.125", "") for loss in (1.9, 1.88))
    assert (
        both["value"] == bound["value"] == 0.1
        and bound["ok"]
        and "at most" in bound["what"]
        and "at most" not in both["what"]
    )
    assert "more than 20.0 s" in bound["conditions"]
    never = time_row(curves, 1.0, "<= 0.125", "")
    assert never["value"] is None and never["ok"] is False


def test_merging_replaces_one_benchmark_and_keeps_the_others(tmp_path):
    path = tmp_path / "bench.json"
    merge(path, "train", [row("a", 1)], {"threads": 1})
    merge(path, "loss", [row("b", 2)], {"threads": 1})
    merge(path, "train", [row("c", 3)], {"threads": 2})
    results = json.loads(path.read_text())
    assert [r["what"] for r in results["train"]["rows"]] == ["c"] and results["train"][
        "conditions"
    ] == {"threads": 2}
    assert [r["what"] for r in results["loss"]["rows"]] == ["b"] and list(tmp_path.iterdir()) == [
        path
    ]


def test_a_row_that_misses_its_target_says_why_and_one_that_meets_it_does_not(capsys):
    missed = row("speed", 1.2, "x", ">= 1.3", note="tried: less")
    met = row("speed", 1.3, "x", ">= 1.3", note="tried: all")
    bench.print_rows("decode", [missed, met])
    told = capsys.readouterr().out
    assert "tried: less" in told and "tried: all" not in told


def test_what_runs_beside_the_products_by_hand():
    # relu reads and writes 6 floats, the sum reads 6 and writes 1; the product and the view of its
    # transpose are not counted, nor is a product with one vector
    x, w, v = torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)

    def work():
        torch.mv(x, v)
        return (x @ w.T).relu().sum()

    with torch.inference_mode(), bench.Beside() as beside:
        work()
    assert (beside.operators, beside.bytes) == (2, 4 * (6 + 6 + 6 + 1))
    told = bench.counted(lambda: (x @ w.T).relu().sum())
    assert told.startswith("4.8e-08 GFLOP in products; beside them 2 operators with 7.6e-08 GB")


# --- what is compared


def test_the_bound_multiplies_what_a_training_step_must_multiply():
    # by hand: a token costs 2 operations per weight and product, three products; attention's 2 T D
    # per matrix (q k^T and p v), again and twice backward, are counted by torch as well. Embedding
    # look-ups cost nothing; the head counts.
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(
        ModelConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as bound:
        products(model, 2, 8)()
    with FlopCounterMode(display=False) as step:
        model(ids).logits.sum().backward()
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 40 * 32
    attention = bound.get_flop_counts()["Global"]
    linear = sum(n for op, n in attention.items() if "attention" not in str(op))
    assert linear == 3 * 2 * weights * 16
    assert (
        bound.get_total_flops() <= step.get_total_flops() < 1.02 * bound.get_total_flops()
    )  # the norms' own sums are no products


def test_a_token_is_one_product_with_each_matrix_whatever_is_fused(monkeypatch):
    model = Transformer(
        ModelConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()
    for net, matrices in ((model, 7 * 2 + 1), (copy.deepcopy(model).fuse(), 4 * 2 + 1)):
        one_token = bench.products_of_a_token(net)
        read = []
        for where, name in ((F, "linear"), (torch, "mv"), (bench, "sliced_product")):
            monkeypatch.setattr(where, name, counting(getattr(where, name), read))
        one_token()
        monkeypatch.undo()
        assert (
            len(read) == matrices and sum(read) == 2 * (4 * 32 * 32 + 3 * 32 * 64) + 40 * 32
        )  # each number once


def counting(product, read):
    """The product, which also writes down how many numbers its matrix has."""

    def counted(*arguments):
        read.append(max(t.numel() for t in arguments))
        return product(*arguments)

    return counted


def test_another_checkout_decodes_in_its_turn(tmp_path):
    model = Transformer(
        ModelConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    bench.save_pretrained(model, tmp_path)
    turn = bench.decoder_elsewhere(
        Config(beside=str(bench.ROOT)), str(tmp_path), torch.float32, [[1, 2]], 3
    )
    assert turn() is turn() is None
    broken = bench.decoder_elsewhere(
        Config(beside=str(bench.ROOT)), str(tmp_path / "none"), torch.float32, [[1, 2]], 3
    )
    with pytest.raises(InputError, match="did not decode"):
        broken()


def test_the_classical_recipe_has_its_size_and_no_character_sees_the_future():
    model = Classical(65, 128, 4, 4, 64, generator(0, "init"))
    assert (
        sum(p.numel() for p in model.parameters()) - model.position.weight.numel() == 795_904
    )  # "0.8M", as usually counted
    ids = torch.randint(65, (1, 64), generator=generator(0, "ids"))
    changed = ids.clone()
    changed[0, 40] = (ids[0, 40] + 1) % 65
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_peer_has_the_same_weights_and_gives_the_same_logits():
    model = Transformer(
        ModelConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    ids = torch.randint(40, (2, 8), generator=generator(0, "ids"))
    with torch.no_grad():
        torch.testing.assert_close(
            bench.peer_of(model)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_peak_memory_sees_what_is_allocated_and_freed_again():
    assert bench.peak_memory(Config(quick=True), allocate, 64) == pytest.approx(
        64 * 2**20, rel=0.15
    )


def allocate(megabytes):
    return lambda: torch.ones(megabytes, 2**18).sum()


# --- the whole script


def test_every_benchmark_runs_with_tiny_shapes_and_writes_its_rows(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 300)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    measured = main(Config(quick=True, data=str(text)))
    written = json.loads((tmp_path / "runs" / "bench.json").read_text())
    assert list(measured) == list(written) == list(BENCHMARKS)
    for name in BENCHMARKS:
        assert written[name]["rows"] == measured[name] and measured[name]
        fields = {"what", "value", "interval", "unit", "target", "ok", "conditions", "note"}
        assert all(set(r) == fields and r["ok"] is None for r in measured[name])
        assert {"cpu", "cores", "threads", "torch", "transformers"} <= set(
            written[name]["conditions"]
        )
    assert not (tmp_path / "results").exists()
    monkeypatch.setitem(bench.BENCHMARKS, "loss", lambda cfg: pytest.fail("measured again"))
    assert (
        main(Config(what=("loss",), quick=True, resume=True)) == {}
    )  # the same commit, machine and versions


@pytest.mark.parametrize(
    "change, words",
    [
        ({"threads": 0}, "--threads 0: give a number of at least 1"),
        ({"beside": "nowhere"}, "--beside nowhere: no checkout"),
    ],
)
def test_flags_that_nothing_can_be_measured_with_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        main(Config(quick=True, **change))


def test_an_unknown_benchmark_is_one_readable_error_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="no benchmark 'trian': choose from train, decode"):
        main(Config(what=("trian",), out=str(tmp_path / "bench.json")))
    assert not list(tmp_path.iterdir())


def test_the_committed_rows_agree_with_their_own_targets():
    path = bench.ROOT / "results" / "bench.json"
    if not path.exists():
        pytest.skip("no committed results yet")
    for name, result in json.loads(path.read_text()).items():
        assert name in BENCHMARKS and result["conditions"]["quick"] is False
        for r in result["rows"]:
            value = math.nan if r["value"] is None else r["value"]
            r = {"interval": None, "note": ""} | r
            given = ("unit", "target", "conditions", "interval", "note")
            assert row(r["what"], value, *(r[name] for name in given)) == r
