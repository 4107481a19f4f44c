"""MoE-LPR: the claims, and the figure. What was measured: experiments/moe_lpr.py."""

from itertools import pairwise

from minilm.claims import (
    Cell,
    Claim,
    NotInThisRun,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    at_least,
    at_most,
    below,
    cells,
    fact,
    judge,
    within,
)
from minilm.results import COLORS, bar_seeds, new_figure

FINE_TUNED = ("ft 3e-4", "ft 1e-3", "ft 3e-3")
RIVALS = (*FINE_TUNED, "moe all")  # all weights trained, in one stage
SIZES = ("lpr", "review 31", "review 16", "stage 1")  # 62, 31, 16, 0 blocks of old text
EXPERTS = ("2 experts", "6 experts", "8 experts")  # (lpr has 4)

FINDING = (
    "Turn a model into a mixture, train the new experts on new languages, then teach only the "
    "router, with a pinch of old text, where the old ones live: the old languages come back."
)


def headline(view: View) -> str:
    """The main numbers beside their baselines, for the README."""
    arms = ("lpr", "review ntp", "shuffled labels")
    back = [view.mean(arm, "recovery") for arm in arms]
    paid = [view.mean(arm, "new cost") for arm in arms]
    return (
        "Of what was forgotten {:.0%} comes back, {:.0%} without the language prior, {:.0%} with "
        "its labels shuffled; of the gain in new languages {:.0%}, {:.0%} and {:.0%} are paid for "
        "it.".format(*back, *paid)
    )


def recovery(view: View, arm: str) -> PerSeed:
    """The share of what stage 1 forgot that came back: of nothing there is no share."""
    if min(view(arm, "forgotten").values) < 0.05:
        raise NotInThisRun("stage 1 did not forget: it lost less than .05 in the old languages")
    return view(arm, "recovery")


# --- the method


def upcycling_changes_nothing(view: View) -> Verdict:
    """Before any training the largest difference of a logit is below 1e-4, in every seed."""
    worst = max(view("upcycled", "logit difference").values)
    return fact(worst < 1e-4, f"largest difference {worst:.1e}")


def frozen_weights_still_forget(view: View) -> Verdict:
    """Of the base's tensors none is changed; after stage 1 the loss on old languages is more than
    .2 higher and on new ones more than .2 lower."""
    forgotten = view("stage 1", "old") - view("base", "old")
    learned = view("base", "new") - view("stage 1", "new")
    changed = max(view("stage 1", "changed").values)
    frozen = fact(changed == 0, f"{changed:.0f} tensors changed")
    return all_of([frozen, above(forgotten, 0.2), above(learned, 0.2)])


def a_review_recovers_most_and_costs_little(view: View) -> Verdict:
    """Recovery is at least .75, new cost at most .15, the replay below 1% of stage 1's tokens."""
    share = max(view("lpr", "replay share").values)
    small = fact(share < 0.01, f"replay share {share:.2%}")
    back = at_least(recovery(view, "lpr"), 0.75)
    return all_of([back, at_most(view("lpr", "new cost"), 0.15), small])


def gain_and_price(view: View, rate: str) -> Verdict:
    """Of the routing loss over the same review without it."""
    gain = recovery(view, "lpr" + rate) - recovery(view, "review ntp" + rate)
    price = view("lpr" + rate, "new cost") - view("review ntp" + rate, "new cost")
    return all_of([above(gain), at_most(price, 0.01)])


def the_routing_loss_recovers_more_at_no_higher_price(view: View) -> Verdict:
    """Recovery is above that of the same review without the routing loss, and new cost at most .01
    above."""
    return gain_and_price(view, "")


def it_does_so_when_both_reviews_have_their_better_rate(view: View) -> Verdict:
    """As C4, at 3e-2: of 1e-2 and 3e-2 the better one for both, by recovery on seed 100."""
    return gain_and_price(view, " 3e-2")


def old_tokens_go_to_the_frozen_expert(view: View) -> Verdict:
    """Mean score of the frozen expert on old tokens: review without the routing loss above stage 1,
    with it above both."""
    steps = pairwise(("stage 1", "review ntp", "lpr"))
    return all_of(above(view(b, "G0 old") - view(a, "G0 old")) for a, b in steps)


def new_tokens_stay_where_they_were(view: View) -> Verdict:
    """Mean score of the frozen expert on new tokens is within .1 of stage 1's; with shuffled labels
    it is more than .1 above."""
    before = view("stage 1", "G0 new")
    stays = within(view("lpr", "G0 new") - before, 0.1)
    return all_of([stays, above(view("shuffled labels", "G0 new") - before, 0.1)])


# --- refutations


def shuffled_labels_cost_the_new_languages_twice_as_much(view: View) -> Verdict:
    """With the labels shuffled over the tokens the new cost is more than twice lpr's, and the
    frozen expert's score on new tokens more than .1 above lpr's. Recovery is printed beside: it
    needs no right label."""
    paid = view("lpr", "new cost")
    excess = (view("shuffled labels", "new cost") - paid - paid).called("cost - 2 x lpr's")
    moved = view("shuffled labels", "G0 new") - view("lpr", "G0 new")
    beside = fact(True, f"{recovery(view, 'shuffled labels')}; {recovery(view, 'lpr')}")
    return all_of([above(excess), above(moved, 0.1), beside])


def routing_moves_where_the_labels_say(view: View) -> Verdict:
    """With the labels inverted it is new tokens that go to the frozen expert: on them its score is
    more than .1 above lpr's, and on old tokens below lpr's."""
    new = view("inverted labels", "G0 new") - view("lpr", "G0 new")
    old = view("inverted labels", "G0 old") - view("lpr", "G0 old")
    return all_of([above(new, 0.1), below(old)])


def it_must_be_the_frozen_expert(view: View) -> Verdict:
    """Old tokens pulled to expert 1, which stage 1 trained: recovery is below lpr's, and at most
    .02 above that of the review without a routing loss."""
    pulled = recovery(view, "expert 1")
    lead = recovery(view, "lpr") - pulled
    return all_of([above(lead), at_most(pulled - recovery(view, "review ntp"), 0.02)])


# --- against others, and what the method is made of


def it_forgets_less_than_training_all_weights(view: View) -> Verdict:
    """On the same replay, loss on old languages is below that of the mixture trained in full, and
    of every fine-tuning (3 rates) that learns the new languages as well: whose loss on them is at
    most lpr's."""
    ours = view("lpr", "old")
    parts = [below(ours - view("moe all", "old"))]
    for arm in FINE_TUNED:
        lead = ours - view(arm, "old")
        if view.mean(arm, "new") <= view.mean("lpr", "new"):
            parts.append(below(lead))
        else:
            parts.append(fact(True, f"{arm} learned less"))
    return all_of(parts)


def it_learns_new_languages_as_well_as_training_all_weights(view: View) -> Verdict:
    """Loss on new languages is at most .02 above that of the mixture trained in full and of each
    fine-tuning."""
    ours = view("lpr", "new")
    return all_of(at_most(ours - view(arm, "new"), 0.02) for arm in RIVALS)


def it_forgets_less_than_LoRA_and_learns_more(view: View) -> Verdict:
    """Loss on old and on new languages is below that of adapters of rank 8."""
    parts = [below(view("lpr", group) - view("lora", group)) for group in ("old", "new")]
    return all_of(parts)


def new_experts_must_start_as_copies(view: View) -> Verdict:
    """Loss on new languages is more than .05 higher when they start at random."""
    return above(view("no copies", "new") - view("lpr", "new"), 0.05)


def more_review_text_protects_old_languages_better(view: View) -> Verdict:
    """Loss on old languages falls from 0 to 16, 31 and 62 blocks of old text."""
    return all_of(below(view(a, "old") - view(b, "old")) for a, b in pairwise(SIZES))


def its_first_blocks_do_most(view: View) -> Verdict:
    """That loss falls by more from 0 to 16 blocks than from 31 to 62."""
    first = view("stage 1", "old") - view("review 16", "old")
    last = view("review 31", "old") - view("lpr", "old")
    return above(first - last)


def it_costs_new_languages_little(view: View) -> Verdict:
    """With 62 blocks loss on new languages is at most .15 above stage 1's."""
    return at_most(view("lpr", "new") - view("stage 1", "new"), 0.15)


def more_experts_learn_new_languages_better(view: View) -> Verdict:
    """Of which each token passes two: loss on new languages is lower with 8 than with 2."""
    return below(view("8 experts", "new") - view("2 experts", "new"))


def more_experts_keep_old_languages_as_well(view: View) -> Verdict:
    """Recovery with 2, 6 and 8 experts is within .1 of that with 4."""
    ours = recovery(view, "lpr")
    return all_of(within(recovery(view, arm) - ours, 0.1) for arm in EXPERTS)


def it_protects_old_languages_that_the_review_never_saw(view: View) -> Verdict:
    """Loss on them is below that of the review without the routing loss and of one stage."""
    ours = view("lpr", "ood")
    return all_of(below(ours - view(arm, "ood")) for arm in ("review ntp", "one stage"))


def two_stages_are_better_than_one(view: View) -> Verdict:
    """Loss on old languages is below that of one stage with replay and routing loss. Beside, on new
    ones."""
    old = view("lpr", "old") - view("one stage", "old")
    return all_of([below(old), fact(True, str(view("lpr", "new") - view("one stage", "new")))])


def the_papers_loss_is_better_than_its_codes(view: View) -> Verdict:
    """Recovery is above that of the second softmax."""
    return above(recovery(view, "lpr") - recovery(view, "double softmax"))


# --- the table


def on(metric: str, *arms: str) -> list[Cell]:
    return cells(arms, [metric])


def forgotten(*arms: str) -> dict[Cell, float]:
    """What `recovery` asks of an arm."""
    return dict.fromkeys(on("forgotten", *arms), 0.5)


MAIN = [
    Claim(
        "C1",
        upcycling_changes_nothing,
        "level",
        on("logit difference", "upcycled"),
        bound=1e-4,
        smaller_is_better=True,
    ),
    Claim(
        "C2",
        frozen_weights_still_forget,
        "more",
        on("old", "base"),
        on("old", "stage 1"),
        margin=0.2,
        smaller_is_better=True,
        given={
            Cell("stage 1", "changed"): 0,
            Cell("base", "new"): 1.5,
            Cell("stage 1", "new"): 0.8,
        },
        paper="old 53.97 -> 47.14 points, new 34.36 -> 45.04",
    ),
    Claim(
        "C3",
        a_review_recovers_most_and_costs_little,
        "level",
        on("recovery", "lpr"),
        bound=0.75,
        given=forgotten("lpr") | {Cell("lpr", "new cost"): 0.1, Cell("lpr", "replay share"): 0.009},
        paper="73% recovered, new 45.04 -> 45.07 points",
    ),
    Claim(
        "C4",
        the_routing_loss_recovers_more_at_no_higher_price,
        "more",
        on("recovery", "lpr"),
        on("recovery", "review ntp"),
        given=forgotten("lpr", "review ntp")
        | dict.fromkeys(on("new cost", "lpr", "review ntp"), 0.1),
        paper="old 51.32 -> 52.12 points, new 45.13 -> 45.07",
        run="seeds",
    ),
    Claim(
        "C4f",
        it_does_so_when_both_reviews_have_their_better_rate,
        "more",
        on("recovery", "lpr 3e-2"),
        on("recovery", "review ntp 3e-2"),
        given=forgotten("lpr 3e-2", "review ntp 3e-2")
        | dict.fromkeys(on("new cost", "lpr 3e-2", "review ntp 3e-2"), 0.1),
        run="seeds",
    ),
    Claim(
        "C5",
        old_tokens_go_to_the_frozen_expert,
        "order",
        on("G0 old", "stage 1", "review ntp", "lpr"),
        paper="so says its Figure 3",
    ),
    Claim(
        "C5n",
        new_tokens_stay_where_they_were,
        "equal",
        on("G0 new", "lpr"),
        on("G0 new", "stage 1"),
        controls=on("G0 new", "shuffled labels"),
        margin=0.1,
        given={Cell("shuffled labels", "G0 new"): 0.8},
    ),
]
REFUTATIONS = [
    Claim(
        "R1",
        shuffled_labels_cost_the_new_languages_twice_as_much,
        "more",
        on("new cost", "lpr"),
        on("new cost", "shuffled labels"),
        margin=0.1,
        smaller_is_better=True,
        given=forgotten("shuffled labels", "lpr")
        | dict.fromkeys(on("recovery", "shuffled labels", "lpr"), 0.9)
        | {Cell("shuffled labels", "G0 new"): 0.4, Cell("lpr", "G0 new"): 0.1},
        run="seeds",
    ),
    Claim(
        "R2",
        routing_moves_where_the_labels_say,
        "more",
        on("G0 new", "inverted labels"),
        on("G0 new", "lpr"),
        margin=0.1,
        given={Cell("inverted labels", "G0 old"): 0.5, Cell("lpr", "G0 old"): 0.8},
        run="seeds",
    ),
    Claim(
        "R3",
        it_must_be_the_frozen_expert,
        "more",
        on("recovery", "lpr"),
        on("recovery", "expert 1"),
        given=forgotten("lpr", "expert 1", "review ntp") | {Cell("review ntp", "recovery"): 0.5},
        run="seeds",
    ),
]
RIVAL = [
    Claim(
        "C6",
        it_forgets_less_than_training_all_weights,
        "more",
        on("old", "lpr"),
        # the mixture first: it is compared always, a fine-tuning only if it learned as much
        on("old", "moe all", *FINE_TUNED),
        smaller_is_better=True,
        given={Cell("lpr", "new"): 0.85} | dict.fromkeys(on("new", *FINE_TUNED), 0.8),
        paper="old: full FT 49.73, MoE 50.44, MoE-LPR 52.12 points",
    ),
    Claim(
        "C6l",
        it_forgets_less_than_LoRA_and_learns_more,
        "more",
        cells(["lpr"], ["old", "new"]),
        cells(["lora"], ["old", "new"]),
        smaller_is_better=True,
        paper="LoRA old 44.43, new 33.02; MoE-LPR 52.12 and 45.07 points",
        run="full",
    ),
    Claim(
        "C7",
        new_experts_must_start_as_copies,
        "more",
        on("new", "lpr"),
        on("new", "no copies"),
        margin=0.05,
        smaller_is_better=True,
        paper="new 45.07 -> 38.37 points without copies",
    ),
    Claim(
        "C10",
        it_learns_new_languages_as_well_as_training_all_weights,
        "no worse",
        on("new", "lpr"),
        on("new", *RIVALS),
        margin=0.02,
        smaller_is_better=True,
        paper="new: full FT 41.12, MoE 42.25, MoE-LPR 45.07 points",
    ),
]
PARTS = [  # --full
    Claim(
        "C8",
        more_review_text_protects_old_languages_better,
        "order",
        on("old", *SIZES),
        paper="old keeps improving",
        run="full",
    ),
    Claim(
        "C8d",
        its_first_blocks_do_most,
        "more",
        on("old", "stage 1"),
        on("old", "review 16"),
        given={Cell("review 31", "old"): 0.6, Cell("lpr", "old"): 0.55},
        paper="with diminishing returns",
        run="full",
    ),
    Claim(
        "C8n",
        it_costs_new_languages_little,
        "no worse",
        on("new", "lpr"),
        on("new", "stage 1"),
        margin=0.15,
        smaller_is_better=True,
        paper="new slightly worse",
        run="full",
    ),
    Claim(
        "C9",
        more_experts_learn_new_languages_better,
        "more",
        on("new", "8 experts"),
        on("new", "2 experts"),
        smaller_is_better=True,
        paper="new better from 2 to 8",
        run="full",
    ),
    Claim(
        "C9o",
        more_experts_keep_old_languages_as_well,
        "equal",
        on("recovery", *EXPERTS),
        on("recovery", "lpr"),
        margin=0.1,
        given=forgotten("lpr", *EXPERTS),
        paper="old stable",
        run="full",
    ),
    Claim(
        "C11",
        it_protects_old_languages_that_the_review_never_saw,
        "more",
        on("ood", "lpr"),
        on("ood", "review ntp", "one stage"),
        smaller_is_better=True,
        paper="old, not reviewed: w/o LPR 44.22, one stage 43.71, MoE-LPR 45.25 points",
        run="full",
    ),
    Claim(
        "C12",
        two_stages_are_better_than_one,
        "more",
        on("old", "lpr"),
        on("old", "one stage"),
        smaller_is_better=True,
        given=dict.fromkeys(on("new", "lpr", "one stage"), 0.7),
        paper="one stage old 51.90, new 45.38; MoE-LPR 52.12 and 45.07 points",
        run="full",
    ),
    Claim(
        "C13",
        the_papers_loss_is_better_than_its_codes,
        "more",
        on("recovery", "lpr"),
        on("recovery", "double softmax"),
        given=forgotten("lpr", "double softmax"),
        run="full",
    ),
]
CLAIMS = MAIN + REFUTATIONS + RIVAL + PARTS


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure

STYLE = {  # arm -> its words, color and marker
    "base": ("base", 7, "*"),
    "stage 1": ("stage 1", 1, "o"),
    "review ntp": ("review, next-token loss", 4, "s"),
    "lpr": ("review + LPR", 2, "D"),
    "shuffled labels": ("review, labels shuffled", 3, "d"),
    "inverted labels": ("review, labels inverted", 3, "h"),
    "ft 3e-4": ("fine-tuning, 3e-4", 0, "<"),
    "ft 1e-3": ("fine-tuning, 1e-3", 0, "v"),
    "ft 3e-3": ("fine-tuning, 3e-3", 0, ">"),
    "moe all": ("mixture, all weights", 3, "P"),
    "lora": ("LoRA", 6, "p"),
    "no copies": ("LPR, experts not copied", 6, "X"),
    "one stage": ("LPR, one stage", 5, "^"),
}
BARS = ("stage 1", "review ntp", "lpr", "shuffled labels")  # whose routers are drawn


def figure(results: dict, unit: str = "nats/letter"):
    """Left: who learns the new languages and who keeps the old. Right: what the review does to the
    router."""
    fig, (left, right) = new_figure(1, 2, width=13, height=5.4)
    view = View(results["metrics"])
    draw_trade(left, view, unit)
    draw_routers(right, results["series"])
    return fig


def draw_trade(ax, view: View, unit: str) -> None:
    for arm, (label, color, marker) in STYLE.items():
        if arm not in view:
            continue
        new, old = view(arm, "new"), view(arm, "old")
        ax.plot(new.values, old.values, marker, color=COLORS[color], alpha=0.35, markersize=6)
        style = {"color": COLORS[color], "markersize": 11, "markeredgecolor": "black"}
        ax.plot(new.mean, old.mean, marker, label=label, **style)
    path = [arm for arm in ("base", "stage 1", "lpr") if arm in view]
    points = [(view.mean(arm, "new"), view.mean(arm, "old")) for arm in path]
    arrow = {"arrowstyle": "->", "color": "#555555", "shrinkA": 7, "shrinkB": 7}
    for a, b in pairwise(points):
        ax.annotate("", b, a, arrowprops=arrow)
    ax.axhline(view.mean("base", "old"), color="#555555", linewidth=1, linestyle="--")
    ax.set(xlabel=f"loss on new languages ({unit})", ylabel=f"loss on old languages ({unit})")
    ax.set(title="Lower left is better (- -: base)")
    ax.legend(fontsize=9)


def draw_routers(ax, series: dict) -> None:
    """A group of bars, one per arm, for every layer of every group of languages."""
    arms = [arm for arm in BARS if series.get(arm)]
    ticks: dict[float, str] = {}
    x = 0.0
    for group, title in (("old", "old"), ("ood", "old, not reviewed"), ("new", "new")):
        name = f"G0 {group}"
        if not arms or name not in series[arms[0]]:
            continue
        for layer, number in enumerate(series[arms[0]][name]["x"]):
            x += 1.0 if layer else 1.7
            ticks[x] = f"{number + 1}" if layer else f"{number + 1}\n{title}"
            for k, arm in enumerate(arms):
                label, color, _ = STYLE[arm]
                values = [row[layer] for row in series[arm][name]["values"]]
                shown = label if len(ticks) == 1 else None
                bar_seeds(ax, x + 0.21 * (k - 1.5), values, COLORS[color], 0.19, shown)
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=11)
    ax.set(xlabel="layer", ylabel="mean score $G_0$ of the frozen expert", ylim=(0, 1.25))
    ax.set(title="Where routers send tokens")
    if arms:
        ax.legend(ncols=2, loc="upper center", fontsize=9)
