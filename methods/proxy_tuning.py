"""Tuning Language Models by Proxy (Liu, Han, Wang, Tsvetkov, Choi, Smith, COLM 2024)
https://arxiv.org/abs/2401.08565

A large model M shall answer as if it had been tuned, but it is too large to tune, or its weights
are not ours to change. So tune a small model with the same vocabulary, S- into S+ (anti-expert and
expert), and at every step of decoding add what tuning changed in it to M's logits:

    z = z_M + alpha (z_S+ - z_S-)        or  p = p_M (p_S+ / p_S-)^alpha / Z

All three read the same text: the prompt, and the tokens chosen from z. What both small models
expect alike cancels, right or wrong, and M decides there; where tuning moved the small model, it
moves M. With alpha = 0, or S+ = S-, z is M's; if M is S- itself, alpha = 1 gives S+.

Here M and S- have read stories and sums, and hardly a worked exercise: M can calculate, and does
not know what is wanted of it. Tuning teaches S+ that, but S+ is too small to be right often.

Found   Here (seed 100, on which the settings were chosen) M answers .38 of the questions, S+ .22,
        M steered by S+ .96, tuned itself 1.00; with seed 101 .56, .44, .85 and 1.00. In the
        experiment (question alignment, four seeds), asked in two other languages, M answers .26,
        steered .38, the small expert .37, tuned itself .60: whether M gains is not tested there, in
        one seed its English stays below the gate.
Run     python methods/proxy_tuning.py                          # 2 CPU cores, about a minute
        python methods/experiments/question_alignment.py --full # with question alignment: claim C5
        python methods/real/question_alignment.py --help        # --stage proxy: your three models
Try     --alpha 0 1 3: .38 (it is M), .96, .15: too much of the difference
        --small-width 40, whose expert is good alone (.90): steered .89 (alpha .5), .49, .15
        ProxyTuned(large, small, expert, alpha) in `main`, expert and anti-expert exchanged: .07
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import nn

from methods.question_alignment_tasks import parse, pretrain, problems, prompt, response
from methods.worlds.clones import EOS, CloneWorld, Mix, Problem
from minilm.data import IGNORE, prompt_masked
from minilm.generate import context_length, generate
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Output, Transformer

# --- 1. the arithmetic, and the three models behind it


def proxy(z_M: torch.Tensor, z_plus: torch.Tensor, z_minus: torch.Tensor, alpha: float = 1.0):
    """Logits [..., V] of the large, the small tuned and the small untuned model -> those to choose
    from. Raw logits: log-probabilities would give the same choice (they differ by a number per
    position). In float32, so that the sum is not rounded once more where the models are in half
    precision; cut to the ids that all three have, as some checkpoints add padding ids at the end.
    (Whether these ids mean the same tokens is the caller's to check.) By hand:
    test_the_arithmetic_by_hand."""
    V = min(z_M.shape[-1], z_plus.shape[-1], z_minus.shape[-1])
    change = z_plus[..., :V].float() - z_minus[..., :V].float()
    return z_M[..., :V].float() + alpha * change


class ProxyTuned(nn.Module):
    """M, tuned by proxy. It has what `minilm.generate` asks of a model, and so decodes like one:
    three caches, which all take in the tokens chosen from z. `hidden` and `lm_head` are apart so
    that of a long prompt only the last position is scored."""

    def __init__(self, model: nn.Module, expert: nn.Module, anti: nn.Module, alpha: float = 1.0):
        super().__init__()
        self.model = model  # M
        self.expert = expert  # S+
        self.anti = anti  # S-
        self.alpha = alpha
        self.config = min(self.three(), key=context_length).config  # no text may outgrow one

    def three(self) -> list[nn.Module]:
        return [self.model, self.expert, self.anti]

    def new_cache(self, B: int) -> list:
        return [m.new_cache(B) for m in self.three()]

    def hidden(self, ids, *, cache=None, attention_mask=None) -> torch.Tensor:
        """[B, T, D_M + 2 D_S]: the three models' last states side by side."""
        caches = cache or [None, None, None]
        states = []
        for model, own in zip(self.three(), caches):
            h = model.hidden(ids, cache=own, attention_mask=attention_mask)
            states.append(h)
        return torch.cat(states, -1)

    def lm_head(self, states: torch.Tensor) -> torch.Tensor:
        widths = [m.config.hidden_size for m in self.three()]
        h_M, h_plus, h_minus = states.split(widths, -1)
        z_M = self.model.lm_head(h_M)
        z_plus = self.expert.lm_head(h_plus)
        z_minus = self.anti.lm_head(h_minus)
        return proxy(z_M, z_plus, z_minus, self.alpha)

    def forward(self, ids, *, cache=None, attention_mask=None) -> Output:
        states = self.hidden(ids, cache=cache, attention_mask=attention_mask)
        return Output(self.lm_head(states))


# --- 2. the small model's tuning: ordinary, and all the training there is


def tune(start: Transformer, world: CloneWorld, seed: int, steps: int, lr: float = 1e-3):
    """The same model after `steps` batches of questions with their worked answers; the loss counts
    the answer's tokens."""
    model = copy.deepcopy(start).train()
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.01)
    rng = random.Random(f"{seed}/tuning")
    for step in progress(range(steps), "tune"):
        rows = [exercise(world, p) for p in problems(world, "cot", rng, 32)]
        inputs, labels = prompt_masked(rows)
        loss = linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels, IGNORE)
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=10, final=0.05))
        take_step(loss, model, optimizers)
    return model.eval()


def exercise(world: CloneWorld, p: Problem) -> tuple[list[int], list[int]]:
    """<s> <q> Eve has 7 coins . finds 4 . ... <a> -> finds 4 so 7 + 4 = 11 . ... answer 9 </s>"""
    return prompt(world, "cot", p, "en"), response(world, "cot", p)


# --- look inside


@torch.no_grad()
def walk_through(tuned: ProxyTuned, ask: list[int], answer: list[int]) -> dict[str, torch.Tensor]:
    """Logits [T, V] before each of the answer's T tokens: of M, S+, S-, and their sum."""
    ids = torch.tensor([ask + answer[:-1]])
    z = {"M": tuned.model, "S+": tuned.expert, "S-": tuned.anti, "sum": tuned}
    return {name: model(ids).logits[0, len(ask) - 1 :] for name, model in z.items()}


def show(world: CloneWorld, z: dict[str, torch.Tensor], answer: list[int], places: int = 5) -> None:
    """First choices at the answer's first places; where M and the sum differ most, the sum as a
    table that adds up."""
    due = answer[:places]
    print_row("due", [world.text([token]) for token in due])
    for name, logits in z.items():
        said = logits[:places].argmax(-1).tolist()
        marked = []
        for token, right in zip(said, due):
            word = world.text([token])
            marked.append(word if token == right else f"[{word}]")
        print_row(name, marked)
    moved = (z["sum"] - z["M"]).abs().amax(-1)  # (T,)
    at = int(moved[:places].argmax())
    first = [int(logits[at].argmax()) for logits in z.values()]
    print(f"\n  at {world.text([answer[at]])!r}    z_M  +  z_S+  -  z_S-  =     z")
    for token in dict.fromkeys([answer[at], *first]):
        parts = [z[name][at, token].item() for name in ("M", "S+", "S-", "sum")]
        numbers = "".join(f"{x:8.1f}" for x in parts)
        print(f"  {world.text([token]):8}{numbers}")


def print_row(name: str, words: Sequence[str]) -> None:
    print(f"  {name:5}" + "".join(word.rjust(9) for word in words))


# --- run it

WORLD = CloneWorld(languages=("en",), verb_final=(), events=(2,))
TEXT = Mix(  # stories, half of them with their sums; of worked exercises one in fifty
    clones=(),
    english_first=0.0,
    drills=0.15,
    retellings=0.1,
    exercises=0.02,
    switched=0.0,
)


def accuracy(model, world: CloneWorld, test: Sequence[Problem]) -> float:
    prompts = [exercise(world, p)[0] for p in test]
    texts = generate(model, prompts, 30, eos_id=EOS)
    said = [parse(world, "cot", ids[len(ask) :]) for ask, ids in zip(prompts, texts)]
    return fmean(number == p.final for number, p in zip(said, test))


@dataclass(frozen=True)
class Config:
    steps: int = 700  # pretraining of both models: optimizer steps
    tune_steps: int = 200  # tuning of the small one
    width: int = 64  # width of the large model, of 4 blocks
    small_width: int = 32  # of the small one, of 2 blocks
    alpha: tuple[float, ...] = (0.5, 1.0, 1.5)  # strengths to try
    problems: int = 200  # test problems
    seed: int = 100  # of the world, the weights, the texts and the problems
    quick: bool = False  # smoke run of seconds: a few steps, numbers without meaning


def main(cfg: Config) -> None:
    check_range(cfg, "steps tune_steps problems", least=1)
    check_range(cfg, "alpha", least=0)
    check_range(cfg, "width small_width", least=8)
    if cfg.quick:
        cfg = replace(cfg, steps=4, tune_steps=2, problems=4)
    world = replace(WORLD, seed=cfg.seed)
    test = problems(world, "cot", random.Random(f"{cfg.seed}/test"), cfg.problems, "test")
    ask, answer = exercise(world, problems(world, "cot", random.Random("an example"), 1)[0])
    print("A row of the small model's tuning; the loss counts what stands in brackets:")
    print(f"  {world.text(ask)} [{world.text(answer)}]\n")

    large = pretrain(world, cfg.seed, cfg.steps, width=cfg.width, text=TEXT)
    small = pretrain(
        world, cfg.seed, cfg.steps, layers=2, width=cfg.small_width, text=TEXT, name="small"
    )
    expert = tune(small, world, cfg.seed, cfg.tune_steps)

    ask, answer = exercise(world, test[0])
    print(f"First choices in the answer to  {world.text(ask)}")
    show(world, walk_through(ProxyTuned(large, expert, small), ask, answer), answer)

    print(f"\nright answers of {cfg.problems}")
    models = {
        "M, untuned": large,
        "S-, untuned": small,
        "S+, tuned": expert,
    }
    for alpha in cfg.alpha:
        name = f"M + {alpha:g} (S+ - S-)"
        models[name] = ProxyTuned(large, expert, small, alpha).eval()
    models["M, tuned itself"] = tune(large, world, cfg.seed, cfg.tune_steps)
    for name, model in models.items():
        print(f"  {name:20} {accuracy(model, world, test):.2f}")
    guess = world.verb_blind_accuracy(test)
    print(f"  {'numbers, no verbs':20} {guess:.2f}")
    print("One seed: this proves nothing. Seeds and claims: methods/experiments/, --full")


if __name__ == "__main__":
    cli(main, Config)
