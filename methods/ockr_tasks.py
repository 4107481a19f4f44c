"""OCKR, the data: seven tasks in which two facts imply a third. The construction is the paper's
method; methods/ockr.py trains on it and asks.

A world has 20 birth years with X, Y and Z persons in each: one Z anchors its year, the Y are asked
about, the X are helpers. A task is a list of premises to train, targets to ask for, and the rows
that teach how a conclusion is asked; `build` turns it into (training rows, test rows) of a setting:

    separate    the two premises of a target are different samples
    adjacent    ... and also both in one sample, of two questions and two answers
    crd         complete reasoning data: for X the premises and the conclusion are trained
    cot         chain of thought: for X the conclusion is trained with both premises before it

A chain is asked for by a hint behind the question (`hinted`): the same model is asked with it and
without. Where the question does not name the partner of a chain, `via` is one that leads to the
conclusion. And three controls of ours:

    oracle        half of the targets themselves are trained
    random        crd, but whether a conclusion is a yes or a no is drawn
    untranslated  seventh task: separate without the translations of names

Which persons a row pairs, how many rows there are and which of them are shown in three paraphrases
is section 3 of the paper. The hard level (aa-hard, ar-hard, rr-hard) has other relations: older
than, born the year before, parent and grandparent. How a fact becomes a sentence is a `Style`: the
three-word sentences of `MINI` here, the published ones in methods/real/ockr_sentences.json.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

PATTERNS = {"aa": "A+A To R", "ar": "A+R To A", "rr": "R+R To R"}
SETTINGS = ("separate", "adjacent", "crd", "cot")

# --- sentences


class Fact(NamedTuple):
    """form "year": a was born in the year `value` (b is empty). Any other form is a relation: it
    holds between a and b if `value`."""

    form: str
    a: str
    b: str
    value: bool | int


class Row(NamedTuple):
    """One sample as the published files have it. Test rows also have a label and a kind: "target",
    or which premise they ask for."""

    prompt: str
    answer: str
    input: str = ""  # the name that is to be translated; in all other rows nothing
    label: str = ""
    kind: str = ""


class Style(NamedTuple):
    """How facts become sentences. {a}, {b}: the persons, {y}: the year."""

    # per form, in every paraphrase: the question, the fact stated, its negation stated
    forms: dict[str, list[tuple[str, str, str]]]
    # to a question for a year, to a yes/no question; {v}: the label, {s}: the fact stated
    answers: tuple[str, str]
    chain: str  # an answer that states both premises first
    hints: dict[str, str]  # per pattern, appended to the question
    translate: list[str]  # asks for a name in Clone; as many as there are paraphrases


FIRST = (
    "Amber Birch Cedar Dusk Ember Fern Gale Haven Iris Jade Kindle Lunar Maple Nomad Ocean Pearl "
    "Quartz River Solar Tide Umber Velvet Wise Zephyr"
).split()
SECOND = (
    "Arrow Bloom Crest Drift Echo Flame Grove Hollow Island Jewel Knoll Leaf Mist Orbit Path Quill "
    "Ridge Spark Thorn Uplift Veil Whisper Yarrow Zone"
).split()
RELATIONS = ("same", "older", "before", "parent", "grandparent")


def mini_forms() -> dict[str, list[tuple[str, str, str]]]:
    """when AmberLeaf ? -> AmberLeaf 2003        same AmberLeaf JadePath ? -> Yes

    and, where a relation is stated: AmberLeaf same JadePath, AmberLeaf unsame JadePath"""
    forms = {"year": [(f"{word} {{a}} ?", "{a} {y}", "") for word in ("when", "born", "dated")]}
    for word in RELATIONS:
        stated, denied = f"{{a}} {word} {{b}}", f"{{a}} un{word} {{b}}"
        questions = [f"{word}{ending} {{a}} {{b}} ?" for ending in ("", "ly", "ish")]
        forms[word] = [(question, stated, denied) for question in questions]
    return forms


MINI = Style(
    forms=mini_forms(),
    answers=("{s}", "{v}"),
    chain="{first} , {second} . Therefore {answer}",
    hints={"aa": "recall", "ar": "name", "rr": "name"},
    translate=["translate", "render", "convert"],
)


def clone(text: str) -> str:
    """English -> Clone, the seventh task's second language: every word, and every part of a name,
    spelled backwards.

    "when AmberLeaf ?" -> "nehw RebmaFael ?" """

    def backwards(found):
        word = found[0]
        return word[::-1].capitalize() if word[0].isupper() else word[::-1]

    return re.sub(r"[A-Z]?[a-z]+", backwards, text)


def label(fact: Fact) -> str:
    """What an answer is held against: a year, Yes or No."""
    if fact.form == "year":
        return str(fact.value)
    return "Yes" if fact.value else "No"


# --- the world

YEARS = 20  # groups; group g was born in 2010 - g


def flat(groups: Sequence[Sequence]) -> list:
    return [item for group in groups for item in group]


def after(items: Sequence) -> list:
    """The one after each: [a, b, c] -> [b, c, a]."""
    return [*items[1:], *items[:1]]


class BirthYears:
    """20 birth years; in each one Z, `k` X and `k` Y: Z[g], X[g][i], Y[g][i]."""

    def __init__(self, names: Sequence[str], k: int, style: Style, seed: str):
        size = 2 * k + 1
        groups = [names[g * size : (g + 1) * size] for g in range(YEARS)]
        self.Z = [group[0] for group in groups]
        self.X = [group[1 : k + 1] for group in groups]
        self.Y = [group[k + 1 :] for group in groups]
        self.born = {name: 2010 - g for g, group in enumerate(groups) for name in group}
        self.k = k
        self.style = style
        self.seed = seed
        # whose name, spelled backwards, a person has abroad: drawn, so that no rule gives it
        everybody = sorted(self.born)
        drawn = random.Random(f"{seed}/abroad").sample(everybody, len(everybody))
        self.namesake = dict(zip(everybody, drawn))
        # The tasks' tables are written in columns, of one entry per group g and number i:
        self.y = flat(self.Y)
        self.z = flat([[z] * k for z in self.Z])
        self.x = flat(self.X)
        self.x_0 = flat([[group[0]] * k for group in self.X])
        self.x_beside = flat([after(group) for group in self.X])  # i + 1 of the same group
        # ... and the same of the next group, which makes every "No"
        self.next_z = flat([[z] * k for z in after(self.Z)])
        self.next_x = flat(after(self.X))
        self.next_x_0 = flat([[group[0]] * k for group in after(self.X)])

    def year(self, name: str) -> Fact:
        return Fact("year", name, "", self.born[name])

    def years(self, names: Sequence[str]) -> list[Fact]:
        return [self.year(name) for name in names]

    def abroad(self, name: str) -> str:
        """The name in Clone. No rule gives it: its parts are another person's, drawn at random."""
        return clone(self.namesake[name])

    def question(self, fact: Fact, t: int = 0) -> str:
        """In paraphrase t, as everywhere below."""
        return self.style.forms[fact.form][t][0].format(a=fact.a, b=fact.b)

    def state(self, fact: Fact, t: int = 0) -> str:
        _, stated, denied = self.style.forms[fact.form][t]
        sentence = denied if fact.value is False else stated
        return sentence.format(a=fact.a, b=fact.b, y=fact.value)

    def answer(self, fact: Fact, t: int = 0) -> str:
        form = self.style.answers[fact.form != "year"]
        return form.format(v=label(fact), s=self.state(fact, t))

    def turn(self, fact: Fact, t: int) -> Fact:
        """`same` is symmetric: its names stand in random order, drawn once per fact and t. Not in
        a chain: its question and hint name first the person through whose partner it leads."""
        if fact.form == "same" and random.Random(f"{self.seed}/{fact}/{t}").random() < 0.5:
            return fact._replace(a=fact.b, b=fact.a)
        return fact

    def ask(self, fact: Fact, t: int = 0, kind: str = "") -> Row:
        return Row(self.question(fact, t), self.answer(fact, t), "", label(fact), kind)

    def rows(self, facts: Sequence[Fact], templates: int | None = None) -> list[Row]:
        """Every fact in every paraphrase, or in the first `templates` of them."""
        count = templates or len(self.style.translate)
        return [self.ask(self.turn(fact, t), t) for t in range(count) for fact in facts]

    def adjacent(self, first: Fact, second: Fact, t: int) -> Row:
        """Both premises in one sample: two questions, two answers."""
        pair = [self.turn(first, t), self.turn(second, t)]
        random.Random(f"{self.seed}/{pair}/{t}").shuffle(pair)
        questions = " ".join(self.question(fact, t) for fact in pair)
        return Row(questions, " ".join(self.answer(fact, t) for fact in pair))

    def premises(self, fact: Fact, via: str | None) -> tuple[Fact, Fact]:
        """T1 and T2, from which the fact follows, through the third person `via`:

        pattern target         premises T1, T2                   via

        A+A->R  same(y, z)     year(y), year(z)                  nobody (None)
        A+R->A  year(y)        same(y, via), year(via)           y's Z (hard: before(y, via))
        R+R->R  same(y, z)     same(y, via), same(via, z)        an X of y's year
        hard    parent(y, z)   parent(via, y), grandparent(via, z)
        """
        if fact.form == "year":
            relation = "same" if fact.value == self.born[via] else "before"
            return Fact(relation, fact.a, via, True), self.year(via)
        if via is None:
            return self.year(fact.a), self.year(fact.b)
        if fact.form == "parent":
            grandparent = Fact("grandparent", via, fact.b, fact.value)
            return Fact("parent", via, fact.a, True), grandparent
        return Fact("same", fact.a, via, True), Fact("same", via, fact.b, fact.value)

    def hinted(self, pattern: str, fact: Fact, via: str | None, t: int = 0, kind: str = "") -> Row:
        """Chain of thought: the hint in the question, the answer states both premises first.

        same AmberLeaf JadePath ? recall -> AmberLeaf 2003 , JadePath 2003 . Therefore Yes
        """
        first, second = (self.state(premise, t) for premise in self.premises(fact, via))
        hint = self.style.hints[pattern].format(a=fact.a, b=fact.b)
        answer = self.answer(fact, t)
        chain = self.style.chain.format(first=first, second=second, answer=answer)
        return Row(f"{self.question(fact, t)} {hint}", chain, "", label(fact), kind)

    def in_context(self, fact: Fact, via: str | None) -> Row:
        """The control: both premises stand in the prompt, in random order."""
        given = [self.state(premise) for premise in self.premises(fact, via)]
        random.Random(f"{self.seed}/{fact}").shuffle(given)
        prompt = f"{given[0]} . {given[1]} . {self.question(fact)}"
        return Row(prompt, self.answer(fact), "", label(fact), "context")


# --- the tasks, as section 3 of the paper has them


class Task(NamedTuple):
    """One pattern in one level, as lists of facts. Of targets and chains: (fact, via)."""

    premises: dict[str, list[Fact]]
    targets: list[tuple[Fact, str | None]]
    adjacent: list[tuple[Fact, Fact]]
    format: list[Fact] = []  # how a conclusion is asked, with X in Y's place; two paraphrases only
    conclusions: list[Fact] = []  # crd: with these, X has both premises and conclusion trained
    shown: list[Fact] = []  # cot: plain rows beside the chains
    chains: list[tuple[Fact, str | None]] = []


def make_task(w: BirthYears, task: str) -> Task:
    """task: "aa", "ar", "rr", or one of them with "-hard"."""
    pattern, _, level = task.partition("-")
    hard = level == "hard"
    if pattern == "aa":
        return attributes_older(w) if hard else attributes_same(w)
    return attribute_of_a_relative(w, hard) if pattern == "ar" else two_relations(w, hard)


def yes(form: str, a: Sequence[str], b: Sequence[str]) -> list[Fact]:
    return [Fact(form, *pair, True) for pair in zip(a, b)]


def no(form: str, a: Sequence[str], b: Sequence[str]) -> list[Fact]:
    return [Fact(form, *pair, False) for pair in zip(a, b)]


def through(facts: Sequence[Fact], via: Sequence[str | None]) -> list[tuple[Fact, str | None]]:
    return list(zip(facts, via))


def attributes_same(w: BirthYears) -> Task:
    """A+A->R simple: year(y), year(z) => same(y, z)."""
    targets = yes("same", w.y, w.z) + no("same", w.y, w.next_z)
    of_x = yes("same", w.x, w.y) + no("same", w.next_x, w.y)
    shown = yes("same", w.x, w.x_beside) + no("same", w.x, w.next_x)
    nobody = [None] * len(targets)
    return Task(
        premises={"year of Y": w.years(w.y), "year of Z": w.years(w.Z)},
        targets=through(targets, nobody),
        adjacent=[(w.year(fact.a), w.year(fact.b)) for fact in targets],
        format=yes("same", w.x, w.x_0) + no("same", w.x, w.next_x_0),
        conclusions=w.years(w.x) + of_x,
        shown=shown,
        chains=through(shown, nobody),
    )


def attributes_older(w: BirthYears) -> Task:
    """A+A->R hard: year(y), year(z) => older(y, z), where a later group is the older one."""
    rng = random.Random(f"{w.seed}/aa-hard")
    groups = [g for g in range(1, YEARS) for _ in range(w.k)]
    x = w.x[w.k :]
    y = w.y[w.k :]
    targets = yes("older", y, [w.Z[rng.randrange(g)] for g in groups])
    targets += no("older", y, [w.Z[rng.randrange(g, YEARS)] for g in groups])
    shown = no("older", x, [rng.choice(w.X[g]) for g in groups])
    shown += yes("older", x, [rng.choice(w.X[g - 1]) for g in groups])
    return Task(
        premises={"year of Y": w.years(w.y), "year of Z": w.years(w.Z)},
        targets=through(targets, [None] * len(targets)),
        adjacent=attributes_same(w).adjacent,
        format=shown,
    )


def attribute_of_a_relative(w: BirthYears, hard: bool) -> Task:
    """A+R->A: same(y, z), year(z) => year(y). Hard: before(y, z), y is born one year before z."""
    relation = "before" if hard else "same"
    related = yes(relation, w.y, w.z)
    unrelated = no(relation, w.y, w.next_z)
    targets = [Fact("year", y, "", w.born[z] - hard) for y, z in zip(w.y, w.z)]
    compared = yes("same", w.x, w.x_0) + no("same", w.x, w.next_x_0)
    return Task(
        premises={"year of Z": w.years(w.Z), "Y and Z": related, "Y and not Z": unrelated},
        targets=through(targets, w.z),
        adjacent=[(fact, w.year(fact.b)) for fact in related + unrelated],
        conclusions=w.years(w.x) + compared,
        chains=through(w.years(w.x), w.x_beside),
    )


def two_relations(w: BirthYears, hard: bool) -> Task:
    """R+R->R: same(x, y), same(x, z) => same(y, z). Hard: y is x's parent, z x's grandparent =>
    z is y's parent (a person's generation is their group)."""
    to_y, to_z = ("parent", "grandparent") if hard else ("same", "same")
    premises = {
        "X and Y": yes(to_y, w.x, w.y),
        "X and not Y": no(to_y, w.next_x, w.y),
        "X and Z": yes(to_z, w.x, w.z),
        "X and not Z": no(to_z, w.x, w.next_z),
    }
    # where x is not y's, this x, of the next group, is not z's either
    neither = zip(premises["X and not Y"], no(to_z, w.next_x, w.z))
    targets = yes(to_y, w.y, w.z) + no(to_y, w.y, w.next_z)
    of_x = zip(yes("same", w.x, w.z), no("same", w.x, w.next_z))
    return Task(
        premises=premises,
        targets=through(targets, w.x * 2),
        adjacent=[*zip(premises["X and Y"], premises["X and Z"]), *neither],
        conclusions=yes("same", w.x, w.x_0) + no("same", w.x, w.next_x_0),
        chains=[(fact, via) for pair, via in zip(of_x, w.x_beside) for fact in pair],
    )


# --- rows of a setting


def build(w: BirthYears, task: str, setting: str) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of a task ("aa", "ar-hard", "xling", ...) in a setting."""
    if task == "xling":
        return build_xling(w, setting)
    T = make_task(w, task)
    pattern = task.partition("-")[0]
    templates = range(len(w.style.translate))
    train = w.rows([fact for facts in T.premises.values() for fact in facts])
    test = [w.ask(w.turn(f, 0), 0, kind) for kind, facts in T.premises.items() for f in facts]
    target = [w.ask(fact, 0, "target") for fact, _ in T.targets]
    if setting in ("separate", "adjacent", "oracle"):
        train += w.rows(T.format, 2)
    if setting == "adjacent":
        train += [w.adjacent(one, other, t) for t in templates for one, other in T.adjacent]
    if setting == "crd":
        train += w.rows(T.conclusions)
    if setting == "random":
        if pattern != "rr":
            raise ValueError("random conclusions are yes or no: for R+R only")
        rng = random.Random(f"{w.seed}/{task}/random")
        train += w.rows([fact._replace(value=rng.random() < 0.5) for fact in T.conclusions])
    if setting == "cot":
        train += w.rows(T.shown)
        train += [w.hinted(pattern, fact, via, t) for t in templates for fact, via in T.chains]
        target = [w.hinted(pattern, fact, via, 0, "target") for fact, via in T.targets]
    if setting == "oracle":  # every second Y
        known = {y for group in w.Y for y in group[::2]}
        train += w.rows([fact for fact, _ in T.targets if fact.a in known])
        for at, (fact, _) in enumerate(T.targets):
            if fact.a in known:
                target[at] = w.ask(w.turn(fact, 0), 0, "trained target")  # as it is trained
    return train, test + target


def build_xling(w: BirthYears, setting: str) -> tuple[list[Row], list[Row]]:
    """English year of X, and X's name in Clone; asked is the year, in Clone. Year questions in
    Clone are shown for Y, whose names nobody translates. Separate: names are translated in rows of
    their own; adjacent: the name's translation stands beside it."""
    if setting == "adjacent":
        both = [w.year(x)._replace(a=f"{x}(Clone: {w.abroad(x)})") for x in w.x]
        train = w.rows(both)
    else:
        train = w.rows(w.years(w.x))
    if setting == "separate":
        train += [translation(w, x, t) for t in range(len(w.style.translate)) for x in w.x]
    train += [year_in_clone(w, y) for y in w.y]
    test = [w.ask(w.year(x), 0, "year of X") for x in w.x]
    test += [translation(w, x, 0, "translation") for x in w.x]
    return train, test + [year_in_clone(w, x, "target") for x in w.x]


def year_in_clone(w: BirthYears, name: str, kind: str = "") -> Row:
    """nehw EdajWorra ? -> EdajWorra 2003"""
    fact = w.year(name)._replace(a=w.namesake[name])
    return Row(clone(w.question(fact)), clone(w.answer(fact)), "", label(fact), kind)


def translation(w: BirthYears, name: str, t: int, kind: str = "") -> Row:
    """translate AmberLeaf -> EdajWorra"""
    return Row(w.style.translate[t], w.abroad(name), name, w.abroad(name), kind)


def xling_in_context(w: BirthYears, name: str) -> Row:
    """AmberLeaf EdajWorra . AmberLeaf 2003 . nehw EdajWorra ? -> EdajWorra 2003"""
    given = [w.state(w.year(name)), f"{name} {w.abroad(name)}"]
    random.Random(f"{w.seed}/{name}").shuffle(given)
    row = year_in_clone(w, name, "context")
    return row._replace(prompt=f"{given[0]} . {given[1]} . {row.prompt}")


def contexts(w: BirthYears, task: str) -> list[Row]:
    """The control in context for every target of a task, in the order of `build`'s targets."""
    if task == "xling":
        return [xling_in_context(w, x) for x in w.x]
    return [w.in_context(fact, via) for fact, via in make_task(w, task).targets]
