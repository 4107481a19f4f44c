"""SkipLayerCD: the claims, and the figure. What was measured: experiments/skip_layer_cd.py."""

from itertools import pairwise

import numpy as np

from methods.skip_layer_cd import BASE, LANGUAGES, OTHERS
from minilm.claims import (
    Cell,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    at_least,
    average,
    cells,
    fact,
    judge,
    key,
    within,
)
from minilm.results import COLORS, new_figure, plot_seeds

LOWER = ("h1", "h2", "h3", "h4")  # early exits of the lower half: DoLa's candidates but h0
SPANS = ("[1,2)", "[2,3)", "[3,4)")  # what SL-H draws from
WIDE = "[1,7)"  # an amateur that keeps the first and the last block only
LAST = "[7,8)"  # an amateur without the last block: the same as the early exit h7
OURS = ("sl-h", "sl-d")
DOLA = ("dola", "dola norm")
OTHER_DOLA = ("dola official", "dola norm official", "dola static")
SWEEP = tuple(f"skip {m}" for m in range(8))

FINDING = (
    "A model that read English first says English words half-way through other languages' texts; "
    "without one middle block it still says the right language. But the contrast of the two gains "
    "nothing here over plain greedy decoding."
)


def headline(view: View) -> str:
    shown = [over(view, arm, "acc", OTHERS).mean for arm in ("sl-d", "dola", "greedy")]
    blind = view.mean("verb-blind", "acc")
    return (
        "Word problems in three other languages, right answers: contrast with a skipped block "
        "{:.2f}, DoLa {:.2f}, greedy {:.2f}; without reading a verb {:.2f}.".format(*shown, blind)
    )


def acc(language: str) -> tuple[str, str]:
    return "acc", language


def over(view: View, arm: str, metric: str, languages) -> PerSeed:
    """The mean over languages: one number per seed."""
    name = f"{arm} {metric} {'/'.join(languages)}"
    return average((view(arm, (metric, language)) for language in languages), name)


def english_is_solved(view: View) -> str:
    """A model that cannot solve English problems says nothing about decoding."""
    worst = min(view("greedy", acc(BASE)).values)
    return "" if worst >= 0.85 else f"gate failed: greedy solves {worst:.2f} < 0.85 in English"


# --- what the layers say


def early_exits_do_not_speak_the_language_of_the_text(view: View) -> Verdict:
    """Where a word of the text's own language is due, the exits h1 to h4 say one less often than
    the whole model: in each other language by more than 0.3, on average over the exits."""
    parts = []
    for language in OTHERS:
        own = "own", language
        leads = [view("expert", own) - view(exit, own) for exit in LOWER]
        parts.append(above(average(leads, f"expert - exits, own {language}"), 0.3))
    return all_of(parts)


def they_speak_English(view: View) -> Verdict:
    """At the same places the exits h1 to h4 say English words more often than words of the text's
    language: by more than 0.3, on average over exits and languages."""
    leads = []
    for exit in LOWER:
        leads += [view(exit, ("base", lang)) - view(exit, ("own", lang)) for lang in OTHERS]
    return above(average(leads, "exits: English - own"), 0.3)


def the_amateur_speaks_the_right_language(view: View) -> Verdict:
    """Without one of SL-H's blocks the share of own words is within 0.05 of the whole model's, in
    each other language; with the first and the last block alone it is lower by more than 0.2."""
    parts = []
    for span in SPANS:
        for language in OTHERS:
            own = "own", language
            parts.append(within(view(span, own) - view("expert", own), 0.05))
    too_much = over(view, "expert", "own", OTHERS) - over(view, WIDE, "own", OTHERS)
    return all_of([*parts, above(too_much, 0.2)])


def without_the_last_block_it_does_not(view: View) -> Verdict:
    """Skip the last block, and the share of own words falls by more than 0.2 (mean of the other
    languages): it is the upper blocks that put thoughts into words."""
    return above(over(view, "expert", "own", OTHERS) - over(view, LAST, "own", OTHERS), 0.2)


def a_model_trained_without_dropping_blocks_cannot_do_without_one(view: View) -> Verdict:
    """Refutes what C2 rests on: with --drop 0 the share of own words falls by more than 0.05 when
    one of SL-H's blocks is skipped (mean of blocks and other languages)."""
    whole = over(view, ("drop 0", "expert"), "own", OTHERS)
    skipped = average((over(view, ("drop 0", s), "own", OTHERS) for s in SPANS), "one skipped")
    return above((whole - skipped).called("--drop 0: expert - one block skipped, own"), 0.05)


def the_amateur_is_fluent_and_copies_rare_verbs_worse(view: View) -> Verdict:
    """Without one of SL-H's blocks function words are within 0.01 of the whole model's accuracy,
    and verbs below it by more than 0.01 (means of blocks and other languages). Signs and results
    are printed beside: they hardly fall."""
    falls = {}
    for metric in ("function", "verb", "sign", "result"):
        whole = over(view, "expert", metric, OTHERS)
        skipped = average((over(view, span, metric, OTHERS) for span in SPANS), metric)
        falls[metric] = (whole - skipped).called(f"{metric}: expert - amateur")
    beside = fact(True, f"{falls['sign']}; {falls['result']}")
    return all_of([within(falls["function"], 0.01), above(falls["verb"], 0.01), beside])


# --- what the decoders answer


def gain(view: View, arm: str, other: str, languages) -> PerSeed:
    """Accuracy of one decoder minus another's on the same problems."""
    lead = over(view, arm, "acc", languages) - over(view, other, "acc", languages)
    return lead.called(f"{arm} - {other}, {'/'.join(languages)}")


def beats(view: View, arm: str, other: str) -> Verdict:
    """On average over all languages with an interval above 0, and in every language on average."""
    each = [gain(view, arm, other, [language]) for language in LANGUAGES]
    shown = ", ".join(f"{lang} {x.mean:+.3f}" for lang, x in zip(LANGUAGES, each))
    everywhere = fact(all(x.mean > 0 for x in each), shown)
    return all_of([above(gain(view, arm, other, LANGUAGES)), everywhere])


def DoLa_harms_and_most_outside_English(view: View) -> Verdict:
    """In both lenses, without a penalty: greedy decoding is better in the other languages, and
    DoLa's loss is larger there than in English (intervals over seeds above 0)."""
    parts = []
    for dola in DOLA:
        loss = gain(view, "greedy", dola, OTHERS)
        more = loss - gain(view, "greedy", dola, [BASE])
        parts += [above(loss), above(more.called(f"{dola} loses more than in {BASE}"))]
    return all_of(parts)


def other_forms_of_DoLa_harm_as_well(view: View) -> Verdict:
    """The authors' divergence in both lenses, and one fixed exit: greedy decoding is better in the
    other languages."""
    return all_of(above(gain(view, "greedy", dola, OTHERS)) for dola in OTHER_DOLA)


def a_repetition_penalty_costs_DoLa_even_more(view: View) -> Verdict:
    """DoLa with its authors' penalty answers worse than without, in the other languages."""
    return above(gain(view, "dola", "dola penalty", OTHERS))


def skipping_beats_DoLa(view: View) -> Verdict:
    """SL-H and SL-D against both lenses, without a penalty: above on average over all languages
    with an interval over seeds above 0, and in every language on average."""
    return all_of(beats(view, ours, dola) for ours in OURS for dola in DOLA)


def skipping_beats_an_early_exit_in_the_same_form(view: View) -> Verdict:
    """The same with the early exit contrasted as SL is (same beta and mask, normed lens): what
    DoLa loses by its bare log-ratio is left aside."""
    return all_of(beats(view, ours, "mild exit") for ours in OURS)


def skipping_is_as_good_as_a_second_weaker_model(view: View) -> Verdict:
    """SL-H and SL-D are at most 0.02 behind vanilla contrastive decoding, whose amateur is the
    model as it was at 60% of its training (mean of all languages)."""
    return all_of(at_least(gain(view, ours, "cd", LANGUAGES), -0.02) for ours in OURS)


def skipping_beats_greedy_decoding(view: View) -> Verdict:
    """SL-H and SL-D: mean of all languages, interval over seeds above 0."""
    return all_of(above(gain(view, ours, "greedy", LANGUAGES)) for ours in OURS)


def skipping_some_block_beats_greedy_decoding(view: View) -> Verdict:
    """At least one of the eight single blocks, skipped for the amateur: mean of all languages,
    interval over seeds above 0 (eight tries, not corrected for)."""
    tried = [above(gain(view, arm, "greedy", LANGUAGES)) for arm in SWEEP]
    best = max(tried, key=lambda part: part.verdict == "holds")
    words = all_of(tried).measured
    if best.verdict == "holds":
        return Verdict("holds", words)
    undecided = any(part.verdict == "undecided" for part in tried)
    return Verdict("undecided" if undecided else "not reproduced", words)


def the_contrast_favours_the_right_verb_where_the_expert_errs(view: View) -> Verdict:
    """What a gain would need: where the expert's verb is wrong, z_E - z_A is larger for the right
    one than for the expert's in more than half of the cases (mean of SL-H's blocks and the other
    languages). Beside: accuracy of verbs when the amateur is subtracted, and when both are averaged
    (beta = -1/3), minus the expert's. Block dropping makes the amateur a member of an ensemble,
    not a weaker copy: it errs elsewhere."""
    favoured = average((over(view, span, "gap", OTHERS) for span in SPANS), "right verb favoured")
    whole = over(view, "expert", "verb", OTHERS)
    beside = []
    for name in ("subtracted", "averaged"):
        changed = average((over(view, span, name, OTHERS) for span in SPANS), name)
        beside.append(str((changed - whole).called(f"verbs, {name} - expert")))
    return all_of([above(favoured, 0.5), fact(True, "; ".join(beside))])


def a_stronger_contrast_costs_more(view: View) -> Verdict:
    """Accuracy falls from beta 0.5 (SL-D) to 1 and to 2, mean of all languages."""
    order = ("sl-d", "beta 1.0", "beta 2.0")
    return all_of(above(gain(view, a, b, LANGUAGES)) for a, b in pairwise(order))


def with_beta_0_it_is_greedy_decoding(view: View) -> Verdict:
    """Every answer is the same as greedy decoding's, token by token, in every language."""
    return all_of(at_least(view("beta 0", ("same", language)), 1) for language in LANGUAGES)


# --- what a token costs


def a_token_costs_2L_minus_n_block_evaluations(view: View) -> Verdict:
    """Over greedy's L, counted in the caches: equal to (2L - n)/L."""
    counted = view("sl-d", "blocks") - view("sl-d", "formula")
    return within(counted.called("counted - formula"), 1e-9)


def its_time_follows(view: View) -> Verdict:
    """Time of a token over greedy's, divided by (2L - n)/L: within 0.15 of 1."""
    ratio = (view("sl-d", "time") / view("sl-d", "formula")).called("time / formula")
    return within(ratio - 1, 0.15)


# --- the table

OWN = [("own", language) for language in OTHERS]
ENGLISH = [("base", language) for language in OTHERS]
VERB = [("verb", language) for language in OTHERS]
ACC = [acc(language) for language in LANGUAGES]
ACC_OTHERS = [acc(language) for language in OTHERS]


def given(arms, metrics, value: float) -> dict[Cell, float]:
    return dict.fromkeys(cells(arms, metrics), value)


FLUENT = [(name, language) for name in ("function", "sign", "result") for language in OTHERS]
CHANGED = [(name, language) for name in ("subtracted", "averaged") for language in OTHERS]

CLAIMS = [
    Claim(
        "C1",
        early_exits_do_not_speak_the_language_of_the_text,
        "more",
        method=cells(["expert"], OWN),
        baseline=cells(LOWER, OWN),
        margin=0.3,
        gate=english_is_solved,
        paper="early exits speak the wrong language",
    ),
    Claim(
        "C1e",
        they_speak_English,
        "more",
        method=cells(LOWER, ENGLISH),
        baseline=cells(LOWER, OWN),
        margin=0.3,
        gate=english_is_solved,
        paper="English, in models that are English-centric",
        sentence="Early exits speak English",
    ),
    Claim(
        "C2",
        the_amateur_speaks_the_right_language,
        "equal",
        method=cells(SPANS, OWN),
        baseline=cells(["expert"], OWN),
        controls=cells([WIDE], OWN),
        margin=0.05,
        given=given([WIDE], OWN, 0.1),
        gate=english_is_solved,
        paper="the amateur speaks the right language",
    ),
    Claim(
        "C2u",
        without_the_last_block_it_does_not,
        "more",
        method=cells(["expert"], OWN),
        baseline=cells([LAST], OWN),
        margin=0.2,
        gate=english_is_solved,
        paper="the upper layers turn concepts into words",
        sentence="Without the last block it does not speak the right language",
    ),
    Claim(
        "C3",
        DoLa_harms_and_most_outside_English,
        "more",
        method=cells(["greedy"], ACC_OTHERS),
        baseline=cells(DOLA, ACC_OTHERS),
        given=given(["greedy", *DOLA], [acc(BASE)], 0.95),
        gate=english_is_solved,
        paper="DoLa fails outside English",
        run="seeds",
    ),
    Claim(
        "C3f",
        other_forms_of_DoLa_harm_as_well,
        "more",
        method=cells(["greedy"], ACC_OTHERS),
        baseline=cells(OTHER_DOLA, ACC_OTHERS),
        gate=english_is_solved,
        run="full",
    ),
    Claim(
        "C3p",
        a_repetition_penalty_costs_DoLa_even_more,
        "more",
        method=cells(["dola"], ACC_OTHERS),
        baseline=cells(["dola penalty"], ACC_OTHERS),
        gate=english_is_solved,
    ),
    Claim(
        "C4",
        skipping_beats_DoLa,
        "more",
        method=cells(OURS, ACC),
        baseline=cells(DOLA, ACC),
        gate=english_is_solved,
        paper="better than DoLa on mGSM (11 languages)",
        run="seeds",
    ),
    Claim(
        "C4m",
        skipping_beats_an_early_exit_in_the_same_form,
        "more",
        method=cells(OURS, ACC),
        baseline=cells(["mild exit"], ACC),
        gate=english_is_solved,
        run="seeds",
    ),
    Claim(
        "C4v",
        skipping_is_as_good_as_a_second_weaker_model,
        "no worse",
        method=cells(OURS, ACC),
        baseline=cells(["cd"], ACC),
        margin=0.02,
        gate=english_is_solved,
        paper="without a second model, no worse than with one",
        run="seeds",
    ),
    Claim(
        "C5",
        skipping_beats_greedy_decoding,
        "more",
        method=cells(OURS, ACC),
        baseline=cells(["greedy"], ACC),
        gate=english_is_solved,
        paper="better than greedy decoding on average",
        run="seeds",
    ),
    Claim(
        "C5s",
        skipping_some_block_beats_greedy_decoding,
        "more",
        method=cells(SWEEP, ACC),
        baseline=cells(["greedy"], ACC),
        gate=english_is_solved,
        run="full",
    ),
    Claim(
        "C5w",
        the_contrast_favours_the_right_verb_where_the_expert_errs,
        "level",
        method=cells(SPANS, [("gap", language) for language in OTHERS]),
        bound=0.5,
        given=given(SPANS, CHANGED, 0.5) | given(["expert"], VERB, 0.5),
        gate=english_is_solved,
    ),
    Claim(
        "C6",
        the_amateur_is_fluent_and_copies_rare_verbs_worse,
        "more",
        method=cells(["expert"], VERB),
        baseline=cells(SPANS, VERB),
        margin=0.01,
        given=given([*SPANS, "expert"], FLUENT, 1.0),
        gate=english_is_solved,
        paper="the amateur is fluent and reasons worse",
    ),
    Claim(
        "C7",
        a_token_costs_2L_minus_n_block_evaluations,
        "equal",
        method=[Cell("sl-d", "blocks")],
        baseline=[Cell("sl-d", "formula")],
        margin=1e-9,
    ),
    Claim(
        "C7t",
        its_time_follows,
        "equal",
        method=[Cell("sl-d", "time")],
        baseline=[Cell("sl-d", "formula")],
        margin=0.15,
        given={Cell("sl-d", "formula"): 1.5},
        sentence="Its time follows the count of blocks",
    ),
    Claim(
        "R1",
        with_beta_0_it_is_greedy_decoding,
        "level",
        method=cells(["beta 0"], [("same", language) for language in LANGUAGES]),
        bound=1.0,
    ),
    Claim(
        "R2",
        a_model_trained_without_dropping_blocks_cannot_do_without_one,
        "more",
        method=cells([("drop 0", "expert")], OWN),
        baseline=cells([("drop 0", span) for span in SPANS], OWN),
        margin=0.05,
        run="full",
    ),
    Claim(
        "R3",
        a_stronger_contrast_costs_more,
        "order",
        method=cells(["beta 2.0", "beta 1.0", "sl-d"], ACC),
        gate=english_is_solved,
        run="full",
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def figure(results: dict):
    """Above: which language each early exit and each amateur speaks. Below: entropy by depth;
    right answers by decoding; the same as change against greedy, or (--full) where to skip."""
    view = View(results["metrics"])
    fig, axes = new_figure(2, 3, width=14, height=8.5)
    L = results["config"]["layers"]
    for ax, language in zip(axes[0], OTHERS):
        draw_languages(ax, view, L, language)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    entropy, accuracy, last = axes[1]
    draw_entropy(entropy, view, L)
    draw_accuracy(accuracy, view, f"{len(results['seeds'])} seeds (small dots)")
    if all(arm in view for arm in ("greedy", *SWEEP)):
        draw_sweep(last, view)
    else:
        draw_change(last, view)
    return fig


def by_seed(view: View, arms, metric) -> list:
    """[seed][arm]: a line per seed over the arms."""
    return list(zip(*(view(arm, metric).values for arm in arms)))


def depths(L: int) -> list[str]:
    return [*(f"h{i}" for i in range(L)), "expert"]


def draw_languages(ax, view: View, L: int, language: str) -> None:
    amateurs = [f"[{m},{m + 1})" for m in range(L)]
    middles = [m + 0.5 for m in range(L)]
    lines = ((COLORS[0], "own", "the text's language"), (COLORS[1], "base", "English"))
    for color, name, words in lines:
        exits = by_seed(view, depths(L), (name, language))
        plot_seeds(ax, range(L + 1), exits, f"early exit says {words}", color)
        shares = [view.mean(amateur, (name, language)) for amateur in amateurs]
        style = {"color": color, "markersize": 6, "fillstyle": "none"}
        ax.plot(middles, shares, "D", label=f"amateur says {words}", **style)
    ax.set(xlabel=f"early exit ({L}: none) / skipped block", ylabel="share of words")
    ax.set(title=f"A text in language {language}", ylim=(-0.03, 1.05))


def draw_entropy(ax, view: View, L: int) -> None:
    for color, language in zip(COLORS, LANGUAGES):
        curves = by_seed(view, depths(L), ("entropy", language))
        plot_seeds(ax, range(L + 1), curves, language, color)
    if "sl-d" in view:
        starts = [view("sl-d", ("m", language)).values for language in LANGUAGES]
        for m in np.unique(starts):
            ax.axvspan(m, m + 1, color="#999999", alpha=0.25)
    ax.set(xlabel="early exit (grey: skipped by SL-D)", ylabel="entropy (nats)")
    ax.set_title("Uncertainty by depth")
    ax.legend()


def decodings(view: View) -> list[str]:
    """Every arm that answered, in the order in which they ran, last one first (to be drawn from
    below); beta 0 is greedy decoding, and a sweep has its own panel."""
    answered = [arm for arm, row in view.metrics.items() if key(acc(BASE)) in row]
    return [arm for arm in answered if arm not in ("beta 0", *SWEEP)][::-1]


def draw_accuracy(ax, view: View, seeds: str) -> None:
    for row, arm in enumerate(decodings(view)):
        for k, language in enumerate(LANGUAGES):
            score = view(arm, acc(language))
            y = row + 0.15 * (1.5 - k)
            label = None if row else language
            ax.plot(score.mean, y, "o", color=COLORS[k], markersize=7, label=label)
            ax.plot(score.values, [y] * len(score.values), ".", color=COLORS[k], alpha=0.6)
    ax.set_yticks(range(len(decodings(view))), decodings(view))
    ax.set(xlabel="accuracy", xlim=(0, 1.03), title=f"Right answers, {seeds}")
    ax.legend(loc="upper left")


def draw_change(ax, view: View) -> None:
    others = [arm for arm in decodings(view) if arm != "greedy"]
    for row, arm in enumerate(others if "greedy" in view else ()):
        for k, language in enumerate(LANGUAGES):
            change = gain(view, arm, "greedy", [language]).values
            y = row + 0.15 * (1.5 - k)
            ax.plot(change, [y] * len(change), ".", color=COLORS[k], markersize=6)
    ax.axvline(0, color="#999999", linewidth=1)
    ax.set_yticks(range(len(others)), others)
    ax.set(xlabel="accuracy minus greedy's", title="Every seed")


def draw_sweep(ax, view: View) -> None:
    for color, languages, label in ((COLORS[0], [BASE], "English"), (COLORS[1], OTHERS, "others")):
        lines = list(zip(*(over(view, arm, "acc", languages).values for arm in SWEEP)))
        plot_seeds(ax, range(len(SWEEP)), lines, label, color)
        greedy = over(view, "greedy", "acc", languages).mean
        ax.axhline(greedy, color=color, linestyle=":", linewidth=1.5)
    ax.set(xlabel="the one block that is skipped", ylabel="accuracy (dotted: greedy)")
    ax.set_title("Where to skip")
    ax.legend()
