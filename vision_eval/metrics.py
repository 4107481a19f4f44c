"""How an answer is scored. Two scorers, and every report says which one was used:

`paper`  Hallu-PI. Generative: R = the annotated objects that a response names, A = the picture's objects, H = its Hal-objects:
             CHAIR = 1 - |R in A| / |R|     Cover = |A in R| / |A|     Cog = |R in H| / |R|     Hal = share of responses with CHAIR > 0
         A silent model has CHAIR 0 and Hal 0: read Cover beside them. Discriminative: ACC = right / questions; ACC+ = pairs with both
         answers right / pairs. The two together: PI-Score = ((100 - Hal) + ACC+) / 2. (The printed formula also has an average that
         would halve it; the published values do not.) Sums run over all responses (micro; the published CHAIR > Hal rules macro out);
         macro is offered.
`amber`  AMBER (https://arxiv.org/abs/2311.07397), rounded as its script does, quirks included: every denominator starts at 0.001; the
         positive class is "No"; an associated word credits its first owner, so that even the true list of objects covers only 93.3%;
         Cog there is the share of the *Hal-list* that was named.

All numbers are percentages. Negation is not understood ("no circle" names a circle) unless asked for; an answer that never came is wrong
and is counted as unanswered.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from minilm import InputError

FIELDS = ("existence", "number", "color", "relation", "hal-object")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "mice": "mouse",
             "geese": "goose", "leaves": "leaf", "knives": "knife", "shelves": "shelf", "wolves": "wolf", "loaves": "loaf",
             "scarves": "scarf", "calves": "calf", "halves": "half"}


class Item(NamedTuple):
    """One question about one picture; a line of a data file has these fields."""

    id: str
    image: str  # a file name, or the number of a picture
    scenario: str  # noise, blur, weather, digital, concat, crop, misleading; "none" for a `before` that several scenarios share
    phase: str  # before or after the perturbation
    task: str  # gen (free text) or disc (yes or no)
    field: str  # one of FIELDS; also describe, name and how many
    pair_id: str  # disc: the same for both questions of a pair
    question: str
    answer: str  # disc: yes or no; gen: the right number, when a number is asked for
    truth: tuple[str, ...] = ()  # gen: the objects that are there
    hal: tuple[str, ...] = ()  # gen: the Hal-objects
    severity: int = 0
    seed: int = 0
    region: str = ""


# --- reading free text

def parse_yes_no(text: str | None, mode: str = "first") -> str | None:
    """"yes", "no" or None. first: the first whole word yes or no; strict: exactly "Yes" or "No" (AMBER); mme: exactly one lower-case word,
    else what the first four characters hold (MME)."""
    if mode not in ("first", "strict", "mme"):
        raise InputError(f"parser {mode!r} is not known: use first, strict or mme")
    if text is None:
        return None
    if mode == "strict":
        return {"Yes": "yes", "No": "no"}.get(text)
    if mode == "mme":
        text = text.strip().lower()
        return text if text in ("yes", "no") else "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else None
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found[1] if found else None


def parse_number(text: str | None) -> str | None:
    """The first number of an answer, as a word up to ten ("6" and "six" are one answer)."""
    found = re.search(r"\b(\d+|" + "|".join(NUMBERS) + r")\b", (text or "").lower())
    if not found:
        return None
    return NUMBERS[int(found[1])] if found[1].isdigit() and int(found[1]) < len(NUMBERS) else found[1]


def singular(word: str) -> list[str]:
    """What the word may be the plural of, the word itself first."""
    forms = [word, *([IRREGULAR[word]] if word in IRREGULAR else [])]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("s") and not word.endswith("ss"):
        forms += [word[:-1], *([word[:-2]] if word.endswith("es") else [])]
    return forms


def mentions(text: str, vocabulary: Iterable[str], negation: bool = False) -> list[str]:
    """Words of the vocabulary that the text names, in order, with repeats, plurals reduced; names of several words win over their parts.
    `negation`: skip a name that follows "no", "not", "without" or "n't" within the two words before it."""
    vocabulary = {name.lower(): name for name in vocabulary}
    longest = max((name.count(" ") + 1 for name in vocabulary), default=1)
    words, found, at = re.findall(r"[\w'-]+", text.lower()), [], 0
    while at < len(words):
        for n in range(longest, 0, -1):
            *first, last = words[at : at + n]
            name = next((vocabulary[full] for form in singular(last) if (full := " ".join([*first, form])) in vocabulary), None)
            if name:
                denied = any(w in ("no", "not", "without") or w.endswith("n't") for w in words[max(0, at - 2) : at])
                found += [] if negation and denied else [name]
                break
        at += n  # (1 where no name was found)
    return found


# --- paper

def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def generative(rows: Sequence[tuple[str | None, Sequence[str], Sequence[str]]], vocabulary: Iterable[str], aggregate: str = "micro",
               negation: bool = False) -> dict[str, float]:
    """rows: (response, truth, hal) -> CHAIR, Cover, Hal, Cog; `silent`: share of responses that name nothing; `unanswered`."""
    if aggregate not in ("micro", "macro"):
        raise InputError(f"aggregate {aggregate!r} is not known: use micro or macro")
    vocabulary, parts = set(vocabulary), []
    for response, truth, hal in rows:
        R, A, H = mentions(response or "", vocabulary, negation), set(truth), set(hal)
        parts.append((sum(w not in A for w in R), len(R), len(A & set(R)), len(A), sum(w in H for w in R)))
    wrong, named, covered, there, expected = zip(*parts)
    shares = lambda a, b: percent(sum(a), sum(b)) if aggregate == "micro" else sum(map(percent, a, b)) / len(parts)
    return {"CHAIR": shares(wrong, named), "Cover": shares(covered, there), "Hal": percent(sum(w > 0 for w in wrong), len(parts)),
            "Cog": shares(expected, named), "silent": percent(sum(n == 0 for n in named), len(parts)),
            "unanswered": sum(r is None for r, _, _ in rows)}


def discriminative(rows: Sequence[tuple[str | None, str, str]], parser: str = "first", positive: str = "yes") -> dict[str, float]:
    """rows: (response, truth, pair) -> ACC, ACC+, F1, the share of yes among the answers understood, the share of answers not understood.
    F1 is 0 when nothing positive was answered."""
    pairs: dict[str, dict[str, bool]] = {}
    answers = [parse_yes_no(response, parser) for response, _, _ in rows]
    for said, (_, truth, pair) in zip(answers, rows):
        both = pairs.setdefault(pair, {})
        if truth not in ("yes", "no") or truth in both:
            raise InputError(f"pair {pair}: its truths must be one yes and one no, a second or unknown {truth!r} was given")
        both[truth] = said == truth
    if half := [pair for pair, both in pairs.items() if len(both) < 2]:
        raise InputError(f"pair {half[0]} has one question only ({len(half)} such pairs): ACC+ needs both, one whose truth is yes, one no")
    right = [said == truth for said, (_, truth, _) in zip(answers, rows)]
    hits = sum(ok and said == positive for ok, said in zip(right, answers))
    precision, recall = percent(hits, answers.count(positive)), percent(hits, sum(truth == positive for _, truth, _ in rows))
    understood = len(answers) - answers.count(None)
    return {"ACC": percent(sum(right), len(rows)), "ACC+": percent(sum(all(both.values()) for both in pairs.values()), len(pairs)),
            "F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "yes rate": percent(answers.count("yes"), understood), "invalid": percent(answers.count(None), len(rows)),
            "unanswered": sum(r is None for r, _, _ in rows), "pairs": len(pairs)}


def pi_score(hal: float, acc_plus: float) -> float:
    return ((100 - hal) + acc_plus) / 2


def score(items: Sequence[Item], answers: dict[str, str | None], parser: str = "first", aggregate: str = "micro", positive: str = "yes",
          negation: bool = False) -> dict[tuple[str, str], dict[str, float]]:
    """{(scenario, phase): metrics}: all of the above, ACC+ of every field, and PI where both tasks were asked. Answers are found by id."""
    check_ids([item.id for item in items], answers)
    vocabulary = {name for item in items for name in (*item.truth, *item.hal)}
    table = {}
    for key in dict.fromkeys((item.scenario, item.phase) for item in items):
        group = [item for item in items if (item.scenario, item.phase) == key]
        gen, disc = ([item for item in group if item.task == task] for task in ("gen", "disc"))
        named, counted = [i for i in gen if not i.answer], [i for i in gen if i.answer]
        row = generative([(answers.get(i.id), i.truth, i.hal) for i in named], vocabulary, aggregate, negation) if named else {}
        if counted:  # "how many": a wrong number is a hallucination
            wrong = sum(parse_number(answers.get(i.id)) != i.answer for i in counted)
            row["Hal"] = (row.get("Hal", 0) * len(named) + 100 * wrong) / len(gen)
            row["unanswered"] = row.get("unanswered", 0) + sum(answers.get(i.id) is None for i in counted)
        if disc:
            asked = lambda some: discriminative([(answers.get(i.id), i.answer, i.pair_id) for i in some], parser, positive)
            whole = asked(disc)
            whole["unanswered"] += row.get("unanswered", 0)
            row |= whole | {f"ACC+ {field}": asked(some)["ACC+"] for field in FIELDS if (some := [i for i in disc if i.field == field])}
        if "Hal" in row and disc:
            row["PI"] = pi_score(row["Hal"], row["ACC+"])
        table[key] = row
    return table


def check_ids(known: Sequence, answered: Iterable) -> None:
    """Refuses repeated ids, answers to questions that do not exist, and an empty set of answers."""
    answered = list(answered)
    if not answered:
        raise InputError("there are no answers to score: give a file with at least one")
    for name, ids in (("questions", known), ("answers", answered)):
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise InputError(f"id {twice} occurs more than once among the {name}: every id must be given once")
    if strange := set(answered) - set(known):
        raise InputError(f"answer with id {min(strange, key=str)} ({len(strange)} such): there is no question with that id")


# --- amber

class Amber(NamedTuple):
    annotations: dict[int, dict]  # id -> {"type", "truth", "hallu"}
    associations: dict[str, list[str]]  # word -> words that mean much the same
    safe_words: frozenset[str]  # words that are never held against a response
    similar: Callable[[str, str], float] = lambda a, b: float(a == b)  # the original: cosine of spaCy's en_core_web_lg vectors


def make_amber(annotations: list[dict], associations: dict[str, list[str]], safe_words: Iterable[str], similar=None) -> Amber:
    check_ids([row.get("id") for row in annotations], [row.get("id") for row in annotations])
    for row in annotations:
        if row.get("id") is None or "type" not in row or "truth" not in row or row["type"] == "generative" and "hallu" not in row:
            raise InputError(f"annotation {row} lacks id, type or truth, or (generative) hallu")
        for word in (*row["truth"], *row["hallu"]) if row["type"] == "generative" else ():
            if word not in associations:
                raise InputError(f"annotation {row['id']}: the association file lacks the word {word!r}: add it, with [] if it has none")
    amber = Amber({row["id"]: row for row in annotations}, associations, frozenset(safe_words))
    return amber._replace(similar=similar) if similar else amber


def with_owners(words: Sequence[str], associations: dict[str, list[str]]) -> list[tuple[str, int]]:
    """(word, index of the object that it stands for): all associated words first, then the objects themselves."""
    return [(w, i) for i, word in enumerate(words) for w in associations[word]] + [(word, i) for i, word in enumerate(words)]


def amber_generative(amber: Amber, responses: dict[int, str], threshold: float = 0.8,
                     nouns: Callable[[str], list[str]] | None = None) -> dict[str, float]:
    """CHAIR, Cover, Hal, Cog of responses {id: text}. `nouns`: the original's tagger and lemmatiser; by default every word, reduced from
    its plural, that the association file knows (it drops all other nouns too), so that a verb spelled like one counts."""
    known = set(amber.associations) | {w for words in amber.associations.values() for w in words}
    wrong, kept, credited, objects, marked, bad_objects, clean, count = 0, 0.001, 0, 0.001, 0, 0.001, 0, 0.001
    for id, text in responses.items():
        row = amber.annotations[id]
        safe, bad = (with_owners(row[key], amber.associations) for key in ("truth", "hallu"))
        good_hits, bad_hits, errors = set(), set(), 0
        found = mentions(text, known) if nouns is None else [w for w in nouns(text) if w in known]
        for noun in found:
            first = lambda pairs, noun=noun: next((i for w, i in pairs if w == noun), None)
            near = lambda pairs, noun=noun: next((i for w, i in pairs if amber.similar(noun, w) > threshold), None)
            if noun in amber.safe_words:
                continue
            if (owner := first(safe)) is not None:
                good_hits.add(owner)
                continue
            bad_hits |= {owner for owner in (first(bad), near(bad)) if owner is not None}
            if (owner := near(safe)) is not None:
                good_hits.add(owner)
                continue
            errors += 1
        wrong, kept, clean, count = wrong + errors, kept + len(found), clean + (errors == 0), count + 1
        credited, objects = credited + len(good_hits), objects + len(row["truth"])
        marked, bad_objects = marked + len(bad_hits), bad_objects + len(row["hallu"])
    return {"CHAIR": round(wrong / kept * 100, 1), "Cover": round(credited / objects * 100, 1), "Hal": round(100 - clean / count * 100, 1),
            "Cog": round(marked / bad_objects * 100, 1)}


def amber_discriminative(amber: Amber, responses: dict[int, str]) -> dict[str, dict[str, float]]:
    """Accuracy, Precision, Recall, F1 of all questions and of every kind of question. Only "Yes" and "No" count, to the letter."""
    groups = {"all": ("",), "existence": ("hallucination",), "attribute": ("state", "number", "action"), "state": ("state",),
              "number": ("number",), "action": ("action",), "relation": ("relation",)}
    kinds = {id: amber.annotations[id]["type"].rsplit("-", 1)[-1] for id in responses}
    kinds = {id: kind if kind in ("state", "number", "action", "hallucination") else "relation" for id, kind in kinds.items()}
    table = {}
    for group, members in groups.items():
        rows = [(text, amber.annotations[id]["truth"]) for id, text in responses.items() if group == "all" or kinds[id] in members]
        if not rows:
            continue
        right = sum(parse_yes_no(text, "strict") == truth for text, truth in rows)
        hits = sum(text == "No" and truth == "no" for text, truth in rows)
        P = round(hits / (0.001 + sum(text == "No" for text, _ in rows)) * 100, 1)
        R = round(hits / (0.001 + sum(truth == "no" for _, truth in rows)) * 100, 1)
        table[group] = {"Accuracy": round(right / (0.001 + len(rows)) * 100, 1), "Precision": P, "Recall": R,
                        "F1": round(2 * P * R / (P + R + (0.001 if group == "existence" else 0.0001)), 1)}
    return table


def amber_score(amber: Amber, answers: dict[int, str]) -> dict:
    """Everything that the answers allow, the AMBER score (100 - CHAIR + F1) / 2 where both parts are there, and how many are missing."""
    check_ids([*amber.annotations], answers)
    gen = {id: text for id, text in answers.items() if amber.annotations[id]["type"] == "generative"}
    disc = {id: text for id, text in answers.items() if id not in gen}
    result = {"scorer": "amber", "answered": len(answers), "unanswered": len(amber.annotations) - len(answers)}
    if gen:
        result["generative"] = amber_generative(amber, gen)
    if disc:
        result["discriminative"] = amber_discriminative(amber, disc)
    if gen and disc:
        result["AMBER score"] = round((100 - result["generative"]["CHAIR"] + result["discriminative"]["all"]["F1"]) / 2, 2)
    return result
