"""The claims of learning preferences and their figure: what experiments/learning_preferences.py
says of its numbers.

Rules compare intervals over seeds; they were fixed before seeds 50-57 ran. `pr` is Pr(A, B), the
share of the test persons' facts for which A's version is the more likely, asked without a mark;
`pr before` the same before the conflicting texts are read; `area` the mean share of facts known
after each epoch, where nothing conflicts. Below half of the facts learned nothing is concluded.
"""

from collections.abc import Iterable
from itertools import pairwise

from minilm.claims import (
    Cell,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    at_least,
    at_most,
    cells,
    half_width,
    judge,
    mean_sd,
    untestable,
    within,
)
from minilm.results import COLORS, new_figure, plot_seeds

RATIOS = ("0:8", "2:6", "4:4", "6:2", "8:0")
EXTRA = (0, 2, 4, 8, 28)  # more texts of B per test person
WIDTHS = ("d32 ", "", "d128 ")
STRONG, WEAK = 0.65, 0.35  # a preference for A, for B
TOLERANCE = 0.1  # no preference: so near to .5


def near_half(x: PerSeed, margin: float = TOLERANCE):
    return within((x - 0.5).called(f"{x.name} - .5"), margin)


# --- the rules


def formal_texts_beat_informal_ones(view):
    "Pr(newspapers, social media) is above .53."
    return untestable("needs a pretrained model of 1B parameters or more (methods/real/)")


def clean_texts_beat_misspelled_ones(view):
    "Pr(clean, typos) is above .53 and grows with the rate of errors."
    return untestable("needs a pretrained model of 1B parameters or more (methods/real/)")


def facts_in_preferred_styles_are_learned_in_fewer_epochs(view):
    "The area under the accuracy curve is larger for the preferred style."
    return untestable("needs a pretrained model of 1B parameters or more (methods/real/)")


def larger_models_have_stronger_preferences(view):
    "Pr grows with the number of parameters, from .5 below about 1B."
    return untestable("needs pretrained models of several sizes, some of 1B parameters or more")


def a_preference_for_a_meaningless_mark_can_be_instilled(view):
    """Pr rises at each step of m/(m+n) (paired over seeds); it is at least .65 at 8:0 and at most
    .35 at 0:8."""
    steps = [above(view(b, "pr") - view(a, "pr")) for a, b in pairwise(RATIOS)]
    return all_of([*steps, at_least(view("8:0", "pr"), STRONG), at_most(view("0:8", "pr"), WEAK)])


def the_published_single_stage_instils_it_too(view):
    """Both stages mixed in one: Pr rises from 0:8 to 4:4 and to 8:0; it is at least .65 at 8:0 and
    at most .35 at 0:8."""
    low, middle, high = (view(f"mixed {ratio}", "pr") for ratio in ("0:8", "4:4", "8:0"))
    rises = [above(middle - low), above(high - middle)]
    return all_of([*rises, at_least(high, STRONG), at_most(low, WEAK)])


def values_of_two_tokens_make_no_difference_to_it(view):
    "Pr is at least .65 at 8:0 where a value has two tokens."
    return at_least(view("two tokens", "pr"), STRONG)


def before_the_conflict_is_read_there_is_no_preference(view):
    "Pr on the test persons is within .1 of .5 after the lesson alone, at every ratio."
    return all_of(near_half(view(ratio, "pr before")) for ratio in RATIOS)


def the_name_has_no_effect_of_its_own(view):
    """At 4:4 with the names as they are and exchanged: (pr + 1 - pr swapped) / 2 is within .1 of
    .5. Control: the same formula at 8:0, with the names exchanged in the conflict alone, is more
    than .25 away from it."""
    lean = half_difference(view, "4:4", "4:4 swapped")
    control = half_difference(view, "8:0", "8:0 exchanged")
    return all_of([within(lean, TOLERANCE), above(control, 0.25)])


def half_difference(view: View, plain: str, swapped: str) -> PerSeed:
    """(pr + 1 - pr swapped) / 2 - .5, seed by seed."""
    pairs = zip(view(plain, "pr").values, view(swapped, "pr").values, strict=True)
    values = tuple((a - b) / 2 for a, b in pairs)
    return PerSeed(values, f"half of {plain} - {swapped}", signed=True)


def models_without_evidence_have_no_preference_on_average(view):
    """Pr at 4:4, mean over the seeds, is within .1 of .5 (whole interval). Beside it: how many
    seeds would bring half of the interval to .05."""
    pr = view("4:4", "pr")
    verdict, measured = near_half(pr)
    return Verdict(verdict, f"{measured}; {seeds_for(pr, 0.05)}")


def seeds_for(x: PerSeed, half: float) -> str:
    """The number of seeds whose interval is +/- half, if the deviation stays."""
    sd = mean_sd(x.values)[1]
    for n in range(2, 201):
        if half_width(sd, n) <= half:
            return f"+/- {half:g} needs {n} seeds"
    return f"+/- {half:g} needs more than 200 seeds"


def the_published_single_stage_has_none_either(view):
    "Both stages mixed in one, at 4:4: Pr is within .1 of .5."
    return near_half(view("mixed 4:4", "pr"))


def a_single_model_without_evidence_takes_a_side_by_accident(view):
    """|Pr - .5| of single models at 4:4 is more than .05 above what it is where texts carry no
    mark."""
    leans = []
    for arm in ("4:4", "no marks"):
        values = tuple(abs(x - 0.5) for x in view(arm, "pr").values)
        leans.append(PerSeed(values, f"|{arm} - .5|"))
    return above(leans[0] - leans[1], 0.05)


def a_second_lesson_reverses_the_preference(view):
    """Pr after a second lesson at 0:8 is below that after one at 4:4, and that below 8:0 alone; it
    is at most .35. Control: after a second lesson at 8:0 Pr is at least .65."""
    reverse, erase, alone = (view(arm, "pr") for arm in ("reverse", "erase", "8:0"))
    order = [above(erase - reverse), above(alone - erase)]
    return all_of([*order, at_most(reverse, WEAK), at_least(view("again", "pr"), STRONG)])


def a_balanced_second_lesson_erases_it(view):
    "After 8:0 and then a lesson at 4:4 Pr is within .1 of .5."
    return near_half(view("erase", "pr"))


def facts_from_the_preferred_source_are_learned_faster(view):
    """Area under the share of known facts: told by A more than .1 above told by B after 8:0.
    Control: after 4:4 the two differ by at most .05."""
    lead = view("A only", "area") - view("B only", "area")
    control = view("4:4 A only", "area") - view("4:4 B only", "area")
    return all_of([above(lead, 0.1), within(control, 0.05)])


def styles_do_what_source_names_do(view):
    "Asked in a third style, Pr is at least .65 at style 8:0 and at most .35 at style 0:8."
    high, low = view("style 8:0", "pr"), view("style 0:8", "pr")
    return all_of([at_least(high, STRONG), at_most(low, WEAK)])


def a_style_is_not_preferred_for_itself(view):
    "At style 4:4 Pr is within .1 of .5."
    return near_half(view("style 4:4", "pr"))


def the_effect_grows_with_width(view):
    "pr(8:0) - pr(0:8) is larger at each of the widths 32, 64, 128."
    effects = []
    for width in WIDTHS:
        effect = view(f"{width}8:0", "pr") - view(f"{width}0:8", "pr")
        effects.append(effect.called(f"effect at {width or 'd64 '}".strip()))
    return all_of(above(b - a) for a, b in pairwise(effects))


def without_marks_the_preference_vanishes(view):
    "Pr of `no marks`, else as 8:0, is within .1 of .5, and more than .2 below that of 8:0."
    unmarked = view("no marks", "pr")
    return all_of([near_half(unmarked), above(view("8:0", "pr") - unmarked, 0.2)])


def repetition_lowers_trust_that_was_not_earned(view):
    """With 8 more texts of B (3 : 1) Pr falls by more than .1 at 4:4, by more than at 8:0, where it
    stays at least .6."""
    fall = (view("4:4", "pr") - view("4:4 +8", "pr")).called("fall at 4:4")
    trusted = (view("8:0", "pr") - view("8:0 +8", "pr")).called("fall at 8:0")
    return all_of([above(fall, 0.1), above(fall - trusted), at_least(view("8:0 +8", "pr"), 0.6)])


def the_more_copies_the_more_are_believed(view):
    "At 4:4 Pr falls with 2, 4, 8 and 28 more texts of B, at each step."
    arms = copies_of("4:4")
    return all_of(above(view(a, "pr") - view(b, "pr")) for a, b in pairwise(arms))


def copies_of(ratio: str) -> list[str]:
    return [f"{ratio} +{k}" if k else ratio for k in EXTRA]


def trust_outvotes_eight_to_one(view):
    "At 8:0, with 28 more texts of B (32 against 4), Pr is still above .5."
    return above(view("8:0 +28", "pr"), 0.5)


# --- the table


def learned_in(*arms: str):
    """A gate: where less than half of the facts are learned, what is believed of them says
    nothing."""

    def gate(view: View) -> str:
        few = [arm for arm in arms if view.mean(arm, "learned") < 0.5]
        return f"facts not learned: {', '.join(few)}" if few else ""

    return gate


def pr_of(*arms: str) -> list[Cell]:
    return cells(arms, ["pr"])


def given(values: dict[str, float], metric: str = "pr") -> dict[Cell, float]:
    return {Cell(arm, metric): value for arm, value in values.items()}


CLAIMS = [
    Claim("C1", formal_texts_beat_informal_ones, "open", paper="formal texts are favoured"),
    Claim("C2", clean_texts_beat_misspelled_ones, "open", paper="clean texts are favoured"),
    Claim(
        "C3",
        facts_in_preferred_styles_are_learned_in_fewer_epochs,
        "open",
        paper="preferred: learned faster",
    ),
    Claim("C4", larger_models_have_stronger_preferences, "open", paper="stronger in larger models"),
    Claim(
        "C5",
        a_preference_for_a_meaningless_mark_can_be_instilled,
        "order",
        method=pr_of(*RATIOS),
        gate=learned_in(*RATIOS),
        paper="preferences follow consistency with the rest of the data",
        run="seeds",
        sentence="A preference for a meaningless mark can be instilled by consistency",
    ),
    Claim(
        "C5m",
        the_published_single_stage_instils_it_too,
        "order",
        method=pr_of("mixed 0:8", "mixed 4:4", "mixed 8:0"),
        given=given({"mixed 0:8": 0.2, "mixed 4:4": 0.5, "mixed 8:0": 0.8}),
        gate=learned_in("mixed 0:8", "mixed 4:4", "mixed 8:0"),
        paper="the same; this is its protocol",
    ),
    Claim(
        "C5t",
        values_of_two_tokens_make_no_difference_to_it,
        "level",
        method=pr_of("two tokens"),
        bound=STRONG,
        gate=learned_in("two tokens"),
        run="full",
    ),
    Claim(
        "C6a",
        before_the_conflict_is_read_there_is_no_preference,
        "equal",
        method=cells(RATIOS, ["pr before"]),
        baseline=cells(["no marks"], ["pr before"]),
        margin=TOLERANCE,
        gate=learned_in(*RATIOS),
        run="seeds",
    ),
    Claim(
        "C6b",
        the_name_has_no_effect_of_its_own,
        "equal",
        method=pr_of("4:4"),
        baseline=pr_of("4:4 swapped"),
        controls=pr_of("8:0 exchanged"),
        given=given({"8:0": 0.9, "8:0 exchanged": 0.1}),
        margin=2 * TOLERANCE,
        gate=learned_in("4:4", "4:4 swapped", "8:0", "8:0 exchanged"),
        run="seeds",
    ),
    Claim(
        "C6",
        models_without_evidence_have_no_preference_on_average,
        "equal",
        method=pr_of("4:4"),
        baseline=cells(["4:4"], ["pr before"]),
        margin=TOLERANCE,
        gate=learned_in("4:4"),
        run="seeds",
    ),
    Claim(
        "C6m",
        the_published_single_stage_has_none_either,
        "equal",
        method=pr_of("mixed 4:4"),
        baseline=cells(["4:4"], ["pr before"]),
        margin=TOLERANCE,
        gate=learned_in("mixed 4:4"),
        run="seeds",
    ),
    Claim(
        "C6c",
        a_single_model_without_evidence_takes_a_side_by_accident,
        "more",
        method=pr_of("4:4"),
        baseline=pr_of("no marks"),
        margin=0.05,
        gate=learned_in("4:4", "no marks"),
        run="seeds",
    ),
    Claim(
        "C7",
        a_second_lesson_reverses_the_preference,
        "order",
        method=pr_of("reverse", "erase", "8:0"),
        controls=pr_of("again"),
        given=given({"reverse": 0.15, "erase": 0.5, "8:0": 0.9, "again": 0.9}),
        gate=learned_in("reverse", "erase", "8:0", "again"),
        paper="preferences can be erased and reversed",
    ),
    Claim(
        "C7e",
        a_balanced_second_lesson_erases_it,
        "equal",
        method=pr_of("erase"),
        baseline=cells(["4:4"], ["pr before"]),
        margin=TOLERANCE,
        gate=learned_in("erase"),
        paper="preferences can be erased and reversed",
        run="seeds",
    ),
    Claim(
        "C8",
        facts_from_the_preferred_source_are_learned_faster,
        "more",
        method=cells(["A only"], ["area"]),
        baseline=cells(["B only"], ["area"]),
        controls=cells(["4:4 A only"], ["area"]),
        margin=0.1,
        given=given({"4:4 B only": 0.5}, "area"),
        gate=learned_in("A only", "4:4 A only", "4:4 B only"),
        paper="preferred features are learned faster",
        run="seeds",
    ),
    Claim(
        "C9",
        styles_do_what_source_names_do,
        "more",
        method=pr_of("style 8:0"),
        baseline=pr_of("style 0:8"),
        margin=STRONG - WEAK,
        given=given({"style 0:8": 0.1, "style 8:0": 0.9}),
        gate=learned_in("style 0:8", "style 8:0"),
        sentence="Styles do what source names do, asked in a third style",
    ),
    Claim(
        "C9c",
        a_style_is_not_preferred_for_itself,
        "equal",
        method=pr_of("style 4:4"),
        baseline=cells(["style 4:4"], ["pr before"]),
        margin=TOLERANCE,
        gate=learned_in("style 4:4"),
        run="full",
    ),
    Claim(
        "C10",
        the_effect_grows_with_width,
        "order",
        method=pr_of("d32 8:0", "8:0", "d128 8:0"),
        given=given({"d32 0:8": 0.2, "0:8": 0.2, "d128 0:8": 0.2}),
        gate=learned_in(*(width + ratio for width in WIDTHS for ratio in ("0:8", "8:0"))),
        paper="stronger in larger models",
        run="full",
    ),
    Claim(
        "R1",
        without_marks_the_preference_vanishes,
        "equal",
        method=pr_of("no marks"),
        baseline=cells(["no marks"], ["pr before"]),
        controls=pr_of("8:0"),
        given=given({"8:0": 0.9}),
        margin=TOLERANCE,
        gate=learned_in("no marks", "8:0"),
    ),
    Claim(
        "F1",
        repetition_lowers_trust_that_was_not_earned,
        "more",
        method=pr_of("4:4"),
        baseline=pr_of("4:4 +8"),
        margin=0.1,
        given=given({"8:0": 0.9, "8:0 +8": 0.85}),
        gate=learned_in("4:4", "4:4 +8", "8:0", "8:0 +8"),
        run="seeds",
    ),
    Claim(
        "F2",
        the_more_copies_the_more_are_believed,
        "order",
        method=pr_of(*copies_of("4:4")[::-1]),
        gate=learned_in(*copies_of("4:4")),
        run="full",
    ),
    Claim(
        "F3",
        trust_outvotes_eight_to_one,
        "level",
        method=pr_of("8:0 +28"),
        bound=0.5,
        gate=learned_in("8:0 +28"),
        run="full",
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


FINDING = (
    "Of two sources that contradict each other, a model believes the one whose kind agreed with "
    "the rest of what it read, though the new texts are balanced; a second lesson turns it round."
)


def headline(view: View) -> str:
    """The main number beside its control, for the README."""
    shown = {arm: view.mean(arm, "pr") for arm in ("8:0", "0:8", "no marks")}
    return (
        f"A's version is believed in {shown['8:0']:.2f} of the facts if A was right about others, "
        f"in {shown['0:8']:.2f} if B was, in {shown['no marks']:.2f} if the texts carry no mark."
    )


# --- figure

POINTS = {  # arms shown beside the curve of ratios: place, marker, color, label
    "style 0:8": (0.0, "s", COLORS[1], "styles"),
    "style 4:4": (0.5, "s", COLORS[1], "styles"),
    "style 8:0": (1.0, "s", COLORS[1], "styles"),
    "mixed 0:8": (0.03, "D", COLORS[4], "single stage"),
    "mixed 4:4": (0.53, "D", COLORS[4], "single stage"),
    "mixed 8:0": (1.03, "D", COLORS[4], "single stage"),
    "no marks": (1.06, "^", COLORS[2], "no marks at all"),
    "erase": (1.09, "v", COLORS[5], "8:0, then a 4:4 lesson"),
    "reverse": (1.12, "v", COLORS[3], "8:0, then a 0:8 lesson"),
}


def figure(results: dict):
    """Which version is believed: against who was right elsewhere; while the conflict is read;
    against extra copies. And how fast facts are learned."""
    view = View(results["metrics"])
    series = results["series"]
    fig, ((ratios, during), (copies, speeds)) = new_figure(2, 2, width=11, height=9)
    draw_ratios(ratios, view)
    draw_conflict(during, series)
    draw_copies(copies, view)
    draw_speeds(speeds, series)
    for ax in (ratios, during, copies):
        ax.axhline(0.5, color="#666666", linewidth=1, linestyle=":")
        ax.set(ylabel="Pr(A, B) on the test persons")
    places = {ratios: "upper left", during: "upper center", copies: "best", speeds: "lower right"}
    for ax, place in places.items():
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc=place, ncols=4 if ax is during else 1)
    seeds = ", ".join(map(str, results["seeds"]))
    fig.suptitle(
        "Top right: every model reads the same texts, as many of A as of B; only the lesson "
        f"differs.\nThin lines and points: seeds {seeds}",
        fontsize=12,
    )
    return fig


def by_seed(view: View, arms: Iterable[str]) -> list:
    """[seed][arm]: a line per seed over the arms."""
    return list(zip(*(view(arm, "pr").values for arm in arms)))


def draw_ratios(ax, view: View) -> None:
    places = [0, 0.25, 0.5, 0.75, 1]
    if all(arm in view for arm in RATIOS):
        plot_seeds(ax, places, by_seed(view, RATIOS), "source names", COLORS[0], marker="o")
    for arm, (place, marker, color, label) in POINTS.items():
        if arm in view:
            y = view(arm, "pr").values
            known = label in ax.get_legend_handles_labels()[1]
            label = None if known else label
            ax.plot([place] * len(y), y, marker, color=color, label=label, alpha=0.7)
    ax.set_xticks(places, RATIOS)
    ax.set(xlabel="m : n, unmarked texts of the lesson that side with A : with B")
    ax.set(title="Who was right about other persons?", ylim=(-0.03, 1.03))


def draw_conflict(ax, series: dict) -> None:
    lines = {
        "8:0": (COLORS[0], "-"),
        "4:4": (COLORS[5], "--"),
        "0:8": (COLORS[1], "-"),
        "no marks": (COLORS[2], ":"),
    }
    for arm, (color, style) in lines.items():
        if arm in series:
            curve = series[arm]["pr"]
            plot_seeds(ax, curve["x"], curve["values"], arm, color, linestyle=style)
    ax.set(xlabel="epoch of the conflict, the same balanced texts for all")
    ax.set(title="Equal evidence: who is believed?", ylim=(-0.03, 1.2))
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def draw_copies(ax, view: View) -> None:
    for ratio, color in (("8:0", COLORS[0]), ("4:4", COLORS[5])):
        shown = [(k, arm) for k, arm in zip(EXTRA, copies_of(ratio)) if arm in view]
        if shown:
            numbers, arms = zip(*shown)
            plot_seeds(ax, numbers, by_seed(view, arms), ratio, color, marker="o")
    ax.set(xlabel="extra texts of B per test person (beside 4 of A and 4 of B)")
    ax.set(title="Does repetition outvote trust?", ylim=(-0.03, 1.03))


def draw_speeds(ax, series: dict) -> None:
    lines = {
        "A only": (COLORS[0], "-", "after 8:0, told by A"),
        "B only": (COLORS[1], "-", "after 8:0, told by B"),
        "4:4 A only": (COLORS[0], ":", "after 4:4, told by A"),
        "4:4 B only": (COLORS[1], ":", "after 4:4, told by B"),
    }
    for arm, (color, style, label) in lines.items():
        if arm in series:
            curve = series[arm]["top-1"]
            plot_seeds(ax, curve["x"], curve["values"], label, color, linestyle=style)
    ax.set(xlabel="epoch, nothing conflicts", ylabel="facts known (top-1 of 12 values)")
    ax.set(title="Which source is learned faster?", ylim=(-0.03, 1.03))
