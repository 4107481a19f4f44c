"""The claims and the figure of experiments/prealign.py."""

from minilm.claims import check, claim
from minilm.results import COLORS, new_figure, plot_seeds

# --- claims

CHANCE = 1 / 8  # eight places


def claims(metrics: dict) -> list[dict]:
    """The paper's claims and our control, decided on means over seeds. Rules were fixed before the runs, but see Honest."""
    seeds = len(metrics[next(iter(metrics))]["ppl en"]["values"])
    noise = (CHANCE * (1 - CHANCE) / (24 * seeds)) ** 0.5  # a person's three queries are not independent: 24 persons per seed
    pair, ingredients = ("joint", "prealign"), ("joint", "cs-only", "align-only", "prealign")
    widths, transfer = ("", " d32", " d128"), ("ppl clone", "zs-clt clone", "clka clone")
    return [
        check(metrics, "C1", "The clone is modelled better, English as well", "ppl clone <= 0.75 x joint; ppl en differs by < 5%",
              {"ppl clone": pair, "ppl en": pair}, lambda m: m("prealign", "ppl clone") <= 0.75 * m("joint", "ppl clone")
              and abs(m("prealign", "ppl en") / m("joint", "ppl en") - 1) < 0.05, "lower perplexity in the second language"),
        check(metrics, "C2", "What is fine-tuned in English works in the clone", "zs-clt clone >= joint + 0.30; zs-clt en within 0.03",
              {"zs-clt clone": pair, "zs-clt en": pair}, lambda m: m("prealign", "zs-clt clone") >= m("joint", "zs-clt clone") + 0.30
              and abs(m("prealign", "zs-clt en") - m("joint", "zs-clt en")) <= 0.03, "better zero-shot cross-lingual transfer"),
        check(metrics, "C3", "Facts read in English only can be asked for in the clone", f"clka clone: joint within 2 standard errors (2 x "
              f"{noise:.3f}) of chance {CHANCE}, prealign >= chance + 0.30; clka en >= 0.95", {"clka clone": pair, "clka en": pair},
              lambda m: abs(m("joint", "clka clone") - CHANCE) <= 2 * noise and m("prealign", "clka clone") >= CHANCE + 0.30
              and min(m(arm, "clka en") for arm in pair) >= 0.95, "better knowledge application"),
        check(metrics, "C4", "Both stages matter for knowledge", "clka clone: joint < cs-only, align-only < prealign, up to 0.03 of noise",
              {"clka clone": ingredients}, lambda m: all(-0.03 < m(b, "clka clone") - m(a, "clka clone") for a, b in (
                  ("joint", "cs-only"), ("joint", "align-only"), ("cs-only", "prealign"), ("align-only", "prealign")))),
        check(metrics, "C5", "The alignment survives pretraining", "retrieval@1: prealign >= 0.5 and >= align-only - 0.05; joint <= 0.1",
              {"retrieval": ("joint", "align-only", "prealign")}, lambda m: m("joint", "retrieval") <= 0.1 and
              m("prealign", "retrieval") >= max(0.5, m("align-only", "retrieval") - 0.05)),
        check(metrics, "C6", "Alignment at the start beats the same steps at the end", "clka clone: late < prealign",
              {"clka clone": ("late", "prealign")}, lambda m: m("late", "clka clone") < m("prealign", "clka clone"), "early is best"),
        *(check(metrics, id, f"Words {which} are aligned too", "their retrieval@1 >= joint's of all words (it has no dictionary) + 0.05",
                {"retrieval unseen": [arm], "retrieval": ["joint"]}, lambda m, arm=arm: m(arm, "retrieval unseen") - 0.05 >=
                m("joint", "retrieval"), digits=3) for id, arm, which in (("C7a", "half-words", "outside the dictionary"),
                                                         ("C7b", "half-tokens", "made of syllables outside the dictionary"))),
        check(metrics, "C8", "Input-only switching puts no foreign words into English", "leak: vanilla-cs >= 3 x prealign",
              {"leak": ("vanilla-cs", "prealign")}, lambda m: m("vanilla-cs", "leak") >= 3 * m("prealign", "leak"), digits=4),
        check(metrics, "C9", "C1 to C3 hold at three widths", "at each: ppl clone <= 0.75 x joint; zs-clt, clka clone >= joint + 0.30",
              {name: [arm + w for w in widths for arm in pair] for name in transfer},
              lambda m: all(m("prealign" + w, "ppl clone") <= 0.75 * m("joint" + w, "ppl clone") and
                            all(m("prealign" + w, name) >= m("joint" + w, name) + 0.30 for name in transfer[1:]) for w in widths),
              "at several model sizes"),
        claim("C10", "The gain holds for real languages", "perplexity, transfer, knowledge in real languages",
              "needs large real corpora, dictionaries and a GPU (methods/real/prealign.py)", None, "English with zh, de, ar, ru"),
        check(metrics, "C11", "Perfect alignment is the upper bound", "full at least as good as prealign on every clone metric, up to "
              "0.03 of noise (a violation means a bug)", {name: ("full", "prealign") for name in transfer},
              lambda m: m("full", "ppl clone") <= m("prealign", "ppl clone") + 0.03
              and all(m("full", name) >= m("prealign", name) - 0.03 for name in transfer[1:])),
        check(metrics, "R1", "Refutation: a shuffled dictionary kills C3", "clka clone of shuffled <= chance + 0.10",
              {"clka clone": ("shuffled",)}, lambda m: m("shuffled", "clka clone") <= CHANCE + 0.10),
    ]


# --- figure

def figure(results: dict):
    """Left, middle: clone perplexity and knowledge during pretraining. Right: which layers know which words translate each other."""
    fig, (left, middle, right) = new_figure(1, 3, width=14, height=4.8)
    arms = [arm for arm in ("joint", "cs-only", "align-only", "prealign", "full", "shuffled") if arm in results["series"]]
    for color, arm in zip(COLORS, arms):
        series, style = results["series"][arm], {"linestyle": "--" if arm in ("full", "shuffled") else "-"}
        for ax, name in ((left, "ppl clone"), (middle, "clka clone"), (right, "retrieval after")):
            if arm != "full" or ax is not right:
                plot_seeds(ax, series[name]["x"], series[name]["values"], arm, color, **style)
        if arm in ("joint", "prealign"):
            plot_seeds(right, series["retrieval before"]["x"], series["retrieval before"]["values"], None, color, linestyle=":")
    left.set(yscale="log", xlabel="pretraining step", ylabel="perplexity", title="Text of the clone")
    middle.axhline(CHANCE, color="#999999", linewidth=1)
    middle.set(xlabel="pretraining step", ylabel="accuracy (grey: chance)", ylim=(-0.03, 1.03), title="English facts, asked in the clone")
    last = len(results["series"][arms[0]]["retrieval after"]["x"]) - 1
    right.set_xticks(range(last + 1), ["embed", *(f"block {i}" for i in range(1, last)), "head"])
    right.set(ylabel="retrieval@1 (dotted: at step 0)", ylim=(-0.03, 1.03), title="Nearest clone word is the translation")
    fig.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return fig


