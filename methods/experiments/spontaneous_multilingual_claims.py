"""Spontaneous multilingual learners: the claims, and the figure. What was measured:
experiments/spontaneous_multilingual.py."""

from methods.spontaneous_multilingual import DEV, SEEN, UNSEEN
from minilm.claims import (
    HOLDS,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    at_least,
    at_most,
    average,
    cells,
    fact,
    judge,
    untestable,
)
from minilm.results import COLORS, bar_seeds, new_figure, plot_seeds

BASE, QT, SHUFFLED, MONO = "base", "qt", "shuffled", "mono"
TO_CLONE, LORA, TWICE = "to clone", "qt lora", "base asked twice"
CONTROLS = (SHUFFLED, MONO)
CLONES = (*SEEN, *DEV, *UNSEEN)
LAST = UNSEEN[-1]  # f puts the verb last; English, and so whoever copies English, does not
ENGLISH, KNOWN, TAUGHT = 0.75, 0.8, 0.9  # the gates' bounds, in every seed

FINDING = (
    "A model that can translate six languages, and labels questions in English alone, is tuned to "
    "translate questions of two. It then translates others that tuning never showed, too, and the "
    "label that it writes behind its translation is right; read at once, as the paper reads them, "
    "labels gain in no language."
)


def headline(view: View) -> str:
    exact = [over(view, arm, "exact", UNSEEN).mean for arm in (QT, MONO, SHUFFLED)]
    labels = [
        over(view, QT, "label", UNSEEN).mean,
        over(view, QT, "acc", UNSEEN).mean,
        over(view, BASE, "acc", UNSEEN).mean,
    ]
    return (
        "Questions in languages that no tuning showed, translated word for word: {:.2f}, after "
        "copied English {:.2f}, after wrong pairs {:.2f}. The label behind its own translation is "
        "right in {:.2f}, at once in {:.2f}, before tuning in {:.2f}; chance .5.".format(
            *exact, *labels
        )
    )


def over(view: View, arm: str, metric, languages) -> PerSeed:
    """The mean over languages: one number per seed. metric: a name, or ("acc", "0-shot")."""
    parts = (metric,) if isinstance(metric, str) else metric
    name = f"{arm} {' '.join(parts)} {'/'.join(languages)}"
    return average((view(arm, (*parts, language)) for language in languages), name)


def lead(view: View, arm: str, other: str, metric, languages=UNSEEN) -> PerSeed:
    """One arm minus another, on the same questions."""
    return over(view, arm, metric, languages) - over(view, other, metric, languages)


def leads_by(x: PerSeed, margin: float) -> Verdict:
    """The interval over seeds is above 0, and the mean at least the margin."""
    return all_of([above(x), fact(x.mean >= margin, "")])


def lowest(view: View, arm: str, metric: str, languages) -> PerSeed:
    """The worst language of each seed."""
    rows = zip(*(view(arm, (metric, language)).values for language in languages))
    return PerSeed(tuple(map(min, rows)), f"{arm} {metric}, worst of {'/'.join(languages)}")


def in_every_seed(x: PerSeed, bound: float) -> Verdict:
    worst = min(x.values)
    return fact(worst >= bound, f"{x.name}, worst seed {worst:.3f}, mean {x.mean:.3f}")


def beside(*shown: PerSeed) -> Verdict:
    """What is printed and decides nothing."""
    return fact(True, "beside: " + ", ".join(f"{x.name} {x.mean:.3f}" for x in shown))


# --- gates: what the paper presupposes


def the_base_answers_in_English(view: View) -> Verdict:
    """base, English, two examples: at least .75 of the labels in every seed. Both labels are due
    equally often, so who always says the same is right in .5."""
    return in_every_seed(view(BASE, ("acc", "en")), ENGLISH)


def the_base_can_translate_every_clone(view: View) -> Verdict:
    """Asked as in pretraining (<sep>), the base finds at least .8 of the English verbs of each of
    the six clones in every seed."""
    exact = over(view, TWICE, "exact", CLONES)
    found = in_every_seed(lowest(view, TWICE, "verbs", CLONES), KNOWN)
    return all_of([found, beside(exact)])


def tuning_has_taught_the_seen_languages(view: View) -> Verdict:
    """qt translates at least .9 of the test questions in a and in b exactly, in every seed."""
    return in_every_seed(lowest(view, QT, "exact", SEEN), TAUGHT)


GATES = {
    "G1": the_base_answers_in_English,
    "G2": the_base_can_translate_every_clone,
    "G3": tuning_has_taught_the_seen_languages,
}


def failed(view: View, *names: str) -> str:
    """Which of these gates fail, with their numbers; "" if none does."""
    verdicts = {name: GATES[name](view) for name in names}
    found = [f"{name} ({v.measured})" for name, v in verdicts.items() if not ok(v)]
    return f"gate failed: {'; '.join(found)}" if found else ""


def knows_and_was_taught(view: View) -> str:
    """For translations: what was to be woken must be there, and tuning must have taught its
    task."""
    return failed(view, "G2", "G3")


def answers_as_well(view: View) -> str:
    """For labels: the base must also know how to find them, in English at least."""
    return failed(view, "G1", "G2", "G3")


def ok(verdict: Verdict) -> bool:
    return verdict.verdict == HOLDS


# --- the paper's reading: the label in one pass


def gains(view: View, arm: str, languages, by: float) -> Verdict:
    """The rule of C1, C2 and C3: AUC above the base and both controls, intervals over seeds above 0
    and mean leads of at least `by`. Accuracy, the paper's metric, stands beside it."""
    others = (BASE, *CONTROLS)
    parts = [leads_by(lead(view, arm, other, "auc", languages), by) for other in others]
    shown = [over(view, x, "acc", languages) for x in (arm, BASE)]
    return all_of([*parts, beside(*shown)])


def languages_whose_questions_were_translated_gain_in_one_pass(view: View) -> Verdict:
    """AUC of the label, mean of a and b: qt above base, shuffled and mono, intervals over seeds
    above 0 and each mean lead at least .08."""
    return gains(view, QT, SEEN, 0.08)


def languages_never_seen_in_tuning_gain_in_one_pass(view: View) -> Verdict:
    """AUC of the label, mean of e and f: qt above base, shuffled and mono, intervals over seeds
    above 0 and each mean lead at least .04."""
    return gains(view, QT, UNSEEN, 0.04)


def translating_into_another_language_than_English_does_it_too(view: View) -> Verdict:
    """C2's rule for questions of English and b, translated into clone a."""
    return gains(view, TO_CLONE, UNSEEN, 0.04)


def questions_of_one_task_help_another_task(view: View) -> Verdict:
    """Accuracy on another task."""
    return untestable(
        "this world has one classification task; methods/real/spontaneous_multilingual.py has "
        "--train-task"
    )


def middle_layers_think_of_the_English_label_more(view: View) -> Verdict:
    """Largest probability of the right English label below the last block, mean of e and f: qt
    above base, shuffled and mono (intervals over seeds)."""
    return all_of(above(lead(view, QT, other, "lens")) for other in (BASE, *CONTROLS))


def unseen_languages_are_aligned_better_with_English(view: View) -> Verdict:
    """Correlation of the first principal component with English's, mean of e and f, as it is and
    without prompt length: qt above base, shuffled and mono (intervals over seeds)."""
    parts = []
    for metric in ("r", "partial r"):
        parts += [above(lead(view, QT, other, metric)) for other in (BASE, *CONTROLS)]
    return all_of(parts)


def English_is_kept(view: View) -> Verdict:
    """English accuracy: qt at most .03 below base (interval over seeds)."""
    return at_least(view(QT, ("acc", "en")) - view(BASE, ("acc", "en")), -0.03)


# --- our reading: what spreads is the translation


def translates_better(view: View, languages) -> Verdict:
    """The rule of T1 and T1v."""
    return all_of(
        [
            leads_by(lead(view, QT, MONO, "exact", languages), 0.15),
            above(lead(view, QT, SHUFFLED, "exact", languages), 0.5),
            above(lead(view, QT, BASE, "exact", languages), 0.5),
        ]
    )


def languages_never_seen_in_tuning_are_translated(view: View) -> Verdict:
    """Asked to translate e and f (mean), qt does so word for word more often than mono (interval
    over seeds above 0, mean lead at least .15), than shuffled and than base (each by more than
    .5)."""
    return translates_better(view, UNSEEN)


def also_where_the_word_order_is_another(view: View) -> Verdict:
    """T1's rule for f alone, which puts the verb last. English, and so mono's task, does not."""
    return all_of([translates_better(view, (LAST,)), beside(over(view, QT, "exact", UNSEEN[:1]))])


def also_words_that_no_clone_shares_with_another(view: View) -> Verdict:
    """English verbs found for a clone's own verbs (no root that a or b has as well), mean of e and
    f: qt above mono, shuffled and base, intervals over seeds above 0, mean leads at least .1."""
    others = (BASE, *CONTROLS)
    return all_of(leads_by(lead(view, QT, other, "own verbs"), 0.1) for other in others)


def the_papers_adapter_does_so_as_well(view: View) -> Verdict:
    """Rank 8 on query and value projections, e and f translated word for word: above base and above
    shuffled by more than .15 (intervals over seeds). Beside: qt, and the adapter in a and b."""
    parts = [above(lead(view, LORA, other, "exact"), 0.15) for other in (BASE, SHUFFLED)]
    shown = over(view, QT, "exact", UNSEEN), over(view, LORA, "exact", SEEN)
    return all_of([*parts, beside(*shown)])


def wrong_pairs_teach_no_translation(view: View) -> Verdict:
    """shuffled translates at most .05 of the questions in e and f exactly (interval over seeds)."""
    return at_most(over(view, SHUFFLED, "exact", UNSEEN), 0.05)


def behind_its_own_translation_the_label_is_right(view: View) -> Verdict:
    """Mean of e and f. The label that qt puts into the slot that it opened itself is right more
    often than the base's label in one pass, the better of two examples and none, by more than .2;
    shuffled's is right in at most .6 (intervals over seeds). A slot that is not opened is wrong."""
    few, none = (over(view, BASE, metric, UNSEEN) for metric in ("acc", ("acc", "0-shot")))
    best = PerSeed(tuple(map(max, few.values, none.values)), "base in one pass, better reading")
    gain = over(view, QT, "label", UNSEEN) - best
    return all_of(
        [
            above(gain, 0.2),
            at_most(over(view, SHUFFLED, "label", UNSEEN), 0.6),
            beside(
                over(view, QT, "label", UNSEEN),
                over(view, SHUFFLED, "opened", UNSEEN),
                over(view, TWICE, "label", UNSEEN),
            ),
        ]
    )


def it_took_the_translation_of_clones_to_do_so(view: View) -> Verdict:
    """The same label: qt above mono, which copied English only (interval over seeds)."""
    return above(lead(view, QT, MONO, "label"))


def the_untuned_base_does_it_in_two_prompts(view: View) -> Verdict:
    """Asked to retell (<sep>), and then for the label of what it said, the base is at most .05
    behind qt, mean of e and f (interval over seeds): tuning joins what the base knows."""
    return at_least(lead(view, TWICE, QT, "label"), -0.05)


def answers_and_translates(view: View) -> str:
    refused = answers_as_well(view)
    if not refused and not ok(languages_never_seen_in_tuning_are_translated(view)):
        return "gate failed: T1 (the translation itself is not there)"
    return refused


# --- the table


def of(arms, metric: str, languages=UNSEEN) -> list:
    return cells(arms, [(metric, language) for language in languages])


def given(value: float, *groups: list) -> dict:
    return {cell: value for group in groups for cell in group}


TRANSLATIONS = {"gate": knows_and_was_taught}
LABELS = {"gate": answers_as_well}
BOTH = {"gate": answers_and_translates}

CLAIMS = [
    Claim(
        "G1",
        the_base_answers_in_English,
        "level",
        method=of([BASE], "acc", ["en"]),
        bound=ENGLISH,
        sentence="Gate: the base answers in English",
    ),
    Claim(
        "G2",
        the_base_can_translate_every_clone,
        "level",
        method=of([TWICE], "verbs", CLONES),
        bound=KNOWN,
        given=given(0.8, of([TWICE], "exact", CLONES)),
        sentence="Gate: the base can translate every clone",
    ),
    Claim(
        "G3",
        tuning_has_taught_the_seen_languages,
        "level",
        method=of([QT], "exact", SEEN),
        bound=TAUGHT,
        sentence="Gate: tuning has taught the seen languages",
    ),
    Claim(
        "C1",
        languages_whose_questions_were_translated_gain_in_one_pass,
        "more",
        method=of([QT], "auc", SEEN),
        baseline=of([BASE], "auc", SEEN),
        controls=of(CONTROLS, "auc", SEEN),
        margin=0.08,
        given=given(0.5, of([QT, BASE], "acc", SEEN)),
        paper="mean accuracy rises clearly",
        **LABELS,
    ),
    Claim(
        "C2",
        languages_never_seen_in_tuning_gain_in_one_pass,
        "more",
        method=of([QT], "auc"),
        baseline=of([BASE], "auc"),
        controls=of(CONTROLS, "auc"),
        margin=0.04,
        given=given(0.5, of([QT, BASE], "acc")),
        paper="rises in a wide range of languages",
        **LABELS,
    ),
    Claim(
        "C3",
        translating_into_another_language_than_English_does_it_too,
        "more",
        method=of([TO_CLONE], "auc"),
        baseline=of([BASE], "auc"),
        controls=of(CONTROLS, "auc"),
        margin=0.04,
        given=given(0.5, of([TO_CLONE, BASE], "acc")),
        paper="the same with Chinese as the target (from a summary)",
        **LABELS,
    ),
    Claim(
        "C4",
        questions_of_one_task_help_another_task,
        "open",
        paper="another task's questions help as well (from a summary)",
    ),
    Claim(
        "C5",
        middle_layers_think_of_the_English_label_more,
        "more",
        method=of([QT], "lens"),
        baseline=of([BASE], "lens"),
        controls=of(CONTROLS, "lens"),
        paper="latent English grows (from a summary)",
        **LABELS,
    ),
    Claim(
        "C6",
        unseen_languages_are_aligned_better_with_English,
        "more",
        method=[*of([QT], "r"), *of([QT], "partial r")],
        baseline=[*of([BASE], "r"), *of([BASE], "partial r")],
        controls=[*of(CONTROLS, "r"), *of(CONTROLS, "partial r")],
        paper="rises in low-resource languages (from a summary)",
        **LABELS,
    ),
    Claim(
        "C7",
        English_is_kept,
        "no worse",
        method=of([QT], "acc", ["en"]),
        baseline=of([BASE], "acc", ["en"]),
        margin=0.03,
        given=given(0.95, of([BASE], "acc", ["en"])),
        **LABELS,
    ),
    Claim(
        "T1",
        languages_never_seen_in_tuning_are_translated,
        "more",
        method=of([QT], "exact"),
        baseline=of([MONO], "exact"),
        controls=of([BASE, SHUFFLED], "exact"),
        margin=0.15,
        given=given(0.0, of([BASE, SHUFFLED], "exact")),
        **TRANSLATIONS,
    ),
    Claim(
        "T1v",
        also_where_the_word_order_is_another,
        "more",
        method=of([QT], "exact", [LAST]),
        baseline=of([MONO], "exact", [LAST]),
        controls=of([BASE, SHUFFLED], "exact", [LAST]),
        margin=0.15,
        given=given(0.0, of([BASE, SHUFFLED], "exact", [LAST]))
        | given(0.9, of([QT], "exact", UNSEEN[:1])),
        **TRANSLATIONS,
    ),
    Claim(
        "T2",
        also_words_that_no_clone_shares_with_another,
        "more",
        method=of([QT], "own verbs"),
        baseline=of([MONO], "own verbs"),
        controls=of([BASE, SHUFFLED], "own verbs"),
        margin=0.1,
        **TRANSLATIONS,
    ),
    Claim(
        "T3",
        the_papers_adapter_does_so_as_well,
        "more",
        method=of([LORA], "exact"),
        baseline=of([BASE], "exact"),
        controls=of([SHUFFLED], "exact"),
        margin=0.15,
        given=given(0.9, of([QT], "exact"), of([LORA], "exact", SEEN)),
        **TRANSLATIONS,
    ),
    Claim(
        "R1",
        wrong_pairs_teach_no_translation,
        "level",
        method=of([SHUFFLED], "exact"),
        bound=0.05,
        smaller_is_better=True,
        **TRANSLATIONS,
    ),
    Claim(
        "L1",
        behind_its_own_translation_the_label_is_right,
        "more",
        method=of([QT], "label"),
        baseline=[*of([BASE], "acc"), *cells([BASE], [("acc", "0-shot", x) for x in UNSEEN])],
        controls=of([SHUFFLED], "label"),
        margin=0.2,
        given=given(0.9, of([TWICE], "label"), of([SHUFFLED], "opened")),
        **BOTH,
    ),
    Claim(
        "L2",
        it_took_the_translation_of_clones_to_do_so,
        "more",
        method=of([QT], "label"),
        baseline=of([MONO], "label"),
        **BOTH,
    ),
    Claim(
        "L3",
        the_untuned_base_does_it_in_two_prompts,
        "no worse",
        method=of([TWICE], "label"),
        baseline=of([QT], "label"),
        margin=0.05,
        **BOTH,
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure

SHOWN = {
    TWICE: ("untuned, asked as its pretraining asks", 7),
    SHUFFLED: ("tuned on wrong pairs", 3),
    MONO: ("tuned on copied English", 5),
    QT: ("tuned on questions of a and b", 1),
}


def figure(results: dict):
    """Left: exact translations per language. Middle: unseen languages, the label in one pass and
    behind the own translation. Right: the English label by layer."""
    view = View(results["metrics"])
    fig, (left, middle, right) = new_figure(1, 3, width=14, height=5)
    left.get_gridspec().set_width_ratios((2, 1.3, 1))
    draw_translations(left, view)
    draw_labels(middle, view)
    draw_lens(right, results["series"])
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    fig.legend(*middle.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return fig


def draw_translations(ax, view: View) -> None:
    arms = [arm for arm in SHOWN if arm in view]
    width = 0.85 / max(1, len(arms))
    for i, arm in enumerate(arms):
        label, color = SHOWN[arm]
        for j, language in enumerate(CLONES):
            x = j + (i - (len(arms) - 1) / 2) * width
            values = view(arm, ("exact", language)).values
            bar_seeds(ax, x, values, COLORS[color], 0.93 * width, None if j else label)
    kinds = ("seen", "seen\nverb last", "", "verb last", "unseen", "unseen\nverb last")
    ax.set_xticks(range(len(CLONES)), [f"{x}\n{kind}" for x, kind in zip(CLONES, kinds)])
    ax.set(ylabel="questions translated exactly", ylim=(0, 1.03))
    ax.set_title(f"Asked to translate (dots: {view.seeds} seeds)")
    ax.grid(axis="x", visible=False)


def draw_labels(ax, view: View) -> None:
    readings = {"acc": ("in one pass", 0), "label": ("behind the own translation", 2)}
    arms = [arm for arm in (BASE, SHUFFLED, MONO, QT, LORA) if arm in view]
    for i, (metric, (label, color)) in enumerate(readings.items()):
        for x, arm in enumerate(arms):
            values = over(view, arm, metric, UNSEEN).values
            named = None if x else label
            bar_seeds(ax, x + 0.4 * i - 0.2, values, COLORS[color], 0.37, named)
    if TWICE in view:
        ceiling = over(view, TWICE, "label", UNSEEN).mean
        ax.axhline(ceiling, color=COLORS[7], linewidth=1, label="base, asked twice")
    ax.axhline(0.5, color="#555555", linewidth=1, linestyle="--", label="chance")
    ax.set_xticks(range(len(arms)), arms, rotation=20)
    ax.set(ylabel="right labels", ylim=(0, 1.03), title="Unseen languages e, f")
    ax.grid(axis="x", visible=False)


def draw_lens(ax, series: dict) -> None:
    for arm, color in ((BASE, 7), (MONO, 5), (QT, 1)):
        if arm not in series:
            continue
        both = [series[arm][f"lens {language}"] for language in UNSEEN]
        seeds = zip(*(lines["values"] for lines in both))
        means = [[sum(at) / len(at) for at in zip(*lines)] for lines in seeds]
        plot_seeds(ax, both[0]["x"], means, arm, COLORS[color])
        last = both[0]["x"][-1]
        ax.set_xticks(range(last + 1), ["embed", *map(str, range(1, last)), "last"])
    ax.set(xlabel="after block", ylabel="the right English label", title="Logit lens, e and f")
    ax.legend()
