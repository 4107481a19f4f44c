"""Multilingual Contrastive Decoding via Language-Agnostic Layers Skipping
(Wenhao Zhu, Sizhe Liu, Shujian Huang, Shuaijie She, Chris Wendler, Jiajun Chen, EMNLP Findings 2024), https://arxiv.org/abs/2407.10795

Idea    Contrastive decoding prefers what an expert likes more than an amateur does: s = (1 + beta) z_expert - beta z_amateur. The amateur
        of DoLa is an early exit of the same model. But a model that learned English first thinks in English half-way: in other languages
        its early exits speak the wrong language, and the contrast removes the wrong thing. So keep the last blocks, which put thoughts
        into words, and skip a few blocks before them: this amateur speaks the right language and reasons a little worse. The method, all
        decoders side by side, has its own file, methods/skip_layer_cd_decoders.py.
Claims  C1 early exits speak English; C2 the skipping amateur speaks the right language; C3 DoLa harms, other languages more than English;
        C4 SL-H and SL-D (a random span, one found by entropy) beat DoLa; C5 they beat greedy; C6 the amateur is fluent but reasons worse;
        C7 a token costs (2L - n)/L of greedy's blocks; R1 beta 0 is greedy. With --full: every span, other beta, alpha, forms of DoLa.
Run     python methods/experiments/skip_layer_cd.py                # 2 free CPU cores, ~5 min: table + figure; --full: every arm, 6 min
        python methods/real/skip_layer_cd.py --help    # mGSM, GSM8K, GSM-Plus, AQuA or a prompt of yours on a real checkpoint
Honest  One world of 3-step word problems in en and three clones of it, one small model per seed; all decodings share model and problems.
        Features of that world: all languages are pretrained with worked answers; verbs follow Zipf's law and 70% of the events are gains
        in training, neither in the test; blocks are dropped at random in training, but for the first and the last (without it C2 fails:
        --drop 0). SL-D looks at training problems only. A question tells its own language. Not reproduced: C5; contrasting costs 2 to 3
        points (other languages: greedy .793, SL-D .765, SL-H .754). In --full only one of all spans, betas and alphas is not below greedy
        there: skipping the last block (.800; two seeds up, one down), and that amateur *is* the early exit h7, which speaks the right
        language for 60% of the words. Much of DoLa's loss comes from its bare log-ratio: contrasted in the mild form, an early exit is as
        good as SL-D ("mild exit": .76 and .77 of the other languages' problems). Run 2: in run 1 (seeds 0-3) each clone had 12% of the
        text (now a 12, c 9, e 6); exits spoke a little less English, DoLa's raw lens cost 2 points only, and C4 failed (SL-H - DoLa:
        normed lens +.10, raw lens -.00). C4's rule was relaxed after two pilots, before run 1: an interval above 0 in every language, as
        it first read, still fails in language e.
Try     with --seeds 100 (other languages: greedy .76, SL-H .72, DoLa norm .49; the amateurs' reasoning .77, the expert's .79)
        --drop 0: greedy .90, SL-H .83, DoLa norm .73; exits speak English as before, but one skipped block is a large injury: an amateur
        speaks the right language for .82 of the words and its reasoning falls from .89 to .61.  --beta 2: SL-H .52, the amateur decides.
        --alpha 1e-9: SL-H .72 as before, but DoLa norm .12: the mask is what keeps a bare log-ratio in bounds.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import NamedTuple

import torch

from methods.skip_layer_cd_decoders import (ContrastModels, DoLa, RepetitionPenalty, SkipLayers, blocks_per_token, check_contrast,
                                            entropy_curve, entropy_span, heuristic_span)
from minilm import InputError
from minilm.data import IGNORE, generator, pad
from minilm.generate import generate
from minilm.ops import linear_cross_entropy
from minilm.results import (COLORS, Outcome, check, claim, cli, new_figure, paired_bootstrap, plot_seeds, print_claims,
                            print_metrics, progress, run_seeds, save_results)
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer
from methods.worlds.clones import ANSWER, BOS, EOS, Mix, Problem, World, document, new_model

PAPER = "SkipLayerCD, Findings of EMNLP 2024, arXiv 2407.10795"
BASE, *OTHERS = LANGUAGES = ("en", "a", "c", "e")  # the clones keep the word order of en


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("greedy", "beta 0", "cd", "dola", "dola norm", "dola penalty", "mild exit", "sl-h", "sl-d")  # see ARMS
    seeds: tuple[int, ...] = (10, 11, 12, 13)  # one model, its training text and its test problems per seed
    steps: int = 900  # pretraining: optimizer steps
    batch: int = 32  # pretraining: documents per step
    lr: float = 3e-3  # pretraining: learning rate
    drop: float = 0.15  # pretraining: chance of each block but the first and the last to be left out of a step
    layers: int = 8  # blocks
    width: int = 64  # model width
    early: float = 0.6  # the amateur of `cd` is the model after this share of the steps
    alpha: float = 0.1  # plausible tokens have at least this share of the best token's probability
    beta: float = 0.5  # strength of the contrast
    penalty: float = 1.2  # the repetition penalty of DoLa's authors
    threshold: float = 0.1  # SL-D: least fall of entropy, in nats per block
    exemplars: int = 64  # training problems per language whose entropies SL-D looks at
    problems: int = 200  # test problems per language and seed
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every arm of ARMS: all spans, strengths, other forms of DoLa
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


# --- data

WORLD = World(languages=LANGUAGES, verb_final=(), verbs=12, events=(3,))
TEXT = Mix(clones=(0.12, 0.09, 0.06), drills=0.1, retellings=0.15, to_english=True, exercises=0.5, clone_exercises=0.5, explained=0.5,
           switched=0.0, gain=0.7, zipf=1.0)  # skewed: rare verbs, 70% gains. Test problems are not: habits are worth discounting there
EVENT = 9  # tokens of an answer per event


def exercise(world: World, p: Problem, language: str) -> tuple[list[int], list[int]]:
    """Prompt and answer, for example (in language a)

    <s> Eve has_a 7 coins_a . finds_a 4 . ... howmany_a coins_a ? <a>      finds_a 4 so_a 7 + 4 = 11 . ... answer_a 9 </s>
    """
    return [BOS, *world.question(p, language), ANSWER], [*world.solution(p, language), EOS]


# --- loss and training

def lm_loss(model: Transformer, ids: torch.Tensor, real: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Next-token loss in nats of a pass through the blocks `kept` only."""
    h = model.embed(ids[:, :-1])
    rotary, mask = model.prepare(h)
    for i in kept:
        h, _ = model.layers[i](h, rotary, mask)
    return linear_cross_entropy(model.norm(h), model.lm_head.weight, ids[:, 1:].masked_fill(~real[:, 1:], IGNORE))


class Models(NamedTuple):
    base: Transformer
    early: Transformer


def pretrain(cfg: Config, world: World, seed: int) -> Models:
    """English alone first, then all languages, mostly English -> the model, and as it was after cfg.early of the steps."""
    model = new_model(world, cfg.width, cfg.layers, generator(seed, "init"))
    optimizers, text, depth = make_optimizers(model, "adamw", cfg.lr, 0.01), random.Random(f"{seed}/text"), random.Random(f"{seed}/depth")
    early = copy.deepcopy(model)
    for step in progress(range(cfg.steps), "pretrain"):
        set_lr(optimizers, schedule(step, cfg.steps, "cosine", warmup=30, final=0.05))
        rows = [document(world, TEXT, text, step / cfg.steps) for _ in range(cfg.batch)]
        kept = [i for i in range(cfg.layers) if i in (0, cfg.layers - 1) or depth.random() >= cfg.drop]
        take_step(lm_loss(model, *pad(rows), kept), model, optimizers)
        if step + 1 == round(cfg.early * cfg.steps):
            early = copy.deepcopy(model)
    return Models(model.eval(), early.eval())


# --- evaluate: what every layer says

@torch.no_grad()
def views(model: Transformer, ids: torch.Tensor, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, logits [B, T, V]) of the early exits h0 ... (with the final norm), the expert, and the amateur of every span."""
    states = model(ids, output_hidden_states=True).hidden_states
    rotary, mask = model.prepare(states[0])
    for i, h in enumerate(states):
        yield f"h{i}" if i < len(model.layers) else "expert", model.lm_head(model.norm(h))
    for m, n in spans:
        h = states[m]
        for layer in model.layers[n:]:
            h, _ = layer(h, rotary, mask)
        yield f"[{m},{n})", model.lm_head(model.norm(h))


def look(world: World, model: Transformer, problems: Sequence[Problem], language: str, spans) -> dict[str, dict[str, float]]:
    """Teacher-forced over the answers: view -> own, base: where a word of this language is due, how often the view's first choice is a
    word of this language, of English; entropy in nats; function, reasoning: accuracy on so and answer, on verbs, signs and results."""
    pairs, seen = [exercise(world, p, language) for p in problems], {}
    ids, first = torch.tensor([prompt + solution for prompt, solution in pairs]), len(pairs[0][0])  # all rows are equally long
    starts, end = range(0, 3 * EVENT, EVENT), 3 * EVENT  # finds 4 so 7 + 4 = 11 . (three times) answer 9 </s>
    function, reasoning = [*(s + 2 for s in starts), end], [s + t for s in starts for t in (0, 4, 7)]
    specific = [*function, *starts]
    speaks = torch.tensor([LANGUAGES.index(lang) if lang else -1 for lang in world.language_of])
    for name, logits in views(model, ids[:, :-1], spans):
        log_p = logits[:, first - 1 :].log_softmax(-1)
        choice = log_p.argmax(-1)
        said, right = speaks[choice[:, specific]], (choice == ids[:, first:]).float()
        seen[name] = {"own": (said == LANGUAGES.index(language)).float().mean(), "base": (said == 0).float().mean(),
                      "entropy": -(log_p.exp() * log_p).sum(-1).mean(), "function": right[:, function].mean(),
                      "reasoning": right[:, reasoning].mean(), "verb": right[:, list(starts)].mean()}
    return seen


# --- evaluate: answers

class Arm(NamedTuple):
    make: Callable  # (cfg, models, span) -> decoder
    span: str | tuple[int, int] | None = None  # of skipped blocks: "sl-h", "sl-d", or a fixed one
    changes: dict = {}  # other Config values


def dola(layers=None, penalty=False, **settings) -> Arm:
    def make(c, models, span):
        decoder = DoLa(models.base, layers, c.alpha, **settings)
        return RepetitionPenalty(decoder, c.penalty) if penalty else decoder
    return Arm(make)


def skip(span, **changes) -> Arm:
    return Arm(lambda c, models, span: SkipLayers(models.base, span, c.alpha, c.beta), span, changes)


ARMS = {
    "greedy": Arm(lambda c, models, span: models.base), "beta 0": skip("sl-d", beta=0.0),
    "cd": Arm(lambda c, models, span: ContrastModels(models.base, models.early, c.alpha, c.beta)),
    "dola": dola(), "dola norm": dola(norm=True), "dola penalty": dola(penalty=True), "mild exit": dola(norm=True, beta=0.5),
    "sl-h": skip("sl-h"), "sl-d": skip("sl-d"),
    "dola official": dola(jsd="official"), "dola norm official": dola(norm=True, jsd="official"), "dola static": dola([2], norm=True),
    **{f"skip {m}": skip((m, m + 1)) for m in range(8)}, "skip 1-2": skip((1, 3)), "skip 3-4": skip((3, 5)), "skip 2-5": skip((2, 6)),
    **{f"beta {b}": skip("sl-d", beta=b) for b in (0.25, 1.0, 2.0)}, **{f"alpha {a}": skip("sl-d", alpha=a) for a in (0.01, 0.5)},
}
PAIRS = [(a, b) for a in ("sl-h", "sl-d") for b in ("greedy", "dola", "dola norm", "mild exit")] + [
    (a, "greedy") for a in ("dola", "dola norm", "dola penalty", "mild exit")]  # whose difference is judged problem by problem


def answer(cfg: Config, arm: Arm, models: Models, prompts: list[list[int]], spans: Sequence) -> list[list[int]]:
    """Every prompt's answer; rows that skip the same span are one batch."""
    answers = [[]] * len(prompts)
    for span in dict.fromkeys(spans):
        rows = [i for i, own in enumerate(spans) if own == span]
        decoder = arm.make(replace(cfg, **arm.changes), models, span)
        for i, ids in zip(rows, generate(decoder, [prompts[i] for i in rows], 3 * EVENT + 3, eos_id=EOS)):
            answers[i] = ids[len(prompts[i]) :]
    return answers


def cost(cfg: Config, model: Transformer, span: tuple[int, int], prompts: list[list[int]]) -> dict[str, float]:
    """Block evaluations per token, counted in the caches, and the time of a token, over greedy decoding's (A B A B, medians)."""
    decoder, L, times = SkipLayers(model, span, cfg.alpha, cfg.beta), len(model.layers), {"greedy": [], "skip": []}
    cache = decoder.new_cache(1)
    with torch.no_grad():
        decoder(torch.tensor(prompts[:1]), cache=cache)
    for _ in range(1 if cfg.quick else 15):
        for name, one in (("greedy", model), ("skip", decoder)):
            started = time.perf_counter()
            generate(one, prompts[:32], 32)
            times[name].append(time.perf_counter() - started)
    ratio = median(b / a for a, b in zip(*times.values()))
    return {"blocks": blocks_per_token(cache) / L, "formula": (2 * L - span[1]) / L, "time": ratio}


# --- one seed

def run(cfg: Config, seed: int) -> Outcome:
    """One model; every decoding of it answers the same problems."""
    world, n = replace(WORLD, seed=seed), cfg.problems
    models = pretrain(cfg, world, seed)
    rng = random.Random(f"{seed}/problems")
    shown = [world.sample(rng, "train", TEXT.gain, TEXT.zipf) for _ in range(cfg.exemplars)]
    test = [world.sample(rng, "test") for _ in range(n)]
    spans = [(m, m + 1) for m in range(cfg.layers)] + [(2, 6), (1, cfg.layers - 1)]
    metrics = {"verb-blind": {"acc": world.verb_blind_accuracy(test), "problems": n}}  # for who reads the numbers and no verb
    metrics |= {arm: {} for arm in cfg.methods} | {f"{a} - {b}": {} for a, b in PAIRS if {a, b} <= set(cfg.methods)}
    for language in LANGUAGES:
        for view, values in look(world, models.base, test, language, spans).items():
            metrics.setdefault(view, {}).update({f"{name} {language}": float(value) for name, value in values.items()})
        rows = [prompt + solution for prompt, solution in (exercise(world, p, language) for p in shown)]
        dynamic, rng = entropy_span(entropy_curve(models.base, *pad(rows)), cfg.threshold), random.Random(f"{seed}/{language}/spans")
        chosen = {"sl-d": [dynamic] * n, "sl-h": [heuristic_span(cfg.layers, rng) for _ in test]}
        prompts, right, said = [exercise(world, p, language)[0] for p in test], {}, {}
        for name in progress(cfg.methods, f"decode {language}"):
            said[name] = answer(cfg, ARMS[name], models, prompts, chosen.get(ARMS[name].span, [ARMS[name].span] * n))
            right[name] = [world.final_number(ids) == p.final for ids, p in zip(said[name], test)]
            words = [world.language_of[i] for ids in said[name] for i in ids if world.language_of[i]]
            metrics[name] |= {f"acc {language}": sum(right[name]) / n, f"spoken {language}": words.count(language) / max(1, len(words))}
        for pair in [pair for pair in PAIRS if set(pair) <= set(right)]:
            d = [x - y for x, y in zip(*(right[name] for name in pair))]  # problem by problem: 1 only the first solves it, -1 the second
            metrics[" - ".join(pair)] |= {f"gained {language}": d.count(1) / n, f"lost {language}": d.count(-1) / n}
        metrics.get("sl-d", {})[f"m {language}"] = dynamic[0]
        if {"beta 0", "greedy"} <= set(said):
            metrics["beta 0"][f"same {language}"] = sum(a == b for a, b in zip(said["beta 0"], said["greedy"])) / n
    for values in metrics.values():
        for name in [key.removesuffix(f" {BASE}") for key in values if key.endswith(f" {BASE}")]:
            values[f"{name} others"] = sum(values[f"{name} {language}"] for language in OTHERS) / len(OTHERS)
    if "sl-d" in cfg.methods:
        metrics["sl-d"] |= cost(cfg, models.base, dynamic, prompts)
    return Outcome(metrics, {})


# --- claims

def difference(metrics: dict, pair: str, languages: Sequence[str]) -> tuple[float, float, float]:
    """Accuracy of a - b over the problems of all seeds, with the 95% interval of a paired bootstrap."""
    d, n = [], metrics["verb-blind"]["problems"]["values"][0]
    for language in languages:
        for gained, lost in zip(metrics[pair][f"gained {language}"]["values"], metrics[pair][f"lost {language}"]["values"]):
            plus, minus = round(gained * n), round(lost * n)
            d += [1] * plus + [-1] * minus + [0] * (round(n) - plus - minus)
    return paired_bootstrap(d, [0] * len(d), samples=1000)


def claims(metrics: dict) -> list[dict]:
    """The paper's claims, decided on means over seeds and on intervals over problems. The rules were fixed before the default seeds ran."""
    L = sum(view[0] == "h" and view[1:].isdigit() for view in metrics)  # blocks: the exits are h0 ... h(L-1)
    lower, single, wide = [f"h{i}" for i in range(1, L // 2 + 1)], [f"[{m},{m + 1})" for m in range(1, max(2, L // 2))], f"[1,{L - 1})"
    dolas, ours, every = ("dola", "dola norm"), ("sl-h", "sl-d"), list(LANGUAGES)
    harm, gain, win = ([f"{a} - {b}" for a in first for b in second] for first, second in (
        (dolas, ["greedy"]), (ours, ["greedy"]), (ours, dolas)))
    mean, low, high = ((lambda pair, languages, k=k: difference(metrics, pair, languages)[k]) for k in range(3))

    def contrasted(id, statement, rule, pairs, groups, test, paper, more=()):
        if missing := [pair for pair in pairs if pair not in metrics]:
            return claim(id, statement, rule, f"not in this run: {', '.join(missing)}", None, paper)
        measured = "; ".join(f"{pair}: " + ", ".join("{} {:+.3f} [{:+.3f}, {:+.3f}]".format(
            "/".join(g), *difference(metrics, pair, g)) for g in groups) for pair in (*pairs, *more) if pair in metrics)
        return claim(id, statement, rule, measured, test(), paper)

    def worse(view):  # by how much this amateur reasons worse than the expert, per seed
        return [e - v for e, v in zip(metrics["expert"]["reasoning others"]["values"], metrics[view]["reasoning others"]["values"])]

    table = [
        check(metrics, "C1", "Other languages' early exits speak English", f"exits 1 to {L // 2}: English above own in each language, and "
              "on average by 0.3; last layer: own >= 0.9", {"base others": lower, "own others": [*lower, "expert"]}, lambda m: all(
                  m(h, f"base {lang}") > m(h, f"own {lang}") and m("expert", f"own {lang}") >= 0.9 for h in lower for lang in OTHERS)
              and sum(m(h, "base others") - m(h, "own others") for h in lower) >= 0.3 * len(lower), "early exits speak the wrong language"),
        check(metrics, "C2", "The skipping amateur speaks the right language, unless too much is skipped", "SL-H's spans, each language: "
              "own within 0.05 of the expert's; all but the first and last block skipped: below it by 0.2",
              {"own others": ["expert", *single, wide]}, lambda m: m(wide, "own others") <= m("expert", "own others") - 0.2 and all(
                  abs(m(s, f"own {lang}") - m("expert", f"own {lang}")) <= 0.05 for s in single for lang in OTHERS), "right language"),
        contrasted("C3", "DoLa harms, other languages more than English", "both lenses, no penalty: interval below 0 in the "
                   "other languages, and they lose more than en", harm, [[BASE], OTHERS], lambda: all(
                       high(d, OTHERS) < 0 and mean(d, OTHERS) < mean(d, [BASE]) for d in harm), "DoLa fails outside English",
                   ["dola penalty - greedy"]),
        contrasted("C4", "SL-H and SL-D beat DoLa", "both lenses, no penalty: above DoLa in every language, and the interval over all "
                   "languages above 0", win, [[lang] for lang in every] + [every], lambda: all(low(d, every) > 0 and all(
                       mean(d, [lang]) > 0 for lang in every) for d in win), "better than DoLa on mGSM (11 languages)",
                   ["sl-d - mild exit"]),
        contrasted("C5", "SL-H and SL-D beat greedy decoding", "all languages: both intervals above 0", gain, [[BASE], OTHERS, every],
                   lambda: all(low(d, every) > 0 for d in gain), "better than greedy on average"),
        check(metrics, "C6", "The amateur is fluent and reasons worse", "SL-H's spans, other languages: function words within 0.01 of the "
              "expert's; verbs, signs and results below it on average by 0.01 and in every seed", {f"{k} others": ["expert", *single]
              for k in ("function", "reasoning")}, lambda m: min(losses := [sum(x) / len(x) for x in zip(*map(worse, single))]) > 0
              and sum(losses) / len(losses) >= 0.01 and all(
                  abs(m(s, "function others") - m("expert", "function others")) <= 0.01 for s in single), "weaker, but fluent", 3),
        check(metrics, "C7", "A token costs (2L - n)/L of greedy's block evaluations", "counted in the caches: equal; time within 15%",
              {k: ["sl-d"] for k in ("blocks", "formula", "time")}, lambda m: abs(m("sl-d", "blocks") - m("sl-d", "formula")) < 1e-9
              and abs(m("sl-d", "time") / m("sl-d", "formula") - 1) <= 0.15),
        check(metrics, "R1", "Refutation: with beta = 0 the decoder is greedy decoding", "every answer is the same, token by token",
              {f"same {lang}": ["beta 0"] for lang in LANGUAGES}, lambda m: all(m("beta 0", f"same {lang}") == 1 for lang in LANGUAGES)),
    ]
    solved = metrics.get("greedy", {}).get(f"acc {BASE}", {"mean": 0.0})["mean"]
    if solved < 0.85:  # a model that cannot solve English problems says nothing about decoding
        failed = f"gate failed: greedy English {solved:.2f} < 0.85. "
        table[:6] = [c | {"holds": None, "measured": failed + c["measured"]} for c in table[:6]]
    return table


# --- figure

def figure(results: dict):
    """Above: which language each early exit and each amateur speaks. Below: entropy by depth; accuracy by decoding."""
    metrics, (fig, axes) = results["metrics"], new_figure(2, 3, width=14, height=8.5)
    L = sum(view[0] == "h" and view[1:].isdigit() for view in metrics)
    depth = [*(f"h{i}" for i in range(L)), "expert"]
    seeds = lambda views, name: list(zip(*(metrics[view][name]["values"] for view in views)))
    for ax, language in zip(axes[0], OTHERS):
        for color, name, label in ((COLORS[0], "own", "the text's language"), (COLORS[1], "base", "English")):
            plot_seeds(ax, range(L + 1), seeds(depth, f"{name} {language}"), f"early exit says {label}", color)
            amateurs = [metrics[f"[{m},{m + 1})"][f"{name} {language}"]["mean"] for m in range(L)]
            ax.plot([m + 0.5 for m in range(L)], amateurs, "D", color=color, markersize=6, fillstyle="none", label=f"amateur says {label}")
        ax.set(xlabel=f"early exit ({L}: none) / skipped block", ylabel="share of words", title=f"A text in language {language}")
        ax.set_ylim(-0.03, 1.05)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    entropy, accuracy, gain = axes[1]
    for color, language in zip(COLORS, LANGUAGES):
        plot_seeds(entropy, range(L + 1), seeds(depth, f"entropy {language}"), language, color)
    for m in {m for lang in LANGUAGES for m in metrics.get("sl-d", {}).get(f"m {lang}", {"values": []})["values"]}:
        entropy.axvspan(m, m + 1, color="#999999", alpha=0.25)
    entropy.set(xlabel="early exit (grey: skipped by SL-D)", ylabel="entropy (nats)", title="Uncertainty by depth")
    entropy.legend()
    names = [name for name in Config.methods if name in metrics and name != "beta 0"][::-1]
    for (k, language), (row, name) in product(enumerate(LANGUAGES), enumerate(names)):
        values, y = metrics[name][f"acc {language}"]["values"], row + 0.15 * (1.5 - k)
        change = [v - g for v, g in zip(values, metrics.get("greedy", metrics[name])[f"acc {language}"]["values"])]
        accuracy.plot(sum(values) / len(values), y, "o", color=COLORS[k], markersize=7, label=None if row else language)
        for ax, points in ((accuracy, values), (gain, change)):
            ax.plot(points, [y] * len(points), ".", color=COLORS[k], alpha=0.6, markersize=6)
    for ax, title, label in ((accuracy, "Right answers (small dots: seeds)", "accuracy"), (gain, "Every seed", "accuracy minus greedy's")):
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel=label, title=title)
    gain.axvline(0, color="#999999", linewidth=1)
    starts = [f"skip {m}" for m in range(L)]
    if {"greedy", *starts} <= set(metrics):  # --full: a sweep in place of the last panel
        gain.clear()
        for color, which in ((COLORS[0], BASE), (COLORS[1], "others")):
            plot_seeds(gain, range(L), seeds(starts, f"acc {which}"), "English" if which == BASE else "other languages", color)
            gain.axhline(metrics["greedy"][f"acc {which}"]["mean"], color=color, linestyle=":", linewidth=1.5)
        gain.set(xlabel="the one block that is skipped", ylabel="accuracy (dotted: greedy)", title="Where to skip")
        gain.legend()
    accuracy.legend(loc="lower left")
    return fig


def main(cfg: Config) -> dict:
    started, asked, world = time.time(), cfg, replace(WORLD, seed=cfg.seeds[0])
    if wrong := set(cfg.methods) - set(ARMS):
        raise InputError(f"--methods {' '.join(sorted(wrong))} is not known; give some of {', '.join(ARMS)}")
    check_contrast(cfg.alpha, cfg.beta)
    if cfg.full:
        cfg = replace(cfg, methods=tuple(ARMS))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], steps=3, problems=2, exemplars=2)
    rng = random.Random("an example")
    print(f"A training text, every token a target:\n  {world.text(document(world, TEXT, rng))}\nA test problem and its answer:")
    print("  " + "\n  ".join(map(world.text, exercise(world, world.sample(rng, "test"), "a"))))
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics({arm: row for arm, row in results["metrics"].items() if arm in ARMS}, [f"acc {lang}" for lang in (*LANGUAGES, "others")])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
