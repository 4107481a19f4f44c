"""OCKR, the data: seven tasks in which two facts imply a third. The construction is the paper's method; methods/ockr.py is its experiment.

A world has 20 birth years with X, Y and Z persons in each. A task is a list of premises to train, targets to ask for, and the rows that
teach how a conclusion is asked; `build` turns it into (training rows, test rows) for a setting. Which persons a row pairs, how many rows
there are and which of them are shown in three paraphrases is section 3 of the paper; how a fact becomes a sentence is a `Style`: the
three-word sentences of `MINI` here, the published ones in methods/real/ockr_sentences.json.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

PATTERNS = {"aa": "A+A To R", "ar": "A+R To A", "rr": "R+R To R"}
SETTINGS = ("separate", "adjacent", "crd", "cot")


# --- data: sentences

class Fact(NamedTuple):
    """form "year": a was born in the year `value` (b is empty).  Any other form is a relation: it holds between a and b if `value`."""

    form: str
    a: str
    b: str
    value: bool | int


class Row(NamedTuple):
    """One sample as the published files have it. Test rows also have a label and a kind: "target", or which premise they ask for."""

    prompt: str
    answer: str
    input: str = ""
    label: str = ""
    kind: str = ""


class Style(NamedTuple):
    """How facts become sentences."""

    forms: dict[str, list[tuple[str, str, str]]]  # per form, in every paraphrase: question, the fact stated, its negation stated
    answers: tuple[str, str]  # to a question for a year, to a yes/no question: {v} value, {s} statement
    chain: str  # an answer that states both premises first
    hints: dict[str, str]  # per pattern, appended to the question
    translate: list[str]


FIRST = ("Amber Birch Cedar Dusk Ember Fern Gale Haven Iris Jade Kindle Lunar Maple Nomad Ocean Pearl Quartz River Solar Tide Umber "
         "Velvet Wise Zephyr").split()
SECOND = ("Arrow Bloom Crest Drift Echo Flame Grove Hollow Island Jewel Knoll Leaf Mist Orbit Path Quill Ridge Spark Thorn Uplift Veil "
          "Whisper Yarrow Zone").split()
YEARS = 20  # groups; group g was born in 2010 - g
RELATIONS = ("same", "older", "before", "parent", "grandparent")
MINI = Style({"year": [(f"{word} {{a}} ?", "{a} {y}", "") for word in ("when", "born", "dated")]} | {
    r: [(f"{r}{ending} {{a}} {{b}} ?", f"{{a}} {r} {{b}}", f"{{a}} un{r} {{b}}") for ending in ("", "ly", "ish")] for r in RELATIONS},
    ("{s}", "{v}"), "{first} , {second} . Therefore {answer}", {"aa": "recall", "ar": "name", "rr": "name"},
    ["translate", "render", "convert"])


def clone(text: str) -> str:
    """English -> Clone, the seventh task's second language: every word, and every part of a name, spelled backwards.

    "when AmberFern ?" -> "nehw RebmaNref ?" """
    return re.sub(r"[A-Z]?[a-z]+", lambda m: m[0][::-1].capitalize() if m[0][0].isupper() else m[0][::-1], text)


# --- data: the world and the seven tasks. This construction is the paper's method.

class BirthYears:
    """20 birth years; in each one Z, `k` X and `k` Y. X are helpers, Y are asked about, Z anchors its year: Z[g], X[g][i], Y[g][i]."""

    def __init__(self, names: Sequence[str], k: int, style: Style, seed: str):
        groups = [names[g * (2 * k + 1) : (g + 1) * (2 * k + 1)] for g in range(YEARS)]
        self.Z, self.X, self.Y = [g[0] for g in groups], [g[1 : k + 1] for g in groups], [g[k + 1 :] for g in groups]
        self.born = {name: 2010 - g for g, group in enumerate(groups) for name in group}
        self.k, self.style, self.seed = k, style, seed
        self.each = [(g, (g + 1) % YEARS, i) for g in range(YEARS) for i in range(k)]  # (g + 1) % 20 makes every "No"

    def year(self, name: str) -> Fact:
        return Fact("year", name, "", self.born[name])

    def question(self, fact: Fact, t: int = 0) -> str:
        return self.style.forms[fact.form][t][0].format(a=fact.a, b=fact.b)

    def state(self, fact: Fact, t: int = 0) -> str:
        return self.style.forms[fact.form][t][2 if fact.value is False else 1].format(a=fact.a, b=fact.b, y=fact.value)

    def answer(self, fact: Fact, t: int = 0) -> str:
        return self.style.answers[fact.form != "year"].format(v=label(fact), s=self.state(fact, t))

    def turn(self, fact: Fact, t: int) -> Fact:
        """`same` is symmetric: its two names stand in random order, drawn once for every fact and paraphrase."""
        swap = fact.form == "same" and random.Random(f"{self.seed}/{fact}/{t}").random() < 0.5
        return fact._replace(a=fact.b, b=fact.a) if swap else fact

    def ask(self, fact: Fact, t: int = 0, kind: str = "") -> Row:
        return Row(self.question(fact, t), self.answer(fact, t), "", label(fact), kind)

    def rows(self, facts: Sequence[Fact], templates: int | None = None) -> list[Row]:
        return [self.ask(self.turn(f, t), t) for t in range(templates or len(self.style.translate)) for f in facts]

    def adjacent(self, first: Fact, second: Fact, t: int) -> Row:
        """Both premises in one sample: two questions, two answers."""
        pair = [self.turn(first, t), self.turn(second, t)]
        random.Random(f"{self.seed}/{pair}/{t}").shuffle(pair)
        return Row(" ".join(self.question(f, t) for f in pair), " ".join(self.answer(f, t) for f in pair))

    def premises(self, fact: Fact, via: str | None) -> tuple[Fact, Fact]:
        """T1 and T2, from which the fact follows: `via` is the third person through whom it does (None: the years of a and b)."""
        if fact.form == "year":  # A+R->A
            return Fact("same" if fact.value == self.born[via] else "before", fact.a, via, True), self.year(via)
        if via is None:  # A+A->R
            return self.year(fact.a), self.year(fact.b)
        if fact.form == "parent":  # R+R->R, hard
            return Fact("parent", via, fact.a, True), Fact("grandparent", via, fact.b, fact.value)
        return Fact("same", fact.a, via, True), Fact("same", via, fact.b, fact.value)  # R+R->R

    def hinted(self, pattern: str, fact: Fact, via: str | None, t: int = 0, kind: str = "") -> Row:
        """Chain of thought: the hint in the question, the answer states both premises first."""
        first, second = (self.state(p, t) for p in self.premises(fact, via))
        chain = self.style.chain.format(first=first, second=second, answer=self.answer(fact, t))
        return Row(f"{self.question(fact, t)} {self.style.hints[pattern].format(a=fact.a, b=fact.b)}", chain, "", label(fact), kind)

    def in_context(self, fact: Fact, via: str | None) -> Row:
        """The control: both premises stand in the prompt, in random order."""
        given = [self.state(p) for p in self.premises(fact, via)]
        random.Random(f"{self.seed}/{fact}").shuffle(given)
        return Row(f"{given[0]} . {given[1]} . {self.question(fact)}", self.answer(fact), "", label(fact), "context")


def label(fact: Fact) -> str:
    return str(fact.value) if fact.form == "year" else "Yes" if fact.value else "No"


class Task(NamedTuple):
    """One pattern in one level, as lists of facts; `targets`, `chains`: (fact, via)."""

    premises: dict[str, list[Fact]]
    targets: list[tuple[Fact, str | None]]
    adjacent: list[tuple[Fact, Fact]]
    format: list[Fact]  # teach how a conclusion is asked, with X in the place of Y; in two paraphrases only
    conclusions: list[Fact]  # complete reasoning data: what is added to the premises so that for X both premises and conclusion are trained
    shown: list[Fact]  # chain of thought: plain rows beside the chains
    chains: list[tuple[Fact, str | None]]


def make_task(w: BirthYears, task: str) -> Task:
    """Section 3 of the paper. `same`+ and `same`- of the tables are Fact("same", a, b, True) and (..., False)."""
    pattern, hard = task[:2], task.endswith("-hard")
    X, Y, Z, rng = w.X, w.Y, w.Z, random.Random(f"{w.seed}/{task}")
    plus = lambda form, pairs: [Fact(form, a, b, True) for a, b in pairs]
    minus = lambda form, pairs: [Fact(form, a, b, False) for a, b in pairs]
    pairs = lambda one, other: [(one(g, n, i), other(g, n, i)) for g, n, i in w.each]
    years = lambda groups: [w.year(name) for group in groups for name in group]
    x, x_after, y = (lambda g, n, i: X[g][i]), (lambda g, n, i: X[n][i]), (lambda g, n, i: Y[g][i])
    z, z_after, following = (lambda g, n, i: Z[g]), (lambda g, n, i: Z[n]), (lambda g, n, i: X[g][(i + 1) % w.k])
    x_0 = plus("same", pairs(x, lambda g, n, i: X[g][0])) + minus("same", pairs(x, lambda g, n, i: X[n][0]))
    x_next = plus("same", pairs(x, following)) + minus("same", pairs(x, x_after))
    if pattern == "aa":
        premises = {"year of Y": years(Y), "year of Z": years([Z])}
        adjacent = [(w.year(a), w.year(b)) for a, b in pairs(y, z) + pairs(y, z_after)]
        if not hard:
            targets = plus("same", pairs(y, z)) + minus("same", pairs(y, z_after))
            conclusions = years(X) + plus("same", pairs(x, y)) + minus("same", pairs(x_after, y))
            return Task(premises, [(f, None) for f in targets], adjacent, x_0, conclusions, x_next, [(f, None) for f in x_next])
        later = [(g, i) for g, n, i in w.each if g]  # a person of group g is older than one of group h if g > h
        targets = plus("older", [(Y[g][i], Z[rng.randrange(g)]) for g, i in later])
        targets += minus("older", [(Y[g][i], Z[rng.randrange(g, YEARS)]) for g, i in later])
        shown = minus("older", [(X[g][i], rng.choice(X[g])) for g, i in later])
        shown += plus("older", [(X[g][i], rng.choice(X[g - 1])) for g, i in later])
        return Task(premises, [(f, None) for f in targets], adjacent, shown, [], [], [])
    if pattern == "ar":
        relation = "before" if hard else "same"
        yes, no = plus(relation, pairs(y, z)), minus(relation, pairs(y, z_after))
        targets = [(Fact("year", f.a, "", w.born[f.b] - hard), f.b) for f in yes]
        chains = [(w.year(a), b) for a, b in pairs(x, following)]
        return Task({"year of Z": years([Z]), "Y and Z": yes, "Y and not Z": no}, targets, [(f, w.year(f.b)) for f in yes + no], [],
                    years(X) + x_0, [], chains)
    to_y, to_z = ("parent", "grandparent") if hard else ("same", "same")
    premises = {"X and Y": plus(to_y, pairs(x, y)), "X and not Y": minus(to_y, pairs(x_after, y)),
                "X and Z": plus(to_z, pairs(x, z)), "X and not Z": minus(to_z, pairs(x, z_after))}
    targets = [(f, X[g][i]) for f, (g, n, i) in zip(plus(to_y, pairs(y, z)) + minus(to_y, pairs(y, z_after)), w.each * 2)]
    both_no = zip(premises["X and not Y"], minus(to_z, pairs(x_after, z)))
    chains = [(Fact("same", X[g][i], Z[h], h == g), X[g][(i + 1) % w.k]) for g, n, i in w.each for h in (g, n)]
    return Task(premises, targets, [*zip(premises["X and Y"], premises["X and Z"]), *both_no], [], x_0, [], chains)


def build(w: BirthYears, task: str, setting: str) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of a task in a setting: separate, adjacent, crd, cot, or our control oracle: half the targets trained."""
    if task == "xling":
        return build_xling(w, setting)
    T, pattern = make_task(w, task), task[:2]
    templates = range(len(w.style.translate))
    test = [w.ask(w.turn(f, 0), 0, kind) for kind, facts in T.premises.items() for f in facts]
    target = [w.hinted(pattern, f, via, 0, "target") if setting == "cot" else w.ask(f, 0, "target") for f, via in T.targets]
    train = w.rows([f for facts in T.premises.values() for f in facts])
    if setting in ("separate", "adjacent", "oracle"):
        train += w.rows(T.format, 2)
    if setting == "adjacent":
        train += [w.adjacent(first, second, t) for t in templates for first, second in T.adjacent]
    if setting == "crd":
        train += w.rows(T.conclusions)
    if setting == "cot":
        train += w.rows(T.shown) + [w.hinted(pattern, w.turn(f, t), via, t) for t in templates for f, via in T.chains]
    if setting == "oracle":  # every second Y
        known = {y for group in w.Y for y in group[::2]}
        train += w.rows([f for f, _ in T.targets if f.a in known])
        target = [row._replace(kind="trained target") if f.a in known else row for row, (f, _) in zip(target, T.targets)]
    return train, test + target


def build_xling(w: BirthYears, setting: str) -> tuple[list[Row], list[Row]]:
    """English year of X, and X's name in Clone; asked is the year, in Clone. Year questions in Clone are shown for Y."""
    names, others = [x for group in w.X for x in group], [y for group in w.Y for y in group]
    foreign = lambda name, kind="": Row(clone(w.question(w.year(name))), clone(w.answer(w.year(name))), "", str(w.born[name]), kind)
    translate = lambda name, t, kind="": Row(w.style.translate[t], clone(name), name, clone(name), kind)
    if setting == "separate":
        train = w.rows([w.year(x) for x in names]) + [translate(x, t) for t in range(len(w.style.translate)) for x in names]
    else:  # the name's translation stands beside it
        both = [Fact("year", f"{x}(Clone: {clone(x)})", "", w.born[x]) for x in names]
        train = w.rows(both)
    test = [w.ask(w.year(x), 0, "year of X") for x in names] + [translate(x, 0, "translation") for x in names]
    return train + [foreign(y) for y in others], test + [foreign(x, "target") for x in names]
