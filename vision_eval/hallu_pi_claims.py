"""What hallu_pi_experiment.py claims, rule by rule, and its figure."""

from collections.abc import Sequence

import numpy as np

from minilm.claims import (
    STRENGTH,
    Cell,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    at_least,
    at_most,
    average,
    below,
    cells,
    fact,
    judge,
    key,
    untestable,
)
from minilm.results import COLORS, bar_seeds, new_figure, plot_seeds
from vision_eval import scenes, vlm
from vision_eval.exam import BEFORE, PLAIN, Block, Exam, before
from vision_eval.hallu_pi import OPS, SCENARIOS
from vision_eval.metrics import FIELDS
from vision_eval.scenes import KINDS

HINTS = ("0.5", "0.8", "0.95", "1.0")  # how often a hint was right in training
MILD = ("noise", "blur", "digital")
SHOWN = (  # blocks of which the figure shows a picture
    PLAIN,
    *(Block(op, severity=3) for op in OPS),
    *map(Block, ("concat", "crop", "misleading")),
)


# --- names of metrics


def pi(block: Block) -> tuple:
    return ("PI", *block)


def acc(block: Block, field: str = "") -> tuple:
    """ACC+, of all questions or of one field."""
    return ("ACC+", field, *block)


def four(hint: str = "", words: str = "") -> Block:
    """The mean of noise, blur, weather and digital."""
    return Block("four", hint=hint, words=words)


def lost(view: View, arm: str, scenario: str) -> PerSeed:
    whole, damaged = view(arm, pi(before(scenario))), view(arm, pi(Block(scenario)))
    return (whole - damaged).called(f"{arm} PI lost to {scenario}")


def told(parts: Sequence[PerSeed]) -> str:
    return "; ".join(map(str, parts))


# --- C: the paper's claims


def damage_raises_hallucination(view):
    """PI falls in all six picture scenarios, in at least four of them by 10 points."""
    drops = [lost(view, "clean", scenario) for scenario in SCENARIOS if scenario != "misleading"]
    falls = [above(drop, 0) for drop in drops]
    large = [at_least(drop, 10) for drop in drops]
    best_first = [part for word in STRENGTH for part in large if part.verdict == word]
    return all_of(falls + best_first[:4])


def hurts_more_than_mild_damage(view, scenario):
    """PI lost, and PI afterwards, against noise, blur and digital one by one."""
    parts = []
    for mild in MILD:
        more = lost(view, "clean", scenario) - lost(view, "clean", mild)
        lower = view("clean", pi(Block(scenario))) - view("clean", pi(Block(mild)))
        parts += [above(more, 0), below(lower, 0)]
    verdict = all_of(parts).verdict
    losses = [lost(view, "clean", name) for name in (scenario, *MILD, "weather")]
    return Verdict(verdict, told(losses))


def concatenation_hurts_more_than_noise_blur_and_pixels(view):
    """PI lost to it is more, and PI after it less, than with each of the three (fog is left out:
    its loss stands beside)."""
    return hurts_more_than_mild_damage(view, "concat")


def cropping_hurts_more_than_noise_blur_and_pixels(view):
    """PI lost to it is more, and PI after it less, than with each of the three (fog is left out:
    its loss stands beside)."""
    return hurts_more_than_mild_damage(view, "crop")


def misleading_prompts_hurt_more_than_noise_blur_and_pixels(view):
    """PI lost to it is more, and PI after it less, than with each of the three (fog is left out:
    its loss stands beside)."""
    return hurts_more_than_mild_damage(view, "misleading")


def field_drop(view, field: str) -> PerSeed:
    drop = view("clean", acc(PLAIN, field)) - view("clean", acc(Block("concat"), field))
    return drop.called(f"{field} lost to concat")


LEARNED = ("existence", "number", "color", "hal-object")  # relation is not, before any damage


def some_fields_suffer_more_than_others(view):
    """Concat: existence loses at least 10 points of ACC+ more than number (the order of earlier
    runs, fixed before this one)."""
    existence, number = field_drop(view, "existence"), field_drop(view, "number")
    part = at_least((existence - number).called("existence - number"), 10)
    return Verdict(part.verdict, f"{part.measured}; {existence}; {number}")


def number_suffers_most(view):
    """Concat: number loses more ACC+ than existence, color and hal-object, each (relation is left
    out: it was not learned)."""
    number = field_drop(view, "number")
    others = [field_drop(view, field) for field in LEARNED if field != "number"]
    verdict = all_of(above(number - other, 0) for other in others).verdict
    after = [view("clean", acc(Block("concat"), field)) for field in FIELDS]
    afterwards = ", ".join(f"{field} {x.mean:.0f}" for field, x in zip(FIELDS, after))
    return Verdict(verdict, f"{told([number, *others])}; ACC+ after: {afterwards}")


def rank_swaps(view, twin: str) -> Verdict:
    worse = view("clean", pi(PLAIN)) - view(twin, pi(PLAIN))
    better = view(twin, pi(four())) - view("clean", pi(four()))
    return all_of([above(worse, 0), above(better, 0)])


def the_best_on_clean_pictures_is_not_the_best_on_damaged_ones(view):
    """PI of a twin that saw damage of other kinds: below clean's before, above it on the mean of
    noise, blur, weather, digital."""
    return rank_swaps(view, "robust elsewhere")


def so_it_is_with_a_twin_that_saw_the_tested_damage(view):
    """PI of the robust twin: below clean's before, above it on the mean of the four operations."""
    return rank_swaps(view, "robust")


USUAL = ("usual", *Block("crop"))


def a_cropped_page_still_has_the_usual_count(view):
    """Cropped boards said to have nine shapes: at least 3 x 1/9 of them, and more than the robust
    twin, which has seen partial boards, says it of."""
    clean, robust = view("clean", USUAL), view("robust", USUAL)
    return all_of([at_least(clean, 100 / 3), above(clean - robust, 0)])


FOGGED = Block("weather")
MISLED = (PLAIN._replace(hint="misled"), FOGGED._replace(hint="misled"))


def cost(view, trust: str) -> PerSeed:
    """ACC+ lost to wrong hints, mean of undamaged and fogged pictures."""
    arm = f"hints {trust}"
    losses = []
    for block, misled in zip((PLAIN, FOGGED), MISLED):
        losses.append(view(arm, acc(block)) - view(arm, acc(misled)))
    return average(losses, f"ACC+ lost, hints right {float(trust):.0%}")


def a_false_premise_misleads_the_more_hints_were_trusted(view):
    """ACC+ lost to wrong hints: 10 points more where hints were always right than where half were;
    where 80% were, at most 3 outside of that."""
    low, middle, high = (cost(view, trust) for trust in ("0.5", "0.8", "1.0"))
    parts = [at_least(high - low, 10), at_least(middle - low, -3), at_least(high - middle, -3)]
    return Verdict(all_of(parts).verdict, told([low, middle, high]))


def a_reminder_helps(view):
    """Not testable here; the gain of ACC+ on the four operations stands beside that of two other
    words that were never trained either."""
    reason = ("of the reminder two words reach this model, note and carefully, and neither was "
              "ever trained")
    if "clean" not in view:
        return untestable(reason)
    none = view("clean", acc(four()))
    gains = []
    for words in ("reminder", "greeting"):
        gains.append((view("clean", acc(four(words=words))) - none).called(words))
    return untestable(f"{reason}: {told(gains)}")


def demonstrations_help(view):
    """Not testable here: they are other pictures, earlier in the conversation."""
    return untestable("the tiny model reads one picture at a time; benchmark.py --baseline icl "
                      "asks a real model so")


def a_taught_reminder_helps_against_wrong_hints(view):
    """Its gain of ACC+ (mean of the four operations, wrong hints): 2 points or more, more than
    where it was not taught, and to 2 points above what that arm has without it."""
    def gain(arm):
        with_it = view(arm, acc(four("misled", "reminder")))
        return (with_it - view(arm, acc(four("misled")))).called(f"{arm}: gain")

    taught, untaught = gain("reminded"), gain("unreminded")
    reached = view("reminded", acc(four("misled", "reminder")))
    left_alone = view("unreminded", acc(four("misled")))
    parts = [at_least(taught, 2), above(taught - untaught, 0), at_least(reached - left_alone, 2)]
    return Verdict(all_of(parts).verdict, told([taught, untaught, reached - left_alone]))


EXPECTED, CHANCE = ("expected",), ("chance",)


def lead(view, arm: str, table: str = "") -> PerSeed:
    over = view(arm, (*EXPECTED, table)) - view(arm, (*CHANCE, table))
    return over.called(f"{arm}{' ' if table else ''}{table}: expected - chance")


def what_is_invented_is_what_one_would_expect(view):
    """Hal-objects among the kinds that the robust twin invents on noise, blur, weather and digital:
    above their share of the absent kinds (mean 5 points or more), and more so than in a twin whose
    world has no such pairs of kinds."""
    robust, unprimed = lead(view, "robust"), lead(view, "unprimed")
    parts = [above(robust, 0), fact(robust.mean >= 5, str(robust)), above(robust - unprimed, 0)]
    return Verdict(all_of(parts).verdict, told([robust, unprimed]))


# --- R: what would explain it away


def with_a_wrong_table_of_pairs_nothing_is_expected(view):
    """The same inventions, scored with pairs of kinds that do not go together: at most 5 points
    above their own chance."""
    return at_most(lead(view, "robust", "wrong pairs"), 5)


def without_pairs_in_training_nothing_is_expected(view):
    """A base and a robust twin of a world in which a kind comes with every other equally often: at
    most 5 points above chance."""
    return at_most(lead(view, "unprimed"), 5)


def the_information_is_still_there(view):
    """PI lost by the robust twin: at most 2/3 of clean's on the four operations (mean), at most
    half of it for crop."""
    def left(scenario, share):
        own, other = lost(view, "robust", scenario), lost(view, "clean", scenario)
        spared = PerSeed(tuple(share * b - a for a, b in zip(own.values, other.values)))
        return at_least(spared, 0), own, other

    damage, crop = left("four", 2 / 3), left("crop", 1 / 2)
    return Verdict(all_of([damage[0], crop[0]]).verdict, told([*damage[1:], *crop[1:]]))


def mosaics_can_be_learned(view):
    """PI lost to concat by a twin that trained on mosaics: at most 2/3 of clean's."""
    own, other = lost(view, "robust mosaics", "concat"), lost(view, "clean", "concat")
    spared = PerSeed(tuple(2 / 3 * b - a for a, b in zip(own.values, other.values)))
    return Verdict(at_least(spared, 0).verdict, told([own, other]))


def who_distrusts_pixels_trusts_prompts(view):
    """On undamaged pictures wrong hints cost the robust twin more ACC+ than clean."""
    losses = []
    for arm in ("robust", "clean"):
        loss = view(arm, acc(PLAIN)) - view(arm, acc(MISLED[0]))
        losses.append(loss.called(f"{arm}: ACC+ lost to wrong hints"))
    robust, clean = losses
    pi_lost = [lost(view, arm, "misleading") for arm in ("robust", "clean")]
    return Verdict(above(robust - clean, 0).verdict, told([*losses, *pi_lost]))


def steps_down(view, op: str) -> Verdict:
    blocks = [PLAIN, *(Block(op, severity=severity) for severity in (1, 3, 5))]
    levels = [view("clean", acc(block)) for block in blocks]
    parts = [above(less - more, 0) for less, more in zip(levels, levels[1:])]
    return Verdict(all_of(parts).verdict, told(levels))


def mild_noise_hurts_already(view):
    """ACC+: none > severity 1 > 3 > 5."""
    return steps_down(view, "noise")


def mild_blur_hurts_already(view):
    """ACC+: none > severity 1 > 3 > 5."""
    return steps_down(view, "blur")


def mild_fog_hurts_already(view):
    """ACC+: none > severity 1 > 3 > 5."""
    return steps_down(view, "weather")


def large_pixels_hurt_already(view):
    """ACC+: none > severity 1 > 3 > 5."""
    return steps_down(view, "digital")


# --- the table


def at(arm: str, *metrics: tuple) -> list[Cell]:
    return cells([arm], metrics)


def given(cells_: Sequence[Cell], value: float) -> dict[Cell, float]:
    """Other numbers that a rule reads, with a value under which the claim can hold."""
    return dict.fromkeys(cells_, value)


WHOLE = [pi(before(scenario)) for scenario in SCENARIOS]
AFTER = [pi(Block(scenario)) for scenario in SCENARIOS]
MILD_AFTER = [pi(Block(mild)) for mild in MILD]


def worse_than_mild(id: str, rule, scenario: str) -> Claim:
    others = {pi(PLAIN), pi(before(scenario)), pi(Block("weather"))}
    return Claim(
        id, rule, "more", at("clean", pi(Block(scenario))), at("clean", *MILD_AFTER),
        smaller_is_better=True, given=given(at("clean", *others), 50),
        paper="concat, crop and misleading prompts hurt far more than the four operations",
        sentence=rule.__name__.replace("_", " ").replace("noise blur", "noise, blur").capitalize(),
    )  # fmt: skip


def order(id: str, rule, op: str) -> Claim:
    damaged = [acc(Block(op, severity=severity)) for severity in (5, 3, 1)]
    return Claim(id, rule, "order", at("clean", *damaged, acc(PLAIN)))


OF_THE_PAPER = [
    Claim(
        "C1", damage_raises_hallucination, "more",
        at("clean", *WHOLE[:-1]), at("clean", *AFTER[:-1]), margin=10,
        paper="PI falls for 11 of 12 models (concat), 10 of 12 (crop); ACC+ in 33 of 36 cells",
    ),
    worse_than_mild("C2a", concatenation_hurts_more_than_noise_blur_and_pixels, "concat"),
    worse_than_mild("C2b", cropping_hurts_more_than_noise_blur_and_pixels, "crop"),
    worse_than_mild("C2c", misleading_prompts_hurt_more_than_noise_blur_and_pixels, "misleading"),
    Claim(
        "C3a", some_fields_suffer_more_than_others, "more",
        at("clean", acc(Block("concat"), "number")), at("clean", acc(Block("concat"), "existence")),
        margin=10,
        given=given(at("clean", acc(PLAIN, "number"), acc(PLAIN, "existence")), 50),
        paper="in concat every field drops, unevenly",
    ),
    Claim(
        "C3b", number_suffers_most, "more",
        at("clean", acc(Block("concat"), "number")),
        at("clean", *(acc(Block("concat"), f) for f in ("existence", "color", "hal-object"))),
        smaller_is_better=True,
        given=given(at("clean", *(acc(PLAIN, f) for f in LEARNED),
                       acc(Block("concat"), "relation")), 50),
        paper="number drops most, relation is lowest after",
    ),
    Claim(
        "C4", the_best_on_clean_pictures_is_not_the_best_on_damaged_ones, "more",
        [*at("robust elsewhere", pi(four())), *at("clean", pi(PLAIN))],
        [*at("clean", pi(four())), *at("robust elsewhere", pi(PLAIN))],
        run="seeds", paper="scores on clean inputs do not predict those on perturbed ones",
    ),
    Claim(
        "C4s", so_it_is_with_a_twin_that_saw_the_tested_damage, "more",
        [*at("robust", pi(four())), *at("clean", pi(PLAIN))],
        [*at("clean", pi(four())), *at("robust", pi(PLAIN))],
    ),
    Claim(
        "C5", a_cropped_page_still_has_the_usual_count, "level", at("clean", USUAL),
        controls=at("robust", USUAL), bound=100 / 3, paper='"26 letters" in any crop',
    ),
    Claim(
        "C6", a_false_premise_misleads_the_more_hints_were_trusted, "more",
        at("hints 0.5", *map(acc, MISLED)), at("hints 1.0", *map(acc, MISLED)), margin=10,
        given=given(cells(["hints 0.5", "hints 0.8", "hints 1.0"], [acc(PLAIN), acc(FOGGED)]), 50)
        | given(at("hints 0.8", *map(acc, MISLED)), 5),
        paper="PI falls for 12 of 12 models",
    ),
    Claim("C7", a_reminder_helps, "open", paper="GPT-4V, one run: ACC+ rises in all scenarios"),
    Claim("C7i", demonstrations_help, "open", paper="GPT-4V, one run: ACC+ rises, Hal not always"),
    Claim(
        "C7t", a_taught_reminder_helps_against_wrong_hints, "more",
        at("reminded", acc(four("misled", "reminder"))), at("unreminded", acc(four("misled"))),
        at("unreminded", acc(four("misled", "reminder"))), margin=2,
        given=given(at("reminded", acc(four("misled"))), 0.5), run="seeds",
    ),
    Claim(
        "C8", what_is_invented_is_what_one_would_expect, "more",
        at("robust", EXPECTED), at("robust", CHANCE), at("unprimed", EXPECTED), margin=5,
        given=given(at("unprimed", CHANCE), 0.5), run="seeds",
        paper="Cog rises from 8.0 to 14.1 (concat)",
    ),
]  # fmt: skip

OF_OURS = [
    Claim(
        "R8a", with_a_wrong_table_of_pairs_nothing_is_expected, "no worse",
        at("robust", (*EXPECTED, "wrong pairs")), at("robust", (*CHANCE, "wrong pairs")),
        margin=5, smaller_is_better=True, run="seeds",
    ),
    Claim(
        "R8b", without_pairs_in_training_nothing_is_expected, "no worse",
        at("unprimed", EXPECTED), at("unprimed", CHANCE),
        margin=5, smaller_is_better=True, run="seeds",
    ),
    Claim(
        "R1", the_information_is_still_there, "more",
        at("robust", pi(four()), pi(Block("crop"))), at("clean", pi(four()), pi(Block("crop"))),
        margin=6, given=given(cells(["clean", "robust"], [pi(PLAIN), pi(before("crop"))]), 10),
    ),
    order("R2a", mild_noise_hurts_already, "noise"),
    order("R2b", mild_blur_hurts_already, "blur"),
    order("R2c", mild_fog_hurts_already, "weather"),
    order("R2d", large_pixels_hurt_already, "digital"),
    Claim(
        "R4", mosaics_can_be_learned, "more",
        at("robust mosaics", pi(Block("concat"))), at("clean", pi(Block("concat"))),
        margin=6, given=given(cells(["clean", "robust mosaics"], [pi(PLAIN)]), 10), run="full",
    ),
    Claim(
        "R5", who_distrusts_pixels_trusts_prompts, "more",
        at("robust", acc(MISLED[0])), at("clean", acc(MISLED[0])), smaller_is_better=True,
        given=given(cells(["clean", "robust"], [acc(PLAIN), pi(before("misleading")),
                                                pi(Block("misleading"))]), 50),
    ),
]  # fmt: skip

CLAIMS = OF_THE_PAPER + OF_OURS

FINDING = (
    "A model that sees makes things up when its picture is damaged, cropped or pasted among "
    "others; what a wrong hint costs depends on how often hints were right in training."
)


def headline(view: View) -> str:
    names = {"before": PLAIN, "noise": Block("noise"), "fog": Block("weather"),
             "concat": Block("concat")}
    scores = [f"{name} {view.mean('clean', pi(block)):.0f}" for name, block in names.items()]
    return f"PI-Score: {', '.join(scores)}."


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def shown_scene(exam: Exam, block: Block) -> int:
    """The picture of the figure: the first scene with three kinds (misleading, where one is added:
    two), or the first board."""
    if block.scenario == "crop":
        return 0
    wanted = 2 if block.scenario == "misleading" else 3
    for i, scene in enumerate(exam.scenes):
        if len(scenes.kinds_of(scene.shapes)) == wanted:
            return i
    return 0


RIGHT, WRONG, MISSED = COLORS[6], COLORS[1], COLORS[7]  # black, orange, grey


def judged_phrases(words: Sequence[str], truth: str) -> list[list[tuple[str, str]]]:
    """An answer as phrases, each word with its colour: black where kind, number and colour are as
    in `truth` (a description, names or a number), orange where not; [what is missing] in grey.

        "two white ring" where one white ring is there: two is orange, white and ring are black"""
    there = {phrase[-1]: phrase for phrase in phrases(truth.split())}
    told, named = [], set()
    for phrase in phrases(words):
        right = there.get(phrase[-1], [])
        told.append([(word, RIGHT if word in right else WRONG) for word in phrase])
        named.add(phrase[-1])
    told += [[(f"[{phrase[-1]}]", MISSED)] for kind, phrase in there.items() if kind not in named]
    return told


def phrases(words: Sequence[str]) -> list[list[str]]:
    """["one", "red", "ring", "bar"] -> [["one", "red", "ring"], ["bar"]]: a kind ends a phrase."""
    found: list[list[str]] = [[]]
    for word in words:
        found[-1].append(word)
        if word in KINDS:
            found.append([])
    return [phrase for phrase in found if phrase]


def right_words(exam: Exam, block: Block, i: int) -> str:
    """What the model should say about picture i of a block."""
    if block.scenario == "crop":
        return exam.block(block).rows[i][0].answer
    shapes = exam.scenes[i].shapes
    named = scenes.name_kinds(shapes) if block.scenario == "misleading" else scenes.describe(shapes)
    return named.evidence


def write_words(ax, told: list[list[tuple[str, str]]]) -> None:
    """Under a picture, a phrase a line, every word in its colour."""
    for row, phrase in enumerate(told[:6]):
        line = " ".join(word for word, _ in phrase)
        start = 0
        for word, color in phrase:
            padded = " " * start + word + " " * (len(line) - start - len(word))
            ax.text(0.5, -0.07 - 0.16 * row, padded, transform=ax.transAxes, color=color,
                    ha="center", va="top", fontsize=7.5, family="monospace")  # fmt: skip
            start += len(word) + 1


def draw_pictures(fig, exam: Exam, says: dict) -> None:
    grid = fig.add_gridspec(1, len(SHOWN), left=0.015, right=0.985, bottom=0.72, top=0.9,
                            wspace=0.12)  # fmt: skip
    for column, block in enumerate(SHOWN):
        ax = fig.add_subplot(grid[column])
        i = shown_scene(exam, block)
        asked = exam.block(block)
        ax.imshow(asked.pictures[i])
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        place = f" ({asked.rows[i][0].region})" if asked.rows[i][0].region else ""
        ax.set_title((block.scenario or BEFORE) + place, fontsize=10.5)
        name = key(("says", *block))
        if name in says:
            words = [vlm.WORDS[int(id)] for id in says[name]["values"][0] if id]
            write_words(ax, judged_phrases(words, right_words(exam, block, i)))
    fig.text(0.5, 0.985, "What the model says (severity 3): black is right, orange is not, [grey] "
             "is missed", ha="center", va="top", fontsize=13)  # fmt: skip


def draw_scores(ax, metrics: dict) -> None:
    """PI before and after every scenario, and after it for the robust twin."""
    bars = (("clean", before, "before"), ("clean", Block, "after"),
            ("robust", Block, "after, robust twin"))  # fmt: skip
    for k, (arm, block_of, label) in enumerate(bars):
        for x, scenario in enumerate(SCENARIOS):
            name = key(pi(block_of(scenario)))
            if name in metrics.get(arm, {}):
                values = metrics[arm][name]["values"]
                bar_seeds(ax, x + 0.27 * (k - 1), values, COLORS[k], 0.25, None if x else label)
    blank = key(pi(Block("blank")))
    if blank in metrics.get("clean", {}):
        level = metrics["clean"][blank]["mean"]
        ax.axhline(level, color=COLORS[6], linestyle="--", linewidth=1, label="no picture")
    ax.set_xticks(range(len(SCENARIOS)), SCENARIOS, rotation=35, ha="right")
    ax.set(ylabel="PI-Score (points; dots: seeds)", ylim=(0, 122), title="Before and after")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", ncols=2, fontsize=8.5, columnspacing=1, frameon=False)


def draw_severities(ax, series: dict) -> None:
    for op, color in zip(OPS, COLORS):
        name = key(("ACC+", op))
        if name in series:
            plot_seeds(ax, series[name]["x"], series[name]["values"], op, color, marker="o")
    ax.set(xlabel="severity (0: none)", ylabel="ACC+ (%)", title="How much damage", ylim=(0, 103))
    if ax.lines:
        ax.legend(fontsize=8.5, frameon=False)


def draw_hints(ax, metrics: dict) -> None:
    trusted = [trust for trust in HINTS if f"hints {trust}" in metrics]
    x = [100 * float(trust) for trust in trusted]
    kinds = ((PLAIN, MISLED[0], "undamaged", 0), (FOGGED, MISLED[1], "fogged", 4))
    for block, misled, label, color in kinds:
        costs = []
        for trust in trusted:
            row = metrics[f"hints {trust}"]
            whole, wrong = (row[key(acc(b))]["values"] for b in (block, misled))
            costs.append(np.subtract(whole, wrong))
        if costs:
            plot_seeds(ax, x, np.array(costs).T, label, COLORS[color], marker="o")
    ax.set(xlabel="hints right in training (%)", ylabel="ACC+ lost to wrong hints (points)",
           title="A false premise")  # fmt: skip
    if ax.lines:
        ax.legend(fontsize=8.5, frameon=False)


def draw_inventions(ax, view: View) -> None:
    """C8 and what refutes it: the share of Hal-objects among what is invented, above chance."""
    shown = (
        ("robust", "", "robust twin"),
        ("robust", "wrong pairs", "scored with\nwrong pairs"),
        ("unprimed", "", "in a world\nwithout pairs"),
    )
    for x, (arm, table, _) in enumerate(shown):
        bar_seeds(ax, x, lead(view, arm, table).values, COLORS[x])
    ax.axhline(0, color="#555555", linewidth=1)
    labels = [label for _, _, label in shown]
    ax.set_xticks(range(len(shown)), labels, rotation=35, ha="right", fontsize=8.5)
    ax.set(ylabel="expected, above chance (points)", title="What is invented")


def draw_fields(ax, metrics: dict) -> None:
    """ACC+ lost, a row a field, a column a scenario; crop asks for numbers only."""
    shown = [scenario for scenario in SCENARIOS if scenario != "crop"]

    def mean(block, field):
        return metrics.get("clean", {}).get(key(acc(block, field)), {"mean": np.nan})["mean"]

    losses = np.full((len(FIELDS), len(shown)), np.nan)
    labels = []
    for row, field in enumerate(FIELDS):
        whole = mean(PLAIN, field)
        if np.isnan(whole):
            labels.append(field)
            continue
        labels.append(f"{field}\n({whole:.0f} before" + (")" if whole >= 50 else ":\nnot learned)"))
        for column, scenario in enumerate(shown):
            loss = mean(before(scenario), field) - mean(Block(scenario), field)
            if whole >= 50:
                losses[row, column] = loss
            color = "white" if whole >= 50 and loss > 50 else "black" if whole >= 50 else COLORS[7]
            shown_as = {"color": color, "ha": "center", "va": "center", "fontsize": 9}
            ax.text(column, row, str(round(loss)), **shown_as)
    ax.imshow(losses, cmap="cividis_r", vmin=0, vmax=100, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(len(shown)), shown, rotation=35, ha="right")
    ax.set_yticks(range(len(FIELDS)), labels, fontsize=8.5)
    ax.set_title("ACC+ lost (points)")


def figure(results: dict):
    """Above: one scene (and a board) before and after, with what the model says. Below: PI before
    and after; ACC+ over severity; what wrong hints cost; ACC+ lost by field."""
    metrics, series = results["metrics"], results["series"].get("clean", {})
    fig, placeholder = new_figure(1, 1, width=13, height=7.6)
    placeholder.remove()
    fig.set_layout_engine("none")
    draw_pictures(fig, Exam(results["config"]["scenes"], results["seeds"][0]), series)
    panels = fig.add_gridspec(1, 4, left=0.05, right=0.985, bottom=0.12, top=0.49, wspace=0.4,
                              width_ratios=(1.9, 1, 1, 1.5))  # fmt: skip
    scores, severities, hints, fields = (fig.add_subplot(panels[i]) for i in range(4))
    for ax in (scores, severities, hints):
        ax.spines[["top", "right"]].set_visible(False)
    draw_scores(scores, metrics)
    draw_severities(severities, series)
    if "unprimed" in metrics and "hints 1.0" not in metrics:
        draw_inventions(hints, View(metrics))
    else:
        draw_hints(hints, metrics)
    draw_fields(fields, metrics)
    return fig
