"""Multilingual Contrastive Decoding via Language-Agnostic Layers Skipping
(Zhu, Liu, Huang, She, Wendler, Chen, EMNLP Findings 2024), https://arxiv.org/abs/2407.10795

Contrastive decoding prefers the tokens that an expert likes more than an amateur does:

    s(v) = (1 + beta) z_expert(v) - beta z_amateur(v),  among the tokens plausible to the expert

DoLa takes the amateur from the same model: an early exit, the head applied half-way. But a model
that learned English first thinks in English half-way; in another language that amateur speaks the
wrong language, and the contrast removes the wrong thing. So keep the last blocks, which put
thoughts into words, and skip a few lower-middle blocks: this amateur speaks the right language and
reasons a little worse. (An early exit is the case in which all later blocks are skipped.)

Found   (four seeds) In texts of three other languages early exits say the right language's words in
        .10 of the places, the model without one middle block in .99. But no contrast of a model
        with itself beats greedy decoding (.735 right): a skipped block has .69 (SL-H, chosen at
        random) and .70 (SL-D, by entropies), DoLa .66, an early exit in the skipped block's own
        form .72. So skipping beats neither greedy nor, form for form, an early exit; the paper's
        models gain. Where the whole model errs, z_expert - z_amateur prefers the right word in .38
        of the cases (a coin: .50): this amateur errs elsewhere, it is no weaker copy.
Run     python methods/skip_layer_cd.py                   # 2 CPU cores, about two minutes
        python methods/experiments/skip_layer_cd.py       # seeds, controls, claims, figure
        python methods/real/skip_layer_cd.py --help       # mGSM, GSM8K, ... on a checkpoint
Try     (mean of a, c, e; as it is: greedy .80, against an early exit .77, a skipped block .65)
        --beta 2: the amateur decides, .61 and .48
        average the two 2 : 1 instead, `beta = -1/3` as `contrast`'s first line: a skipped block .83
        --drop 0: what h4 says is nearly noise; greedy .77, a skipped block .69 (one model)
"""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from methods.worlds.clones import ANSWER, BOS, EOS, CloneWorld, Mix, Problem, document, new_model
from minilm import InputError
from minilm.data import IGNORE, generator, pad
from minilm.generate import generate
from minilm.ops import linear_cross_entropy
from minilm.results import cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import LayerCache, Output, Transformer

# --- 1. prefer what the expert likes more than the amateur


def contrast(expert: torch.Tensor, amateur: torch.Tensor, alpha=0.1, beta: float | None = 0.5):
    """Scores of the next token from two logits [..., V]. The choice is the expert's, among what the
    expert itself finds plausible:

        V_head = {v : z_E(v) >= max_w z_E(w) + log alpha}
        s(v)   = (1 + beta) z_E(v) - beta z_A(v)  in V_head, else -inf

    beta None is the limit of a large beta: s = log p_E - log p_A, if log-probabilities are given.
    To choose or to sample, logits do as well as those (s changes by a constant); not under a
    repetition penalty, which looks at the sign of s. By hand: test_the_rule_by_hand."""
    expert = expert.float()
    amateur = amateur.float()
    if beta is None:
        scores = expert - amateur
    else:
        scores = (1 + beta) * expert - beta * amateur
    implausible = expert < expert.max(-1, keepdim=True).values + math.log(alpha)  # not in V_head
    return scores.masked_fill(implausible, -torch.inf)  # last: masks the NaN of -inf - -inf, too


def check_contrast(alpha: float, beta: float) -> None:
    if not 0 < alpha <= 1:
        raise InputError(
            f"--alpha {alpha} must be above 0 and at most 1 (1 leaves the expert's best token only)"
        )
    if not 0 <= beta < math.inf:
        raise InputError(f"--beta {beta} must be a number from 0 (greedy decoding) upwards")


# --- 2. an amateur that speaks the language: the same model without some blocks


def scores_everywhere(self, ids, *, cache=None, attention_mask=None) -> Output:
    """A decoder's forward: `hidden` runs the blocks, `lm_head` contrasts. `generate` calls the two
    itself, to score the last position only."""
    return Output(self.lm_head(self.hidden(ids, cache=cache, attention_mask=attention_mask)))


class SkipLayers(nn.Module):
    """The paper's decoder. It has a model's `forward` and `new_cache`, so minilm.generate runs it
    like a model. The amateur lacks the blocks m ... n-1 at every token, the prompt's included:

        h_0 = embed(x)    h_{i+1} = block_i(h_i)                 expert   z_E = head(norm(h_L))
        h'_n = h_m        h'_{i+1} = block_i(h'_i) from n on     amateur  z_A = head(norm(h'_L))

    Up to block m both are one pass with one cache; from block n on the amateur has keys and values
    of its own. A token costs L + (L - n) block evaluations (2L - (n - m) if nothing is shared)."""

    def __init__(self, model: Transformer, span: tuple[int, int], alpha=0.1, beta=0.5, share=True):
        super().__init__()
        check_contrast(alpha, beta)
        m, n = span
        L = len(model.layers)
        if not 0 <= m < n <= L:
            raise InputError(
                f"span {m},{n}: blocks m to n-1 are skipped, with 0 <= m < n <= {L} in this model"
            )
        self.model = model
        self.config = model.config
        self.span = span
        self.alpha = alpha
        self.beta = beta
        self.share = share

    def new_cache(self, B: int) -> list[list[LayerCache]]:
        """The expert's and the amateur's; where nothing is computed, a cache stays empty."""
        return [self.model.new_cache(B), self.model.new_cache(B)]

    def hidden(self, ids, *, cache=None, attention_mask=None) -> torch.Tensor:
        """[B, T, 2D]: both last states side by side, the expert's first, since `generate` takes the
        last position from what `hidden` returns and hands it to `lm_head`."""
        model = self.model
        m, n = self.span
        L = len(model.layers)
        expert_cache, amateur_cache = cache or (None, None)
        x = model.embed(ids)
        rotary, mask = model.prepare(x, expert_cache, attention_mask)

        def blocks(h, first, last, cache):
            for i in range(first, last):
                h, _ = model.layers[i](h, rotary, mask, cache[i] if cache else None)
            return h

        h_m = blocks(x, 0, m, expert_cache)
        expert = blocks(h_m, m, L, expert_cache)
        start = h_m if self.share else blocks(x, 0, m, amateur_cache)
        amateur = blocks(start, n, L, amateur_cache)
        return torch.cat((model.norm(expert), model.norm(amateur)), -1)  # (B, T, 2D)

    def lm_head(self, states: torch.Tensor) -> torch.Tensor:
        expert, amateur = states.chunk(2, -1)
        z_E = self.model.lm_head(expert)
        z_A = self.model.lm_head(amateur)
        return contrast(z_E, z_A, self.alpha, self.beta)

    forward = scores_everywhere


def blocks_per_token(cache: list[list[LayerCache]]) -> float:
    """What a decoder costs, told by its cache: every entry was one evaluation of one block."""
    return sum(layer.length for part in cache for layer in part) / cache[0][0].length


# --- 3. which blocks: a few in the lower middle


def span_sizes(L: int, min_start: int | None = None) -> tuple[int, int]:
    """(n_skip, first): how many blocks are skipped, an eighth but at least one; and the lowest that
    may be skipped: 4 as in the paper, or in a model of fewer than 16 blocks an eighth of them."""
    eighth = max(1, round(L / 8))
    if min_start is not None:
        return eighth, min_start
    return eighth, 4 if L >= 16 else eighth


def heuristic_span(L: int, rng: random.Random, min_start: int | None = None) -> tuple[int, int]:
    """SL-H (heuristic): a random start m from {4, ..., L/2 - 1}, one draw per question."""
    n_skip, first = span_sizes(L, min_start)
    m = rng.randint(first, max(first, L // 2 - 1))
    if m >= L:
        raise InputError(f"--min-start {first}: the model has the blocks 0 to {L - 1}")
    return m, min(L, m + n_skip)


@torch.no_grad()
def entropy_curve(model: Transformer, ids: torch.Tensor, mask=None) -> list[float]:
    """H_i, i = 0 ... L-1: entropy in nats of softmax(head(norm(h_i))), the mean over the positions
    of ids [B, T] except each row's last. mask: bool [B, T], True at real tokens, which stand on the
    left (padded on the right, as `pad` does it)."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    counted = mask[:, 1:]
    curve = []
    for h in model(ids, output_hidden_states=True).hidden_states[:-1]:
        log_p = model.lm_head(model.norm(h[:, :-1][counted])).float().log_softmax(-1)
        curve.append(-(log_p.exp() * log_p).sum(-1).mean().item())
    return curve


def find_entropy_span(H: Sequence[float], threshold: float = 0.1, min_start: int | None = None):
    """SL-D (dynamic): where the entropy begins to fall for good, the model turns thoughts into
    words; skip the n_skip blocks just before. State n = i + 2 is that place if the entropy has come
    down to it by more than `threshold` a block over two blocks, e_i = (H_i - H_n) / 2 > threshold,
    and is lower still in every later state: H_n > H_j for all j > n. The first such i from n_skip +
    first on (the two numbers of `span_sizes`; first is 4 in the paper) gives the span [m, n), m =
    n - n_skip.

    None if no i qualifies."""
    L = len(H)
    n_skip, first = span_sizes(L, min_start)
    for i in range(n_skip + first, L - 2):
        n = i + 2
        falls = (H[i] - H[n]) / 2 > threshold
        if falls and all(H[n] > later for later in H[n + 1 :]):
            return n - n_skip, n
    return None


def entropy_span(H: Sequence[float], threshold: float = 0.1, min_start: int | None = None):
    """`find_entropy_span`, or where it finds no such fall (the authors' code ends in an error
    there) the middle of SL-H's range, and a warning."""
    found = find_entropy_span(H, threshold, min_start)
    if found:
        return found
    L = len(H)
    n_skip, first = span_sizes(L, min_start)
    m = (first + L // 2) // 2
    print(
        f"warning: SL-D finds no lasting fall above {threshold} in the entropies "
        f"{', '.join(f'{x:.2f}' for x in H)}: skipping from block {m}, the middle of SL-H's range"
    )
    return m, min(L, m + n_skip)


# --- look inside


@torch.no_grad()
def views(model: Transformer, ids: torch.Tensor, spans) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, logits [B, T, V]) of the early exits h0 ..., of the expert, and of the amateur
    of every span. All get the final norm: our hidden_states end before it (those of transformers
    have it in the last one)."""
    states = model(ids, output_hidden_states=True).hidden_states
    rotary, mask = model.prepare(states[0])
    for i, h in enumerate(states):
        name = f"h{i}" if i < len(model.layers) else "expert"
        yield name, model.lm_head(model.norm(h))
    for m, n in spans:
        h = states[m]
        for layer in model.layers[n:]:
            h, _ = layer(h, rotary, mask)
        yield f"[{m},{n})", model.lm_head(model.norm(h))


def walk_through(model, world, problem: Problem, language: str, span, alpha=0.1, beta=0.5) -> dict:
    """View -> its first choices (token ids), one at every place of the right answer: what is due,
    the early exits, expert, amateur, and SL, the contrast of these two."""
    prompt, solution = exercise(world, problem, language)
    ids = torch.tensor([prompt + solution])
    logits = {}
    for name, z in views(model, ids[:, :-1], [span]):
        logits[name] = z[0, len(prompt) - 1 :]  # row i stands before the answer's token i
    logits["amateur"] = logits.pop("[{},{})".format(*span))
    logits["SL"] = contrast(logits["expert"], logits["amateur"], alpha, beta)
    said = {name: z.argmax(-1).tolist() for name, z in logits.items()}
    return {"due": solution} | said


def show(world: CloneWorld, said: dict[str, list], places: int = 14) -> None:
    """The walk-through as a table: what is not the word that is due stands in [brackets]."""
    rows = {}
    for name, ids in said.items():
        rows[name] = [world.text([i]) for i in ids[:places]]
        if name != "due":
            pairs = zip(rows[name], rows["due"])
            rows[name] = [word if word == due else f"[{word}]" for word, due in pairs]
    widths = [max(map(len, column)) for column in zip(*rows.values())]
    for name, words in rows.items():
        print(f"  {name:8}" + " ".join(word.ljust(width) for word, width in zip(words, widths)))


# --- a small multilingual model, English first

LANGUAGES = ("en", "a", "c", "e")  # the clones keep the word order of en
BASE, *OTHERS = LANGUAGES
WORLD = CloneWorld(languages=LANGUAGES, verb_final=(), verbs=12, events=(3,))
# Skewed: rare verbs, 70% gains; test problems are not, so that habits are worth discounting. In the
# first 40% of the steps all texts are English (`Mix.english_first`).
TEXT = Mix(
    clones=(0.12, 0.09, 0.06),  # shares of a, c, e
    drills=0.1,
    retellings=0.15,
    to_english=True,
    exercises=0.5,
    clone_exercises=0.5,
    explained=0.5,
    switched=0.0,
    gain=0.7,
    zipf=1.0,
)
EVENT = 9  # tokens of an answer per event: finds 4 so 7 + 4 = 11 .
ANSWER_LENGTH = 3 * EVENT + 3  # and at the end: answer 9 </s>


def exercise(world: CloneWorld, p: Problem, language: str) -> tuple[list[int], list[int]]:
    """Prompt and answer, for example in language a (<a>: here an answer begins, in any language)

    <s> Eve has_a 7 coins_a . finds_a 4 . ... howmany_a coins_a ? <a>
    finds_a 4 so_a 7 + 4 = 11 . ... answer_a 9 </s>
    """
    prompt = [BOS, *world.question(p, language), ANSWER]
    return prompt, [*world.solution(p, language), EOS]


def lm_loss(model: Transformer, ids: torch.Tensor, real: torch.Tensor, kept: Sequence[int]):
    """Next-token loss in nats of a pass through the blocks `kept` only."""
    h = model.embed(ids[:, :-1])
    rotary, mask = model.prepare(h)
    for i in kept:
        h, _ = model.layers[i](h, rotary, mask)
    labels = ids[:, 1:].masked_fill(~real[:, 1:], IGNORE)
    return linear_cross_entropy(model.norm(h), model.lm_head.weight, labels)


class Models(NamedTuple):
    base: Transformer
    early: Transformer  # the same, as it was earlier in training: the amateur of vanilla contrast


def pretrain(
    world: CloneWorld,
    seed: int,
    steps: int = 900,
    batch: int = 32,
    lr: float = 3e-3,
    drop: float = 0.15,
    layers: int = 8,
    width: int = 64,
    early: float = 0.6,
) -> Models:
    """English alone first, then all languages, mostly English: this order is what makes a model
    think in English. Each block but the first and the last is left out of a step with chance
    `drop`, so that the model can do without one (otherwise skipping a block is an injury)."""
    model = new_model(world, width, layers, generator(seed, "init"))
    optimizers = make_optimizers(model, "adamw", lr, 0.01)
    text = random.Random(f"{seed}/text")
    depth = random.Random(f"{seed}/depth")
    earlier = copy.deepcopy(model)
    for step in progress(range(steps), "pretrain"):
        rows = [document(world, TEXT, text, step / steps) for _ in range(batch)]
        ends = (0, layers - 1)
        kept = [i for i in range(layers) if i in ends or depth.random() >= drop]
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=30, final=0.05))
        take_step(lm_loss(model, *pad(rows), kept), model, optimizers)
        if step + 1 == round(early * steps):
            earlier = copy.deepcopy(model)
    return Models(model.eval(), earlier.eval())


# --- run it


def decode(world: CloneWorld, decoder, problems: Sequence[Problem], language: str) -> list:
    """A decoder's answers to the questions, as token ids."""
    prompts = [exercise(world, p, language)[0] for p in problems]
    texts = generate(decoder, prompts, ANSWER_LENGTH, eos_id=EOS)
    return [ids[len(prompt) :] for prompt, ids in zip(prompts, texts)]


def solved(world: CloneWorld, problems: Sequence[Problem], answers: list[list[int]]) -> list[bool]:
    return [world.final_number(ids) == p.final for p, ids in zip(problems, answers)]


@dataclass(frozen=True)
class Config:
    steps: int = 900  # pretraining: optimizer steps
    problems: int = 60  # test problems per language
    alpha: float = 0.1  # plausible tokens have at least this share of the best token's probability
    beta: float = 0.5  # strength of the contrast
    drop: float = 0.15  # pretraining: chance of each block to be left out of a step
    seed: int = 100  # of weights, texts and problems
    quick: bool = False  # a few steps: seconds, and a model that knows nothing


def main(cfg: Config) -> None:
    check_contrast(cfg.alpha, cfg.beta)
    if cfg.quick:
        cfg = replace(cfg, steps=3, problems=2)
    world = replace(WORLD, seed=cfg.seed)
    rng = random.Random(f"{cfg.seed}/problems")
    problems = [world.sample(rng, "test") for _ in range(cfg.problems)]
    example = document(world, TEXT, random.Random("an example"))
    print(f"A training text, every token a target:\n  {world.text(example)}")

    model = pretrain(world, cfg.seed, cfg.steps, drop=cfg.drop).base
    L = len(model.layers)
    # one for all questions, so that they are one batch; the paper draws one for each
    span = heuristic_span(L, random.Random(f"{cfg.seed}/span"))
    language = OTHERS[1]
    print(f"\nA right answer in language {language}; at every place, what each view says first [if")
    print(f"it is not what is due]. h: early exits. The amateur skips block {span[0]}.")
    said = walk_through(model, world, problems[0], language, span, cfg.alpha, cfg.beta)
    shown = ("due", f"h{L // 4}", f"h{L // 2}", "expert", "amateur", "SL")
    show(world, {name: said[name] for name in shown})

    decoders = {
        "greedy": model,
        "against an early exit": SkipLayers(model, (L // 4, L), cfg.alpha, cfg.beta),
        "against a skipped block": SkipLayers(model, span, cfg.alpha, cfg.beta),
    }
    print(f"\nright answers of {cfg.problems} ".ljust(28), *(f"{x:>5}" for x in LANGUAGES))
    for name, decoder in decoders.items():
        right = []
        for language in LANGUAGES:
            hits = solved(world, problems, decode(world, decoder, problems, language))
            right.append(sum(hits) / len(hits))
        print(name.ljust(27), *(f"{x:5.2f}" for x in right))
    chance = world.verb_blind_accuracy(problems)
    print("reading numbers, no verbs".ljust(27), f"{chance:5.2f}")
    print("One model: this proves nothing. Seeds, controls: methods/experiments/skip_layer_cd.py")


if __name__ == "__main__":
    cli(main, Config)
