"""Verdicts: what is said follows from the interval, and from nothing else."""

from dataclasses import replace

import pytest

from bamoe.reports.record import DifferenceRecord, Interval, ParameterMatch
from bamoe.reports.verdicts import parameter_verdict, verdict, verdicts
from tests.reports import records

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def record():
    return records.experiment(seeds=(0,))


def difference(relative, seeds=None, text=(-0.030, -0.040, -0.020)):
    over_seeds = None if seeds is None else Interval(*seeds, 3)
    return DifferenceRecord("bam-kv-experts", "btx-top-1", relative, over_seeds, Interval(*text, 400))


def test_an_interval_below_zero_is_lower(record):
    assert verdict(record, difference(-0.0324, (-0.032, -0.041, -0.023))) == (
        f"3.2% lower average perplexity than BTX top-1 (log perplexity {MINUS}0.032, 95% interval over 3 seeds "
        f"{MINUS}0.041 to {MINUS}0.023)"
    )


def test_an_interval_above_zero_is_higher(record):
    found = difference(0.015, (0.014, 0.004, 0.024), text=(0.014, 0.010, 0.018))
    assert verdict(record, found).startswith("1.5% higher average perplexity than BTX top-1 (log perplexity +0.014, ")


@pytest.mark.parametrize(
    "bounds", [(-0.041, 0.001), (-0.041, 0.0), (-0.001, 0.1), (-0.01, -0.0002), (0.0004, 0.02)]
)  # the last two read as zero
def test_an_interval_with_zero_says_neither(record, bounds):
    text = verdict(record, difference(-0.02, (-0.02, *bounds)))
    assert text.startswith(f"not distinguishable from BTX top-1 (average perplexity {MINUS}2.0%, log perplexity")
    assert not {"lower", "higher", "better"} & set(text.split())


def test_seeds_decide_over_text_and_a_disagreement_is_told(record):
    agreed = verdict(record, difference(-0.03, (-0.03, -0.05, -0.01)))
    assert "held-out text" not in agreed
    told = verdict(record, difference(-0.03, (-0.03, -0.05, -0.01), text=(-0.03, -0.07, 0.01)))
    assert told.startswith("3.0% lower")
    assert f"over the held-out text {MINUS}0.070 to +0.010" in told
    assert verdict(record, difference(-0.03, (-0.03, -0.05, 0.01))).startswith("not distinguishable")


def test_with_one_seed_the_interval_is_said_to_be_over_text_only(record):
    assert verdict(record, difference(-0.0296)) == (
        f"3.0% lower average perplexity than BTX top-1 (log perplexity {MINUS}0.030, 95% interval {MINUS}0.040 to "
        f"{MINUS}0.020, over the held-out text only: one random seed)"
    )


def test_without_an_interval_there_is_no_direction(record):
    lone = replace(difference(-0.03), over_text=None)
    assert verdict(record, lone) == (
        f"not distinguishable from BTX top-1 (average perplexity {MINUS}3.0%, "
        "one random seed and one block of text: no interval)"
    )
    assert verdict(record, replace(difference(-0.03, (-0.03, -0.05, -0.01)), over_text=None)).startswith("3.0% lower")


@pytest.mark.parametrize("relative", [0.004, 0.0])
def test_means_of_perplexity_and_of_its_logarithm_that_disagree_are_both_told(record, relative):
    text = verdict(record, difference(relative))
    assert text.startswith("lower mean log perplexity than BTX top-1 (")
    assert text.endswith(f"but not lower average perplexity ({'+0.4%' if relative else '0.0%'})")


def test_every_difference_has_its_verdict(record):
    found = verdicts(record)
    assert [name for name, _ in found] == [record.row(each.row).name for each in record.differences]
    assert all("one random seed" in text for _, text in found)


@pytest.mark.parametrize(("total", "active"), [(0.00501, 0.0), (0.0, -0.08), (0.012, 0.08)])
def test_unmatched_parameters_are_never_called_matched(total, active):
    text = parameter_verdict(ParameterMatch("a", "b", total, active))
    assert "not matched" in text
    assert "matched" not in text.replace("not matched", "")


def test_names_are_those_of_the_report(record):
    rows = [replace(row, name="BTX top-1") if row.key == "btx-top-2" else row for row in record.rows]
    named = replace(record, rows=rows)
    assert "than BTX top-1 (btx-top-1) (" in verdict(named, difference(-0.03))
