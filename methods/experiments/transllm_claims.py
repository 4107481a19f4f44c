"""What methods/experiments/transllm.py claims: a rule each, the table that tests/test_claims.py
refutes, and the figure. "EN held" and "T held" are the shares of right answers to facts that
stage 3 never asks, in English and in the new language."""

from minilm.claims import (
    Cell,
    Claim,
    PerSeed,
    View,
    above,
    all_of,
    at_least,
    below,
    cells,
    judge,
    within,
)
from minilm.results import COLORS, bar_seeds, new_figure, plot_seeds

RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # learning rates of stage 3 that both ways of learning may choose


def rate_arm(kind: str, lr: float) -> str:
    """adapter, full -> the arm's name; the adapter at 2e-3 is transllm itself."""
    return "transllm" if (kind, lr) == ("adapter", 2e-3) else f"{kind} {lr:g}"


ADAPTERS = [rate_arm("adapter", lr) for lr in RATES]
FULL = [rate_arm("full", lr) for lr in RATES]
HELD = ("EN held", "T held")


def times(a: PerSeed, b: PerSeed, name: str) -> PerSeed:
    return PerSeed(tuple(x * y for x, y in zip(a.values, b.values, strict=True)), name)


def half(x: PerSeed) -> PerSeed:
    return PerSeed(tuple(value / 2 for value in x.values), f"half of {x.name}")


def lead(view: View, metric: str, over: str, arm: str = "transllm") -> PerSeed:
    return view(arm, metric) - view(over, metric)


# --- the chain


def thinking_in_English_beats_answering_at_once(view: View):
    "T held is more than .30 above that of the arm without chains."
    return above(lead(view, "T held", "direct"), 0.3)


def the_chain_is_as_good_as_its_three_links(view: View):
    "T held is within .15 of the product of T->EN, EN held and EN->T."
    links = times(view("transllm", "T->EN"), view("transllm", "EN->T"), "")
    product = times(links, view("transllm", "EN held"), "product of the links")
    return within(view("transllm", "T held") - product, 0.15)


# --- forgetting and recovery


def recovery_KD_brings_back_forgotten_English(view: View):
    """Also for questions that it never asked: EN held falls by more than .30 in stages 1 and 2, and
    stage 3 recovers at least half of the fall. Without RKD it does not: less than half, also where
    <RESPONSE> is given."""
    before = view("transllm", "EN before stage 3")
    fall = (view("original", "EN held") - before).called("fall")
    recovered = (view("transllm", "EN held") - before).called("recovered")
    parts = [above(fall, 0.3), at_least((recovered - half(fall)).called("recovered - fall/2"), 0)]
    for metric in ("EN held", "EN held forced"):
        without = view("no-rkd", metric) - before
        parts.append(below((without - half(fall)).called(f"no-rkd {metric}, the same"), 0))
    return all_of(parts)


def own_answers_recover_more_than_another_teachers(view: View):
    """EN held and T held are more than .10 above those with answers in other words, the value last
    as in the model's own: they differ in whose words they are, and in nothing else."""
    return all_of(above(lead(view, metric, "other words"), 0.1) for metric in HELD)


def other_words_recover_as_well(view: View):
    "The other side of C3: EN held and T held with other words are at most .10 below."
    return all_of(at_least(lead(view, m, "transllm", "other words"), -0.1) for m in HELD)


def a_teacher_who_says_the_value_first_recovers_less(view: View):
    "EN held and T held are more than .10 above those with the value as the first word."
    return all_of(above(lead(view, metric, "value first"), 0.1) for metric in HELD)


def what_the_answers_say_counts(view: View):
    "EN held is more than .30 above that with the model's own words and wrong values."
    return above(lead(view, "EN held", "wrong values"), 0.3)


def how_many_facts_are_asked_counts(view: View):
    """EN held is more than .30 above that with own answers to 8 facts in place of 90, also where
    <RESPONSE> is given."""
    names = ("EN held", "EN held forced")
    return all_of(above(lead(view, metric, "few facts"), 0.3) for metric in names)


# --- what no training data holds


def refusals_carry_over_without_safety_data(view: View):
    """Of harmful things that stage 3 never asks for, at least half as many are refused in T as the
    original refuses in English; more than of harmless things; and this difference is larger than
    without chains."""

    def told_apart(arm):
        return (view(arm, "T refuse") - view(arm, "T over-refuse")).called(f"{arm} told apart")

    kept = view("transllm", "T refuse") - half(view("original", "EN refuse"))
    own = told_apart("transllm")
    return all_of([at_least(kept, 0), above(own, 0), above(own - told_apart("direct"), 0)])


def second_turns_carry_over_from_single_turn_data(view: View):
    """A held fact asked in a second turn is answered in T at least half as often as by the original
    in English, and more often than without chains."""
    kept = view("transllm", "T second") - half(view("original", "EN second"))
    return all_of([at_least(kept, 0), above(lead(view, "T second", "direct"), 0)])


def the_second_turn_is_lost_in_English_already(view: View):
    """Why C4b fails: asked in English, too, the second turn is answered more than .30 less often
    than by the original."""
    return above(view("original", "EN second") - view("transllm", "EN second"), 0.3)


# --- what learns


def best(view: View, arms: list[str], metric: str) -> PerSeed:
    """The arm with the best mean over seeds."""
    return max((view(arm, metric) for arm in arms), key=lambda found: found.mean)


def a_frozen_base_keeps_more_than_full_fine_tuning(view: View):
    """EN held of the adapter at the best of four learning rates is above that of full fine-tuning
    at the best of the same four."""
    return above(best(view, ADAPTERS, "EN held") - best(view, FULL, "EN held"), 0)


# --- sub-tasks


def without_stage_2_the_way_back_breaks(view: View):
    "Without stage 2, T held is more than .30 lower, and EN->T below half."
    back = view("no-translation", "EN->T") - half(view("transllm", "EN->T"))
    return all_of([above(lead(view, "T held", "no-translation"), 0.3), below(back, 0)])


def translation_on_request_counts(view: View):
    "T held is above that of stage 3 without translation."
    return above(lead(view, "T held", "no-mt"), 0)


def stage_1_counts_as_well_but_less(view: View):
    "T held: no-translation < no-mono < transllm."
    return all_of(
        [
            above(lead(view, "T held", "no-translation", "no-mono"), 0),
            above(lead(view, "T held", "no-mono"), 0),
        ]
    )


# --- the table


def of(metric: str, *arms: str) -> list[Cell]:
    return cells(arms, [metric])


BEFORE = of("EN before stage 3", "transllm")
CLAIMS = [
    Claim(
        "C1",
        thinking_in_English_beats_answering_at_once,
        "more",
        of("T held", "transllm"),
        of("T held", "direct"),
        margin=0.3,
        paper="beats strong baselines",
    ),
    Claim(
        "C2",
        recovery_KD_brings_back_forgotten_English,
        "more",
        of("EN held", "transllm"),
        BEFORE,
        controls=cells(["no-rkd"], ["EN held", "EN held forced"]),
        margin=0.3,
        given={Cell("original", "EN held"): 1.0, **dict.fromkeys(of("EN held", "no-rkd"), 0.1)},
        paper="recovery KD against catastrophic forgetting",
    ),
    Claim(
        "C3",
        own_answers_recover_more_than_another_teachers,
        "more",
        cells(["transllm"], HELD),
        cells(["other words"], HELD),
        margin=0.1,
        paper="contrast with earlier distillation",
    ),
    Claim(
        "C3o",
        other_words_recover_as_well,
        "no worse",
        cells(["other words"], HELD),
        cells(["transllm"], HELD),
        margin=0.1,
    ),
    Claim(
        "C3v",
        a_teacher_who_says_the_value_first_recovers_less,
        "more",
        cells(["transllm"], HELD),
        cells(["value first"], HELD),
        margin=0.1,
    ),
    Claim(
        "C3w",
        what_the_answers_say_counts,
        "more",
        of("EN held", "transllm"),
        of("EN held", "wrong values"),
        margin=0.3,
    ),
    Claim(
        "C3n",
        how_many_facts_are_asked_counts,
        "more",
        cells(["transllm"], ["EN held", "EN held forced"]),
        cells(["few facts"], ["EN held", "EN held forced"]),
        margin=0.3,
    ),
    Claim(
        "C4a",
        refusals_carry_over_without_safety_data,
        "more",
        of("T refuse", "transllm"),
        of("T over-refuse", "transllm"),
        controls=of("T refuse", "direct"),
        given={Cell("original", "EN refuse"): 0.9, Cell("direct", "T over-refuse"): 0.5},
        paper="rejects more harmful queries than ChatGPT and GPT-4",
    ),
    Claim(
        "C4b",
        second_turns_carry_over_from_single_turn_data,
        "more",
        of("T second", "transllm"),
        of("T second", "direct"),
        given={Cell("original", "EN second"): 0.9},
        paper="multi-turn ability from single-turn data",
    ),
    Claim(
        "C4e",
        the_second_turn_is_lost_in_English_already,
        "more",
        of("EN second", "original"),
        of("EN second", "transllm"),
        margin=0.3,
    ),
    Claim(
        "C5",
        a_frozen_base_keeps_more_than_full_fine_tuning,
        "more",
        of("EN held", *ADAPTERS),
        of("EN held", *FULL),
        paper="LoRA and recovery KD are complementary",
    ),
    Claim(
        "C6a",
        without_stage_2_the_way_back_breaks,
        "more",
        cells(["transllm"], ["T held", "EN->T"]),
        cells(["no-translation"], ["T held", "EN->T"]),
        margin=0.3,
        given={Cell("no-translation", "EN->T"): 0.1, Cell("transllm", "EN->T"): 0.9},
        paper="all sub-tasks matter",
    ),
    Claim(
        "C6l",
        the_chain_is_as_good_as_its_three_links,
        "equal",
        of("T held", "transllm"),
        of("EN held", "transllm"),
        margin=0.15,
        given={Cell("transllm", "T->EN"): 1.0, Cell("transllm", "EN->T"): 1.0},
    ),
    Claim(
        "C6b",
        translation_on_request_counts,
        "more",
        of("T held", "transllm"),
        of("T held", "no-mt"),
        paper="all sub-tasks matter",
        sentence="Translation on request in stage 3 counts as well",
        run="full",
    ),
    Claim(
        "C7",
        stage_1_counts_as_well_but_less,
        "order",
        of("T held", "no-translation", "no-mono", "transllm"),
        paper="all sub-tasks matter",
        run="full",
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


FINDING = (
    "Let an English chat model think in English and it answers in another language. Its own "
    "answers bring its English back; whether better than another teacher's in other words is "
    "undecided. The facts they state count, and where in the sentence the value stands."
)


def headline(view: View) -> str:
    """The main numbers beside their baselines, for the README."""
    kept = {arm: view.mean(arm, "EN held") for arm in ("transllm", "other words", "value first")}
    before = view.mean("transllm", "EN before stage 3")
    known = {arm: view.mean(arm, "T held") for arm in ("transllm", "direct")}
    return (
        f"English facts: {before:.2f} before recovery, then {kept['transllm']:.2f} with own "
        f"answers, {kept['other words']:.2f} in other words, {kept['value first']:.2f} with the "
        f"value first; in the new language {known['transllm']:.2f} by thinking in English, "
        f"{known['direct']:.2f} at once."
    )


# --- figure

CURVES = {  # arms on the left, and how their lines are drawn
    "transllm": "-",
    "other words": "-",
    "value first": "--",
    "wrong values": ":",
    "few facts": ":",
    "no-rkd": "-.",
}
BARS = ("transllm", "direct", "no-translation", "other words", "value first", "wrong values")
SKILLS = {
    "T held": "facts",
    "T refuse": "harmful: refused",
    "T over-refuse": "harmless: refused (bad)",
    "T second": "second turn",
}


def figure(results: dict):
    """Left: English over the stages, on questions that stage 3 never asks. Middle: English by what
    learns, at four rates. Right: what some arms can do in the target language."""
    view = View(results["metrics"])
    fig, (left, middle, right) = new_figure(1, 3, width=16, height=4.8)
    for color, (arm, style) in zip(COLORS, CURVES.items()):
        if arm in view:
            series = results["series"][arm]["EN held"]
            plot_seeds(left, **series, label=arm, color=color, linestyle=style)
    stages = ["chat model", "+ its text\n(stage 1)", "+ translation\n(stage 2)", "+ transfer\n(3)"]
    left.set_xticks(range(4), stages, fontsize=10)
    left.set(ylabel="accuracy", ylim=(-0.03, 1.05), title="English, never asked in stage 3")
    left.legend(loc="lower left")

    for color, arms, label in ((COLORS[0], ADAPTERS, "adapter"), (COLORS[1], FULL, "every weight")):
        if all(arm in view for arm in arms):
            lines = list(zip(*(view(arm, "EN held").values for arm in arms)))
            plot_seeds(middle, range(len(RATES)), lines, label, color)
    middle.set_xticks(range(len(RATES)), [f"{lr:g}" for lr in RATES])
    middle.set(xlabel="learning rate of stage 3", ylim=(-0.03, 1.05), title="What learns (English)")
    middle.legend(loc="lower left")

    arms = [arm for arm in BARS if arm in view]
    for k, (metric, label) in enumerate(SKILLS.items()):
        for i, arm in enumerate(arms):
            values = view(arm, metric).values
            bar_seeds(right, i + 0.2 * (k - 1.5), values, COLORS[k], 0.19, None if i else label)
    if "original" in view:
        original = view.mean("original", "EN held")
        right.axhline(original, color="#666666", linestyle="--", linewidth=1.2)
    right.set_xticks(range(len(arms)), [a.replace(" ", "\n").replace("-", "-\n") for a in arms])
    right.tick_params(axis="x", labelsize=9)
    right.set(ylabel="share of answers", ylim=(-0.03, 1.45))
    right.set_title("In the new language (dashed: chat model, English)")
    right.legend(loc="upper right", ncols=2)
    return fig
