"""PreAlign: Boosting Cross-Lingual Transfer by Early Establishment of Multilingual Alignment
(Jiahuan Li, Shujian Huang, Aarron Ching, Xinyu Dai, Jiajun Chen, EMNLP 2024)
https://arxiv.org/abs/2407.16222

A model that reads mostly English finds out by itself that two languages say the same things, but
late and weakly: what it read before that, says the paper, stays locked in English. (`joint` is such
a model.) So align the languages before pretraining starts. Stage 1 takes a random model and a
word dictionary, and pulls each word x towards its translation y, in every layer, and away from all
other words z of the batch:

    L_align = -log  exp(cos(x, y) / tau)  /  sum over z, x left out, of exp(cos(x, z) / tau)
    L_stage1 = alpha L_align + L_LM

Stage 2 is ordinary pretraining, but 5% of the English words are *read* as their translation while
the English word stays the *label* (input-only code-switching). So the alignment stays in use, and
no foreign word is taught as English output. The second language here is English-Clone: English in
tokens of their own, printed in CAPITALS, one document to 30 of English, none a translation.

Found   (four seeds) Facts read in English alone, asked in the clone: .97 right, without alignment
        .14, by switching alone .63, by stage 1 alone .55 (chance .12). The clone's text has
        perplexity 3.49, without alignment 4.73. But switching the labels as well gives 2.81 (facts
        1.00: not decided), at the price of 4% of the probability on foreign tokens after English
        text (.3% otherwise).
Run     python methods/prealign.py                  # 2 CPU cores, ~1 min: look inside both models
        python methods/experiments/prealign.py      # seeds, controls, claims, figure
        python methods/real/prealign.py --help      # your corpora, dictionaries, checkpoint
Try     --rho 0: stage 2 lets go of what it does not use, .49 of the facts cross over (.99 with .05)
        layers="top" where `main` calls `align`: .64, the lower layers are not aligned
        mode "vanilla" in place of "input" in `main`: 1.00, perplexity of the clone 2.73 (3.22)
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from methods.worlds.prealign import (
    BOS,
    PAD,
    TEMPLATES,
    VOCABULARY,
    Document,
    TopicWorld,
    Word,
    clone,
    english,
    is_start,
    make_documents,
    show,
)
from minilm.data import IGNORE, batches, collate, generator, pad
from minilm.evaluate import continuation_logprobs, perplexity
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

Entry = Sequence[Word]  # of a dictionary: a source word and its translations


@dataclass(frozen=True)
class Config:
    align_steps: int = 150  # stage 1: optimizer steps
    steps: int = 320  # stage 2: optimizer steps
    rho: float = 0.05  # stage 2: share of the English words that are switched
    seed: int = 100  # of the world, the weights and the order of the text
    quick: bool = False  # smoke run of seconds: a few steps, numbers without meaning


# --- 1. before pretraining, translations are pulled together in every layer


def word_vectors(model: Transformer, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One unit vector per word and layer, float32 [n + 2, M, D], for words ids, mask [M, T], padded
    on the right. Each word is read alone, and each with its own mask (the authors' code pools y
    with the mask of x).

    Of a model with n blocks. Layer 0: token embeddings; l = 1 ... n-1: what leaves block l; n: what
    leaves the last one, after the final norm (our hidden_states end before the norm, those of
    transformers after it); n + 1: the head's rows of the word's tokens. A word's vector is the sum
    over its tokens (their mean has the same direction).
    """
    device = model.embed.weight.device
    ids, mask = ids.to(device), mask.to(device)
    states = model(ids, output_hidden_states=True).hidden_states
    last = model.norm(states[-1])
    layers = torch.stack([*states[:-1], last, model.lm_head.weight[ids]]).float()  # (n+2, M, T, D)
    words = (layers * mask[..., None]).sum(2)  # (n+2, M, D)
    return F.normalize(words, dim=-1, eps=1e-6)


LAYERS = {  # which of word_vectors' rows stage 1 aligns
    "all": slice(None),
    "embed": [0, -1],  # the rows of embedding and head
    "top": [-2],  # what leaves the last block, after the final norm
}


def alignment_loss(
    z: torch.Tensor, group: torch.Tensor, word: torch.Tensor, tau: float
) -> torch.Tensor:
    """Mean over layers, anchors i and positives j of

        -log [ exp(z_i . z_j / tau) / sum over k, i left out, of exp(z_i . z_k / tau) ]

    z [layers, M, D]: unit vectors of M words. group [M]: the words of one dictionary entry are each
    other's positives. word [M]: equal numbers are equal words. A group of n words is n (n - 1)
    terms of the mean. For pairs this is the paper's loss taken in both directions (the authors'
    code anchors at x alone).

    A word's own translations are never negatives, in whatever entry they stand. Where two entries
    share a word ("bank": Bank; "bank": Ufer) and a third does not ("dog": Hund), so with group
    [0 0 1 1 2 2] and word [0 1 0 2 3 4], each row's candidates are + positive or - negative:

                  bank Bank bank Ufer  dog Hund
          bank      .    +    .    .    -    -
          Bank      +    .    .    -    -    -
          bank      .    .    .    +    -    -
          Ufer      .    -    +    .    -    -

    By hand: test_the_loss_of_two_perfectly_aligned_orthogonal_pairs_by_hand.
    """
    scores = z @ z.mT / tau  # (layers, M, M)
    together = group[:, None] == group  # (M, M): in one entry
    equal = word[:, None] == word
    related = (equal.float() @ together.float() @ equal.float()) > 0  # also by an equal word
    positive = together.clone().fill_diagonal_(False)
    # -inf leaves out what is neither. (The authors subtract the row's maximum, which is the word's
    # score with itself, and then multiply that score by 0. It was 0 already: its exp(0) = 1 stays
    # in their sum, and their loss cannot fall below log 2.)
    log_p = scores.masked_fill(related & ~positive, -torch.inf).log_softmax(-1)
    return -log_p[:, positive].mean()


def word_batches(
    dictionary: Sequence[Entry], pairs: int, gen: torch.Generator
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless ids [M, T], mask [M, T], group [M], word [M] of `pairs` different entries at a time,
    whose words are one another's negatives."""
    number: dict[Word, int] = {}
    for entry in dictionary:
        for word in entry:
            number.setdefault(tuple(word), len(number))
    for chosen in batches(len(dictionary), min(pairs, len(dictionary)), gen):
        words, group = [], []
        for i in chosen.tolist():
            words += [tuple(word) for word in dictionary[i]]
            group += [i] * len(dictionary[i])
        ids, mask = pad(words, PAD)
        yield ids, mask, torch.tensor(group), torch.tensor([number[word] for word in words])


def lm_loss(model: Transformer, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean -log p(label) in nats over the labels that count; inputs and labels [B, T], each label
    at the position of its own token."""
    device = model.embed.weight.device
    inputs, labels = inputs.to(device), labels.to(device)
    states = model.hidden(inputs[:, :-1])
    return linear_cross_entropy(states, model.lm_head.weight, labels[:, 1:], IGNORE)


def align(
    model: Transformer,
    dictionary: Sequence[Entry],
    texts: Iterator[list[Document]],
    gen: torch.Generator,
    *,
    steps: int,
    pairs: int = 96,
    tau: float = 0.1,
    alpha: float = 1.0,
    lr: float = 1e-3,
    layers: str = "all",
    lm: str = "text",
) -> list[float]:
    """Stage 1: L = alpha L_align + L_LM, all weights trained -> L_align of every step.

    `texts` yields the documents of each step's L_LM (lm "text"; the authors' later code uses the
    dictionary's words themselves, "words"; "none": no L_LM). Their alpha is .1 in one trainer and
    an argument in the other; at this size 1 works.
    """
    optimizers = make_optimizers(model, "adamw", lr)
    batch = word_batches(dictionary, pairs, gen)
    losses = []
    for step in progress(range(steps), "stage 1: align"):
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=steps // 20))
        ids, mask, group, word = next(batch)
        z = word_vectors(model, ids, mask)[LAYERS[layers]]
        loss = alignment_loss(z, group, word, tau)
        losses.append(loss.item())
        loss = alpha * loss
        if lm == "text":
            rows = [(document.ids, document.ids) for document in next(texts)]
            loss = loss + lm_loss(model, *collate(rows))
        elif lm == "words":
            loss = loss + lm_loss(model, ids, ids.masked_fill(~mask, IGNORE))
        take_step(loss, model, optimizers)
    return losses


# --- 2. during pretraining, some English words are read in translation


def cut_words(ids: Sequence[int], starts: Callable[[int], bool]) -> Iterator[Word]:
    """Token ids, word by word. A word is a token that starts one, and those that go on with it."""
    word: list[int] = []
    for token in ids:
        if word and starts(token):
            yield tuple(word)
            word = []
        word.append(token)
    if word:
        yield tuple(word)


def make_table(dictionary: Iterable[Entry]) -> dict[Word, list[Word]]:
    """Source word -> its translations. An entry's first word is the source word; a translation
    equal to it is dropped."""
    table: dict[Word, list[Word]] = {}
    for source, *translations in dictionary:
        others = [tuple(t) for t in translations if tuple(t) != tuple(source)]
        if others:
            table.setdefault(tuple(source), []).extend(others)
    return table


def code_switch(
    ids: Sequence[int],
    table: dict[Word, list[Word]],
    rho: float,
    mode: str,
    rng: random.Random,
    starts: Callable[[int], bool] = is_start,
) -> tuple[list[int], list[int]]:
    """Replaces each word X1..Xm that is in the table, with probability rho, by one of its
    translations, Y1..Yk, at random -> inputs, labels. Labels stand at the position of the token
    that they name (the loss shifts them by one):

        mode input     input ... Y1 Y2 ... Yk next      vanilla     input ... Y1 Y2 ... Yk next
                       label ... X1 -  ... -  next                  label ... Y1 Y2 ... Yk next

    input-only: the model learns to read a foreign word in the place of X, and to predict X1. X2..Xm
    and Y2..Yk are never targets. (The authors' late data file does vanilla switching; the paper's
    method is input-only.)
    """
    inputs, labels = [], []
    for word in cut_words(ids, starts):
        if word in table and rng.random() < rho:
            new = rng.choice(table[word])
            inputs += new
            if mode == "input":
                labels += [word[0], *[IGNORE] * (len(new) - 1)]
            else:
                labels += new
        else:
            inputs += word
            labels += word
    return inputs, labels


def pretrain(
    model: Transformer,
    corpus: Sequence[list[Document]],
    table: dict[Word, list[Word]],
    rng: random.Random,
    *,
    mode: str | None = "input",
    rho: float = 0.05,
    lr: float = 2e-3,
    warmup: int = 30,
    starts: Callable[[int], bool] = is_start,
) -> Iterator[int]:
    """Stage 2: next-token prediction over the corpus, a list of documents per step. The source
    language's documents are code-switched afresh (mode None: never). A generator: yields the
    number of steps done, before each step and at the end, so that the caller may look at the model.
    (Warm-up here is a number of steps; the authors' is 5% of them.)
    """
    optimizers = make_optimizers(model, "adamw", lr)
    for step, documents in enumerate(progress(corpus, "stage 2: pretrain")):
        yield step
        set_lr(optimizers, schedule(step, len(corpus), "cosine", warmup=warmup))
        rows = []
        for ids, is_source in documents:
            if mode and is_source:
                rows.append(code_switch(ids, table, rho, mode, rng, starts))
            else:
                rows.append((ids, ids))
        take_step(lm_loss(model, *collate(rows)), model, optimizers)
    yield len(corpus)


# --- 3. what it should bring: words that find their translations, facts that cross over


@torch.no_grad()
def nearest(
    model: Transformer, words: Sequence[Word], candidates: Sequence[Word]
) -> torch.Tensor:
    """For every layer and word the nearest candidate by cosine, as its number: int64 [n + 2, M]."""
    z = word_vectors(model, *pad(words))
    others = word_vectors(model, *pad(candidates))
    return (z @ others.mT).argmax(-1)


def retrieval(
    model: Transformer, entries: Sequence[tuple[Word, Word]], candidates: Sequence[Word]
) -> list[float]:
    """retrieval@1 of every layer: share of the entries' words whose nearest candidate is their own
    translation. (The paper draws the cosine itself; but any two words of an untrained model can
    have .5 to .9, so the cosine alone shows nothing.)"""
    found = nearest(model, [source for source, _ in entries], candidates)
    number = {tuple(word): i for i, word in reversed(list(enumerate(candidates)))}
    right = torch.tensor([number[tuple(target)] for _, target in entries], device=found.device)
    return (found == right).float().mean(-1).tolist()


def place_scores(
    model: Transformer,
    world: TopicWorld,
    persons: Sequence[Word],
    language: Callable[[Sequence[int]], list[int]],
) -> torch.Tensor:
    """Where does a person live, asked and answered in a language: for every person, template and
    place the mean log-probability of the place's tokens, float32 [persons, 3, 8]."""
    pairs = []
    for person in persons:
        for template in TEMPLATES:
            prefix = [BOS, *world.spell(template.split("{c}")[0], p=person)]
            for place in world.places:
                pairs.append((language(prefix), language(place)))
    scores = continuation_logprobs(model, pairs, batch=len(pairs))
    return scores.mean.view(len(persons), len(TEMPLATES), len(world.places))


def knowledge(model: Transformer, world: TopicWorld, language) -> float:
    """CLKA, cross-lingual knowledge application: share of (tested person, template) for which the
    right one of eight places is the most probable. English training text stated each of these
    facts; no clone text ever did. Chance: 1/8."""
    guesses = place_scores(model, world, world.tested, language).argmax(-1)
    homes = torch.tensor([world.places.index(world.home[person]) for person in world.tested])
    return (guesses == homes[:, None]).float().mean().item()


# --- look inside


def show_example(world: TopicWorld) -> None:
    """One training document and, code-switched, its inputs above their labels."""
    document = world.document(random.Random("an example"), world.support)
    table = make_table(world.dictionary)
    inputs, labels = code_switch(document, table, 0.2, "input", random.Random("an example"))
    print(f"A document, every token a target:\n  {show(document)}")
    print("Code-switched (here 20% of the words; CAPITALS: the clone), with its labels (-: none):")
    above, below = "  reads ", "  learns"
    for token, label in list(zip(inputs, labels))[:20]:
        read, learned = show([token]), "-" if label == IGNORE else show([label])
        width = max(len(read), len(learned))
        above += f" {read:>{width}}"
        below += f" {learned:>{width}}"
    print(f"{above}\n{below}")


def show_neighbours(model: Transformer, world: TopicWorld, title: str) -> None:
    """For a few English words the nearest of all clone words, layer by layer. The right one is the
    same word in capitals."""
    words = [world.topics[0]["noun"][0], world.topics[1]["verb"][0], world.places[0]]
    words += world.tested[:2]
    clones = [target for _, target in world.content]
    found = nearest(model, words, clones).tolist()  # [n + 2][words]
    blocks = [f"block {i}" for i in range(1, len(found) - 1)]
    print(f"\n{title}\n  {'':8}" + "".join(f"{name:10}" for name in ["embed", *blocks, "head"]))
    for column, word in enumerate(words):
        row = [show(clones[layer[column]]) for layer in found]
        print(f"  {show(word):8}" + "".join(f"{text:10}" for text in row))


def show_fact(models: dict[str, Transformer], world: TopicWorld) -> None:
    """One fact of the English documents, asked in both languages."""
    person = world.tested[0]
    home = world.home[person]
    print(f"\nEnglish documents say '{show(world.spell(TEMPLATES[0], p=person, c=home))}',")
    print("no clone document does. Each place's score (softmax of mean log-probability a token):")
    print(f"  {'':26}" + "".join(f"{show(place):>8}" for place in world.places))
    for name, model in models.items():
        for language in (english, clone):
            scores = place_scores(model, world, [person], language)[0, 0]
            question = show(language(world.spell("{p} LIVES IN", p=person)))
            row = "".join(f"{p:8.2f}" for p in scores.softmax(-1).tolist())
            print(f"  {name:9}{question:17}{row}")


# --- run it


def make_model(width: int, layers: int, gen: torch.Generator) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        model_type="llama",
    )
    return Transformer(config, gen)


def steps_of_stage1(align_steps: int, documents: int, pairs: int, batch: int) -> int:
    """How many pretraining steps read as many tokens as stage 1 does. The baseline gets them on
    top, so that it reads no less. A document has 45 tokens, a word of the dictionary 1.8: 25 words
    are as long as a document."""
    per_step = documents + 2 * pairs / 25  # in documents
    return round(align_steps * per_step / batch)


def main(cfg: Config) -> None:
    check_range(cfg, "align_steps", least=0)
    check_range(cfg, "steps", least=1)
    check_range(cfg, "rho", least=0, below=1)
    if cfg.quick:
        cfg = replace(cfg, align_steps=4, steps=6)
    batch, text_batch, pairs = 32, 8, 96
    world = TopicWorld(cfg.seed)
    show_example(world)

    extra = steps_of_stage1(cfg.align_steps, text_batch, pairs, batch)
    # stage 2 reads corpus[: cfg.steps]; the rest serves stage 1's L_LM and joint's extra steps
    count = (cfg.steps + max(extra, cfg.align_steps)) * batch
    # one document in 31 is the clone's, drawn from as many different ones as stage 2 reads
    documents = make_documents(
        world, cfg.seed, count, ratio=30, clone_documents=cfg.steps * batch // 31
    )
    corpus = [documents[i : i + batch] for i in range(0, count, batch)]
    texts = (step[:text_batch] for step in corpus[cfg.steps :])

    models = {}
    for name in ("joint", "prealign"):  # the same weights, the same documents in the same order
        models[name] = model = make_model(64, 2, generator(cfg.seed, "init"))
        steps, mode = cfg.steps + extra, None
        if name == "prealign":
            steps, mode = cfg.steps, "input"
            show_neighbours(model, world, "The nearest clone word, in the random model")
            gen = generator(cfg.seed, "pairs")
            align(model, world.dictionary, texts, gen, steps=cfg.align_steps, pairs=pairs)
            show_neighbours(model, world, f"and after {cfg.align_steps} steps of stage 1")
        rng = random.Random(f"{cfg.seed}/switching")
        table = make_table(world.dictionary)
        for _ in pretrain(model, corpus[:steps], table, rng, mode=mode, rho=cfg.rho):
            pass  # (the experiment looks at the model here)
    show_neighbours(models["joint"], world, "At the end of pretraining: joint")
    show_neighbours(models["prealign"], world, "At the end of pretraining: prealign")
    show_fact(models, world)

    rng = random.Random(f"{cfg.seed}/held out text")
    held_out = [clone(world.document(rng, world.support)) for _ in range(200)]
    print("\n           facts asked in      facts asked in      perplexity of")
    print("           English             the clone           clone text")
    for name, model in models.items():
        known = [knowledge(model, world, language) for language in (english, clone)]
        print(f"{name:9}{known[0]:9.2f}{known[1]:20.2f}{perplexity(model, held_out):20.2f}")
    print(f"{'chance':9}{1 / 8:9.2f}{1 / 8:20.2f}")
    print("One seed: this proves nothing; methods/experiments/prealign.py has seeds and controls.")


if __name__ == "__main__":
    cli(main, Config)
