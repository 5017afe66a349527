"""`bamoe evaluate`: perplexity per domain, and what the routers did there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamoe.errors import ConfigError

if TYPE_CHECKING:
    from bamoe.evaluation import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A dense model or a mixture: a directory, or a hub id.")],
    data: Annotated[
        list[str], typer.Option("--data", metavar="NAME=PATH", help="A domain and its text; give it once per domain.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context [default: as trained here, else at most 1024].")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score only the first so many of each domain.")] = None,
    text_field: Annotated[str, typer.Option(help="The field of JSON and Parquet files with the text.")] = "text",
) -> None:
    """Score a model on texts: perplexity and bits per byte; for a mixture also load and entropy of its routers."""
    domains = _named_paths(data)
    from bamoe.evaluation import evaluate as score

    result = score(model, domains, sequence_length=sequence_length, max_tokens=max_tokens, text_field=text_field)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        _print_tables(result)


def _named_paths(data: list[str]) -> dict[str, str | Path]:
    domains: dict[str, str | Path] = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--data takes NAME=PATH, found {item!r}")
        if name in domains:
            raise ConfigError(f"--data: the domain {name!r} is given twice")
        domains[name] = path
    return domains


def _print_tables(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("domain", title=f"Context of {result.sequence_length} tokens")
    for heading in ("perplexity", "log perplexity", "bits per byte", "tokens"):
        table.add_column(heading, justify="right")
    for name, score in result.domains.items():
        table.add_row(
            name,
            f"{score.perplexity:.3f}",
            f"{score.log_perplexity:.4f}",
            f"{score.bits_per_byte:.4f}",
            f"{score.tokens:,}",
        )
    table.add_section()
    table.add_row("average", f"{result.average_perplexity:.3f}", f"{result.average_log_perplexity:.4f}", "", "")
    console.print(table)
    for kind, domains in (result.routing or {}).items():
        table = Table("layer", "domain", "load per expert", title=f"{kind.replace('_', '-')} routers")
        table.add_column("entropy of load", justify="right")
        table.add_column("entropy per token", justify="right")
        for layer in range(len(next(iter(domains.values())))):
            for name, layers in domains.items():
                routing = layers[layer]
                load = " ".join(f"{share:.2f}" for share in routing.load)
                table.add_row(str(layer), name, load, f"{routing.load_entropy:.3f}", f"{routing.token_entropy:.3f}")
            table.add_section()
        console.print(table)
