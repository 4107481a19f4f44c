"""How an answer is scored. Two scorers, and every report says which one was used:

`paper`  Hallu-PI. Generative: R = the annotated objects that a response names, A = the picture's
         objects, H = its Hal-objects (absent, but one would expect them):

             CHAIR = 1 - |R in A| / |R|    Cover = |A in R| / |A|    Cog = |R in H| / |R|
             Hal   = share of responses with CHAIR > 0

         A silent model has CHAIR 0 and Hal 0: read Cover beside them. Discriminative:
         ACC = right / questions; ACC+ = pairs with both answers right / pairs. Together:

             PI-Score = ((100 - Hal) + ACC+) / 2

         (The printed formula also has an average that would halve it; the published values do
         not.) Sums run over all responses (micro; the published CHAIR > Hal rules macro out);
         macro is offered.
`amber`  AMBER (https://arxiv.org/abs/2311.07397), rounded as its script does, quirks included:
         every counter of a denominator starts at 0.001; the positive class is "No"; an associated
         word credits its first owner, so that even the true list of objects covers only 93.3%;
         Cog there is the share of the *Hal-list* that was named.

All numbers are percentages. An answer that is not understood is wrong. An answer that never came
is neither right nor wrong: it is left out of every share, the numbers of answers that a share rests
on (`described`, `asked`, `pairs`) stand beside it, and there is no PI-Score while one is missing.

Nouns are found by the vocabulary, not by a tagger: a verb spelled like a noun counts; unlike the
published script upper and lower case are one word. "the dog's tail" names a dog, as it does there;
so do "dog-shaped" and, for "traffic light", "traffic-light", where the script knows whole words
only. Negation is not understood ("no circle" names a circle) unless asked for.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from minilm import InputError

FIELDS = ("existence", "number", "color", "relation", "hal-object")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot",
    "teeth": "tooth", "mice": "mouse", "geese": "goose", "leaves": "leaf", "knives": "knife",
    "shelves": "shelf", "wolves": "wolf", "loaves": "loaf", "scarves": "scarf",
    "calves": "calf", "halves": "half",
}


class Item(NamedTuple):
    """One question about one picture; a line of a data file has these fields."""

    id: str
    image: str  # a file name, or the number of a picture
    scenario: str  # noise, blur, weather, digital, concat, crop, misleading; "none": see phase
    phase: str  # before or after the perturbation; scenarios may share a "none" before
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


def vocabulary_of(items: Iterable[Item]) -> set[str]:
    """Every object that the annotations name. Take it from the whole data file: what an answer
    scores must not depend on which other pictures are scored with it."""
    return {name for item in items for name in (*item.truth, *item.hal)}


# --- reading free text


def parse_yes_no(text: str | None, mode: str = "first") -> str | None:
    """"yes", "no" or None. first: the first whole word yes or no; strict: exactly "Yes" or "No"
    (AMBER); mme: exactly one lower-case word, else what the first four characters hold (MME)."""
    if mode not in ("first", "strict", "mme"):
        raise InputError(f"parser {mode!r} is not known: use first, strict or mme")
    if text is None:
        return None
    if mode == "strict":
        return {"Yes": "yes", "No": "no"}.get(text)
    text = text.lower()
    if mode == "first":
        found = re.search(r"\b(yes|no)\b", text)
        return found[1] if found else None
    text = text.strip()
    if text in ("yes", "no"):
        return text
    if "yes" in text[:4]:
        return "yes"
    return "no" if "no" in text[:4] else None


def parse_number(text: str | None) -> str | None:
    """The first number of an answer, as a word up to ten ("6" and "six" are one answer)."""
    found = re.search(r"\b(\d+|" + "|".join(NUMBERS) + r")\b", (text or "").lower())
    if not found:
        return None
    number = found[1]
    if number.isdecimal() and int(number) < len(NUMBERS):
        return NUMBERS[int(number)]
    return number


def split_words(text: str) -> list[str]:
    """Lower-case words; 's is split off and dropped, n't is a word, a hyphen parts two words.

        "The dog's tail isn't T-shaped"  ->  the dog tail is n't t shaped"""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = re.sub(r"'s\b", " ", text)
    return re.findall(r"\w+(?=n't\b)|n't\b|\w+", text)


def singular(word: str) -> list[str]:
    """What the word may be the plural of, the word itself first."""
    forms = [word]
    if word in IRREGULAR:
        forms.append(IRREGULAR[word])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
        if word.endswith("es"):
            forms.append(word[:-2])
    return forms


def mentions(text: str, vocabulary: Iterable[str], negation: bool = False) -> list[str]:
    """Words of the vocabulary that the text names, in order, with repeats, plurals reduced; names
    of several words win over their parts. `negation`: skip a name that follows "no", "not",
    "without" or "n't" within the two words before it."""
    names = {" ".join(split_words(name)): name for name in vocabulary}
    longest = max((name.count(" ") + 1 for name in names), default=1)
    words = split_words(text)
    found = []
    at = 0
    while at < len(words):
        step = 1
        for n in range(longest, 0, -1):
            name = _name(words[at : at + n], names)
            if name is None:
                continue
            denied = {"no", "not", "without", "n't"} & {*words[max(0, at - 2) : at]}
            if not (negation and denied):
                found.append(name)
            step = n
            break
        at += step
    return found


def _name(words: list[str], names: dict[str, str]) -> str | None:
    """The name that these words are, the last of them perhaps in the plural."""
    *first, last = words
    for form in singular(last):
        full = " ".join([*first, form])
        if full in names:
            return names[full]
    return None


# --- paper


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


class Naming(NamedTuple):
    """What one description named: the counts that the generative metrics are made of."""

    wrong: int  # mentions of objects that are not there
    named: int  # mentions of any object, |R|
    covered: int  # different objects that are there and were named
    there: int  # |A|
    expected: int  # mentions of Hal-objects


def count_names(response, truth, hal, vocabulary, negation=False) -> Naming:
    R = mentions(response, vocabulary, negation)
    A = set(truth)
    H = set(hal)
    return Naming(
        wrong=sum(name not in A for name in R),
        named=len(R),
        covered=len(A & set(R)),
        there=len(A),
        expected=sum(name in H for name in R),
    )


def generative(
    rows: Sequence[tuple[str | None, Sequence[str], Sequence[str]]],
    vocabulary: Iterable[str],
    aggregate: str = "micro",
    negation: bool = False,
) -> dict[str, float]:
    """rows: (response, truth, hal) -> CHAIR, Cover, Hal, Cog, `silent` (share of responses that
    name nothing), over the `described` responses that came; `unanswered`: those that did not."""
    if aggregate not in ("micro", "macro"):
        raise InputError(f"aggregate {aggregate!r} is not known: use micro or macro")
    vocabulary = set(vocabulary)
    came = [row for row in rows if row[0] is not None]
    lost = {"described": len(came), "unanswered": len(rows) - len(came)}
    if not came:
        return lost
    counts = [count_names(*row, vocabulary, negation) for row in came]

    def share(part: str, whole: str) -> float:
        pairs = [(getattr(count, part), getattr(count, whole)) for count in counts]
        if aggregate == "macro":
            return sum(percent(*pair) for pair in pairs) / len(pairs)
        return percent(sum(a for a, _ in pairs), sum(b for _, b in pairs))

    return {
        "CHAIR": share("wrong", "named"),
        "Cover": share("covered", "there"),
        "Hal": percent(sum(count.wrong > 0 for count in counts), len(counts)),
        "Cog": share("expected", "named"),
        "silent": percent(sum(count.named == 0 for count in counts), len(counts)),
        **lost,
    }


def check_pairs(rows: Sequence[tuple[str | None, str, str]]) -> None:
    """Every pair asks one question whose truth is yes and one whose truth is no."""
    truths: dict[str, list[str]] = {}
    for _, truth, pair in rows:
        given = truths.setdefault(pair, [])
        if truth not in ("yes", "no") or truth in given:
            raise InputError(f"pair {pair}: its truths must be one yes and one no, "
                             f"a second or unknown {truth!r} was given")
        given.append(truth)
    half = [pair for pair, given in truths.items() if len(given) < 2]
    if half:
        raise InputError(f"pair {half[0]} has one question only ({len(half)} such pairs): "
                         "ACC+ needs both, one whose truth is yes, one no")


def discriminative(
    rows: Sequence[tuple[str | None, str, str]], parser: str = "first", positive: str = "yes"
) -> dict[str, float]:
    """rows: (response, truth, pair) -> ACC, ACC+, F1, `yes rate` (among answers understood),
    `invalid` (share of answers not understood), over the `asked` questions that were answered and
    the `pairs` that were answered whole; `unanswered`. F1 is 0 when nothing positive was said."""
    check_pairs(rows)
    came = [row for row in rows if row[0] is not None]
    lost = {"asked": len(came), "unanswered": len(rows) - len(came)}
    if not came:
        return lost | {"pairs": 0}
    said = [parse_yes_no(response, parser) for response, _, _ in came]
    truths = [truth for _, truth, _ in came]
    right = [a == b for a, b in zip(said, truths)]
    pairs: dict[str, list[bool]] = {}
    for ok, (_, _, pair) in zip(right, came):
        pairs.setdefault(pair, []).append(ok)
    whole = [both for both in pairs.values() if len(both) == 2]

    hits = sum(ok and answer == positive for ok, answer in zip(right, said))
    precision = percent(hits, said.count(positive))
    recall = percent(hits, truths.count(positive))
    both = precision + recall
    row = {
        "ACC": percent(sum(right), len(came)),
        "F1": 2 * precision * recall / both if both else 0.0,
        "yes rate": percent(said.count("yes"), len(said) - said.count(None)),
        "invalid": percent(said.count(None), len(said)),
        "pairs": len(whole),
        **lost,
    }
    if whole:
        row["ACC+"] = percent(sum(all(pair) for pair in whole), len(whole))
    return row


def pi_score(hal: float, acc_plus: float) -> float:
    return ((100 - hal) + acc_plus) / 2


def score(
    items: Sequence[Item],
    answers: dict[str, str | None],
    vocabulary: Iterable[str],
    parser: str = "first",
    aggregate: str = "micro",
    positive: str = "yes",
    negation: bool = False,
) -> dict[tuple[str, str], dict[str, float]]:
    """{(scenario, phase): metrics}: all of the above, ACC+ of every field, and PI where both tasks
    were asked and every answer came. Answers are found by id; `vocabulary`: see vocabulary_of."""
    check_ids([item.id for item in items], answers)
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.scenario, item.phase), []).append(item)

    def asked(some: Sequence[Item]) -> dict[str, float]:
        rows = [(answers.get(item.id), item.answer, item.pair_id) for item in some]
        return discriminative(rows, parser, positive)

    table = {}
    for key, group in groups.items():
        row: dict[str, float] = {"unanswered": 0}
        named = [i for i in group if i.task == "gen" and not i.answer]
        counted = [i for i in group if i.task == "gen" and i.answer]
        disc = [i for i in group if i.task == "disc"]
        if named:
            rows = [(answers.get(i.id), i.truth, i.hal) for i in named]
            row = generative(rows, vocabulary, aggregate, negation)
        if counted:
            row |= with_numbers(row, [(answers.get(i.id), i.answer) for i in counted])
        if disc:
            lost = row["unanswered"]
            row |= asked(disc)
            row["unanswered"] += lost
            for field in FIELDS:
                of_field = [i for i in disc if i.field == field]
                if of_field and "ACC+" in (part := asked(of_field)):
                    row[f"ACC+ {field}"] = part["ACC+"]
        if not row["unanswered"] and "Hal" in row and "ACC+" in row:
            row["PI"] = pi_score(row["Hal"], row["ACC+"])
        table[key] = row
    return table


def with_numbers(row: dict[str, float], answered: Sequence[tuple[str | None, str]]) -> dict:
    """Adds "how many" answers, (response, right number): a wrong number is a hallucination."""
    came = [(said, right) for said, right in answered if said is not None]
    described = row.get("described", 0)
    total = {
        "described": described + len(came),
        "unanswered": row["unanswered"] + len(answered) - len(came),
    }
    if total["described"]:
        wrong = sum(parse_number(said) != right for said, right in came)
        total["Hal"] = (row.get("Hal", 0) * described + 100 * wrong) / total["described"]
    return total


def check_ids(known: Sequence, answered: Iterable) -> None:
    """Refuses repeated ids, answers to questions that do not exist, an empty set of answers."""
    answered = list(answered)
    if not answered:
        raise InputError("there are no answers to score: give a file with at least one")
    for name, ids in (("questions", known), ("answers", answered)):
        twice = [id for id, count in Counter(ids).items() if count > 1]
        if twice:
            raise InputError(f"id {twice[0]} occurs more than once among the {name}: "
                             "every id must be given once")
    strange = set(answered) - set(known)
    if strange:
        raise InputError(f"answer with id {min(strange, key=str)} ({len(strange)} such): "
                         "there is no question with that id")


# --- amber


def equal(a: str, b: str) -> float:
    return float(a == b)


class Amber(NamedTuple):
    annotations: dict[int, dict]  # id -> {"type", "truth", "hallu"}
    associations: dict[str, list[str]]  # word -> words that mean much the same
    safe_words: frozenset[str]  # words that are never held against a response
    similar: Callable[[str, str], float] = equal  # the script: cosine in spaCy's en_core_web_lg


def make_amber(annotations: list, associations: dict, safe_words: Iterable[str], similar=None):
    """Checks the files of AMBER's repository and puts them together."""
    if not isinstance(associations, dict) or not all(map(_is_words, associations.values())):
        raise InputError("the association file must be {word: [words]}, as AMBER's relation.json")
    for row in annotations:
        _check_annotation(row, associations)
    ids = [row["id"] for row in annotations]
    check_ids(ids, ids)
    by_id = {row["id"]: row for row in annotations}
    return Amber(by_id, associations, frozenset(safe_words), similar or equal)


def _is_words(value) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _check_annotation(row, associations) -> None:
    needs = "needs an id (a whole number), a type, a truth and, if generative, a list hallu"
    if not isinstance(row, dict) or type(row.get("id")) is not int:
        raise InputError(f"annotation {str(row)[:80]} {needs}")
    if not isinstance(row.get("type"), str):
        raise InputError(f"annotation {row['id']} {needs}")
    if row["type"] != "generative":
        if row.get("truth") not in ("yes", "no"):
            raise InputError(f"annotation {row['id']}: its truth must be yes or no")
        return
    if not _is_words(row.get("truth")) or not _is_words(row.get("hallu")):
        raise InputError(f"annotation {row['id']} {needs}; truth and hallu are lists of words")
    for word in (*row["truth"], *row["hallu"]):
        if word not in associations:
            raise InputError(f"annotation {row['id']}: the association file lacks the word "
                             f"{word!r}: add it, with [] if it has none")


def with_owners(words: Sequence[str], associations: dict) -> list[tuple[str, int]]:
    """(word, index of the object that it stands for): all associated words, then the objects."""
    owners = [(other, i) for i, word in enumerate(words) for other in associations[word]]
    return owners + [(word, i) for i, word in enumerate(words)]


def amber_generative(
    amber: Amber,
    responses: dict[int, str],
    threshold: float = 0.8,
    nouns: Callable[[str], list[str]] | None = None,
) -> dict[str, float]:
    """CHAIR, Cover, Hal, Cog of responses {id: text}. `nouns`: the original's tagger and
    lemmatiser; by default every word, reduced from its plural, that the association file knows (it
    drops all other nouns too), so that a verb spelled like one counts."""
    known = set(amber.associations).union(*amber.associations.values())
    wrong, kept = 0, 0.001  # nouns that are hallucinated; of all
    credited, objects = 0, 0.001  # entries of the truth lists that were named; of all
    marked, bad_objects = 0, 0.001  # entries of the Hal-lists that were named; of all
    clean, count = 0, 0.001  # responses without a hallucinated noun; of all
    for id, text in responses.items():
        row = amber.annotations[id]
        safe = with_owners(row["truth"], amber.associations)
        bad = with_owners(row["hallu"], amber.associations)
        if nouns is None:
            found = mentions(text, known)
        else:
            found = [word for word in nouns(text) if word in known]
        good_hits = set()
        bad_hits = set()
        errors = 0
        for noun in found:
            if noun in amber.safe_words:
                continue
            owner = first_owner(safe, noun)
            if owner is not None:
                good_hits.add(owner)
                continue
            for owner in (first_owner(bad, noun), near_owner(bad, noun, amber, threshold)):
                if owner is not None:
                    bad_hits.add(owner)
            owner = near_owner(safe, noun, amber, threshold)
            if owner is None:
                errors += 1
            else:
                good_hits.add(owner)
        wrong, kept = wrong + errors, kept + len(found)
        credited, objects = credited + len(good_hits), objects + len(row["truth"])
        marked, bad_objects = marked + len(bad_hits), bad_objects + len(row["hallu"])
        clean, count = clean + (errors == 0), count + 1
    return {
        "CHAIR": round(wrong / kept * 100, 1),
        "Cover": round(credited / objects * 100, 1),
        "Hal": round(100 - clean / count * 100, 1),
        "Cog": round(marked / bad_objects * 100, 1),
    }


def first_owner(owners: Sequence[tuple[str, int]], noun: str) -> int | None:
    return next((owner for word, owner in owners if word == noun), None)


def near_owner(owners, noun: str, amber: Amber, threshold: float) -> int | None:
    for word, owner in owners:
        if amber.similar(noun, word) > threshold:
            return owner
    return None


ROWS = {  # a row of AMBER's table -> the kinds of questions that are added up for it
    "all": None,
    "existence": ("hallucination",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}


def kind_of(annotation: dict) -> str:
    """`discriminative-relation`, `relation` and whatever else has no row of its own: relation."""
    kind = annotation["type"].rsplit("-", 1)[-1]
    return kind if kind in ("state", "number", "action", "hallucination") else "relation"


def amber_discriminative(amber: Amber, responses: dict[int, str]) -> dict[str, dict[str, float]]:
    """Accuracy, Precision, Recall, F1 of all questions and of every kind of question. Only "Yes"
    and "No" count, to the letter, and "No" is the positive class."""
    rows = []
    for id, text in responses.items():
        annotation = amber.annotations[id]
        rows.append((kind_of(annotation), text, annotation["truth"]))
    table = {}
    for name, kinds in ROWS.items():
        of_row = [(text, truth) for kind, text, truth in rows if kinds is None or kind in kinds]
        if of_row:
            counters = 3 if name == "attribute" else 1  # attribute adds those of its three kinds
            epsilon = 0.001 if name == "existence" else 0.0001
            table[name] = amber_row(of_row, 0.001 * counters, epsilon)
    return table


def amber_row(rows: Sequence[tuple[str, str]], start: float, epsilon: float) -> dict[str, float]:
    """rows: (response, truth). `start`: where the counters of the denominators begin; `epsilon`
    is added to precision + recall, both between 0 and 1 and rounded as printed."""
    right = sum(parse_yes_no(text, "strict") == truth for text, truth in rows)
    hits = sum(text == "No" and truth == "no" for text, truth in rows)
    said = sum(text == "No" for text, _ in rows)
    due = sum(truth == "no" for _, truth in rows)
    precision = round(hits / (start + said) * 100, 1)
    recall = round(hits / (start + due) * 100, 1)
    p, r = precision / 100, recall / 100
    return {
        "Accuracy": round(right / (start + len(rows)) * 100, 1),
        "Precision": precision,
        "Recall": recall,
        "F1": round(2 * p * r / (p + r + epsilon) * 100, 1),
    }


def amber_score(amber: Amber, answers: dict[int, str | None]) -> dict:
    """Everything that the answers allow, how many questions have none, and the AMBER score
    (100 - CHAIR + F1) / 2 where both parts were asked and no answer was lost (None)."""
    check_ids([*amber.annotations], answers)
    gen, disc, lost = {}, {}, 0
    for id, text in answers.items():
        if text is None:
            lost += 1
        elif amber.annotations[id]["type"] == "generative":
            gen[id] = text
        else:
            disc[id] = text
    answered = len(gen) + len(disc)
    missing = len(amber.annotations) - answered
    result: dict = {"scorer": "amber", "answered": answered, "unanswered": missing, "lost": lost}
    if gen:
        result["generative"] = amber_generative(amber, gen)
    if disc:
        result["discriminative"] = amber_discriminative(amber, disc)
    if gen and disc and not lost:
        F1 = result["discriminative"]["all"]["F1"]
        result["AMBER score"] = round((100 - result["generative"]["CHAIR"] + F1) / 2, 2)
    return result
