"""How long MoE++'s experts take beside those of a plain mixture of the same size, against what tau promises.

    python benchmarks/moepp/expert_forward.py OUT [--size 0.6B] [--tokens 2048] [--tau 0.75] [--repetitions 11]

Timed is one feed-forward layer in evaluation: router (gating residuals included), dispatch, all experts, combine; of
the plain mixture the same without zero-computation experts, with the same feed-forward weights. Both take turns, so
that whatever else the machine does meets both; a ratio is the median over the turns.

An untrained router ignores tau, so tokens are made to be routed as the load-balance loss would have it: experts are
drawn, K per token, with shares tau : 1 (feed-forward : zero-computation), and each token is a random vector moved until
the router's own product gives its experts the highest scores. The plain mixture's tokens are made so for equal shares.

In theory the ratio is tau·E / (tau·E + Z), the part of the assignments that still goes to the E feed-forward experts.
Fewer rows per expert make poorer matrix products, whatever is around them, so "products alone" is timed as well: the
same rows through the same weights, already sorted, with no router, dispatch or combine.

OUT gets results.json, table.md and one plot per size. On a GPU, if there is one.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import grouped_mm, silu

from bamoe.modeling.configuration_bamoe import BamoeConfig
from bamoe.modeling.feed_forward import MixtureOfFeedForward
from bamoe.reports.plots import Curve, Panel, curve_looks, panel_svg
from bamoe.reports.table import Column, Table

WIDTH, INNER, TOP_K = 768, 2048, 2
TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
TOKENS = (512, 2048, 8192)
# Experts of the paper's models: feed-forward, zero, copy, constant.
SIZES = {"0.6B": (8, 1, 1, 2), "1B": (16, 1, 1, 2), "2B": (32, 1, 1, 6)}
# Of the paper's table 3, by size and tau: MoE++'s expert-forward time over the plain mixture's.
PAPER = {("0.6B", 0.75): 0.799, ("1B", 0.25): 0.630, ("1B", 0.75): 0.819, ("2B", 0.75): 0.821}
WARM_UP = 2
WIDE = 170  # characters of the table


@dataclass(frozen=True)
class Measurement:
    """One size, tau and number of tokens.

    ratio: MoE++'s time over the plain mixture's, the median over turns; low, high: its quartiles.
    theory: tau·E/(tau·E + Z). computed: the part of the assignments that did go to feed-forward experts.
    products: the ratio of the matrix products alone. milliseconds, plain_milliseconds: medians.
    paper: what the paper measured.
    """

    size: str
    tau: float
    tokens: int
    ratio: float
    low: float
    high: float
    theory: float
    computed: float
    products: float
    milliseconds: float
    plain_milliseconds: float
    paper: float | None

    @property
    def above_theory(self) -> float:
        """Measured over theoretical ratio."""
        return self.ratio / self.theory


def layer(size: str, tau: float | None, device: torch.device, dtype: torch.dtype) -> MixtureOfFeedForward:
    """The feed-forward of a second layer; with no tau that of a plain mixture."""
    experts, zero, copies, constants = SIZES[size]
    added = {"num_zero_experts": zero, "num_copy_experts": copies, "num_constant_experts": constants}
    config = BamoeConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_experts=1,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        experts_implementation="grouped_mm",
        **({} if tau is None else added | {"zero_computation_tau": tau}),
    )
    torch.manual_seed(0)
    with torch.device(device):
        made = MixtureOfFeedForward(config, layer_idx=1)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    if made.gate.residual_weight is not None:  # its product is run, and leaves the drawn experts as they are
        torch.nn.init.zeros_(made.gate.residual_weight)
    return made.to(dtype).eval()


def draw_experts(shares: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Which experts (tokens, N) each token selects: TOP_K of them, expert i for TOP_K·shares[i] of the tokens.

    Systematic sampling: the experts in random order make a line, each as long as its share of it, and TOP_K points at
    equal distances hit the selected ones.
    """
    order = torch.rand(tokens, len(shares), generator=generator).argsort(dim=-1)
    ends = (TOP_K * shares)[order].cumsum(dim=-1)
    hits = (ends + torch.rand(tokens, 1, generator=generator)).floor().clamp_max(TOP_K)
    hits[:, -1] = TOP_K  # rounding must not lose the last one
    selected = hits.diff(dim=-1, prepend=torch.zeros(tokens, 1)) > 0
    return torch.zeros_like(selected).scatter(1, order, selected)


def routed_tokens(mixture: MixtureOfFeedForward, shares: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    """Hidden states (1, tokens, WIDTH) whose experts are drawn with `shares`; see the head of this file."""
    generator = torch.Generator().manual_seed(seed)
    selected = draw_experts(shares.double(), tokens, generator)
    scores = torch.where(selected, 2.0, -2.0) + 0.3 * torch.randn(selected.shape, generator=generator)
    weight = mixture.gate.weight.detach().float().cpu()
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    hidden += (scores - hidden @ weight.T) @ torch.linalg.pinv(weight).T
    return hidden[None].to(mixture.gate.weight)


def timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """`call` once, in milliseconds."""

    @torch.no_grad()
    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return 1000 * (time.perf_counter() - start)

    return run


def whole(mixture: MixtureOfFeedForward, hidden: torch.Tensor) -> Callable[[], object]:
    """The layer, with the scores of a layer before."""
    previous = torch.randn(hidden.shape[1], len(mixture.gate.weight), device=hidden.device)
    return lambda: mixture(hidden, previous)


def products(mixture: MixtureOfFeedForward, hidden: torch.Tensor) -> Callable[[], object]:
    """The matrix products of the same rows alone, sorted already."""
    experts, counts = mixture.experts, selected_by(mixture, hidden).bincount(minlength=mixture.num_experts)
    rows = hidden[0].repeat(TOP_K, 1)[: counts[: mixture.num_experts].sum()]
    ends = counts[: mixture.num_experts].cumsum(0).to(torch.int32)

    def run() -> object:
        gate, up = grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return grouped_mm(silu(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)

    return run


@torch.no_grad()
def selected_by(mixture: MixtureOfFeedForward, hidden: torch.Tensor) -> torch.Tensor:
    """(tokens·TOP_K,) the experts that the router selects."""
    previous = hidden.new_zeros(hidden.shape[1], len(mixture.gate.weight))
    return mixture.gate(hidden[0], previous).indices.flatten()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def measure(
    size: str, tokens: int, taus: list[float], repetitions: int, device: torch.device, dtype: torch.dtype
) -> list[Measurement]:
    """The plain mixture and MoE++ at every tau, turn by turn."""
    plain = layer(size, None, device, dtype)
    experts, *added = SIZES[size]
    plain_tokens = routed_tokens(plain, torch.full((experts,), 1 / experts), tokens, seed=1)
    mixtures = [layer(size, tau, device, dtype) for tau in taus]
    inputs = []
    calls = [whole(plain, plain_tokens), products(plain, plain_tokens)]
    for mixture in mixtures:
        mixture.experts = plain.experts  # the same weights, which no cache has seen more often
        inputs.append(routed_tokens(mixture, torch.tensor(mixture.expert_shares), tokens, seed=2))
        calls += [whole(mixture, inputs[-1]), products(mixture, inputs[-1])]
    timers = [timer(call, device) for call in calls]
    turns = [[run() for run in timers] for _ in range(WARM_UP + repetitions)][WARM_UP:]
    found = []
    for number, (tau, mixture, hidden) in enumerate(zip(taus, mixtures, inputs, strict=True), start=1):
        ratios = [turn[2 * number] / turn[0] for turn in turns]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found.append(
            Measurement(
                size=size,
                tau=tau,
                tokens=tokens,
                ratio=statistics.median(ratios),
                low=low,
                high=high,
                theory=tau * experts / (tau * experts + sum(added)),
                computed=(selected_by(mixture, hidden) < experts).double().mean().item(),
                products=statistics.median(turn[2 * number + 1] / turn[1] for turn in turns),
                milliseconds=statistics.median(turn[2 * number] for turn in turns),
                plain_milliseconds=statistics.median(turn[0] for turn in turns),
                paper=PAPER.get((size, tau)),
            )
        )
    return found


def table(measurements: list[Measurement]) -> Table:
    """All measurements, a row each."""
    columns = [
        Column("size", "size", "text"),
        Column("experts", "experts", "text"),
        Column("tokens", "tokens", "text"),
        Column("tau", "tau", "text"),
        Column("theory", "theory", "fine"),
        Column("ratio", "measured", "fine"),
        Column("products", "products alone", "fine"),
        Column("quartiles", "quartiles", "text"),
        Column("above_theory", "measured / theory", "number"),
        Column("above_products", "measured / products", "number"),
        Column("paper_above_theory", "paper's / theory", "number"),
        Column("plain_milliseconds", "plain, ms", "number"),
        Column("milliseconds", "MoE++, ms", "number"),
    ]
    records = [
        {
            **asdict(each),
            "experts": "{}+{}/{}/{}".format(*SIZES[each.size]),
            "quartiles": f"{each.low:.3f} to {each.high:.3f}",
            "above_theory": each.above_theory,
            "above_products": each.ratio / each.products,
            "paper_above_theory": each.paper and each.paper / each.theory,
        }
        for each in measurements
    ]
    return Table(columns, records)


def plot(size: str, measurements: list[Measurement]) -> bytes:
    """Ratios over tau, a curve for each number of tokens, theory and paper beside them."""
    curves = []
    for tokens in dict.fromkeys(each.tokens for each in measurements):
        chosen = [each for each in measurements if each.tokens == tokens]
        x, y = [each.tau for each in chosen], [each.ratio for each in chosen]
        low, high = [each.low for each in chosen], [each.high for each in chosen]
        curves.append(Curve(f"{tokens:,} tokens", x, y, low=low, high=high))
    theory = {each.tau: each.theory for each in measurements}
    curves.append(Curve("theory", list(theory), list(theory.values())))
    if paper := {each.tau: each.paper for each in measurements if each.paper is not None}:
        curves.append(Curve("the paper, measured", list(paper), list(paper.values())))
    panel = Panel(f"Experts' time, {size}", "tau", "MoE++ over the plain mixture", curves)
    return panel_svg(panel, curve_looks(curve.name for curve in curves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help=f"default: {TOKENS}")
    parser.add_argument("--tau", type=float, action="append", help=f"default: {TAUS}")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    console.width = max(console.width, WIDE)
    measurements: list[Measurement] = []
    for size in arguments.size or SIZES:
        for tokens in arguments.tokens or TOKENS:
            taus = arguments.tau or list(TAUS)
            measurements += measure(size, tokens, taus, arguments.repetitions, device, dtype)
            console.print(f"{size}, {tokens:,} tokens: done", style="dim")
        chosen = [each for each in measurements if each.size == size]
        (arguments.out / f"{size}.svg").write_bytes(plot(size, chosen))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    setting = {
        "device": str(device), "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."), "repetitions": arguments.repetitions,
        "width": WIDTH, "feed_forward_width": INNER, "experts_per_token": TOP_K,
    }  # fmt: skip
    results = {**setting, "measurements": [asdict(each) for each in measurements]}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "table.md").write_text(table(measurements).markdown(), encoding="utf-8")
    console.print(table(measurements).rich("Experts' time: MoE++ over a plain mixture of the same size"))


if __name__ == "__main__":
    main()
