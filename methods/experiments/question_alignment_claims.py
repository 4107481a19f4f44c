"""Question alignment and proxy-tuning: the claims, and the figure. What was measured:
experiments/question_alignment.py."""

from methods.question_alignment import ALIGNED, UNSEEN
from minilm.claims import (
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
    within,
)
from minilm.results import COLORS, bar_seeds, new_figure

R, Q, COPY, SHUFFLED = "ralign", "qalign->ralign", "copy->ralign", "shuffled->ralign"
FIRST = "qalign only"  # after stage I
BOTH_WAYS = "translate-train"  # translated questions and answers
ENGLISH = "english responses"
SMALL_R, SMALL_Q = "small ralign", "small qalign->ralign"
GATE = 0.85  # below this accuracy in English an arm cannot reason: its other languages say nothing
LEAD = 0.10  # a gain in accuracy that counts

FINDING = (
    "Teach a model to translate questions into English, then to answer in English alone, and it "
    "answers more questions in the other languages too. Reading the same questions untranslated "
    "brings about half of that, so the translation's own part is not shown; and one stage of "
    "questions in all these languages, answered in English, solves them all."
)


def headline(view: View) -> str:
    shown = [over(view, arm, "acc", ALIGNED).mean for arm in (R, Q, COPY, ENGLISH)]
    return (
        "Right answers in two languages (four seeds; eight in the file): English answers alone "
        "{:.2f}, after translated questions {:.2f}, after copied ones {:.2f}, questions of all "
        "taught languages with English answers {:.2f}; without reading a verb {:.2f}.".format(
            *shown, view.mean("verb-blind", "acc")
        )
    )


def acc(language: str) -> tuple[str, str]:
    return "acc", language


def over(view: View, arm: str, metric: str, languages) -> PerSeed:
    """The mean over languages: one number per seed."""
    name = f"{arm} {metric} {'/'.join(languages)}"
    return average((view(arm, (metric, language)) for language in languages), name)


def lead(view: View, arm: str, other: str, metric: str = "acc", languages=ALIGNED) -> PerSeed:
    """One arm minus another, on the same problems."""
    return over(view, arm, metric, languages) - over(view, other, metric, languages)


def english_is_solved(*arms: str):
    """A gate for claims that compare these arms: all of them, in the worst seed."""

    def gate(view: View) -> str:
        worst = {arm: min(view(arm, acc("en")).values) for arm in arms}
        failed = [f"{arm} {x:.2f}" for arm, x in worst.items() if x < GATE]
        return f"gate failed, English below {GATE} in a seed: {', '.join(failed)}" if failed else ""

    return gate


def reasons_better(view: View, arm: str, other: str, metric: str = "acc") -> Verdict:
    """The one rule of C1, C4, C8 and R1. In the aligned languages, the mean of a and b: an arm's
    lead over another has its interval over seeds above 0, and is at least LEAD on average; the
    arm's own mean is above that of a guess which reads every number and no verb."""
    gain = lead(view, arm, other, metric)
    own = over(view, arm, metric, ALIGNED).mean
    guess = view.mean("verb-blind", "acc")
    parts = [
        above(gain),
        fact(gain.mean >= LEAD, ""),
        fact(own > guess, f"{own:.3f}, a guess without verbs {guess:.3f}"),
    ]
    return all_of(parts)


# --- question alignment


def translated_questions_then_English_answers_reason_better_in_the_aligned_languages(view: View):
    """The mean of a and b: the lead of qalign->ralign over ralign has its interval over eight seeds
    above 0 and a mean of at least 0.10, and the accuracy is above a guess that reads no verb."""
    return reasons_better(view, Q, R)


def English_stays_what_it_is(view: View) -> Verdict:
    """English accuracy of qalign->ralign is within 0.03 of ralign's. (Both are at the ceiling here:
    it says that nothing is damaged, and no more.)"""
    return within(view(Q, acc("en")) - view(R, acc("en")), 0.03)


def it_beats_training_on_translated_questions_and_answers(view: View) -> Verdict:
    """The mean of a and b: above translate-train, with an interval over seeds above 0."""
    return above(lead(view, Q, BOTH_WAYS))


def it_holds_at_two_sizes(view: View) -> Verdict:
    """C1's rule, for the large and for the small model."""
    return all_of([reasons_better(view, SMALL_Q, SMALL_R), reasons_better(view, Q, R)])


def clone_questions_are_answered_in_English_unless_stage_II_translates_into_clones(view: View):
    """Answers to a and b that are in the question's language: +en-x leads both ralign and
    qalign->ralign by 0.10 on average with an interval above 0; its accuracy is below
    qalign->ralign's."""
    parts = []
    for arm in (R, Q):
        more = lead(view, "+en-x", arm, "consistency")
        parts += [above(more), fact(more.mean >= LEAD, "")]
    return all_of([*parts, above(lead(view, Q, "+en-x"))])


def stage_I_brings_parallel_questions_together_and_stage_II_leaves_them_so(view: View) -> Verdict:
    """Alignment score of the middle layer, mean of a and b, intervals over seeds above 0: after
    stage I and after both stages above ralign; after both above copy->ralign, too."""
    compared = [(FIRST, R), (Q, R), (Q, COPY)]
    return all_of(above(lead(view, arm, other, "alignment")) for arm, other in compared)


def aligned_languages_give_the_answer_that_English_gives(view: View) -> Verdict:
    """C1's rule for the share of answers that equal the answer to the same question in English,
    right or wrong. (Where English is always right that is the accuracy.)"""
    return reasons_better(view, Q, R, "agreement")


def more_translation_pairs_help_less_and_less(view: View) -> Verdict:
    """The mean of a and b rises from 1% to 10% of the pairs, and from there to all of them, and
    rises more in the first part than in the second: intervals over seeds above 0."""
    few, some = (over(view, f"pairs {share}", "acc", ALIGNED) for share in ("1%", "10%"))
    first = some - few
    second = over(view, Q, "acc", ALIGNED) - some
    return all_of([above(first), above(second), above((first - second).called("less and less"))])


def programs_and_multiple_choice_gain_as_well(view: View) -> Verdict:
    """The mean of a and b, for either task: the lead over its ralign has its interval over seeds
    above 0 and is at least 0.05 on average. Multiple choice is above its chance of 1/3 by 0.05."""
    parts = []
    for task in ("pot", "mcq"):
        gain = lead(view, f"{task} {Q}", f"{task} {R}")
        parts += [above(gain), fact(gain.mean >= 0.05, "")]
    return all_of([*parts, above(over(view, f"mcq {Q}", "acc", ALIGNED), 1 / 3 + 0.05)])


def stage_I_alone_or_last_does_not_reason(view: View) -> Verdict:
    """Whether stage I stands alone or comes last: English is below 0.85, and the mean of a and b is
    below half of qalign->ralign's (intervals over seeds)."""
    parts = []
    whole = over(view, Q, "acc", ALIGNED)
    for arm in (FIRST, "ralign->qalign"):
        own = over(view, arm, "acc", ALIGNED)
        missing = (whole - own - own).called(f"{Q} - twice {arm}, acc a/b")
        parts += [below(view(arm, acc("en")), GATE), above(missing)]
    return all_of(parts)


def one_stage_after_the_other_beats_both_at_once(view: View) -> Verdict:
    """The mean of a and b: qalign->ralign above joint, interval over seeds above 0. Joint has the
    rows of both stages mixed, and as many steps as both."""
    return above(lead(view, Q, "joint"))


# --- what it is, and what it is not


def it_is_translation_not_more_reading_of_clone_questions(view: View) -> Verdict:
    """C1's rule against copy->ralign, which spends stage I on the same questions untranslated."""
    return reasons_better(view, Q, COPY)


def wrong_translations_do_not_help(view: View) -> Verdict:
    """The mean of a and b: shuffled->ralign is at most 0.05 above ralign (interval over seeds)."""
    return at_most(lead(view, SHUFFLED, R), 0.05)


def what_is_gained_is_the_translation_of_verbs(view: View) -> Verdict:
    """The English verb in the right answer to a question in a or b, the answer so far given: more
    than 0.20 above ralign and above copy->ralign (intervals over seeds)."""
    return all_of(above(lead(view, Q, other, "verb"), 0.20) for other in (R, COPY))


def stage_I_translates_new_questions_word_for_word(view: View) -> Verdict:
    """After stage I at least 0.95 of the test questions in a and b are translated exactly (interval
    over seeds), more than by the base model. Beside: unseen clones; what stage II leaves of it."""
    beside = [over(view, FIRST, "exact", UNSEEN), over(view, Q, "exact", ALIGNED)]
    shown = ", ".join(f"{x.name} {x.mean:.3f}" for x in beside)
    learned = [at_least(over(view, FIRST, "exact", ALIGNED), 0.95)]
    return all_of([*learned, above(lead(view, FIRST, "base", "exact")), fact(True, shown)])


def clones_that_were_never_translated_gain_as_well(view: View) -> Verdict:
    """The mean of c and d: qalign->ralign above ralign and above copy->ralign, intervals over eight
    seeds above 0; shuffled->ralign is at most 0.05 above ralign."""
    parts = [above(lead(view, Q, other, languages=UNSEEN)) for other in (R, COPY)]
    return all_of([*parts, at_most(lead(view, SHUFFLED, R, languages=UNSEEN), 0.05)])


def answered_in_English_questions_of_the_taught_languages_are_all_solved(view: View) -> Verdict:
    """Stage II with questions in en, a and b, all answered in English, and no stage I: the mean of
    a and b is at least 0.95 (interval over eight seeds), above ralign's. So the base could do it:
    what question alignment misses is lost in stage II."""
    return solves(view, ALIGNED, 0.95)


def and_so_are_most_of_unseen_clones(view: View) -> Verdict:
    """The same arm in c and d, of which it saw no question: at least 0.75, above ralign's."""
    return solves(view, UNSEEN, 0.75)


def solves(view: View, languages, bound: float) -> Verdict:
    enough = at_least(over(view, ENGLISH, "acc", languages), bound)
    return all_of([enough, above(lead(view, ENGLISH, R, languages=languages))])


# --- proxy-tuning: what tuning changed in the small model, added to the large one's logits


def proxy_tuning_lends_a_small_models_tuning_to_an_untuned_larger_one(view: View) -> Verdict:
    """The mean of a and b: the lead of proxy over the untuned large model has its interval over
    seeds above 0 and is at least 0.10 on average."""
    gain = lead(view, "proxy", "base")
    return all_of([above(gain), fact(gain.mean >= LEAD, "")])


def the_large_model_so_tuned_beats_the_small_expert(view: View) -> Verdict:
    """The mean of a and b: proxy above small qalign->ralign, interval over seeds above 0."""
    return above(lead(view, "proxy", SMALL_Q))


def tuning_the_large_model_directly_is_better_still(view: View) -> Verdict:
    """The mean of a and b: qalign->ralign above proxy, interval over seeds above 0."""
    return above(lead(view, Q, "proxy"))


def what_stage_I_changed_in_a_small_tuned_model_lifts_a_large_tuned_one(view: View) -> Verdict:
    """The large ralign, steered by small qalign->ralign minus small ralign: the mean of a and b is
    above the large ralign's, interval over seeds above 0."""
    return above(lead(view, "ralign + proxy", R))


# --- the table

ACC = [acc(language) for language in ALIGNED]
ACC_UNSEEN = [acc(language) for language in UNSEEN]
AGREEMENT = [("agreement", language) for language in ALIGNED]
CONSISTENCY = [("consistency", language) for language in ALIGNED]
ALIGNMENT = [("alignment", language) for language in ALIGNED]
EXACT = [("exact", language) for language in ALIGNED]
VERB = [("verb", language) for language in ALIGNED]
GUESS = dict.fromkeys(cells(["verb-blind"], ["acc"]), 0.3)


def given(arms, metrics, value: float) -> dict:
    return dict.fromkeys(cells(arms, metrics), value)


CLAIMS = [
    Claim(
        "C1",
        translated_questions_then_English_answers_reason_better_in_the_aligned_languages,
        "more",
        method=cells([Q], ACC),
        baseline=cells([R], ACC),
        margin=LEAD,
        given=GUESS,
        gate=english_is_solved(R, Q),
        paper="mGSM, ten languages, 7B: 49.6 against 38.4",
        run="seeds",
        sentence="Translated questions, then English answers: aligned languages reason better",
    ),
    Claim(
        "C2",
        English_stays_what_it_is,
        "equal",
        method=cells([Q], [acc("en")]),
        baseline=cells([R], [acc("en")]),
        margin=0.03,
        gate=english_is_solved(R, Q),
        paper="mGSM, English, 7B: 68.0 against 65.5",
    ),
    Claim(
        "C3",
        it_beats_training_on_translated_questions_and_answers,
        "more",
        method=cells([Q], ACC),
        baseline=cells([BOTH_WAYS], ACC),
        gate=english_is_solved(Q, BOTH_WAYS),
        paper="mGSM, 7B: 49.6 against 40.0",
    ),
    Claim(
        "C4",
        it_holds_at_two_sizes,
        "more",
        method=cells([SMALL_Q, Q], ACC),
        baseline=cells([SMALL_R, R], ACC),
        margin=LEAD,
        given=GUESS,
        gate=english_is_solved(SMALL_R, SMALL_Q, R, Q),
        paper="7B, 13B, 70B",
        run="seeds",
    ),
    Claim(
        "C5",
        proxy_tuning_lends_a_small_models_tuning_to_an_untuned_larger_one,
        "more",
        method=cells(["proxy"], ACC),
        baseline=cells(["base"], ACC),
        margin=LEAD,
        gate=english_is_solved("proxy", SMALL_Q),
        paper="GSM8K, 70B: 53.9 against 9.6",
        run="full",
        sentence="Proxy-tuning lends a small model's tuning to an untuned larger one",
    ),
    Claim(
        "C5e",
        the_large_model_so_tuned_beats_the_small_expert,
        "more",
        method=cells(["proxy"], ACC),
        baseline=cells([SMALL_Q], ACC),
        gate=english_is_solved("proxy", SMALL_Q),
        paper="GSM8K, 70B: 53.9 against 42.2",
        run="full",
    ),
    Claim(
        "C5d",
        tuning_the_large_model_directly_is_better_still,
        "more",
        method=cells([Q], ACC),
        baseline=cells(["proxy"], ACC),
        gate=english_is_solved("proxy", Q),
        paper="GSM8K, 70B: 67.9 against 53.9",
        run="full",
    ),
    Claim(
        "C5r",
        what_stage_I_changed_in_a_small_tuned_model_lifts_a_large_tuned_one,
        "more",
        method=cells(["ralign + proxy"], ACC),
        baseline=cells([R], ACC),
        gate=english_is_solved("ralign + proxy", R),
        run="full",
        sentence="What stage I changed in a small tuned model lifts a large tuned one",
    ),
    Claim(
        "C6",
        clone_questions_are_answered_in_English_unless_stage_II_translates_into_clones,
        "more",
        method=cells(["+en-x"], CONSISTENCY),
        baseline=cells([R, Q], CONSISTENCY),
        margin=LEAD,
        given=given([Q], ACC, 0.7) | given(["+en-x"], ACC, 0.5),
        gate=english_is_solved(R, Q, "+en-x"),
        paper="mGSM, 7B: consistency 9.7 -> 52.3, accuracy 49.6 -> 41.0",
        run="full",
        sentence="Clone questions are answered in English, unless stage II translates into clones",
    ),
    Claim(
        "C7",
        stage_I_brings_parallel_questions_together_and_stage_II_leaves_them_so,
        "more",
        method=cells([FIRST, Q], ALIGNMENT),
        baseline=cells([R], ALIGNMENT),
        controls=cells([COPY], ALIGNMENT),
        paper="clusters of languages merge",
        sentence="Stage I brings parallel questions together in the middle layer, and stage II "
        "leaves them so",
    ),
    Claim(
        "C8",
        aligned_languages_give_the_answer_that_English_gives,
        "more",
        method=cells([Q], AGREEMENT),
        baseline=cells([R], AGREEMENT),
        margin=LEAD,
        given=GUESS,
        gate=english_is_solved(R, Q),
        paper="predictions agree more with those in English",
        run="seeds",
    ),
    Claim(
        "C9",
        more_translation_pairs_help_less_and_less,
        "order",
        method=cells(["pairs 1%", "pairs 10%", Q], ACC),
        given=given(["pairs 1%"], ACC, 0.2)
        | given(["pairs 10%"], ACC, 0.5)
        | given([Q], ACC, 0.7),
        gate=english_is_solved("pairs 1%", "pairs 10%", Q),
        paper="more pairs help, with diminishing returns",
        run="full",
        sentence="More translation pairs help, less and less",
    ),
    Claim(
        "C10",
        programs_and_multiple_choice_gain_as_well,
        "more",
        method=cells([f"pot {Q}", f"mcq {Q}"], ACC),
        baseline=cells([f"pot {R}", f"mcq {R}"], ACC),
        margin=0.05,
        gate=english_is_solved(f"pot {R}", f"pot {Q}", f"mcq {R}", f"mcq {Q}"),
        paper="program-of-thought and commonsense reasoning gain as well",
        run="full",
    ),
    Claim(
        "C11",
        stage_I_alone_or_last_does_not_reason,
        "level",
        method=cells([FIRST, "ralign->qalign"], [acc("en")]),
        bound=GATE,
        smaller_is_better=True,
        given=given([FIRST, "ralign->qalign"], ACC, 0.05) | given([Q], ACC, 0.6),
        gate=english_is_solved(Q),
        run="full",
    ),
    Claim(
        "C11j",
        one_stage_after_the_other_beats_both_at_once,
        "more",
        method=cells([Q], ACC),
        baseline=cells(["joint"], ACC),
        gate=english_is_solved(Q, "joint"),
        run="full",
    ),
    Claim(
        "R1",
        it_is_translation_not_more_reading_of_clone_questions,
        "more",
        method=cells([Q], ACC),
        baseline=cells([COPY], ACC),
        margin=LEAD,
        given=GUESS,
        gate=english_is_solved(Q, COPY),
        run="seeds",
        sentence="It is translation, not more reading of clone questions",
    ),
    Claim(
        "R2",
        wrong_translations_do_not_help,
        "no worse",
        method=cells([R], ACC),
        baseline=cells([SHUFFLED], ACC),
        margin=0.05,
        gate=english_is_solved(R, SHUFFLED),
        run="seeds",
    ),
    Claim(
        "R3",
        what_is_gained_is_the_translation_of_verbs,
        "more",
        method=cells([Q], VERB),
        baseline=cells([R, COPY], VERB),
        margin=0.20,
        gate=english_is_solved(R, COPY, Q),
    ),
    Claim(
        "T1",
        stage_I_translates_new_questions_word_for_word,
        "level",
        method=cells([FIRST], EXACT),
        bound=0.95,
        controls=cells(["base"], EXACT),
        given=given([FIRST], [("exact", x) for x in UNSEEN], 0.5) | given([Q], EXACT, 0.5),
        sentence="Stage I translates new questions, word for word",
    ),
    Claim(
        "U1",
        clones_that_were_never_translated_gain_as_well,
        "more",
        method=cells([Q], ACC_UNSEEN),
        baseline=cells([R, COPY], ACC_UNSEEN),
        controls=cells([SHUFFLED], ACC_UNSEEN),
        gate=english_is_solved(R, COPY, Q),
        paper="the spontaneous learners' finding (arXiv 2405.13816)",
        run="seeds",
    ),
    Claim(
        "E1",
        answered_in_English_questions_of_the_taught_languages_are_all_solved,
        "level",
        method=cells([ENGLISH], ACC),
        bound=0.95,
        controls=cells([R], ACC),
        gate=english_is_solved(R, ENGLISH),
        run="seeds",
        sentence="Taught to answer them in English, it solves all questions of the taught clones",
    ),
    Claim(
        "E1u",
        and_so_are_most_of_unseen_clones,
        "level",
        method=cells([ENGLISH], ACC_UNSEEN),
        bound=0.75,
        controls=cells([R], ACC_UNSEEN),
        gate=english_is_solved(R, ENGLISH),
        run="seeds",
        sentence="And so are most questions of clones that were never taught",
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure

SHOWN = {
    "base": ("untuned", 7),
    R: ("English answers only (RAlign)", 5),
    SHUFFLED: ("wrong translations, then RAlign", 3),
    COPY: ("copied questions, then RAlign", 4),
    Q: ("translated questions, then RAlign (QAlign)", 1),
    BOTH_WAYS: ("translated questions and answers", 2),
    ENGLISH: ("questions of a and b, English answers", 0),
}


def figure(results: dict):
    """Left: exact answers per language. Middle, right: the same questions in three languages as the
    middle layer sees them before and after stage I; of the first seed."""
    view = View(results["metrics"])
    seeds = results["seeds"]
    planes = {"base": "before stage I", FIRST: "after stage I"}
    shown = [arm for arm in planes if "pca 0" in results["series"].get(arm, {})]
    fig, axes = new_figure(1, 1 + len(shown), width=14 if shown else 10, height=5)
    bars, *axes = axes if shown else [axes]
    draw_answers(bars, view, len(seeds))
    fig.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    if not shown:  # an arm of the default run alone
        return fig
    bars.get_gridspec().set_width_ratios((2.4, *[1] * len(shown)))
    for ax, arm in zip(axes, shown):
        series = results["series"][arm]
        draw_plane(ax, *(series[f"pca {i}"]["values"][0] for i in (0, 1)))
        ax.set_title(f"Middle layer, seed {seeds[0]}\n{planes[arm]}")
        ax.set_xlabel("principal component 1")
    axes[0].set_ylabel("principal component 2")
    fig.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return fig


def draw_answers(ax, view: View, seeds: int) -> None:
    arms = [arm for arm in SHOWN if arm in view]
    width = 0.85 / max(1, len(arms))
    languages = ("en", *ALIGNED, *UNSEEN)
    for i, arm in enumerate(arms):
        label, color = SHOWN[arm]
        for j, language in enumerate(languages):
            x = j + (i - (len(arms) - 1) / 2) * width
            values = view(arm, acc(language)).values
            bar_seeds(ax, x, values, COLORS[color], 0.93 * width, None if j else label)
    guess = view.mean("verb-blind", "acc")
    ax.axhline(guess, color="#555555", linewidth=1, linestyle="--", label="guess without verbs")
    kinds = ("", "aligned", "aligned", "unseen", "unseen")
    names = ["English", *(f"clone {x}" for x in languages[1:])]
    ax.set_xticks(range(5), [f"{name}\n{kind}" for name, kind in zip(names, kinds)])
    ax.set(ylabel="exact answers", ylim=(0, 1.03), title=f"Accuracy (dots: {seeds} seeds)")
    ax.grid(axis="x", visible=False)


def draw_plane(ax, x: list[float], y: list[float]) -> None:
    """x and y: the questions in English, then the same in a, then in b."""
    n = len(x) // 3
    for k in range(n):  # one question in its three languages
        ax.plot(x[k::n], y[k::n], color="#999999", linewidth=0.6, zorder=1)
    for j, (name, marker) in enumerate((("English", "o"), ("clone a", "s"), ("clone b", "^"))):
        own = slice(j * n, (j + 1) * n)
        ax.plot(x[own], y[own], marker, color=COLORS[j], markersize=6, label=name)
