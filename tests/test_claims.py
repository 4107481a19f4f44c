"""What a claim is: intervals over seeds, rules with teeth, verdicts of four kinds.

The shared test at the end takes every claim of every experiment: on a table of numbers built from
what the claim declares it must hold; with a few of these numbers moved, it must not."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from minilm.claims import (
    HOLDS,
    KINDS,
    NOT_REPRODUCED,
    NOT_TESTED,
    SMOKE,
    UNDECIDED,
    Cell,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    as_metrics,
    at_least,
    at_most,
    average,
    below,
    cells,
    decide,
    fact,
    false_tables,
    judge,
    key,
    mean_sd,
    paired_bootstrap,
    paired_diff,
    pm,
    print_claims,
    seeds_to_decide,
    true_table,
    wilson,
    within,
)

ROOT = Path(__file__).resolve().parents[1]


# --- statistics


def test_mean_and_deviation_by_hand():
    assert mean_sd([2, 4]) == (3.0, pytest.approx(math.sqrt(2)))
    mean, sd = mean_sd([5])
    assert mean == 5.0 and math.isnan(sd)  # one value says nothing of its spread


def test_the_wilson_interval_by_hand():
    # 0 of n: from 0 to z^2 / (n + z^2); n of n is its mirror image; nothing seen says nothing
    assert wilson(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)))
    assert wilson(10, 10) == pytest.approx((1 - 0.27753, 1), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    for p in wilson(30, 100):  # its ends are where 0.3 is exactly z standard errors away
        assert abs(0.3 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))


def test_the_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, sd 1, two degrees of freedom: 4.303 / sqrt(3) = 2.484
    assert paired_diff([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert paired_diff([1, 2], [1, 2]) == (0.0, 0.0, 0.0)
    assert paired_diff([5], [3]) == (2.0, -math.inf, math.inf)  # one pair has no interval


def test_the_t_interval_of_seeds_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    draws = [rng.normal(1, 1, n) for n in (4, 31) for _ in range(1500)]
    covered = [PerSeed(tuple(x)).low < 1 < PerSeed(tuple(x)).high for x in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_paired_bootstrap_agrees_with_the_normal_interval_and_repeats():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    mean, low, high = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / 20
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.08 * half)
    assert (mean, low, high) == paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap([1, 1, 0], [1, 1, 0], samples=100) == (0.0, 0.0, 0.0)


def test_as_many_resamplings_are_drawn_as_were_asked_for(monkeypatch):
    drawn = []
    quantile = np.quantile

    def counted(means, q):
        drawn.append(len(means))
        return quantile(means, q)

    monkeypatch.setattr(np, "quantile", counted)
    for samples in (3, 500, 700, 10_000):
        paired_bootstrap([1.0, 2, 3], [0.0, 1, 1], samples=samples)
    assert drawn == [3, 3, 500, 500, 700, 700, 10_000, 10_000]  # one quantile at each end


# --- the view

METRICS = as_metrics({Cell("method", "acc a"): [0.89, 0.91], Cell("base", "acc a"): [0.5, 0.5]})


def test_a_view_composes_names_in_one_place_and_keeps_the_values_of_the_seeds():
    assert key(("acc", "a")) == "acc a" and key(("aligned", "", 3)) == "aligned 3"
    view = View(METRICS)
    assert view("method", ("acc", "a")).values == (0.89, 0.91)
    assert view.mean("base", "acc a") == 0.5 and "method" in view and "other" not in view
    assert view.seeds == 2


def test_a_difference_is_paired_and_a_mean_over_languages_is_one_number_per_seed():
    a, b = PerSeed((0.9, 0.7), "a"), PerSeed((0.5, 0.3), "b")
    lead = a - b
    assert lead.values == pytest.approx((0.4, 0.4)) and lead.low == pytest.approx(0.4)
    assert str(lead) == "a - b +0.400 [+0.400, +0.400]"
    assert (a / b).values == pytest.approx((1.8, 0.7 / 0.3))
    assert (a - 1).values == pytest.approx((-0.1, -0.3)) and (a - 1).name == "a - 1"
    both = average([a, b], "both")
    assert both.values == pytest.approx((0.7, 0.5)) and both.name == "both"
    with pytest.raises(ValueError):
        a - PerSeed((1.0,), "one seed only")


def test_an_arm_that_did_not_run_is_not_tested_and_a_misspelt_metric_is_an_error():
    def rule(view):
        return above(view(arm, metric))

    claim = Claim("C1", rule, "more")
    arm, metric = "other", "acc a"
    assert decide(claim, View(METRICS)) == (NOT_TESTED, "not in this run: other")
    arm, metric = "method", "accuracy"
    with pytest.raises(KeyError, match="'accuracy'; its metrics are acc a"):
        decide(claim, View(METRICS))


# --- rules


def test_verdicts_by_hand():
    # mean .5, sd .1, n 4: half the interval is 3.182 * .1 / 2 = .159
    x = PerSeed((0.4, 0.45, 0.55, 0.6), "x")
    assert (x.low, x.high) == pytest.approx((0.3548, 0.6452), abs=1e-3)
    assert [above(x, t).verdict for t in (0.3, 0.5, 0.7)] == [HOLDS, UNDECIDED, NOT_REPRODUCED]
    assert [below(x, t).verdict for t in (0.3, 0.5, 0.7)] == [NOT_REPRODUCED, UNDECIDED, HOLDS]
    assert [within(x, m).verdict for m in (0.3, 0.5, 0.7)] == [NOT_REPRODUCED, UNDECIDED, HOLDS]


def test_at_a_threshold_that_is_met_exactly_a_lead_fails_and_a_level_holds():
    one = PerSeed((1.0, 1.0), "one")
    assert above(one, 1).verdict == below(one, 1).verdict == NOT_REPRODUCED
    assert at_least(one, 1).verdict == at_most(one, 1).verdict == HOLDS


def test_one_seed_decides_nothing():
    one = PerSeed((1.0,), "one")
    for rule in (above, below, at_least, at_most, within):
        assert rule(one, 0.5).verdict == UNDECIDED
    assert "one seed decides nothing" in above(one, 0.5).measured

    def counted(view):
        return fact(True, "equal")

    single = as_metrics({Cell("a", "m"): [1.0]})
    assert decide(Claim("C1", counted, "level"), View(single)).verdict == UNDECIDED


def test_the_number_of_seeds_that_would_decide():
    values = [0.0, 0.2, 0.4, 0.6]  # mean .3, sd .258
    assert seeds_to_decide(values, 0.1) == "about 9 seeds would decide"  # 2.306 * .258 / 3 = .198
    assert PerSeed(tuple(values)).low < 0.1
    assert seeds_to_decide(values, 0.3) == "more than 100 seeds would be needed"
    assert "about 9 seeds would decide" in above(PerSeed(tuple(values), "x"), 0.1).measured


def test_of_parts_not_tested_beats_a_no_a_no_beats_undecided_and_that_beats_holds():
    parts = {word: Verdict(word, word) for word in (HOLDS, UNDECIDED, NOT_REPRODUCED, NOT_TESTED)}
    assert all_of(parts.values()).verdict == NOT_TESTED
    assert all_of([parts[NOT_REPRODUCED], parts[UNDECIDED], parts[HOLDS]]).verdict == NOT_REPRODUCED
    assert all_of([parts[HOLDS], parts[UNDECIDED]]) == (UNDECIDED, "holds; undecided")


def method_beats_base(view):
    "The method's accuracy is above the baseline's."
    return above(view("method", "acc a") - view("base", "acc a"))


def weak_base(view):
    return "" if view.mean("base", "acc a") < 0.6 else "the base can do it already"


BEATS = Claim(
    "C1",
    method_beats_base,
    "more",
    method=cells(["method"], ["acc a"]),
    baseline=cells(["base"], ["acc a"]),
    gate=weak_base,
    paper="+ 40 points",
)


def test_a_row_is_made_of_the_rules_name_its_docstring_and_its_numbers():
    assert judge([BEATS], METRICS) == [
        {
            "id": "C1",
            "statement": "Method beats base",
            "paper": "+ 40 points",
            "rule": "The method's accuracy is above the baseline's.",
            "measured": "method acc a - base acc a +0.400 [+0.273, +0.527]",
            "verdict": HOLDS,
            "run": "default",
        }
    ]


def test_a_gate_that_fails_leaves_the_numbers_and_takes_the_verdict():
    table = {Cell("method", "acc a"): [0.9, 0.9], Cell("base", "acc a"): [0.7, 0.7]}
    verdict, measured = decide(BEATS, View(as_metrics(table)))
    assert verdict == NOT_TESTED
    assert measured.startswith("the base can do it already (method acc a - base acc a +0.200")


def test_claims_are_printed_whole_with_the_papers_number_and_a_smoke_run_without_a_verdict(capsys):
    row = judge([BEATS], METRICS)[0]
    failed = row | {"id": "C2", "verdict": NOT_REPRODUCED, "measured": "far " * 40, "run": "full"}
    print_claims([row, failed, row | {"id": "C3", "verdict": SMOKE}])
    printed = capsys.readouterr().out
    assert "C1   holds" in printed and "C2   NOT REPRODUCED" in printed and "C3   smoke" in printed
    assert printed.count("far") == 40 and max(map(len, printed.splitlines())) <= 120
    assert "paper + 40 points" in printed and printed.count("--full decides") == 1
    assert pm({"mean": 0.75, "sd": 0.03}) == "0.75 +/- 0.03"
    assert pm({"mean": 0.75, "sd": None}) == pm({"mean": 0.75, "sd": math.nan}) == "0.75"
    assert pm({"mean": None, "sd": None}) == pm({"mean": math.nan, "sd": math.nan}) == "-"


# --- the shared test: every claim of every experiment has teeth

EXPERIMENTS = [
    *sorted((ROOT / "methods" / "experiments").glob("*.py")),
    ROOT / "signals" / "mdm_experiment.py",
    ROOT / "vision_eval" / "hallu_pi_experiment.py",
]
EXPERIMENTS = [f for f in EXPERIMENTS if f.stem != "__init__" and not f.stem.endswith("_claims")]


def module_of(file: Path):
    return importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


TABLES = [
    pytest.param(file, claim, id=f"{file.stem}-{claim.id}")
    for file in EXPERIMENTS
    for claim in module_of(file).CLAIMS
]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=[file.stem for file in EXPERIMENTS])
def test_every_experiment_has_a_table_of_claims(file):
    claims = module_of(file).CLAIMS
    assert claims and len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.kind in KINDS and claim.run in ("default", "full", "seeds")
        assert claim.rule_in_words, f"{claim.id}: the rule's docstring says it in words"
        assert claim.kind in ("open", "level", "order") or claim.baseline
        assert claim.method or claim.kind == "open"


def refute(claim: Claim, table: dict) -> list[str]:
    """The false tables on which the claim holds all the same."""
    survived = []
    for name, false in false_tables(claim, table).items():
        verdict, measured = claim.rule(View(as_metrics(false)))
        if verdict in (HOLDS, NOT_TESTED):
            survived.append(f"{name}: {verdict}, {measured}")
    return survived


@pytest.mark.parametrize("file, claim", TABLES)
def test_a_claim_holds_on_a_true_table_and_fails_on_every_false_one(file, claim):
    """The gates are left out: it is the rule that must tell true from false. A rule may read only
    what the claim declares (method, baseline, controls, given)."""
    if claim.kind == "open":
        assert claim.rule(View({})).verdict == NOT_TESTED
        return
    table = true_table(claim)
    verdict, measured = claim.rule(View(as_metrics(table)))
    assert verdict == HOLDS, f"on the true table: {verdict}, {measured}"
    assert false_tables(claim, table)
    assert not refute(claim, table)


@pytest.mark.parametrize("file, claim", TABLES)
def test_a_claim_that_holds_in_a_committed_run_fails_when_its_numbers_are_made_false(file, claim):
    ending = {"default": "", "full": "_full", "seeds": "_seeds"}[claim.run]
    saved = ROOT / "results" / f"{file.stem.removesuffix('_experiment')}{ending}.json"
    if not saved.exists():
        pytest.skip(f"{saved.name}: not run yet")
    run = json.loads(saved.read_text(encoding="utf-8"))
    if "stale" in run or decide(claim, View(run["metrics"])).verdict != HOLDS:
        pytest.skip("stale, or does not hold there")
    table = {
        Cell(arm, metric): cell["values"]
        for arm, metrics in run["metrics"].items()
        for metric, cell in metrics.items()
    }
    assert not refute(claim, table)


# --- the shared test, tested: rules without teeth are caught


def rule_of(test, words="a rule"):
    test.__doc__ = words
    return test


def a_lead(view):
    return above(view("m", "x") - view("b", "x"), 0)


def a_lead_of_means(view):  # the interval is not looked at
    return fact(view.mean("m", "x") > view.mean("b", "x"), "means")


def a_lead_over_the_control_too(view):
    return all_of([a_lead(view), above(view("m", "x") - view("c", "x"))])


def rising(view):
    return all_of(above(view(b, "x") - view(a, "x")) for a, b in (("b", "c"), ("c", "m")))


def rising_ends(view):
    return above(view("m", "x") - view("b", "x"))


def nearly_equal(view):
    return within(view("m", "x") - view("b", "x"), 0.05)


def not_above(view):
    return at_most(view("m", "x") - view("b", "x"), 0.05)


def not_below(view):
    return at_least(view("m", "x") - view("b", "x"), -0.05)


def high(view):
    return at_least(view("m", "x"), 0.9)


def high_enough(view):
    return at_least(view("m", "x"), 0.8)


M, B, C = Cell("m", "x"), Cell("b", "x"), Cell("c", "x")


@pytest.mark.parametrize(
    "claim, survivors",
    [
        (Claim("", a_lead, "more", [M], [B]), []),
        (Claim("", a_lead_of_means, "more", [M], [B]), ["a lead of a tenth"]),
        (Claim("", a_lead, "more", [M], [B], [C]), ["the control c"]),
        (Claim("", a_lead_over_the_control_too, "more", [M], [B], [C]), []),
        (Claim("", rising, "order", [B, C, M]), []),
        (Claim("", nearly_equal, "equal", [M], [B], margin=0.05), []),
        (Claim("", not_above, "equal", [M], [B], margin=0.05), ["twice the margin below"]),
        (Claim("", not_below, "no worse", [M], [B], margin=0.05), []),
        (Claim("", not_above, "no worse", [M], [B], margin=0.05, smaller_is_better=True), []),
        (Claim("", not_above, "no worse", [M], [B], margin=0.05), ["twice the margin below"]),
        (Claim("", high, "level", [M], bound=0.9), []),
        (Claim("", high_enough, "level", [M], bound=0.9), ["past the bound"]),
    ],
)
def test_the_false_tables_find_a_rule_without_teeth(claim, survivors):
    table = true_table(claim)
    assert claim.rule(View(as_metrics(table))).verdict == HOLDS
    found = refute(claim, table)
    assert len(found) == len(survivors)
    for name, expected in zip(found, survivors):
        assert name.startswith(expected)


def test_false_tables_by_hand():
    claim = Claim("", a_lead, "more", [M], [B], [C])
    table = {M: [0.8, 0.9], B: [0.5, 0.5], C: [0.4, 0.4]}
    false = false_tables(claim, table)
    assert false["all equal, at the baseline's values"] == table | {M: [0.5, 0.5]}
    assert false["all equal, at the method's values"] == table | {B: [0.8, 0.9]}
    assert false["exchanged"] == table | {M: [0.5, 0.5], B: [0.8, 0.9]}
    assert false["the control c as good as the method"] == table | {C: [0.8, 0.9]}
    small = PerSeed(tuple(false["a lead of a tenth of the seeds' deviation"][M]))
    small -= PerSeed((0.5, 0.5))
    assert small.mean == pytest.approx(0.1 * mean_sd(small.values)[1])
