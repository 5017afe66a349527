"""Tables: what is best, what competes, how values are written."""

import io

import pytest
from rich.console import Console

from bamoe.reports.table import Column, Table, amount, byte_size, change, duration, signed

COLUMNS = [Column("name", "model", "text"), Column("size", "size", "amount"), Column("loss", "loss", best="min")]
RECORDS = [
    {"name": "a|b", "size": 1500, "loss": 2.004},
    {"name": "c", "size": 2_000_000, "loss": 1.996},
    {"name": "worse", "size": None, "loss": 3.0},
    {"name": "aside", "loss": 1.0, "aside": True},
]


def test_markdown_marks_the_best_of_those_that_compete():
    # 2.004 and 1.996 read the same, so both are the best; the row set aside is smaller and is not.
    assert Table(COLUMNS, RECORDS).markdown().splitlines() == [
        "| model | size | loss |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1.50k | **2.00** |",
        "| c | 2.00M | **2.00** |",
        "| worse |  | 3.00 |",
        "| aside |  | 1.00 |",
    ]


def test_the_best_may_be_the_largest():
    markdown = Table([Column("score", "score", best="max")], [{"score": 1.0}, {"score": 7.0}]).markdown()
    assert "| **7.00** |" in markdown
    assert "| 1.00 |" in markdown


def test_one_row_alone_is_no_best():
    assert "**" not in Table(COLUMNS, RECORDS[2:]).markdown()


def test_a_terminal_of_80_characters_shows_every_number():
    names = [f"n{i}" for i in range(9)]
    columns = [Column("name", "model", "text"), *(Column(name, name * 3) for name in names)]
    record = {"name": "each text by its own expert"} | dict.fromkeys(names, 12.34)
    file = io.StringIO()
    Console(file=file, width=80).print(Table(columns, [record]).rich())
    assert file.getvalue().count("12.34") == 9
    assert max(map(len, file.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (229_952, "230k"), (999_499, "999k"),
     (999_500, "1.00M"), (99_950, "100k"), (9_995, "10.0k"), (2.5e13, "25.0T"), (3e16, "30.0P")],
)  # fmt: skip
def test_amounts_have_three_significant_digits(value, text):
    assert amount(value) == text


def test_text_is_no_markup():
    record = {"name": "<b> $x$ [a](b) *c* _d_ flops_per_token", "command": "a | `b`"}
    columns = [Column("name", "name", "text"), Column("command", "command", "code")]
    assert Table(columns, [record]).markdown().splitlines()[-1] == (
        "| &lt;b&gt; \\$x\\$ \\[a\\](b) \\*c\\* \\_d\\_ flops_per_token | `` a \\| `b` `` |"
    )


def test_differences_have_a_sign_and_zero_has_none():
    assert [signed(value, 2) for value in (0.014, -0.016, -0.004, 0.0)] == [
        "+0.01",
        "\N{MINUS SIGN}0.02",
        "0.00",
        "0.00",
    ]
    assert (change(0.1234), change(-0.0004)) == ("+12.3%", "0.0%")


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [(byte_size, 0, "0 B"), (byte_size, 1023, "1023 B"), (byte_size, 4608, "4.5 KiB"),
     (byte_size, 1020 * 1024, "1020 KiB"), (byte_size, 3 * 2**20, "3 MiB"),
     (duration, 0.25, "0.25 s"), (duration, 61.4, "1 min 1 s"), (duration, 3599.7, "1 h 0 min"),
     (duration, 100_000, "27 h 47 min")],
)  # fmt: skip
def test_bytes_and_times_have_units_that_keep_them_short(write, value, text):
    assert write(value) == text
