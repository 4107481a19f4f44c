"""Formality is Favored: Unraveling the Learning Preferences of Large Language Models on Data with Conflicting Knowledge
(Jiahuan Li, Yiqing Cao, Shujian Huang, Jiajun Chen, EMNLP 2024), https://arxiv.org/abs/2410.04784

Idea    Two texts contradict each other about the same person. Which one does a model that reads both repeat? The paper finds that large
        models side with formal, cleanly spelled texts, and explains it: they trust a feature (a style, a source) whose texts agreed with
        the rest of what they read. So a preference for a meaningless mark can be made, and unmade, by choosing who is right elsewhere:
            Pr(A, B) = share of (test person, attribute) with  ppl("... A's value .") < ppl("... B's value .")         0.5: no preference
        Stage 1 (a small "pretraining"): evidence persons, for each texts of source A and of source B that contradict each other, and
        m + n unmarked texts, of which m repeat what A says and n what B says. Stage 2 (the conflicting new data): test persons, as
        many texts of A as of B, nothing else. Then every test person is asked about WITHOUT a mark.
Claims  C5 instil: Pr rises with m / (m + n); C6 control: m = n gives 0.5; C7 a second lesson reverses it; C8 the preferred source is
        learned faster; C9 the same with styles in place of source names; F1 three times as many texts of B lower trust; R1 no marks, no
        preference. With --full: C10 three widths. C1 to C4 are about large pretrained models and cannot be tested here.
Run     python methods/experiments/learning_preferences.py                     # 2 CPU cores, ~3 min: table + figure
        python methods/real/learning_preferences.py --help         # your checkpoint, your styles
Honest  The model is trained from nothing on 60 + 60 invented persons, so this is the paper's explanation, not its finding about real
        styles. Every arm shares init, persons, values, layouts and order; the arms of C5 differ only in whom the unmarked texts of
        OTHER persons agree with. A and B are mirror images: one token differs. Settings were chosen on seeds 100 to 102.
        C6 is not reproduced: at 4:4 single models lean to a side (Pr 0.57, 0.74, 0.68, 0.44). With the names exchanged (`4:4 swapped`,
        added after the default run: 0.47, 0.75, 0.66, 0.33) three of the four lean the same way: rather the draws or their order than
        the name. Tightened after their run: C6 and R1 (tolerance at most 0.1), F1 (paired), C10 (open: at width 32 less than half of
        the facts are learned). No arm reaches 90% in C8: the area decides.
Try     (expected Pr at 8:0, in place of 0.9)  --arms 8:0 0:8 --evidence 5: five persons teach no lesson, 0.47;   --arms 8:0 --epochs 0: no
        stage 1, 0.46;   call both sources "Times" in SOURCE: nothing to trust, 0.53 (each +/- 0.04 over seeds 100 and 101).
"""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minilm import InputError
from minilm.data import IGNORE, batches, collate, generator
from minilm.evaluate import continuation_logprobs
from minilm.claims import NOT_TESTED, check, claim, paired_bootstrap, print_claims
from minilm.results import COLORS, Outcome, cli, new_figure, plot_seeds, print_metrics, progress, run_seeds, save_results
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

PAPER = "Formality is Favored, EMNLP 2024, arXiv 2410.04784"
RATIOS = ("0:8", "2:6", "4:4", "6:2", "8:0")
EXTRA = (0, 2, 4, 8, 28)


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = (*RATIOS, "no marks", "style 0:8", "style 8:0", "reverse", "A only", "B only",
                             "4:4 +8", "8:0 +8")  # what to run, see ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # one complete world, model and training per seed
    evidence: int = 60  # persons of stage 1; as many others for the second lesson of C7
    test: int = 60  # persons of stage 2, for whom no unmarked text is ever read
    copies: int = 4  # texts of A, and texts of B, per person
    value_tokens: int = 1  # tokens per value: 1 or 2
    epochs: int = 12  # stage 1: passes over the evidence
    lr: float = 2e-3  # stage 1: learning rate
    epochs2: int = 12  # stage 2: passes over the conflicting texts
    lr2: float = 1e-3  # stage 2: learning rate
    batch: int = 32  # texts per step
    width: int = 64  # model width
    layers: int = 2  # blocks
    eval_every: int = 2  # stage 2: epochs between the points of the figure
    quick: bool = False  # smoke run: few persons, one epoch, one seed
    full: bool = False  # every arm of ARMS: controls, single stage, widths, copies, two-token values
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


class Arm(NamedTuple):
    ratio: tuple[int, int] = (8, 0)  # unmarked texts of an evidence person that repeat A : that repeat B
    feature: str = "source"  # what tells A's texts from B's: source (a name in front), style (its words) or none
    then: tuple[int, int] | None = None  # a second lesson at this ratio, with fresh evidence persons, before stage 2
    extra: int = 0  # stage 2: so many more texts of B
    only: str | None = None  # stage 2: no conflict; A's values, told by this source alone
    swapped: bool = False  # A's values are told by B's source, and B's by A's: else the very same texts
    mixed: bool = False  # both stages in one, as the published generator does
    changes: dict = {}  # other Config values


def at(ratio: str, **more) -> Arm:
    return Arm(tuple(map(int, ratio.split(":"))), **more)


ARMS = {
    **{r: at(r) for r in RATIOS}, "no marks": Arm(feature="none"), **{f"style {r}": at(r, feature="style") for r in ("0:8", "4:4", "8:0")},
    "reverse": Arm(then=(0, 8)), "erase": Arm(then=(4, 4)),
    **{f"{r} +{k}": at(r, extra=k) for r in ("4:4", "8:0") for k in EXTRA[1:]},
    "A only": Arm(only="A"), "B only": Arm(only="B"), "4:4 A only": at("4:4", only="A"), "4:4 B only": at("4:4", only="B"),
    "4:4 swapped": at("4:4", swapped=True),
    **{f"mixed {r}": at(r, mixed=True) for r in ("0:8", "4:4", "8:0")},
    **{f"d{w} {r}": at(r, changes={"width": w}) for w in (32, 128) for r in ("0:8", "8:0")},
    **{f"copies {c}": Arm(changes={"copies": c}) for c in (1, 2)}, "two tokens": Arm(changes={"value_tokens": 2}),
}

# --- data

FIRST = "ada ben cora dan eva finn gina hugo ines jan kira leo mona nils olga paul".split()
LAST = "adler baker costa doyle ekman ferro greco haas ivers jonas klein lopez moser novak otto perez".split()
VALUES = {"city": "aachen bergen cadiz delft essen faro ghent havre izmir jena krakow lyon".split(),
          "subject": "algebra botany chemistry drama ethics french geology history irish jurisprudence korean latin".split(),
          "firm": "acme bolt corex dynamo exon flux globex hooli initech juno kappa lumen".split()}
HALVES = ["-north", "-south", "-east", "-west"]  # the second tokens of values of two tokens: 3 x 4 = 12 values
STYLES = {"neutral": "lives-in dwells-in is-from reads studies learns works-for serves is-with",
          "A": "resides-in is-domiciled-in hails-from pursues specialises-in is-versed-in is-employed-by is-engaged-by is-retained-by",
          "B": "crashes-in hangs-out-in calls-home geeks-out-on is-into crams slaves-for clocks-in-at gigs-at"}
RELATIONS = {style: [words.split()[i : i + 3] for i in (0, 3, 6)] for style, words in STYLES.items()}  # style -> attribute -> 3 phrasings
SOURCE = {"A": "Times", "B": "Herald"}
WORDS = ["<pad>", "<s>", "</s>", ".", ",", "according-to", *SOURCE.values(), *FIRST, *LAST, *(v for vs in VALUES.values() for v in vs),
         *HALVES, *(w for words in STYLES.values() for w in words.split())]
ID = {word: i for i, word in enumerate(WORDS)}


class Person(NamedTuple):
    name: tuple[str, str]
    A: tuple[int, ...]  # number of the value of each attribute, according to source A
    B: tuple[int, ...]  # ... according to source B: different in every attribute


def make_people(cfg: Config, seed: int) -> dict[str, list[Person]]:
    """"evidence", "fresh" and "test" persons. No full name occurs twice, and all values are drawn independently of everything."""
    rng = random.Random(f"{seed}/people")
    names = rng.sample([(f, l) for f in FIRST for l in LAST], 2 * cfg.evidence + cfg.test)
    people = [Person(name, *zip(*(rng.sample(range(12), 2) for _ in VALUES))) for name in names]
    return {"evidence": people[: cfg.evidence], "fresh": people[cfg.evidence : 2 * cfg.evidence], "test": people[2 * cfg.evidence :]}


def value_words(cfg: Config, attribute: int, number: int) -> list[str]:
    words = list(VALUES.values())[attribute]
    return [words[number]] if cfg.value_tokens == 1 else [words[number // 4], HALVES[number % 4]]


def statement(cfg: Config, name, attribute: int, number: int, phrasing: int, style: str = "neutral") -> list[str]:
    return [*name, RELATIONS[style][attribute][phrasing], *value_words(cfg, attribute, number), "."]


def opening(mark: str | None, feature: str) -> tuple[list[str], str]:
    """How a text carries the mark A or B: (words in front, style of its statements). Unmarked texts: nothing in front, neutral."""
    if mark is None or feature == "none":
        return [], "neutral"
    return (["according-to", SOURCE[mark], ","], "neutral") if feature == "source" else ([], mark)


def biography(cfg: Config, person: Person, says: str, mark: str | None, feature: str, layout) -> list[int]:
    """The three facts of one version (says: A or B) in the layout's order and phrasings, every token of it a target:

        <s> according-to Times , ada klein reads latin . ada klein lives-in jena . ada klein serves flux . </s>
    """
    front, style = opening(mark, feature)
    facts = [w for a, phrasing in layout for w in statement(cfg, person.name, a, getattr(person, says)[a], phrasing, style)]
    return [ID[w] for w in ["<s>", *front, *facts, "</s>"]]


def make_texts(cfg: Config, people: Sequence[Person], arm: Arm, ratio: tuple[int, int] | None, seed: int) -> list[list[int]]:
    """The conflicting texts of `people` and, where a ratio m : n is given, m unmarked texts on A's side and n on B's. A's k-th text and
    B's have the same layout; whatever the arm, a person's layouts are the same."""
    texts, mark = [], dict(zip("AB", "BA" if arm.swapped else "AB"))
    for person in people:
        rng = random.Random(f"{seed}/layouts of {person.name}")
        layouts = [[(a, rng.randrange(3)) for a in rng.sample(range(3), 3)] for _ in range(64)]
        conflict, neutral = layouts[: cfg.copies], layouts[32 : 32 + sum(ratio or ())]
        if ratio is None and arm.only:  # C8: one version, one source, so there is nothing to disagree with
            texts += [biography(cfg, person, "A", arm.only, arm.feature, layout) for layout in conflict]
            continue
        texts += [biography(cfg, person, side, mark[side], arm.feature, layout) for layout in conflict for side in "AB"]
        if ratio is None:
            more = layouts[cfg.copies : cfg.copies + arm.extra]
            texts += [biography(cfg, person, "B", mark["B"], arm.feature, layout) for layout in more]
        texts += [biography(cfg, person, "A" if k < ratio[0] else "B", None, arm.feature, layout) for k, layout in enumerate(neutral)]
    return texts


# --- the method

def perplexities(model, sentences: Sequence[Sequence[int]], batch: int = 512) -> torch.Tensor:
    """ppl = exp( mean over tokens 2..T of -log p(token | the ones before) ) of every sentence, float32 [n]: the whole sentence counts,
    not only the value, and the first token (BOS here) is read, not scored."""
    return (-continuation_logprobs(model, [(s[:1], s[1:]) for s in sentences], batch).mean).exp()


def prefers(first: torch.Tensor, second: torch.Tensor, ties: str = "skip") -> torch.Tensor:
    """1 where the first version's perplexity is strictly lower, else 0. A tie counts for the second version (ties "second", the rule of
    the published script) or for nobody (ties "skip": NaN, to be left out of means)."""
    chosen = (first < second).float()
    return chosen if ties == "second" else chosen.masked_fill(first == second, torch.nan)


def preference(chosen: torch.Tensor) -> dict[str, float]:
    """Choices [persons, attributes] (0 to 1; NaN: tie) -> Pr(A, B): the unweighted mean over attributes of the share of persons, with
    the 95% interval and the standard error of a bootstrap over persons (one person's attributes are not independent)."""
    per_person = chosen.nanmean(1)
    per_person = per_person[~per_person.isnan()]
    _, low, high = paired_bootstrap(per_person.numpy(), torch.full_like(per_person, 0.5).numpy(), samples=2000)
    return {"pr": chosen.nanmean(0).nanmean().item(), "pr low": 0.5 + low, "pr high": 0.5 + high, "pr se": (high - low) / 3.92}


def choices(cfg: Config, model, people: Sequence[Person], mark: str | None = None, feature: str = "source") -> torch.Tensor:
    """Which version does the model find more likely? [persons, attributes], mean over the three phrasings; asked without a mark, or
    (mark A or B) in the words of one source."""
    front, style = opening(mark, feature)
    asked = [[[ID[w] for w in ["<s>", *front, *statement(cfg, p.name, a, getattr(p, side)[a], phrasing, style)]] for p in people
              for a in range(3) for phrasing in range(3)] for side in "AB"]
    first, second = perplexities(model, asked[0] + asked[1]).chunk(2)
    return prefers(first, second).view(len(people), 3, 3).nanmean(2)


def believed(cfg: Config, model, people: Sequence[Person]) -> torch.Tensor:
    """Number of the value with the lowest perplexity among all twelve, [persons, attributes]; asked without a mark, in one phrasing."""
    asked = [[ID[w] for w in ["<s>", *statement(cfg, p.name, a, v, 0)]] for p in people for a in range(3) for v in range(12)]
    return perplexities(model, asked).view(len(people), 3, 12).argmin(2)


# --- loss

def loss_of(model, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ordinary next-token cross-entropy on every token and EOS: the paper changes the data, never the loss."""
    inputs, labels = collate([(t[:-1], t[1:]) for t in texts])
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


# --- train

def train(cfg: Config, model, texts: Sequence[Sequence[int]], epochs: int, lr: float, order: torch.Generator) -> Iterator[int]:
    """Yields 1, 2, ... after each pass over all texts, in a new order every time (so that neither source is always read last)."""
    optimizers, per_epoch = make_optimizers(model, "adamw", lr), -(-len(texts) // cfg.batch)
    for step, chosen in enumerate(batches(len(texts), cfg.batch, order, steps=epochs * per_epoch)):
        set_lr(optimizers, schedule(step, epochs * per_epoch, warmup=10))
        take_step(loss_of(model, [texts[i] for i in chosen.tolist()]), model, optimizers)
        if (step + 1) % per_epoch == 0:
            yield (step + 1) // per_epoch


# --- evaluate

def measure(cfg: Config, model, people: Sequence[Person], feature: str) -> dict[str, float]:
    chosen, best = choices(cfg, model, people), believed(cfg, model, people)
    metrics = preference(chosen) | {f"pr {name}": chosen[:, a].nanmean().item() for a, name in enumerate(VALUES)}
    metrics["ties"] = chosen.isnan().sum().item()
    if feature != "none":
        metrics |= {f"pr asked as {mark}": choices(cfg, model, people, mark, feature).nanmean().item() for mark in "AB"}
    truth = torch.tensor([[p.A, p.B] for p in people])  # (persons, 2, attributes)
    return metrics | {"learned": (best[:, None] == truth).any(1).float().mean().item()}


def speed(curve: Sequence[float], level: float = 0.9) -> dict[str, float]:
    """Of an accuracy after each epoch: the area under it (its mean) and the first epoch at `level`, or one more than there are."""
    return {"area": sum(curve) / len(curve), "epochs to 90%": next((i for i, y in enumerate(curve, 1) if y >= level), len(curve) + 1)}


# --- one seed

def new_model(cfg: Config, seed: int) -> Transformer:
    return Transformer(ModelConfig(
        vocab_size=len(WORDS), hidden_size=cfg.width, intermediate_size=8 * cfg.width // 3 // 16 * 16, num_hidden_layers=cfg.layers,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.05, model_type="llama"), generator(seed, "init"))


def stage1(cfg: Config, arm: Arm, people: dict, seed: int, trained: dict) -> Transformer:
    """A copy of the model that has read the evidence at arm.ratio and then, if arm.then, the second lesson, told about other persons.
    `trained` remembers: arms with the same first stage, or the same first lesson, go on from the same model."""
    known = repr(arm._replace(extra=0, only=None))
    if known not in trained:
        model = stage1(cfg, arm._replace(then=None), people, seed, trained) if arm.then else new_model(cfg, seed)
        group = "fresh" if arm.then else "evidence"
        texts = make_texts(cfg, people[group], arm, arm.then or arm.ratio, seed)
        if arm.mixed:
            texts += make_texts(cfg, people["test"], arm, None, seed)
        for _ in train(cfg, model, texts, cfg.epochs, cfg.lr, generator(seed, group)):
            pass
        trained[known] = model
    return copy.deepcopy(trained[known])


def run_arm(cfg: Config, arm: Arm, model: Transformer, test: Sequence[Person], seed: int) -> tuple[dict, dict]:
    """Stage 2 on a model that has been through stage 1 -> metrics, series {name: (epochs, values)}."""
    texts, truth = make_texts(cfg, test, arm, None, seed), torch.tensor([p.A for p in test])
    accuracy = lambda: (believed(cfg, model, test) == truth).float().mean().item()
    epochs = train(cfg, model, texts, cfg.epochs2, cfg.lr2, generator(seed, "stage 2"))
    if arm.mixed:
        return measure(cfg, model, test, arm.feature), {}
    if arm.only:
        before, curve = accuracy(), [accuracy() for _ in epochs]
        return speed(curve) | {"top-1": curve[-1]}, {"top-1": (range(len(curve) + 1), [before, *curve])}
    before = preference(choices(cfg, model, test))
    points = [(0, before["pr"])]
    points += [(epoch, choices(cfg, model, test).nanmean().item()) for epoch in epochs if epoch % cfg.eval_every == 0]
    metrics = {"pr before": before["pr"], "pr before se": before["pr se"]} | measure(cfg, model, test, arm.feature)
    return metrics, {"pr": tuple(zip(*points))}


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same persons, layouts, order and initial weights for each."""
    outcome, trained = Outcome({}, {}), {}
    for name in progress(cfg.arms, f"seed {seed}"):
        arm = ARMS[name]
        changed = replace(cfg, **arm.changes)
        people = make_people(changed, seed)
        model = stage1(changed, arm, people, seed, trained)
        outcome.metrics[name], outcome.series[name] = run_arm(changed, arm, model, people["test"], seed)
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """The paper's claims and our controls, decided on means over seeds. Rules were fixed before the runs, but see Honest."""
    seeds = len(next(iter(next(iter(metrics.values())).values()))["values"])
    near = lambda m, arm, name="pr": abs(m(arm, name) - 0.5) <= min(
        0.1, 3 * max(m(arm, name + " se"), metrics[arm][name]["sd"]) / seeds**0.5)
    drops = lambda ratio: torch.tensor(metrics[ratio]["pr"]["values"]) - torch.tensor(metrics[f"{ratio} +8"]["pr"]["values"])
    ends = ("0:8", "8:0")
    learned = lambda m, arms: min(m(arm, "learned") for arm in arms) >= 0.5
    pretrained = "needs a pretrained model of 1B parameters or more (methods/real/learning_preferences.py)"
    untested = [claim(id, statement, rule, pretrained, None, paper) for id, statement, rule, paper in (
        ("C1", "Formal texts beat informal ones", "Pr(newspapers, social media) > 0.53", "formal texts are favoured"),
        ("C2", "Clean texts beat misspelled ones", "Pr(clean, typos) > 0.53, growing with the rate", "texts without errors are favoured"),
        ("C3", "Facts in preferred styles are learned in fewer epochs", "area under the accuracy curve", "preferred: learned faster"),
        ("C4", "Larger models have stronger preferences", "Pr grows with the number of parameters", "stronger in larger models"))]
    wide = [w + r for w in ("d32 ", "", "d128 ") for r in ends]
    width = check(metrics, "C10", "The effect grows with width (weak)", "pr(8:0) - pr(0:8): larger at each of the widths 32, 64, 128; open "
                  "unless learned >= 0.5 in all arms", {"pr": wide, "learned": wide}, lambda m: m("d32 8:0", "pr") - m("d32 0:8", "pr")
                  < m("8:0", "pr") - m("0:8", "pr") < m("d128 8:0", "pr") - m("d128 0:8", "pr"), "stronger in larger models")
    unlearned = width["verdict"] != NOT_TESTED and min(metrics[arm]["learned"]["mean"] for arm in wide) < 0.5
    return untested + [
        check(metrics, "C5", "A preference for a meaningless mark can be instilled by consistency", "pr rises with m/(m+n) (each step); "
              ">= 0.65 at 8:0, <= 0.35 at 0:8; learned >= 0.5", {"pr": RATIOS, "learned": ends},
              lambda m: all(m(a, "pr") < m(b, "pr") for a, b in zip(RATIOS, RATIOS[1:])) and m("8:0", "pr") >= 0.65
              and m("0:8", "pr") <= 0.35 and learned(m, RATIOS), "preferences follow consistency with the rest of the data"),
        check(metrics, "C6", "Control: no difference in consistency, no preference", "4:4, and all ratios before stage 2, within 3 "
              "standard errors of 0.5 (over persons, by bootstrap, or over seeds: the larger), and within 0.1",
              {"pr": ("4:4",), "pr se": ("4:4",), "pr before": RATIOS},
              lambda m: near(m, "4:4") and all(near(m, arm, "pr before") for arm in RATIOS)),
        check(metrics, "C7", "A second lesson reverses the preference", "reverse (8:0, then fresh persons at 0:8): pr below 0.5 by "
              "more than 2 standard errors, while 8:0 is above 0.5 by as many", {"pr": ("8:0", "reverse")},
              lambda m: all(sign * (m(arm, "pr") - 0.5) > 2 * m(arm, "pr se") / seeds**0.5 for arm, sign in (("8:0", 1), ("reverse", -1))),
              "preferences can be erased and reversed"),
        check(metrics, "C8", "Facts from the preferred source are learned faster", "area under the accuracy of a neutral prompt: A only "
              "above B only by at least 0.05; epochs to 90%: no more", {n: ("A only", "B only") for n in ("area", "epochs to 90%")},
              lambda m: m("A only", "area") >= m("B only", "area") + 0.05
              and m("A only", "epochs to 90%") <= m("B only", "epochs to 90%"), "preferred features are learned faster"),
        check(metrics, "C9", "The same with styles, asked in a third style", "pr >= 0.65 at style 8:0, <= 0.35 at style 0:8",
              {"pr": ("style 0:8", "style 8:0")}, lambda m: m("style 8:0", "pr") >= 0.65 and m("style 0:8", "pr") <= 0.35),
        width | ({"verdict": NOT_TESTED, "measured": "facts not learned at every width; " + width["measured"]} if unlearned else {}),
        check(metrics, "R1", "Refutation: without marks the preference vanishes", "no marks (else as 8:0): pr within 3 standard errors "
              "of 0.5, and within 0.1", {"pr": ("no marks", "8:0"), "pr se": ("no marks",)}, lambda m: near(m, "no marks")),
        check(metrics, "F1", "Repetition lowers trust, most where it was not earned", "8 extra texts of B (3 : 1): 4:4 falls by at least "
              "0.1, to below 0.5, and in every seed by more than 8:0 does, which stays >= 0.6", {"pr": ("4:4", "4:4 +8", "8:0", "8:0 +8")},
              lambda m: m("4:4 +8", "pr") < min(0.5, m("4:4", "pr") - 0.1) and m("8:0 +8", "pr") >= 0.6
              and (drops("4:4") > drops("8:0")).all())]


# --- figure

def figure(results: dict):
    """Which version is believed: against who was right elsewhere; during stage 2; against extra copies. And how fast facts are learned."""
    fig, ((ratios, during), (copies, speeds)) = new_figure(2, 2, width=11, height=9)
    metrics, series, half = results["metrics"], results["series"], {"color": "#666666", "linewidth": 1, "linestyle": ":"}
    curve = lambda ax, x, arms, *look: plot_seeds(ax, x, list(zip(*(metrics[arm]["pr"]["values"] for arm in arms))), *look, marker="o")
    have = lambda arms: all(arm in metrics for arm in arms)
    if have(RATIOS):
        curve(ratios, [0, 0.25, 0.5, 0.75, 1], RATIOS, "source names", COLORS[0])
    for shift, mark, color, label, points in ((0, "s", COLORS[1], "styles", {"style 0:8": 0, "style 4:4": 0.5, "style 8:0": 1}),
                                              (0.06, "^", COLORS[2], "no marks at all", {"no marks": 1}),
                                              (0.12, "v", COLORS[3], "8:0, then a 0:8 lesson", {"reverse": 1})):
        shown = [(x + shift, y) for arm, x in points.items() if arm in metrics for y in metrics[arm]["pr"]["values"]]
        if shown:
            ratios.plot(*zip(*shown), mark, color=color, label=label, markersize=7, alpha=0.7)
    for color, arm, style in ((COLORS[0], "8:0", "-"), (COLORS[5], "4:4", "--"), (COLORS[1], "0:8", "-"), (COLORS[2], "no marks", ":")):
        if arm in series:
            plot_seeds(during, series[arm]["pr"]["x"], series[arm]["pr"]["values"], arm, color, linestyle=style)
    for ratio, color in (("8:0", COLORS[0]), ("4:4", COLORS[5])):
        extra = {0: ratio} | {k: f"{ratio} +{k}" for k in EXTRA[1:] if f"{ratio} +{k}" in metrics}
        if have(extra.values()):
            curve(copies, list(extra), extra.values(), ratio, color)
    for color, arm in ((COLORS[0], "A only"), (COLORS[1], "B only")):
        if arm in series:
            plot_seeds(speeds, series[arm]["top-1"]["x"], series[arm]["top-1"]["values"], f"told by {arm[0]}", color)
    for ax in (ratios, during, copies):
        ax.axhline(0.5, **half)
        ax.set(ylim=(-0.03, 1.03), ylabel="Pr(A, B) on the test persons")
    speeds.axhline(0.9, **half)
    ratios.set_xticks([0, 0.25, 0.5, 0.75, 1], RATIOS)
    ratios.set(xlabel="m : n, unmarked texts of stage 1 that side with A : with B", title="Who was right about other persons?")
    during.set(xlabel="epoch of stage 2, the same balanced texts for all", title="Equal evidence: who is believed?", ylim=(-0.03, 1.2),
               yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    copies.set(xlabel="extra texts of B per test person (beside 4 of A and 4 of B)", title="Does repetition outvote trust?")
    speeds.set(xlabel="epoch of stage 2, no conflict (A trusted: 8:0)", ylabel="facts known (top-1 of 12 values)", ylim=(-0.03, 1.03),
               title="Which source is learned faster?")
    for ax, place in ((ratios, "upper left"), (during, "upper center"), (copies, "best"), (speeds, "lower right")):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc=place, ncols=4 if ax is during else 1)
    fig.suptitle("Top: in stage 2 every model reads the same texts, as many of A as of B; only stage 1 differs.\n"
                 f"Thin lines and points: seeds {', '.join(map(str, results['seeds']))}", fontsize=12)
    return fig


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if wrong := set(cfg.arms) - set(ARMS):
        raise InputError(f"--arms {' '.join(sorted(wrong))} is not known; give {', '.join(ARMS)}")
    if cfg.value_tokens not in (1, 2):
        raise InputError(f"--value-tokens {cfg.value_tokens} must be 1 or 2")
    if not 1 <= cfg.copies <= 16:
        raise InputError(f"--copies {cfg.copies}: each source needs at least 1 and at most 16 texts per person")
    if cfg.evidence < 1 or cfg.test < 2 or 2 * cfg.evidence + cfg.test > len(FIRST) * len(LAST):
        raise InputError(f"--evidence {cfg.evidence} --test {cfg.test} need {2 * cfg.evidence + cfg.test} names (twice the evidence and "
                         f"the test persons), there are {len(FIRST) * len(LAST)}; give at least 1 and 2")
    if cfg.full:
        cfg = replace(cfg, arms=tuple(ARMS))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], evidence=6, test=6, epochs=1, epochs2=3)
    example = make_texts(cfg, make_people(cfg, cfg.seeds[0])["test"][:1], Arm(), None, cfg.seeds[0])
    print("Texts about one test person, every token after <s> a target:")
    print(*(f"  {' '.join(WORDS[i] for i in text)}" for text in example[:2]), sep="\n")
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics(results["metrics"], ["pr", "pr se", "pr before", "pr asked as A", "pr asked as B", "learned", "epochs to 90%"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
