"""The parts of training: schedules against their closed forms, a Muon step against an SVD, two
processes against one, files that resume."""

import itertools
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minilm import InputError, training
from minilm.data import generator
from minilm.training import (
    Muon,
    Processes,
    autocast,
    distribute,
    load_state,
    make_optimizers,
    parameter_groups,
    pick_device,
    save_state,
    schedule,
    set_lr,
    start_world,
    take_step,
)
from minilm.transformer import Config, Transformer
from minilm.weights import load_pretrained, save_pretrained

# environment of a child process
CHILD = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
}
tiny = lambda **change: Transformer(
    Config(
        **{
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **change,
        }
    ),
    generator(0, "init"),
)


# --- schedules

def test_warm_up_rises_linearly_and_reaches_the_peak_at_the_first_step_after_it():
    for kind in ("constant", "linear", "cosine", "wsd"):
        assert [schedule(s, 100, kind, warmup=4) for s in range(5)] == pytest.approx(
            [0.2, 0.4, 0.6, 0.8, 1.0]
        )


def test_every_schedule_is_its_closed_form_and_ends_at_final():
    factors = lambda kind: [schedule(s, 101, kind, final=0.1) for s in range(101)]
    assert factors("constant") == [1.0] * 101
    assert factors("linear") == pytest.approx([1 - 0.9 * s / 100 for s in range(101)])
    assert factors("cosine") == pytest.approx(
        [0.1 + 0.45 * (1 + math.cos(math.pi * s / 100)) for s in range(101)]
    )
    assert factors("wsd") == pytest.approx(
        [1.0] * 80 + [1 - 0.9 * (s - 80) / 20 for s in range(80, 101)]
    )
    # one step; beyond the end
    assert schedule(0, 1) == 1.0 and schedule(500, 101, "linear", final=0.0) == 0.0


def test_set_lr_multiplies_the_rate_an_optimizer_was_made_with_and_does_not_compound():
    a, b = (
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.5),
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 2.0),
    )
    for factor in (0.1, 0.1, 0.5):
        set_lr([a, b], factor)
    assert (a.param_groups[0]["lr"], b.param_groups[0]["lr"]) == (0.25, 1.0)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: schedule(0, 10, "step", warmup=5),
            "schedule 'step' is not known: use cosine, wsd, linear or constant",
        ),
        (
            lambda: make_optimizers(tiny(), "sgd", 0.1),
            "optimizer 'sgd' is not known: use adamw or muon",
        ),
        (
            lambda: autocast(torch.device("cpu"), "float16"),
            "dtype 'float16' is not known: use float32 or bfloat16",
        ),
        (lambda: pick_device("foo"), "--device foo"),
        (lambda: pick_device("cpu:x"), "--device cpu:x"),
        (
            lambda: pick_device("cuda") if not torch.cuda.is_available() else pick_device("tpu"),
            "--device",
        ),
    ],
)
def test_a_name_that_is_not_known_is_refused_at_once(call, words):
    with pytest.raises(InputError, match=words):
        call()


# --- optimizers

def test_matrices_decay_norms_and_biases_do_not_and_frozen_parameters_are_left_out():
    model = tiny(model_type="qwen2")
    model.embed.weight.requires_grad = False
    matrices, vectors = parameter_groups(model, weight_decay=0.3)
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
    assert {p.dim() for p in matrices["params"]} == {2} and {
        p.dim() for p in vectors["params"]
    } == {1}
    assert (
        len(matrices["params"]) + len(vectors["params"]) == sum(1 for _ in model.parameters()) - 1
    )


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest_each_parameter_once():
    model = tiny(model_type="qwen3_moe", num_experts=2)
    adamw, muon = make_optimizers(model, "muon", 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon, by_adamw = (
        [names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw)
    )
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert all("_proj" in n for n in by_muon) and not any("_proj" in n for n in by_adamw)
    assert {"embed.weight", "lm_head.weight", "layers.0.mlp.gate.weight", "norm.weight"} <= set(
        by_adamw
    )
    [alone] = make_optimizers(model, "adamw", 0.01)
    assert sum(len(g["params"]) for g in alone.param_groups) == len(names)


def test_when_only_block_matrices_are_trained_muon_stands_alone():
    model = tiny().requires_grad_(False)
    model.layers[0].mlp.requires_grad_(True)
    [muon] = make_optimizers(model, "muon", 0.01)
    assert isinstance(muon, Muon) and len(muon.param_groups[0]["params"]) == 3


def test_two_muon_steps_are_the_orthogonal_factors_of_gradient_and_momentum_mixed():
    gen, lr, beta = generator(0, "muon"), 0.1, 0.95
    W, M = nn.Parameter(torch.randn(12, 20, generator=gen)), torch.zeros(12, 20)
    optimizer = Muon([W], lr, beta, weight_decay=0.5)
    for _ in range(2):
        before, G = W.detach().clone(), torch.randn(12, 20, generator=gen)
        W.grad = G.clone()
        optimizer.step()
        M = beta * M + (1 - beta) * G
        U, _, Vh = torch.linalg.svd((1 - beta) * G + beta * M, full_matrices=False)
        update = (before * (1 - lr * 0.5) - W.detach()) / (lr * 0.2 * math.sqrt(20))
        values = torch.einsum("mk,mn,kn->k", U, update, Vh)  # the diagonal of U^T X V
        assert values.min() > 0.6 and values.max() < 1.3
        assert (update - U * values @ Vh).abs().max() < 1e-3
    # so W moves by 0.2 lr rms, AdamW's size
    assert update.square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(20), rel=0.2)


def test_muon_batches_matrices_of_one_shape_without_mixing_them_and_skips_those_without_gradient():
    gen = generator(1, "muon")
    start, grads = torch.randn(3, 6, 4, generator=gen), torch.randn(3, 6, 4, generator=gen)
    together, alone = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    for step in range(2):
        for ps in (together, alone):
            for p, g in zip(ps[:2], grads):
                p.grad = g * (step + 1)
        if step == 0:
            one, each = Muon(together, 0.1), [Muon([p], 0.1) for p in alone]
        one.step()
        for optimizer in each:
            optimizer.step()
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
    assert torch.equal(together[2], start[2])


def test_take_step_clips_the_whole_gradient_to_one_norm_and_clears_it():
    p = nn.Linear(2, 1, bias=False)
    p.weight.data.zero_()
    take_step(
        p(torch.tensor([[30.0, 40.0]])).sum(), p, [torch.optim.SGD(p.parameters(), 1.0)], clip=5.0
    )
    # the gradient (30, 40) has norm 50: a tenth of it
    torch.testing.assert_close(p.weight.data, torch.tensor([[-3.0, -4.0]]))
    assert p.weight.grad is None


def test_two_steps_of_adamw_by_hand():
    # gradients 1 and 3; m = 0.9 m + 0.1 g, v = 0.95 v + 0.05 g^2, each over what its weights add
    # up to: 1 - 0.9^t, 1 - 0.95^t
    layer = nn.Linear(1, 1, bias=False)
    [adamw] = make_optimizers(layer, "adamw", 0.1, weight_decay=0.5)
    w = layer.weight.item()
    for g, m, v in ((1.0, 1.0, 1.0), (3.0, (0.09 + 0.3) / 0.19, (0.0475 + 0.45) / 0.0975)):
        layer.weight.grad = torch.tensor([[g]])
        adamw.step()
        w = w * (1 - 0.1 * 0.5) - 0.1 * m / math.sqrt(v)
        assert layer.weight.item() == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_optimizers_learn_one_batch(name):
    model, ids = tiny(), torch.randint(50, (4, 12), generator=generator(0, "ids"))
    optimizers, losses = make_optimizers(model, name, 0.02), []
    for _ in range(40):
        losses.append(
            nn.functional.cross_entropy(
                model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
            )
        )
        take_step(losses[-1], model, optimizers)
    assert losses[-1] < 0.2 * losses[0]


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32_weights():
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    with autocast(torch.device("cpu"), "bfloat16"):
        mixed = model(ids).logits
    with autocast(torch.device("cpu"), "float32"):
        full = model(ids).logits
    assert mixed.dtype == torch.bfloat16 and full.dtype == model.embed.weight.dtype == torch.float32
    torch.testing.assert_close(mixed.float(), full, atol=0.01, rtol=0.1)


# --- several processes

HALF = """
import sys, torch
from pathlib import Path
from minilm.data import generator
from minilm.training import distribute, leave_world, make_optimizers, save_state, start_world
from minilm.training import take_step
from minilm.transformer import Config, Transformer

class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        logits = self.model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

torch.set_num_threads(1)
cpu, model = torch.device("cpu"), Transformer(Config(50, 16, 24, 2, 2), generator(0, "init"))
ids = torch.randint(50, (4, 9), generator=generator(0, "ids"))
world = start_world(cpu)
loss = distribute(Loss(model), model.layers, world, cpu, sharded=False)
optimizers = make_optimizers(model, "muon", 0.01)
for _ in range(3):
    take_step(loss(ids[world.rank :: world.size]), loss, optimizers)
if world.rank == 0:
    save_state(Path(sys.argv[1]), model.state_dict())
leave_world()
"""


def test_two_processes_with_half_the_batch_each_train_the_same_model_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    # what torchrun tells its processes
    torchrun = {
        **CHILD,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    two = [
        subprocess.Popen(
            [sys.executable, "-c", HALF, str(tmp_path / "two.pt")], env={**torchrun, "RANK": rank}
        )
        for rank in "01"
    ]
    model, ids = tiny(), torch.randint(50, (4, 9), generator=generator(0, "ids"))
    optimizers = make_optimizers(model, "muon", 0.01)
    for _ in range(3):
        take_step(
            nn.functional.cross_entropy(
                model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
            ),
            model,
            optimizers,
        )
    assert [process.wait(timeout=120) for process in two] == [0, 0]
    together = load_state(tmp_path / "two.pt")
    for name, p in model.state_dict().items():
        torch.testing.assert_close(together[name], p, atol=1e-5, rtol=1e-4)


def test_a_single_process_is_a_world_of_one_and_nothing_is_wrapped():
    model = tiny()
    assert start_world(torch.device("cpu")) == Processes(0, 1)
    assert (
        distribute(model, model.layers, Processes(0, 1), torch.device("cpu"), sharded=True) is model
    )


def test_the_parts_of_all_processes_are_the_batch_once_and_all_have_as_many(monkeypatch):
    for size, count, micro in itertools.product((1, 2, 3, 8), (1, 2, 5, 12), (1, 2, 4, 100)):
        rounds, weight = [], [0.0] * count
        for rank in range(size):
            monkeypatch.setattr(training, "this_world", lambda r=rank, s=size: Processes(r, s))
            parts = list(training.my_parts(range(count), micro))
            rounds.append(len(parts))
            for part, times in parts:
                assert 1 <= len(part) <= micro
                for row in part:
                    weight[row] += times / size  # gradients are averaged
        assert len(set(rounds)) == 1 and weight == [1.0] * count


def test_one_process_reads_a_batch_in_the_slices_that_it_always_had():
    assert list(training.my_parts([1, 2, 3, 4, 5], 2)) == [([1, 2], 1), ([3, 4], 1), ([5], 1)]
    assert list(training.my_parts([], 2)) == []


def test_the_first_rows_of_a_frozen_matrix_stay_and_the_others_learn():
    model, ids = tiny(tie_word_embeddings=True), torch.arange(12).view(2, 6)
    training.freeze_rows(model.embed.weight, 10)
    before = model.embed.weight.detach().clone()
    optimizers = make_optimizers(model, "adamw", 0.1, weight_decay=0.0)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
        take_step(loss, model, optimizers)
    assert torch.equal(model.embed.weight[:10], before[:10])
    assert not (model.embed.weight[10:] == before[10:]).any()


def test_a_model_loaded_on_meta_has_read_its_ends_and_no_block(tmp_path):
    model = tiny()
    save_pretrained(model, tmp_path)
    unread, _ = load_pretrained(tmp_path, device="meta")
    for name, p in unread.named_parameters():
        assert p.is_meta == name.startswith("layers.")
    name = "layers.1.mlp.down_proj.weight"
    rows = unread.unread.rows(name, 5, 9, torch.bfloat16, "cpu")
    assert torch.equal(rows, model.get_parameter(name)[5:9].bfloat16())


def test_fsdp_without_torchrun_is_refused_with_what_to_do():
    with pytest.raises(InputError, match="start with torchrun --nproc-per-node N, or leave it out"):
        training.join(SimpleNamespace(device="cpu", fsdp=True))


# --- files that resume

def test_a_state_comes_back_as_it_was_and_training_goes_on_bit_for_bit(tmp_path):
    ids, path = (
        torch.randint(50, (4, 12), generator=generator(0, "ids")),
        tmp_path / "new" / "training.pt",
    )
    steps = lambda model, optimizers, n: [
        take_step(
            nn.functional.cross_entropy(
                model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
            ),
            model,
            optimizers,
        )
        for _ in range(n)
    ]
    model, resumed = tiny(), tiny()
    optimizers, others = (
        make_optimizers(model, "muon", 0.02),
        make_optimizers(resumed, "muon", 0.02),
    )
    steps(model, optimizers, 2)
    save_state(
        path,
        {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "log": [1.5, None],
            "name": "é",
        },
    )
    steps(model, optimizers, 2)
    state = load_state(path)
    assert state["log"] == [1.5, None] and state["name"] == "é"
    resumed.load_state_dict(state["model"])
    for optimizer, saved in zip(others, state["optimizers"]):
        optimizer.load_state_dict(saved)
    steps(resumed, others, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
    assert [p.name for p in path.parent.iterdir()] == ["training.pt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Evil()), b"", b"hello world", b"\x80\x04junk", pickle.dumps({"step": 1})[:9]],
)
def test_a_file_that_is_no_training_state_is_refused_in_one_line_and_nothing_in_it_is_run(
    tmp_path, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(
        InputError, match="training.pt is not a training state that can be resumed"
    ) as error:
        load_state(tmp_path / "training.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_a_pickle_inside_a_torch_file_is_refused_too_and_a_truncated_or_missing_file_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "training.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(InputError, match="training.pt is not a training state"):
        load_state(path)
    save_state(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="training.pt is not a training state"):
        load_state(path)
    with pytest.raises(
        FileNotFoundError, match="there is no run to resume; start one without --resume"
    ):
        load_state(tmp_path / "none.pt")
    assert not (tmp_path / "owned").exists()


KILL = """
import os, signal, sys, torch
from pathlib import Path
from minilm.training import save_state

class Bomb:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

save_state(Path(sys.argv[1]), {"step": 1, "weights": torch.ones(1000)})
save_state(Path(sys.argv[1]), {"step": 2, "weights": torch.ones(1000), "last": Bomb()})
"""


def test_the_same_state_is_the_same_file_to_the_last_byte(tmp_path):
    for name in ("a", "b"):  # so no name of the moment, as a temporary file has, is written into it
        save_state(tmp_path / name / "training.pt", {"step": 1, "weights": torch.ones(3)})
    assert (tmp_path / "a" / "training.pt").read_bytes() == (
        tmp_path / "b" / "training.pt"
    ).read_bytes()


def test_a_process_killed_in_the_middle_of_saving_leaves_the_last_complete_state(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "training.pt")], env=CHILD)
    assert killed.returncode == -signal.SIGKILL
    state = load_state(tmp_path / "training.pt")
    assert state["step"] == 1 and state["weights"].eq(1).all()
    assert len(os.listdir(tmp_path)) == 2  # what it had written of the next
    save_state(tmp_path / "training.pt", state)
    assert os.listdir(tmp_path) == ["training.pt"]
