"""MoE-LPR: Multilingual Extension of Large Language Models through Mixture-of-Experts with Language Priors Routing
(Hao Zhou, Zhijun Wang, Shujian Huang, Xin Huang, Xue Han, Junlan Feng, et al., 2024), https://arxiv.org/abs/2408.11396

Idea    Teach a model new languages without losing the old ones. Copy every MLP into E experts and freeze all that existed before: expert
        0 is the old MLP. Stage 1 trains the other experts and the routers on new languages only. The old languages get lost although
        none of their weights changed, because the routers learned to send every token to the new experts. So stage 2 ("review") trains
        the routers alone, on a mix with less than 1% old-language text, and pulls old-language tokens to the frozen expert:
            L = L_next-token + gamma * mean over layers and old-language tokens of  -log G_0,      G = softmax(x W_r)
        Labels (old or new language) are used in training only; at test time the router recognises the language by itself.
Claims  C1 upcycling changes nothing; C2 frozen weights still forget; C3 the review recovers, cheaply; C4 the routing loss helps; C5 what
        it does to the router; C6 less forgetting than full fine-tuning and a fully trained mixture; C7 copied experts matter; C10 new
        languages as good as theirs. With --full: C8 review size; C9 number of experts; C11 old languages that are never reviewed.
Run     python methods/experiments/moe_lpr.py                     # 2 CPU cores, ~5 min: table + figure
        python methods/real/moe_lpr.py --help         # your own checkpoint and texts
Honest  Five invented languages in two scripts that share 8 letters; 2 layers, 107 thousand weights (311 with 4 experts). The base has seen
        a little of the new languages, as the paper's had. All arms share base, texts and order; those without a review read its
        old-language text in stage 1. Not reproduced: C10 (training all weights learns the new languages better, 0.58 against 0.74 nats),
        C9 (0.76, 0.74, 0.76, 0.76 with 2, 4, 6, 8 experts), C11 (an old language without review text stays lost). The best arm of --full
        is not the paper's: `one stage` keeps old languages as well (0.81) and is better on new ones (0.67 against 0.74) and on the
        unreviewed one (1.67 against 1.94) in all four seeds. C6 and C10 were tightened after their run: open unless every arm ran.
Try     (seed 100: recovery 92%, new cost 7%)  `moe.experts` for `moe.experts[1:]` in set_trainable: no frozen expert to return to,
        recovery 35%.  --gamma 3: recovery 96%, new cost 13%.  --scripts one: letters no longer tell languages apart, new cost 26%.
"""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from minilm import InputError
from minilm.data import batches, generator
from minilm.lora import add_lora
from minilm.moe import MoE, load_balancing_loss, router_stats, upcycle
from minilm.claims import HOLDS, NOT_TESTED, check, print_claims
from minilm.results import COLORS, Outcome, bar_seeds, cli, new_figure, print_metrics, progress, run_seeds, save_results
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

PAPER = "MoE-LPR, 2024, arXiv 2408.11396"


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("stage 1", "review ntp", "lpr", "ft 3e-4", "ft 1e-3", "ft 3e-3", "moe all", "no copies")  # see ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # languages, texts, base model and training of each are its own
    num_experts: int = 4  # expert 0 is the frozen one
    experts_per_token: int = 2  # experts that each token passes
    steps: int = 400  # stage 1: optimizer steps, one pass over as much text
    batch: int = 16  # stage 1: blocks per step
    lr: float = 3e-3  # stage 1: learning rate
    alpha: float = 0.01  # stage 1: weight of the load-balancing loss, in the paper's form (the official code's 0.01 is 0.02 here: K times)
    review_old: int = 62  # review: blocks of old-language text (0.97% of stage 1); twice as many of new-language text
    review_batch: int = 1  # review: blocks per step, one pass
    review_lr: float = 1e-2  # review: learning rate; routers are small and want a large one
    gamma: float = 0.1  # review: weight of the language-priors routing loss
    lpr_form: str = "paper"  # paper: -log softmax(z)_0; double: the official code's second softmax
    scripts: str = "two"  # letters: two scripts with a few shared letters, or one for old and new languages alike
    base_steps: int = 700  # pretraining of the base: optimizer steps
    base_lr: float = 4e-3  # pretraining of the base: learning rate
    block: int = 64  # characters per block
    width: int = 64  # model width
    layers: int = 2  # blocks of the model
    eval_blocks: int = 40  # held-out blocks per language
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every arm of ARMS: also one stage, LoRA, double softmax, review sizes, numbers of experts
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


class Arm(NamedTuple):
    start: str = "upcycled"  # what stage 1 begins with: upcycled, random (its new experts are), dense or lora
    trains: str = "new experts"  # in stage 1, see set_trainable
    replay: bool = False  # does stage 1 read the review's old-language text as well?
    lpr: bool = False  # does stage 1 have the routing loss (in place of the balancing loss)?
    review: str | None = None  # stage 2: ntp or lpr
    changes: dict = {}  # other Config values


SIZES = {0: "stage 1", 16: "review 16", 31: "review 31", 62: "lpr"}  # blocks of old-language text in the review
EXPERTS = {2: "2 experts", 4: "lpr", 6: "6 experts", 8: "8 experts"}
LPR, ALL = Arm(review="lpr"), Arm(trains="all", replay=True)
ARMS = {
    **{f"ft {lr}": ALL._replace(start="dense", changes={"lr": float(lr)}) for lr in ("3e-4", "1e-3", "3e-3")},
    "moe all": ALL, "stage 1": Arm(), "review ntp": Arm(review="ntp"), "lpr": LPR, "no copies": LPR._replace(start="random"),
    "one stage": Arm(replay=True, lpr=True), "lora": ALL._replace(start="lora", trains="adapters"),
    "double softmax": LPR._replace(changes={"lpr_form": "double"}),
    **{name: LPR._replace(changes={"review_old": n}) for n, name in SIZES.items() if name.startswith("review")},
    **{name: LPR._replace(changes={"num_experts": n}) for n, name in EXPERTS.items() if name != "lpr"},
}

# --- data

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz" + "бвгджзйклмнптфцчшщђћ", "aeiouyыэюя"  # 40 and 10 of two scripts
END = 0  # closes a document
LETTERS = "\n" + CONSONANTS + VOWELS + " ."
GROUPS = {"old": ("A", "B"), "ood": ("O",), "new": ("C", "D")}  # old and reviewed; old but never reviewed; new
Document = tuple[list[int], bool]  # token ids; is it in an old language?


class Language:
    """60 words of one to three syllables, and which words like to follow which. All of it is drawn from the seed and the name.

    Two scripts: old languages draw from the first 23 consonants and 6 vowels, new ones from the last: 6 and 2 of them are shared."""

    def __init__(self, seed: int, name: str, scripts: str):
        rng = random.Random(f"{seed}/language {name}")
        which = "one" if scripts == "one" else "new" if name in GROUPS["new"] else "old"
        C, V = {"old": (CONSONANTS[:23], VOWELS[:6]), "new": (CONSONANTS[17:], VOWELS[4:]), "one": (CONSONANTS[:15], VOWELS[:5])}[which]
        letters = {"C": rng.sample(C, 9), "V": rng.sample(V, 4)}
        templates = rng.choice([("CV", "CVC"), ("CV", "VC"), ("CVC", "V"), ("CV", "CCV")])
        words: list[str] = []
        while len(words) < 60:
            word = "".join(rng.choice(letters[kind]) for _ in range(rng.randint(1, 3)) for kind in rng.choice(templates))
            words += [word] * (word not in words)
        self.words, self.follow = words, [rng.sample(range(60), 5) for _ in words]

    def document(self, rng: random.Random) -> list[int]:
        """Six sentences of about eight words; the next word is one of the word's five followers (weights 1, 1/2, ... 1/5), or any (10%).

        "moc tade ril moc. sif tade moc ril fu tade. ...\\n" """
        text = ""
        for _ in range(6):
            at, sentence = rng.randrange(60), []
            while len(sentence) < 4 or rng.random() > 0.25:
                sentence.append(self.words[at])
                at = rng.randrange(60) if rng.random() < 0.1 else rng.choices(self.follow[at], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])[0]
            text += " ".join(sentence) + ". "
        return [LETTERS.index(c) for c in text.strip()]


def pack(documents: Sequence[Document], block: int, end: int = END) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each closed by `end`, one after the other, cut into rows: ids int64 [R, block] and old bool [R, block], where every token
    carries its document's label, the end included. One row may hold the end of an old document and the start of a new one."""
    stream = [(token, old) for ids, old in documents for token in (*ids, end)]
    rows = torch.tensor(stream[: len(stream) // block * block], dtype=torch.int64).view(-1, block, 2)
    return rows[..., 0], rows[..., 1].bool()


class Texts:
    """All text of one seed: `base`, `new` (stage 1), `replay` and `review_new` documents, `held_out` {language: ids [R, block]}."""

    def __init__(self, cfg: Config, seed: int):
        self.cfg, self.seed = cfg, seed
        languages = {name: Language(seed, name, cfg.scripts) for names in GROUPS.values() for name in names}

        def write(purpose: str, names: Sequence[str], blocks: int) -> list[Document]:
            """Shuffled documents, at most `blocks` of text in each language."""
            documents = []
            for name in names:
                rng, room = random.Random(f"{seed}/{purpose} {name}"), blocks * cfg.block
                while (room := room - len(ids := languages[name].document(rng)) - 1) >= 0:
                    documents.append((ids, name not in GROUPS["new"]))
            return random.Random(f"{seed}/{purpose}").sample(documents, len(documents))

        old, new, steps = GROUPS["old"], GROUPS["new"], cfg.base_steps * cfg.batch
        self.base = write("base", old + GROUPS["ood"], int(0.23 * steps)) + write("base, a little", new, int(0.023 * steps))
        self.new = write("new", new, cfg.steps * cfg.batch // len(new))
        self.replay = write("replay", old, cfg.review_old // len(old))
        self.review_new = self.new[: 2 * len(self.replay)]  # old : new documents = 1 : 2; seen in stage 1, like the paper's
        self.share = sum(len(d) + 1 for d, _ in self.replay) / sum(len(d) + 1 for d, _ in self.new)  # of tokens, counted
        read = {tuple(ids) for ids, _ in self.base + self.new + self.replay}  # nothing that any arm reads is asked at the end
        self.held_out = {name: pack([d for d in write("held out", [name], cfg.eval_blocks) if tuple(d[0]) not in read], cfg.block)[0]
                         for name in languages}

    def batches(self, documents: Sequence[Document], batch: int, purpose: str, steps: int | None = None) -> list[tuple[torch.Tensor, ...]]:
        """(ids, old) [batch, block] of every step: `steps` of them, or one pass."""
        order = random.Random(f"{self.seed}/order {purpose}").sample(list(documents), len(documents))
        ids, old = pack(order, self.cfg.block)
        rows = batches(len(ids), batch, generator(self.seed, f"batches {purpose}"), steps or len(ids) // batch)
        return [(ids[r], old[r]) for r in rows]


# --- the method

def set_trainable(model: nn.Module, what: str) -> None:
    """Which weights a stage trains: all; nothing; new experts (experts 1..E-1 and the routers); routers; adapters (as add_lora left it).
    Freezing is requires_grad off, so that the optimizer never sees the tensor: a gradient set to zero would not do, since weight decay
    still shrinks the weight."""
    if what == "adapters":
        return
    model.requires_grad_(what == "all")
    for moe in [m for m in model.modules() if isinstance(m, MoE)] if what in ("new experts", "routers") else []:
        moe.gate.requires_grad_(True)
        moe.experts[1:].requires_grad_(what == "new experts")


# --- loss

def lpr_loss(router_logits: Sequence[torch.Tensor], old: torch.Tensor, form: str = "paper") -> torch.Tensor:
    """Language Priors Routing:  mean over MoE layers and tokens t of old languages of  -log G_0(t),   G = softmax(z) over all experts.

    router_logits: per layer z [B, T, E]; old: bool [B, T], aligned with the tokens the router reads (not with the shifted labels).
    The paper sums over tokens, its code takes the mean, for which gamma = 0.1 is set: we take the mean. Without an old token the loss is
    0 (the code's mean over nothing is NaN). form "double": the code hands the probabilities G to a cross-entropy, which takes a second
    softmax: -log softmax(G)_0, never below log(1 + (E-1)/e), with a weak gradient."""
    z = torch.stack(list(router_logits)).float()  # (layers, B, T, E)
    if form == "double":
        z = z.softmax(-1)
    log_G0 = z.log_softmax(-1)[..., 0]
    return -(log_G0 * old).sum() / (len(z) * old.sum()).clamp(min=1)  # the paper's L_LPR


def objective(model: Transformer, ids: torch.Tensor, old: torch.Tensor, alpha: float, gamma: float, form: str = "paper") -> torch.Tensor:
    """Next-token loss of all tokens [B, T] + alpha * balancing loss (stage 1) + gamma * routing loss (review). One of them at a time: the
    one spreads tokens over the experts, the other gathers them in one."""
    out = model(ids, output_router_logits=True)
    loss = next_token_loss(out.logits, ids)
    if alpha and out.router_logits:
        loss = loss + alpha * load_balancing_loss(out.router_logits, model.config.num_experts_per_tok)
    if gamma:
        loss = loss + gamma * lpr_loss(out.router_logits, old, form)
    return loss


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


# --- train

def train(model: Transformer, data: Sequence, lr: float, desc: str, alpha: float = 0.0, gamma: float = 0.0, form: str = "paper") -> None:
    """One step on each (ids, old) of `data`, of the weights that `set_trainable` left open. Gradients flow through frozen experts."""
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.0)
    for step, (ids, old) in enumerate(progress(data, desc)):
        set_lr(optimizers, schedule(step, len(data), "cosine", warmup=len(data) // 20))
        take_step(objective(model, ids, old, alpha, gamma, form), model, optimizers)


# --- evaluate

@torch.no_grad()
def evaluate(model: Transformer, held_out: dict[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Per group of languages (old, ood, new): the mean of its languages' losses in nats per character, and for a mixture the mean score G_0
    of the frozen expert in every layer. The model gets no language label."""
    losses, scores = {}, {}
    for name, ids in held_out.items():
        out = model(ids, output_router_logits=True)
        losses[name] = next_token_loss(out.logits, ids).item()
        if out.router_logits:
            scores[name] = router_stats(out.router_logits, model.config.num_experts_per_tok).score[:, 0]  # (layers,)
    mean = {group: sum(losses[n] for n in names) / len(names) for group, names in GROUPS.items()}
    return mean, {group: torch.stack([scores[n] for n in names]).mean(0).tolist() for group, names in GROUPS.items() if scores}


def changed_tensors(model: Transformer, base: Transformer) -> int:
    """How many of the base's tensors are not bit for bit in the upcycled model."""
    state = model.state_dict()
    place = lambda name: name if name in state else name.replace(".mlp.", ".mlp.experts.0.")
    return sum(not torch.equal(tensor, state[place(name)]) for name, tensor in base.state_dict().items())


# --- one seed

def make_base(cfg: Config, texts: Texts, seed: int) -> Transformer:
    """A dense model that knows the old languages well and the new ones a little."""
    model = Transformer(ModelConfig(
        vocab_size=len(LETTERS), hidden_size=cfg.width, intermediate_size=11 * cfg.width // 4, num_hidden_layers=cfg.layers,
        num_attention_heads=4, max_position_embeddings=cfg.block, model_type="llama"), generator(seed, "init"))
    train(model, texts.batches(texts.base, cfg.batch, "base", cfg.base_steps), cfg.base_lr, "base")
    return model


def stage_1(cfg: Config, arm: Arm, base: Transformer, texts: Texts, seed: int) -> Transformer:
    """Post-pretraining on new languages; arms with `replay` read the old-language text that others keep for their review."""
    model = copy.deepcopy(base) if arm.start in ("dense", "lora") else upcycle(
        base, cfg.num_experts, cfg.experts_per_token, copies=arm.start == "upcycled", generator=generator(seed, "router"))
    if arm.start == "lora":
        add_lora(model, rank=8, alpha=16, generator=generator(seed, "lora"))
    set_trainable(model, arm.trains)
    data = texts.batches(texts.new + (texts.replay if arm.replay else []), cfg.batch, "stage 1")
    train(model, data, cfg.lr, "stage 1", 0.0 if arm.lpr else cfg.alpha, cfg.gamma if arm.lpr else 0.0, cfg.lpr_form)
    return model


def review(cfg: Config, arm: Arm, model: Transformer, texts: Texts) -> Transformer:
    """Stage 2: the routers alone, one pass over a little text of old and new languages, with or without the routing loss."""
    set_trainable(model := copy.deepcopy(model), "routers")
    data = texts.batches(texts.replay + texts.review_new, cfg.review_batch, "review")
    train(model, data, cfg.review_lr, "review", gamma=cfg.gamma if arm.review == "lpr" else 0.0, form=cfg.lpr_form)
    return model


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed. Arms that differ in the review alone share the model that stage 1 trained."""
    texts, outcome, stages = Texts(cfg, seed), Outcome({}, {}), {}
    base = make_base(cfg, texts, seed)
    at_base, ids = evaluate(base, texts.held_out)[0], torch.cat([ids[:4] for ids in texts.held_out.values()])
    with torch.no_grad():
        upcycled = upcycle(base, cfg.num_experts, cfg.experts_per_token, generator=generator(seed, "router"))
        difference = (upcycled(ids).logits - base(ids).logits).abs().max().item()
    outcome.metrics.update({"base": at_base, "upcycled": {"logit difference": difference}})
    for name in cfg.methods:
        arm, c = ARMS[name], replace(cfg, **ARMS[name].changes)
        texts = Texts(c, seed)
        key = arm._replace(review=None, changes=(c.num_experts, c.lr, arm.replay and c.review_old, arm.lpr and c.lpr_form))
        if key not in stages:
            model = stage_1(c, arm, base, texts, seed)
            stages[key] = model, evaluate(model, texts.held_out)[0]
        model, at_stage_1 = stages[key]
        model = review(c, arm, model, texts) if arm.review else model
        metrics, scores = evaluate(model, texts.held_out)
        if arm.review:
            metrics["recovery"] = (at_stage_1["old"] - metrics["old"]) / (at_stage_1["old"] - at_base["old"])
            metrics["new cost"] = (metrics["new"] - at_stage_1["new"]) / (at_base["new"] - at_stage_1["new"])
            metrics["replay share"] = texts.share
        if scores:
            metrics |= {f"G0 {group}": sum(values) / len(values) for group, values in scores.items()}
            metrics["changed"] = changed_tensors(model, base)
        outcome.metrics[name] = metrics
        outcome.series[name] = {f"G0 {group}": (range(len(values)), values) for group, values in scores.items()}
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """The paper's claims. Rules were fixed before the runs, but see Honest; "every seed" compares within one, the rest are means."""
    seeds = range(len(metrics["base"]["old"]["values"]))
    every = lambda test: all(test(lambda arm, name, i=i: metrics[arm][name]["values"][i]) for i in seeds)
    rivals, stages = [*(arm for arm in ARMS if arm.startswith("ft ")), "moe all"], ("stage 1", "review ntp", "lpr")
    full, sizes, experts = [arm for arm in rivals if arm in metrics], [*SIZES.values()], [*EXPERTS.values()]
    absent = ", ".join(arm for arm in rivals if arm not in metrics)
    rows = [
        check(metrics, "C1", "Upcycling with K >= 2 changes nothing", "max |logit difference| < 1e-4 in every seed",
              {"logit difference": ["upcycled"]}, lambda m: every(lambda s: s("upcycled", "logit difference") < 1e-4), digits=7),
        check(metrics, "C2", "Stage 1 forgets the old languages although no original tensor changes", "every seed: 0 tensors changed; old "
              "loss >= base + 0.2; new loss <= base - 0.2", {"changed": stages[:1], "old": ["base", "stage 1"], "new": ["base", "stage 1"]},
              lambda m: every(lambda s: s("stage 1", "changed") == 0 and s("stage 1", "old") >= s("base", "old") + 0.2
                              and s("stage 1", "new") <= s("base", "new") - 0.2), "old 53.97 -> 47.14 points, new 34.36 -> 45.04"),
        check(metrics, "C3", "A review with < 1% old-language text recovers most of the loss and costs the new languages little",
              "recovery >= 75%, new cost <= 15%, replay share < 1% of stage 1's tokens",
              {name: ["lpr"] for name in ("recovery", "new cost", "replay share")}, lambda m: m("lpr", "recovery") >= 0.75
              and m("lpr", "new cost") <= 0.15 and m("lpr", "replay share") < 0.01, "73% recovered, new 45.04 -> 45.07 points", digits=4),
        check(metrics, "C4", "The routing loss recovers more than the same review without it", "recovery: lpr > review ntp in every seed",
              {"recovery": stages[1:]}, lambda m: every(lambda s: s("lpr", "recovery") > s("review ntp", "recovery")),
              "old 51.32 -> 52.12 points"),
        check(metrics, "C5", "It sends old-language tokens to the frozen expert, new-language tokens as before", "G0 old: stage 1 < review "
              "ntp < lpr in every seed; G0 new of lpr within 0.1 of stage 1", {"G0 old": stages, "G0 new": stages},
              lambda m: every(lambda s: s("stage 1", "G0 old") < s("review ntp", "G0 old") < s("lpr", "G0 old"))
              and abs(m("lpr", "G0 new") - m("stage 1", "G0 new")) < 0.1),
        check(metrics, "C6", "It forgets less than full fine-tuning and a mixture trained in full, on the same replay", "old loss in "
              "every seed: lpr below moe all and below every ft (3 rates) whose new loss is at most lpr's",
              {"old": [*full, "lpr"], "new": [*full, "lpr"]}, lambda m: every(lambda s: all(
                  s("lpr", "old") < s(arm, "old") for arm in full if arm == "moe all" or s(arm, "new") <= s("lpr", "new"))),
              "old: full FT 49.73, MoE 50.44, MoE-LPR 52.12 points"),
        check(metrics, "C7", "New experts must start as copies", "new loss: no copies >= lpr + 0.05", {"new": ["lpr", "no copies"]},
              lambda m: m("no copies", "new") >= m("lpr", "new") + 0.05, "new 45.07 -> 38.37 points without copies"),
        check(metrics, "C8", "More review text: old languages gain less and less, new ones lose a bit", "0, 16, 31, 62 blocks: old loss "
              "falls each time, by less from 31 to 62 than from 0 to 16; new loss rises by 0 to 0.15 in all",
              {"old": sizes, "new": sizes}, lambda m: all(m(b, "old") < m(a, "old") for a, b in zip(sizes, sizes[1:]))
              and m("review 31", "old") - m("lpr", "old") < m("stage 1", "old") - m("review 16", "old")
              and 0 < m("lpr", "new") - m("stage 1", "new") < 0.15, "old keeps improving, new slightly worse"),
        check(metrics, "C9", "More experts, of which a token passes two: new languages gain, old ones stay", "new loss: 8 < 2 experts; "
              "recovery with 2, 4, 6, 8 within 10 points", {"new": experts, "recovery": experts}, lambda m: m("8 experts", "new") <
              m("2 experts", "new") and max(m(e, "recovery") for e in experts) - min(m(e, "recovery") for e in experts) <= 0.1,
              "new better from 2 to 8, old stable"),
        check(metrics, "C10", "It learns new languages as well as full fine-tuning and the fully trained mixture", "new loss: lpr at most "
              "moe all and the best of 3 ft", {"new": [*full, "lpr"]}, lambda m: all(m("lpr", "new") <= m(arm, "new") for arm in full),
              "new: full FT 41.12, MoE 42.25, MoE-LPR 45.07 points"),
        check(metrics, "C11", "It also protects old languages that the review never saw", "ood loss: lpr < review ntp and < one stage",
              {"ood": ["base", *stages, "one stage"]}, lambda m: m("lpr", "ood") < min(m("review ntp", "ood"), m("one stage", "ood")),
              "old, not reviewed: w/o LPR 44.22, one stage 43.71, MoE-LPR 45.25 points")]
    return [row | {"verdict": NOT_TESTED, "measured": f"open, not in this run: {absent}; {row['measured']}"}
            if absent and row["verdict"] == HOLDS and row["id"] in ("C6", "C10") else row for row in rows]


# --- figure

STYLE = {"base": ("base", 7, "*"), "stage 1": ("stage 1", 1, "o"), "review ntp": ("review, next-token loss", 4, "s"),
         "lpr": ("review + LPR", 2, "D"), "ft 3e-4": ("fine-tuning, 3e-4", 0, "<"), "ft 1e-3": ("fine-tuning, 1e-3", 0, "v"),
         "ft 3e-3": ("fine-tuning, 3e-3", 0, ">"), "moe all": ("mixture, all weights", 3, "P"), "lora": ("LoRA", 6, "p"),
         "no copies": ("LPR, experts not copied", 6, "X"), "one stage": ("LPR, one stage", 5, "^")}


def figure(results: dict, unit: str = "nats/character"):
    """Left: who learns the new languages and who keeps the old. Right: what the review does to the router."""
    metrics, (fig, (left, right)) = results["metrics"], new_figure(1, 2, width=13, height=5.4)
    for arm, (label, color, marker) in STYLE.items():
        if arm in metrics:
            x, y = metrics[arm]["new"], metrics[arm]["old"]
            left.plot(x["values"], y["values"], marker, color=COLORS[color], alpha=0.35, markersize=6)
            left.plot(x["mean"], y["mean"], marker, color=COLORS[color], markersize=11, markeredgecolor="black", label=label)
    path = [(metrics[arm]["new"]["mean"], metrics[arm]["old"]["mean"]) for arm in ("base", "stage 1", "lpr") if arm in metrics]
    for a, b in zip(path, path[1:]):
        left.annotate("", b, a, arrowprops={"arrowstyle": "->", "color": "#555555", "shrinkA": 7, "shrinkB": 7})
    left.axhline(metrics["base"]["old"]["mean"], color="#555555", linewidth=1, linestyle="--")
    left.set(xlabel=f"loss on new languages ({unit})", ylabel=f"loss on old languages ({unit})", title="Lower left is better (- -: base)")
    left.legend(fontsize=9)
    arms, ticks, x = [arm for arm in ("stage 1", "review ntp", "lpr") if results["series"].get(arm)], {}, 0.0
    for group, title in (("old", "old"), ("ood", "old, not reviewed"), ("new", "new")) if arms else ():
        for layer in range(len(results["series"][arms[0]].get(f"G0 {group}", {"x": ()})["x"])):
            x += 1 if layer else 1.7
            ticks[x] = f"{layer + 1}" if layer else f"1\n{title}"
            for k, arm in enumerate(arms):
                values = [v[layer] for v in results["series"][arm][f"G0 {group}"]["values"]]
                bar_seeds(right, x + 0.27 * (k - 1), values, COLORS[STYLE[arm][1]], 0.25, None if len(ticks) > 1 else STYLE[arm][0])
    right.set_xticks(list(ticks), ticks.values(), fontsize=11)
    right.set(xlabel="layer", ylabel="mean score $G_0$ of the frozen expert", ylim=(0, 1.2), title="Where routers send tokens")
    right.legend(ncols=3, loc="upper center", fontsize=9)
    return fig


def show_example(cfg: Config) -> None:
    texts = Texts(cfg, cfg.seeds[0])
    ids, old = next((ids[0], old[0]) for ids, old in texts.batches(texts.replay + texts.review_new, 1, "review") if old.any() > old.all())
    print(f"The review reads {texts.share:.2%} of stage 1's tokens in old languages. A block of it (# closes a document); the routing "
          f"loss pulls tokens above a 0 to expert 0, the next-token loss counts all:\n  {''.join(LETTERS[i] if i else '#' for i in ids)}"
          f"\n  {''.join('.0'[int(label)] for label in old)}")


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    for flag, given, allowed in (("methods", cfg.methods, ARMS), ("lpr-form", [cfg.lpr_form], ("paper", "double")),
                                 ("scripts", [cfg.scripts], ("two", "one"))):
        if wrong := set(given) - set(allowed):
            raise InputError(f"--{flag} {' '.join(wrong)} is not known; give {', '.join(allowed)}")
    if not 2 <= cfg.experts_per_token <= cfg.num_experts:
        raise InputError(f"--experts-per-token {cfg.experts_per_token} must lie between 2 and --num-experts {cfg.num_experts}")
    if not 16 <= cfg.review_old <= cfg.steps * cfg.batch // 2:
        raise InputError(f"--review-old {cfg.review_old}: give 16 (a few documents) to {cfg.steps * cfg.batch // 2} (half of stage 1)")
    if cfg.full:
        cfg = replace(cfg, methods=tuple(ARMS))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], base_steps=12, steps=8, review_old=16, eval_blocks=8)
    show_example(cfg)
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics(results["metrics"], ["old", "ood", "new", "G0 old", "G0 ood", "G0 new", "recovery", "new cost"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
