"""The report: one page and its Markdown say the same, safely, whole, and the same every time."""

import base64
import hashlib
import io
import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from bamoe.reports.content import report, results_table, terminal_tables
from bamoe.reports.page import write_report
from bamoe.reports.record import ParameterMatch, TableRecord
from tests.reports import records
from tests.reports.reading import Page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a large experiment."""
    return write_report(records.experiment(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(written):
    return Page(written.html.read_text(encoding="utf-8"))


def few_rows(*keys, **changes):
    """The experiment with some of its rows only."""
    record = records.experiment(seeds=(0,))
    return replace(
        record,
        rows=[record.row(key) for key in keys],
        tables=[TableRecord("All", keys, keys[0])],
        differences=[found for found in record.differences if found.row in keys and found.against in keys],
        parameter_matches=[],
        **changes,
    )


def rendered(markdown):
    """Markdown as GitHub shows it."""
    html = MarkdownIt("commonmark", {"html": True, "xhtmlOut": False}).enable("table").render(markdown)
    return Page(html)


def no_spaces(text):
    return re.sub(r"\s+", "", text)


def assert_same_text(record):
    document = report(record)
    page, markdown = Page(document.html()), rendered(document.markdown())
    assert no_spaces(page.text) == no_spaces(markdown.text)
    assert sorted(no_spaces(text) for text in page.bold) == sorted(no_spaces(text) for text in markdown.bold)
    return page


def test_page_and_markdown_have_the_same_text_and_the_same_in_bold(written, page):
    markdown = rendered(written.markdown.read_text(encoding="utf-8"))
    assert no_spaces(page.text) == no_spaces(markdown.text)
    assert page.bold
    assert page.bold == markdown.bold


def test_everything_recorded_is_there(page):
    record = records.experiment()
    for row in record.rows:
        for run in row.runs:
            assert run.command in page.text
            assert f"{run.average_log_perplexity:.3f}" in page.words
    for words in (record.command, record.notes[0], "The contract The contract", "0101" * 16, "2.13.0", "16 KiB",
                  record.code["commit"], "name: laptop seeds: [0, 1, 2]", "each text by its own expert", "5 min 14 s",
                  "All text comes with the Python installation."):  # fmt: skip
        assert words in page.text


def test_the_page_is_well_formed_and_accessible(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for attributes in page.attributes("a")]
    assert targets == [f"#{name}" for name in ids]
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(next_level <= level + 1 for level, next_level in zip(page.headings, page.headings[1:], strict=False))
    assert all(attributes["scope"] in ("row", "col") for attributes in page.attributes("th"))
    images = page.attributes("img")
    assert len(images) == 3 + 8
    assert all(len(attributes["alt"]) > 50 for attributes in images)
    assert page.attributes("html") == [{"lang": "en"}]


def test_the_page_loads_nothing(written):
    text = written.html.read_text(encoding="utf-8")
    page = Page(text)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not re.search(r"url\(|@import|https?:", text)
    for source in sources:
        drawing = base64.b64decode(source.partition(",")[2]).decode()
        ElementTree.fromstring(drawing)
        assert not re.search(r'href="(?!#)|url\((?!#)|@import|<script', drawing)


def test_the_markdown_shows_its_figures_as_files(written):
    shown = re.findall(r"\]\((figures/[^)]+)\)", written.markdown.read_text(encoding="utf-8"))
    assert [written.markdown.parent / name for name in shown] == list(written.figures)
    assert all(path.is_file() for path in written.figures)


def test_the_best_of_the_rows_that_compete_is_bold():
    record = records.experiment()
    table = results_table(record, record.tables[0])
    best = {cell.text for row in table.records for cell in table.cells(row) if cell.best}
    (dense_all,) = [row for row in table.records if row["name"] == "dense, all tokens"]
    assert best == {cell.text for cell in table.cells(dense_all)[1:7]}
    own = table.records[-1]
    assert own["domain math"] < dense_all["domain math"]  # context does not compete
    assert not any(cell.best for cell in table.cells(own))


def test_means_are_over_the_seeds_and_their_number_is_shown_where_rows_differ():
    record = records.experiment()
    table = results_table(record, record.tables[0])
    assert "seeds" not in [column.title for column in table.columns]
    runs = record.row("btx-top-1").runs
    shown = next(row for row in table.records if row["name"] == "BTX top-1")
    assert shown["domain code"] == pytest.approx(sum(run.perplexity["code"] for run in runs) / 3)
    rows = [replace(row, runs=row.runs[:1]) if row.key == "btx-top-1" else row for row in record.rows]
    table = results_table(replace(record, rows=rows), record.tables[0])
    cells = {row["name"]: table.cells(row)[-1].text for row in table.records}
    assert (cells["BTX top-1"], cells["BTX top-2"]) == ("1", "3")


def test_a_row_with_fewer_seeds_than_others_does_not_compete_with_them():
    record = records.experiment()
    best = "dense, all tokens"
    explained = "own random seeds, changes over the seeds that both rows have"
    assert explained not in report(record).markdown()
    rows = [replace(row, runs=row.runs[:1]) if row.name == best else row for row in record.rows]
    record = replace(record, rows=rows)
    table = results_table(record, record.tables[0])
    bold = {row["name"]: any(cell.best for cell in table.cells(row)) for row in table.records}
    assert best in bold
    assert {name for name, is_best in bold.items() if is_best} == {"BAM, KV experts"}
    text = report(record).markdown()
    assert text.count(explained) == 1  # the other table has no such row
    bits = text.partition("### Bits per byte")[2].partition("\n## ")[0]
    (line,) = [line for line in bits.splitlines() if line.startswith(f"| {best}")]
    assert "**" not in line


def test_one_block_of_text_has_no_interval():
    record = few_rows("btx-top-1", "bam-kv-experts")
    alone = replace(record, differences=[replace(found, over_text=None) for found in record.differences])
    text = assert_same_text(alone).text
    assert "one block of text: no interval" in text
    assert "bootstrap" not in text


def test_only_matched_parameters_are_called_matched():
    keys = ("btx-top-1", "bam-kv-experts")
    matches = [ParameterMatch(*keys, 0.0049, -0.005), ParameterMatch(*keys[::-1], 0.012, 0.0051)]
    text = Page(report(replace(few_rows(*keys), parameter_matches=matches, tables=[])).html()).text
    assert "parameters matched (total +0.49%, active \N{MINUS SIGN}0.50%)" in text
    assert "parameters not matched (total +1.20%, active +0.51%)" in text
    assert len(re.findall(r"(?<!not )matched", text)) == 1


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b \"quoted\" 'single' & </style></details>",
    "$\\frac$ _under_ **bold** [link](https://example.org) ![x](y) `code` ~~gone~~ <!-- hidden",
    "- list",
    "1. first # heading",
]


def test_names_are_shown_and_never_run():
    first, *others = HOSTILE
    record = few_rows(
        "btx-top-1", "bam-kv-experts", config="a: ```\n</code></pre><script>", samples={first: "```\n~~~ |"}
    )
    rows = []
    for row, name in zip(record.rows, HOSTILE[1:3], strict=True):
        runs = [replace(run, perplexity={first: 3.0}, bits_per_byte={first: 1.0}, command=f"run `{name}` | ``")
                for run in row.runs]  # fmt: skip
        runs = [replace(run, routing={kind: {first: layers["code"]} for kind, layers in run.routing.items()})
                for run in runs]  # fmt: skip
        rows.append(replace(row, name=name, runs=runs))
    record = replace(
        record, name=first, description="\n\n".join(others), notes=HOSTILE, domains=[first], rows=rows, own_expert=None,
        tables=[TableRecord(name, ["btx-top-1", "bam-kv-experts"], "btx-top-1", name) for name in HOSTILE],
        corpora={first: {"train|": {"documents": 1, "sha256": "`|`"}}}, environment={"a|<b>": {"$x$": ["<i>", "_"]}},
    )  # fmt: skip
    page = assert_same_text(record)
    for name in HOSTILE:
        assert no_spaces(name) in no_spaces(page.text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "a|b", "i", "b"})


def test_a_corpus_of_several_files_has_a_line_for_each():
    hashes = {"a.jsonl": "aa" * 32, "b.jsonl": "bb" * 32}
    corpora = {"text": {"train": {"path": "texts", "sha256": hashes}, "valid": {"path": "v.txt", "sha256": "cc" * 32}}}
    page = assert_same_text(replace(records.smallest(), corpora=corpora))
    assert f"text train texts a.jsonl {'aa' * 32} text train texts b.jsonl {'bb' * 32} text valid" in page.text
    assert f"v.txt {'cc' * 32}" in page.text


def test_rows_of_one_name_are_told_apart():
    record = few_rows("bam-kv-experts", "bam-kv-experts-compute")
    record = replace(record, rows=[replace(row, name="BAM") for row in record.rows])
    names = [row["name"] for row in results_table(record, record.tables[0]).records][:2]
    assert names == ["BAM (bam-kv-experts)", "BAM (bam-kv-experts-compute)"]


def test_a_record_with_nothing_optional_has_a_report(tmp_path):
    written = write_report(records.smallest(), tmp_path / "deep" / "report")
    page = assert_same_text(records.smallest())
    assert "Routing" not in page.text
    assert "Findings" not in page.text
    assert [path.name for path in written.figures] == ["curves-tokens.svg", "curves-flops.svg"]
    only = records.smallest().rows[0]
    without = replace(only, runs=[replace(only.runs[0], loss_curve=[], validation_curve=[])])
    assert_same_text(replace(records.smallest(), rows=[without]))
    assert_same_text(replace(records.smallest(), rows=[], tables=[]))


def test_collapsed_routers_are_named_with_layer_and_seed():
    record = few_rows("btx-top-1", "bam-kv-experts")
    healthy = "No router collapsed in any seed"
    assert healthy in Page(report(record).html()).text
    row = record.row("btx-top-1")
    collapsed = records.routing(0, ("feed_forward",), load=[0.9, 0.05, 0.045, 0.005], layers=2)
    row = replace(row, runs=[replace(row.runs[0], seed=7, routing=collapsed)])
    text = Page(report(replace(record, rows=[row, record.rows[1]])).html()).text
    assert "BTX top-1 : feed-forward router, layer 1, seed 7: expert 0 gets 90.0%" in text
    assert "layer 2, seed 7" not in text
    assert healthy not in text


def test_the_same_record_gives_the_same_bytes_in_another_process(tmp_path):
    script = (
        "import sys; from bamoe.reports.page import write_report; from tests.reports.test_page import few_rows;"
        "write_report(few_rows('btx-top-1', 'bam-kv-experts'), sys.argv[1])"
    )
    first = write_report(few_rows("btx-top-1", "bam-kv-experts"), tmp_path / "first")
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "second")],
        check=True, timeout=120, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
    )  # fmt: skip

    def hashes(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert len(hashes(tmp_path / "first")) == 2 + len(first.figures)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


def test_a_newer_report_takes_the_place_of_an_older_and_a_failed_one_leaves_it(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    write_report(few_rows("btx-top-1", "bam-kv-experts"), tmp_path)
    newer = write_report(records.smallest(), tmp_path)
    assert sorted((tmp_path / "figures").iterdir()) == sorted(newer.figures)
    before = newer.html.read_bytes(), newer.markdown.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_report(few_rows("btx-top-1", "bam-kv-experts"), tmp_path)
    assert (newer.html.read_bytes(), newer.markdown.read_bytes()) == before
    assert sorted((tmp_path / "figures").iterdir()) == sorted(newer.figures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html", "report.md", "results.json"]


def test_the_tables_fit_on_a_terminal_of_80_characters():
    record = records.experiment()
    tables = terminal_tables(record)
    assert [title for title, _ in tables] == ["Data-matched", "Against top-3 of 6"]
    file = io.StringIO()
    for title, table in tables:
        Console(file=file, width=80).print(table.rich(title))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for _, table in tables:
        for row in table.records:
            assert all(cell.text in text for cell in table.cells(row)[1:])


def test_what_experts_specialise_in_is_shown_where_it_was_measured():
    record = few_rows("btx-top-1", "bam-kv-experts")
    assert "token info" not in Page(report(record).html()).text
    tokens = [[{"token": 5, "text": " return", "count": 40, "share": 0.9, "pmi": 1.2}], []]
    layers = [
        {"domain_information": 0.25, "token_information": 0.5, "chance_information": 0.01, "tokens": tokens},
        {"domain_information": 0.35, "token_information": 0.7, "chance_information": 0.03, "tokens": tokens},
    ]
    row = record.row("btx-top-1")
    row = replace(row, runs=[replace(row.runs[0], specialization={"feed_forward": layers})])
    page = assert_same_text(replace(record, rows=[row, record.rows[1]]))
    assert {"0.300", "0.600", "0.020"} <= set(page.words)
    assert page.text.count("' return'") == 2
