"""OCKR: the claims, and the figure. What was measured: experiments/ockr.py."""

from collections.abc import Iterable

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
    fact,
    judge,
    wilson,
    within,
)
from minilm.results import COLORS, bar_seeds, new_figure, plot_seeds

TASKS = ("aa", "ar", "rr")
NAMES = {"aa": "A+A", "ar": "A+R", "rr": "R+R"}
SEPARATE = ("aa separate", "ar separate", "rr separate")
ADJACENT = ("aa adjacent", "ar adjacent", "rr adjacent")
CRD = ("aa crd", "ar crd", "rr crd")
RELATIONS = ("ar cot", "rr cot")  # chains whose first fact is a relation
ABROAD = ("xling separate", "xling adjacent")
ORACLE = ("aa oracle", "ar oracle", "rr oracle")
LONG = ("aa separate x3", "ar separate x3", "rr separate x3")

MARGIN = 0.1  # as near is at chance, or unmoved
FAR = 0.7  # so far below what is known is "far below"
Z = 3.29  # of the 99.9% interval

FINDING = (
    "Two facts that a model has learned do not combine into a third. Writing both down first "
    "repairs this, in seven models of eight, where the question names both persons, and in none "
    "where a partner must be found."
)


def headline(view: View) -> str:
    shown = [view.mean(f"aa {setting}", "target") for setting in ("separate", "cot")]
    relations = [view.mean(arm, "target") for arm in RELATIONS]
    return (
        "Same year? Asked for two persons whose years are known, {:.2f} are right (chance .50), "
        "with both years written down first {:.2f}; where a partner must be found {:.2f} (A+R, "
        "chance .05) and {:.2f} (R+R, chance .50).".format(*shown, *relations)
    )


# --- what a seed shows


def from_chance(view: View, arm: str) -> PerSeed:
    distance = view(arm, "target") - view(arm, "chance")
    return distance.called(f"{arm} - chance")


def moved(view: View, arm: str, other: str) -> PerSeed:
    return (view(arm, "target") - view(other, "target")).called(f"{arm} - {other}")


def combined(view: View, arms: Iterable[str]) -> Verdict:
    """No seed's target lies above chance with its whole 99.9% Wilson interval."""
    found = []
    for arm in arms:
        above_chance = []
        rows = zip(*(view(arm, name).values for name in ("target", "n target", "chance")))
        for share, n, chance in rows:
            hits = min(max(share, 0.0), 1.0) * n  # a false table may hold what is no share
            above_chance.append(wilson(round(hits), round(n), Z)[0] > chance)
        found.append((sum(above_chance), f"{arm} {sum(above_chance)} of {len(above_chance)}"))
    words = "seeds that have combined: " + ", ".join(text for _, text in found)
    return fact(not any(count for count, _ in found), words)


# --- gates


def known(*arms: str):
    """A gate: what is trained must be known before what follows from it means anything."""

    def gate(view: View) -> str:
        for arm in arms:
            recall = view(arm, "premises")
            if recall.mean < 0.95 or min(recall.values) < 0.9:
                return f"gate failed: {recall}, lowest {min(recall.values):.3f}; .95 and .9 needed"
            if arm.startswith("aa"):
                for answer in ("Yes", "No"):
                    form = view(arm, f"format {answer}")
                    if form.mean < 0.9:
                        return f"gate failed: {form} of trained comparisons, .9 needed"
        return ""

    return gate


def names_must_be_learned(view: View) -> str:
    """The names abroad follow from no rule that the base model knows."""
    guessed = view("xling separate", "base translation")
    if guessed.mean > 0.1:
        return f"gate failed: {guessed} of the new names before one was read, at most .1 allowed"
    return known(*ABROAD)(view)


def able_in_context(*arms: str):
    """A gate: with both premises in the prompt the questions are answered."""

    def gate(view: View) -> str:
        for arm in arms:
            able = view(arm, "context")
            if able.mean < 0.9:
                return f"not a task that the model can do: {able} in context, .9 needed"
        return known(*arms)(view)

    return gate


# --- the paper's claims


def what_follows_from_two_facts_is_not_known_though_both_facts_are(view: View) -> Verdict:
    """In each pattern the target is within .1 of chance (interval over seeds), and no seed has
    combined."""
    parts = [within(from_chance(view, arm), MARGIN) for arm in SEPARATE]
    return all_of([*parts, combined(view, SEPARATE)])


def nor_when_both_facts_stand_in_one_sample(view: View) -> Verdict:
    """In each pattern the target in the adjacent setting is within .1 of the separate one's, seed
    by seed, and no seed has combined."""
    parts = [within(moved(view, a, b), MARGIN) for a, b in zip(ADJACENT, SEPARATE)]
    return all_of([*parts, combined(view, ADJACENT)])


def nor_when_for_others_the_conclusion_is_trained_too(view: View) -> Verdict:
    """After the same number of steps: in each pattern the target with complete reasoning data is
    within .1 of the separate setting's, seed by seed, and no seed has combined."""
    parts = [within(moved(view, a, b), MARGIN) for a, b in zip(CRD, SEPARATE)]
    return all_of([*parts, combined(view, CRD)])


def complete_reasoning_data_teach_R_R(view: View) -> Verdict:
    """R+R's target is above the separate setting's after the same number of steps, and above the
    one of conclusions that are yes or no by lot: it is their truth that teaches."""
    gains = [moved(view, "rr crd", other) for other in ("rr separate", "rr random")]
    return all_of([*map(above, gains), fact(True, combined(view, ["rr crd"]).measured)])


def writing_the_facts_down_first_repairs_A_A(view: View) -> Verdict:
    """A+A with a chain of thought: at least .85, above the setting without one by more than .25,
    and both years retrieved in at least .75 of the answers."""
    return all_of(
        [
            at_least(view("aa cot", "target"), 0.85),
            above(moved(view, "aa cot", "aa separate"), 0.25),
            at_least(view("aa cot", "retrieved"), 0.75),
        ]
    )


def but_not_what_must_retrieve_a_relation(view: View) -> Verdict:
    """A+R and R+R with a chain of thought: target within .15 of chance, and a partner of the same
    year named in at most .15 of the answers (anybody at random would be one in .04)."""
    parts = [within(from_chance(view, arm), 0.15) for arm in RELATIONS]
    parts += [at_most(view(arm, "retrieved"), 0.15) for arm in RELATIONS]
    return all_of(parts)


def with_the_partner_given_A_R_is_answered(view: View) -> Verdict:
    """With the first fact of the chain put into its mouth the model's A+R is above what it answers
    alone by more than .25: retrieval was what it lacked."""
    return above((view("ar cot", "given") - view("ar cot", "target")).called("given - alone"), 0.25)


def with_the_partner_given_R_R_is_answered(view: View) -> Verdict:
    """The same for R+R."""
    return above((view("rr cot", "given") - view("rr cot", "target")).called("given - alone"), 0.25)


def a_year_at_home_and_a_name_in_both_languages_do_not_give_the_year_abroad(view: View) -> Verdict:
    """Separate and adjacent: the year in Clone is below the weaker premise by more than .7."""
    parts = []
    for arm in ABROAD:
        gap = view(arm, "weakest premise") - view(arm, "target")
        parts.append(above(gap.called(f"{arm}: weaker premise - target"), FAR))
        seeds = " ".join(f"{share:.2f}" for share in view(arm, "target").values)
        parts.append(fact(True, f"target by seed {seeds}"))
    return all_of(parts)


def without_the_names_translations_it_is_at_chance(view: View) -> Verdict:
    """Control: no translation is trained. The year in Clone is within .1 of chance, and no seed has
    combined: nothing but the second premise can give it."""
    arm = "xling untranslated"
    return all_of([within(from_chance(view, arm), MARGIN), combined(view, [arm])])


def what_carries_over_comes_from_the_names(view: View) -> Verdict:
    """The year in Clone with translations of names (separate) is above the one without."""
    return above(moved(view, "xling separate", "xling untranslated"))


def with_both_facts_in_the_prompt_the_same_questions_are_answered(view: View) -> Verdict:
    """At least .9 in each pattern and across languages."""
    return all_of(at_least(view(arm, "context"), 0.9) for arm in (*SEPARATE, ABROAD[0]))


# --- the hard level, a pattern each


def at_the_hard_level(view: View, task: str) -> Verdict:
    separate, adjacent = f"{task}-hard separate", f"{task}-hard adjacent"
    distance = within(from_chance(view, separate), MARGIN)
    return all_of([distance, within(moved(view, adjacent, separate), MARGIN)])


def hard_A_A_is_at_chance(view: View) -> Verdict:
    """Who is older: separate within .1 of chance, adjacent within .1 of separate."""
    return at_the_hard_level(view, "aa")


def hard_A_R_is_at_chance(view: View) -> Verdict:
    """Born one year before: separate within .1 of chance, adjacent within .1 of separate."""
    return at_the_hard_level(view, "ar")


def hard_R_R_is_at_chance(view: View) -> Verdict:
    """Parent and grandparent: separate within .1 of chance, adjacent within .1 of separate."""
    return at_the_hard_level(view, "rr")


# --- refutations


def targets_that_are_trained_are_answered(view: View) -> Verdict:
    """Oracle: the trained half of the targets is right in at least .95, in each pattern."""
    return all_of(at_least(view(arm, "trained target"), 0.95) for arm in ORACLE)


def and_the_other_half_does_not_move(view: View) -> Verdict:
    """Oracle: the half that is not trained is within .1 of chance, in each pattern."""
    return all_of(within(from_chance(view, arm), MARGIN) for arm in ORACLE)


def the_trained_half_is_known(view: View) -> str:
    for arm in ORACLE:
        if view.mean(arm, "trained target") < 0.9:
            return f"gate failed: {view(arm, 'trained target')}, .9 needed"
    return known(*ORACLE)(view)


def three_times_as_many_steps_do_not_change_it(view: View) -> Verdict:
    """In each pattern the separate setting's target is within .1 of chance."""
    return all_of(within(from_chance(view, arm), MARGIN) for arm in LONG)


def complete_reasoning_data_teach_R_R_in_three_times_the_steps(view: View) -> Verdict:
    """R+R's target is above the separate setting's, both trained three times as long."""
    seeds = combined(view, ["rr crd x3"]).measured
    return all_of([above(moved(view, "rr crd x3", "rr separate x3")), fact(True, seeds)])


def nor_does_the_year_abroad_come_in_three_times_the_steps(view: View) -> Verdict:
    """The year in Clone is below the weaker premise by more than .7."""
    gap = view("xling separate x3", "weakest premise") - view("xling separate x3", "target")
    return above(gap.called("weaker premise - target"), FAR)


def a_base_that_has_compared_in_silence_combines_relations(view: View) -> Verdict:
    """With bare yes and no in the old world, R+R's target is above the one without by more
    than .1."""
    return above(moved(view, "rr separate compare", "rr separate"), MARGIN)


# --- the table


def target(arms) -> list[Cell]:
    return cells(arms, ["target"])


def chance(arms) -> list[Cell]:
    return cells(arms, ["chance"])


def given(arms, **values: float) -> dict[Cell, float]:
    """The same value for every arm; a name's _ is a space."""
    found = {}
    for name, value in values.items():
        found |= dict.fromkeys(cells(arms, [name.replace("_", " ")]), value)
    return found


def asked(arms, chances: bool = True) -> dict[Cell, float]:
    """What `combined` reads beside the target."""
    return given(arms, n_target=60) | (given(arms, chance=0.5) if chances else {})


def hard(id: str, rule, task: str) -> Claim:
    separate, adjacent = f"{task}-hard separate", f"{task}-hard adjacent"
    return Claim(
        id,
        rule,
        "equal",
        method=target([separate, adjacent]),
        baseline=[*chance([separate]), *target([separate])],
        margin=MARGIN,
        gate=able_in_context(separate, adjacent),
        paper="random level",
        run="full",
    )


CLAIMS = [
    Claim(
        "C1",
        what_follows_from_two_facts_is_not_known_though_both_facts_are,
        "equal",
        method=target(SEPARATE),
        baseline=chance(SEPARATE),
        margin=MARGIN,
        given=asked(SEPARATE, chances=False),
        gate=able_in_context(*SEPARATE),
        paper="random level",
        run="seeds",
    ),
    Claim(
        "C2",
        nor_when_both_facts_stand_in_one_sample,
        "equal",
        method=target(ADJACENT),
        baseline=target(SEPARATE),
        margin=MARGIN,
        given=asked(ADJACENT),
        gate=known(*ADJACENT, *SEPARATE),
        paper="no noticeable change",
        run="seeds",
    ),
    Claim(
        "C3",
        nor_when_for_others_the_conclusion_is_trained_too,
        "equal",
        method=target(CRD),
        baseline=target(SEPARATE),
        margin=MARGIN,
        given=asked(CRD),
        gate=known(*CRD, *SEPARATE),
        paper="no noticeable change",
        run="seeds",
    ),
    Claim(
        "C3r",
        complete_reasoning_data_teach_R_R,
        "more",
        method=target(["rr crd"]),
        baseline=target(["rr separate"]),
        controls=target(["rr random"]),
        given=asked(["rr crd"]),
        gate=known("rr crd", "rr separate", "rr random"),
        run="seeds",
        sentence="Complete reasoning data, if they are true, teach R+R",
    ),
    Claim(
        "C4",
        writing_the_facts_down_first_repairs_A_A,
        "more",
        method=target(["aa cot"]),
        baseline=target(["aa separate"]),
        margin=0.25,
        given=given(["aa cot"], retrieved=0.9),
        gate=known("aa cot", "aa separate"),
        paper="above 90%",
        sentence="Writing the facts down first repairs A+A",
    ),
    Claim(
        "C4r",
        but_not_what_must_retrieve_a_relation,
        "equal",
        method=target(RELATIONS),
        baseline=chance(RELATIONS),
        margin=0.15,
        given=given(RELATIONS, retrieved=0.05),
        gate=known(*RELATIONS),
        paper="A+R and R+R at random level",
        run="seeds",
    ),
    Claim(
        "C4a",
        with_the_partner_given_A_R_is_answered,
        "more",
        method=cells(["ar cot"], ["given"]),
        baseline=target(["ar cot"]),
        margin=0.25,
        gate=known("ar cot"),
        sentence="With the partner named for it, the chain of A+R is completed",
    ),
    Claim(
        "C4b",
        with_the_partner_given_R_R_is_answered,
        "more",
        method=cells(["rr cot"], ["given"]),
        baseline=target(["rr cot"]),
        margin=0.25,
        gate=known("rr cot"),
        sentence="With the partner named for it, the chain of R+R is completed",
    ),
    Claim(
        "C5",
        a_year_at_home_and_a_name_in_both_languages_do_not_give_the_year_abroad,
        "more",
        method=cells(ABROAD, ["weakest premise"]),
        baseline=target(ABROAD),
        margin=FAR,
        gate=names_must_be_learned,
        paper="far below both premises",
        run="seeds",
    ),
    Claim(
        "C5c",
        without_the_names_translations_it_is_at_chance,
        "equal",
        method=target(["xling untranslated"]),
        baseline=chance(["xling untranslated"]),
        margin=MARGIN,
        given=asked(["xling untranslated"], chances=False),
        gate=known("xling untranslated"),
        run="seeds",
    ),
    Claim(
        "C5n",
        what_carries_over_comes_from_the_names,
        "more",
        method=target(["xling separate"]),
        baseline=target(["xling untranslated"]),
        gate=names_must_be_learned,
        run="seeds",
        sentence="What carries over to Clone comes from the translated names",
    ),
    Claim(
        "C6",
        with_both_facts_in_the_prompt_the_same_questions_are_answered,
        "level",
        method=cells((*SEPARATE, ABROAD[0]), ["context"]),
        bound=0.9,
        paper="in-context reasoning is intact",
    ),
    hard("H1a", hard_A_A_is_at_chance, "aa"),
    hard("H1r", hard_A_R_is_at_chance, "ar"),
    hard("H1t", hard_R_R_is_at_chance, "rr"),
    Claim(
        "R1",
        targets_that_are_trained_are_answered,
        "level",
        method=cells(ORACLE, ["trained target"]),
        bound=0.95,
        gate=known(*ORACLE),
        run="seeds",
    ),
    Claim(
        "R1h",
        and_the_other_half_does_not_move,
        "equal",
        method=target(ORACLE),
        baseline=chance(ORACLE),
        margin=MARGIN,
        gate=the_trained_half_is_known,
        run="seeds",
        sentence="With half of the targets trained, the other half does not move",
    ),
    Claim(
        "R2",
        three_times_as_many_steps_do_not_change_it,
        "equal",
        method=target(LONG),
        baseline=chance(LONG),
        margin=MARGIN,
        gate=known(*LONG),
        run="full",
        sentence="Three times as many steps do not change C1",
    ),
    Claim(
        "R2c",
        complete_reasoning_data_teach_R_R_in_three_times_the_steps,
        "more",
        method=target(["rr crd x3"]),
        baseline=target(["rr separate x3"]),
        given=asked(["rr crd x3"]),
        gate=known("rr crd x3", "rr separate x3"),
        run="full",
        sentence="In three times as many steps complete reasoning data teach R+R",
    ),
    Claim(
        "R2x",
        nor_does_the_year_abroad_come_in_three_times_the_steps,
        "more",
        method=cells(["xling separate x3"], ["weakest premise"]),
        baseline=target(["xling separate x3"]),
        margin=FAR,
        gate=known("xling separate x3"),
        run="full",
    ),
    Claim(
        "R3",
        a_base_that_has_compared_in_silence_combines_relations,
        "more",
        method=target(["rr separate compare"]),
        baseline=target(["rr separate"]),
        margin=MARGIN,
        gate=known("rr separate compare", "rr separate"),
        run="full",
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def figure(results: dict):
    """Above: what the cells know (premises) and what they make of it (targets). Below: the targets
    during training, of yes/no questions and of years."""
    view = View(results["metrics"])
    fig, axes = new_figure(2, 2, width=14, height=10)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[0]:
        ax.remove()
    draw_cells(fig.add_subplot(grid[0, :]), view)
    series = results["series"]
    of_relations = ("rr separate", "rr cot", "rr crd", "rr random")
    of_years = ("ar separate", "ar cot", *ABROAD, "xling untranslated")
    draw_training(axes[1, 0], series, "Yes or no", ("aa separate", "aa cot", *of_relations))
    draw_training(axes[1, 1], series, "Years", of_years)
    return fig


def draw_cells(ax, view: View) -> None:
    arms = [arm for arm in view.metrics if "hard" not in arm and len(arm.split()) == 2]
    for i, arm in enumerate(arms):
        first = not i
        known_words = "premises (trained)" if first else None
        target_words = "target (implied, never trained)" if first else None
        bar_seeds(ax, i - 0.2, view(arm, "premises").values, COLORS[7], 0.38, known_words)
        bar_seeds(ax, i + 0.2, view(arm, "target").values, COLORS[1], 0.38, target_words)
        level = [view.mean(arm, "chance")] * 2
        chance_words = "chance" if first else None
        ax.plot([i, i + 0.4], level, color="black", linewidth=2, label=chance_words)
    ax.set_xticks(range(len(arms)), arms, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(ylabel="accuracy (dots: seeds)", title="What is trained, and what follows from it")
    ax.set(ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.legend(loc="upper center", ncols=3)


def draw_training(ax, series: dict, title: str, arms) -> None:
    drawn = [arm for arm in arms if arm in series]
    for color, arm in zip(COLORS, drawn):
        line = series[arm]["target"]
        style = "--" if "separate" in arm or "random" in arm or "un" in arm else "-"
        plot_seeds(ax, line["x"], line["values"], arm, color, linestyle=style)
    ax.set(xlabel="step on the new world", ylabel="target (thin: seeds)", title=title)
    ax.set(ylim=(0, 1.35), yticks=[0, 0.25, 0.5, 0.75, 1])
    if drawn:
        ax.legend(loc="upper center", ncols=3)
