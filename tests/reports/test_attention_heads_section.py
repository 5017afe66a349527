"""The section on mixtures of attention heads: what it shows of made-up routers."""

from bamoe.reports.attention_heads_section import attention_heads_section
from bamoe.reports.document import Document, TableBlock
from bamoe.reports.page import write_document
from bamoe.reports.routing_section import RoutedRow
from tests.reports import records
from tests.reports.reading import Page

HEADS, LAYERS = 16, 3


def specialization(seed: int, kinds: tuple[str, ...]) -> dict:
    return {
        kind: [
            {
                "domain_information": 0.0,
                "token_information": 0.1 + 0.1 * layer + 0.2 * seed,
                "chance_information": 0.01,
                "tokens": [[{"text": f" word{head}", "token": head}] for head in range(HEADS)],
            }
            for layer in range(LAYERS)
        ]
        for kind in kinds
    }


def row(
    name: str, kinds: tuple[str, ...], seeds: tuple[int, ...] = (0, 1), load: list[float] | None = None
) -> RoutedRow:
    routings = [records.routing(seed, kinds, HEADS, LAYERS, ("held-out text",), load) for seed in seeds]
    return RoutedRow(name, seeds, routings, [specialization(seed, kinds) for seed in seeds])


def test_shows_load_information_and_tokens(tmp_path):
    rows = [row("MoA 4K16E", ("encoder", "decoder", "cross")), row("MoA 8K16E", ("attention",))]
    section = attention_heads_section(rows)
    document = Document("Heads", [], [section])
    page = Page(document.html())
    assert "cross-attention router" in document.markdown() or "cross-attention" in page.text
    assert [figure.name for figure in document.figures()] == [
        "head-load-0.svg", "head-load-1.svg", "head-information.svg",
    ]  # fmt: skip
    # Layers 0 to 2, the mean of two seeds.
    assert "MoA 8K16E 0.2, 0.3, 0.4" in document.figures()[-1].alt
    assert "MoA 4K16E: decoder self-attention 0.2, 0.3, 0.4" in document.figures()[-1].alt
    whole = next(block for block in section.blocks if isinstance(block, TableBlock))
    assert [(each["name"], each["kind"]) for each in whole.table.records] == [
        ("MoA 4K16E", "encoder self-attention"), ("MoA 4K16E", "decoder self-attention"),
        ("MoA 4K16E", "cross-attention"), ("MoA 8K16E", "attention"),
    ]  # fmt: skip
    assert all(abs(each["token_information"] - 0.3) < 1e-9 for each in whole.table.records)
    assert "No router collapsed in any seed" in page.text
    assert "' word15'" in page.text
    written = write_document(document, tmp_path)
    assert all(figure.is_file() for figure in written.figures)
    assert written.markdown.read_text(encoding="utf-8") == document.markdown()


def test_the_scale_of_the_maps_is_their_largest_share():
    load = [0.4] + [0.6 / (HEADS - 1)] * (HEADS - 1)
    figure = Document("", [], [attention_heads_section([row("MoA", ("attention",), load=load)])]).figures()[0]
    assert figure.caption == "MoA: white is 0%, the darkest 40.0%, and 6.2% were even."


def test_heads_of_several_seeds_are_not_averaged():
    seeds = [records.routing(seed, ("attention",), HEADS, 1, ("text",), load) for seed, load in enumerate(
        ([1.5 / HEADS] * 8 + [0.5 / HEADS] * 8, [0.5 / HEADS] * 8 + [1.5 / HEADS] * 8))]  # fmt: skip
    figure = Document("", [], [attention_heads_section([RoutedRow("MoA", (0, 1), seeds)])]).figures()[0]
    assert "the darkest 9.4%" in figure.caption


def test_a_collapsed_router_is_named_on_one_text():
    load = [0.9] + [0.1 / (HEADS - 1)] * (HEADS - 1)
    text = Page(
        Document("", [], [attention_heads_section([row("MoA", ("cross",), seeds=(4,), load=load)])]).html()
    ).text
    assert "MoA : cross-attention router, layer 2, seed 4: expert 0 gets 90.0%" in text
    assert "No router collapsed" not in text
