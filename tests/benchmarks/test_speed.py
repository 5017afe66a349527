"""The speed benchmarks in their smallest form: what they make of times is exact, what they count is what it costs."""

import importlib
import io
import json
import math
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from bamoe.checkpoints.loading import load_model
from bamoe.modeling.costs import count_parameters, flops_per_token, kv_cache_bytes_per_token
from bamoe.recipes.mergekit import read_recipe

approx = pytest.approx
FOLDER = Path(__file__).parent.parent.parent / "benchmarks" / "speed"
DENSE, *MIXTURES = NAMES = ["dense Llama", "BAM, KV experts", "BAM, KV sharing", "BTX", "MoA", "MoE++"]
WIDTH, INNER, VOCABULARY, BATCH, CONTEXT = 32, 48, 64, 2, 8
TOKENS = BATCH * CONTEXT
EXPERT = 3 * WIDTH * INNER  # weights of a feed-forward expert
BALANCED = 2 * 0.75 * 8 / (0.75 * 8 + 4)  # feed-forward experts of a token in MoE++ (section 3.3), tau 0.75
PRODUCT = 64  # rows and columns


@pytest.fixture(scope="module")
def speed():
    """The suite's modules by name: they find each other by these bare names, which are taken back afterwards."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for module in (found.harness, found.bench):  # slow, and what is frozen would stay so in other tests
            patch.setattr(module, "gc", SimpleNamespace(collect=list, freeze=list))
        patch.setenv("KINETO_LOG_LEVEL", "99")  # the suite sets it too, and would not take it back
        found.tiny = found.shapes.Shape(WIDTH, 1, 2, INNER, VOCABULARY, BATCH, CONTEXT)
        found.configs = found.shapes.counted(found.tiny)
        yield found
    for name in names:
        del sys.modules[name]


@pytest.fixture
def bench(speed, tmp_path):
    console = Console(file=io.StringIO())
    return speed.harness.Bench(False, 1, torch.device("cpu"), torch.float32, tmp_path, console)


@pytest.fixture
def shrink(monkeypatch):
    """`shrink(module, NAME=value, ...)` sets a module's sizes."""
    return lambda module, **sizes: [monkeypatch.setattr(module, name, size) for name, size in sizes.items()]


@pytest.fixture
def steady(speed, monkeypatch):
    """Every call runs once, and candidate number i is said to take 2^i seconds."""

    def turns(bench, calls, *_, **__):
        for call in calls.values():
            call()
        return speed.harness.Turns({name: [2.0**place] * 2 for place, name in enumerate(calls)})

    monkeypatch.setattr(speed.harness.Bench, "turns", turns)


def rows(result, *keys, blank=()):
    """These values of all rows, once every cell is filled but for the blank ones (row, key); numbers above zero."""
    assert result.table().markdown().count("\n") == len(result.records) + 2  # every value can be written
    columns = [column.key for column in result.columns]
    cells = {(row, key): record.get(key) for row, record in enumerate(result.records) for key in columns}
    assert {cell for cell, value in cells.items() if value is None} == set(blank)
    assert all(0 < value < math.inf for value in cells.values() if isinstance(value, int | float))
    found = [tuple(record[key] for key in keys) for record in result.records]
    return [value for (value,) in found] if len(keys) == 1 else found


def test_turns_rotate_and_count_neither_warm_up_nor_what_comes_before(speed, bench, shrink):
    now, order = [0.0], []
    shrink(speed.harness, time=SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(name, seconds):
        order.append(name)
        now[0] += next(seconds)

    took = {"a": [64.0, 1.0, 2.0], "b": [128.0, 3.0, 5.0], "c": [256.0, 7.0, 4.0]}
    calls = {name: partial(spend, name, iter(seconds)) for name, seconds in took.items()}
    turns = bench.turns(calls, 2, before=partial(spend, "-", iter([1000.0] * 9)))
    assert "".join(order) == "-a-b-c-b-c-a-c-a-b"
    assert turns.seconds == {"a": [1, 2], "b": [3, 5], "c": [7, 4]}


def test_a_ratio_is_the_median_over_turns(speed):
    turns = speed.harness.Turns({"a": [2, 12, 9, 8, 50], "b": [1, 3, 9, 16, 10]})  # ratios 2, 4, 1, 0.5, 5
    assert turns.median("a") == turns.median("b") == 9
    assert turns.ratio("a", "b") == {"ratio": 2, "quartiles": "1.00 to 4.00"}
    assert turns.ratio("a", "b", 3) == {"ratio": 6, "quartiles": "3.00 to 12.00"}
    assert speed.harness.Turns({"a": [3], "b": [2]}).ratio("a", "b") == {"ratio": 1.5, "quartiles": "1.50 to 1.50"}


@pytest.mark.parametrize("wrong", [3.01, math.nan])
def test_candidates_that_disagree_are_refused(speed, wrong):
    calls = {"first": lambda: torch.tensor([1.0, 3.0]), "other": lambda: torch.tensor([1.0, 3.0001])}
    speed.harness.require_agreement(calls)
    with pytest.raises(AssertionError, match="third and first differ by"):
        speed.harness.require_agreement({**calls, "third": lambda: torch.tensor([1.0, wrong])})


def test_a_section_replaces_its_own_on_the_page(speed, tmp_path):
    page = tmp_path / "page.md"
    speed.harness.put(page, "a", "old")
    speed.harness.put(page, "b", "second")
    page.write_text(page.read_text().replace("# Benchmarks", "# Title") + "\nThe end.\n")
    speed.harness.put(page, "a", "new\n\nlonger")
    sections = "<!-- measured: a -->\nnew\n\nlonger\n<!-- end: a -->\n\n<!-- measured: b -->\nsecond\n<!-- end: b -->"
    assert page.read_text() == f"# Title\n\n{sections}\n\nThe end.\n"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_and_experts_run_as_routers_say(speed, bench, name):
    shape = replace(speed.tiny, depth=2)
    config, ids = speed.shapes.counted(shape)[name], speed.shapes.batch_of(shape, bench)[:, :1]  # few: some idle
    model = speed.shapes.model_of(speed.shapes.built(shape)[name], bench).eval()
    model.config.output_router_logits = True
    chosen, output = speed.work.selections(model, lambda: model(input_ids=ids)), model(input_ids=ids)
    idle, run = (VOCABULARY - len(ids.unique())) * WIDTH, 0
    for logits in getattr(output, "router_logits", None) or ():
        selected = logits.topk(config.num_experts_per_tok).indices.flatten().tolist()
        computing = [expert for expert in selected if expert < config.num_experts]
        idle += (config.num_experts - len(set(computing))) * EXPERT
        run += len(computing)
    for logits in getattr(output, "attention_router_logits", None) or ():
        selected = logits.topk(config.num_attention_experts_per_tok or len(logits[0])).indices
        idle += (config.num_attention_experts - len(selected.unique())) * 2 * WIDTH * WIDTH  # queries and outputs
    assert speed.work.weight_bytes(model, ids, chosen) == 4 * (count_parameters(config).total - idle)
    surplus = run - BALANCED * 2 * BATCH if name == "MoE++" else 0
    assert speed.work.surplus_flops(config, chosen) == approx(2 * EXPERT * surplus)


def flops_of(config, tokens, last=1):
    """A sequence's FLOPs by the cost model, with the logits of its last tokens."""
    each = flops_per_token(config, tokens)
    return tokens * (each.attention + each.feed_forward) + last * each.head


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_pass(speed, name):
    config = speed.configs[name]
    assert speed.work.pass_flops(config, 3, 10) == approx(3 * flops_of(config, 10))
    longer = flops_of(config, 11, last=1) - flops_of(config, 10, last=0)
    assert speed.work.pass_flops(config, 3, 1, 10) == approx(3 * longer)


@pytest.mark.parametrize("full", [False, True])
def test_training_step(speed, bench, steady, shrink, full):
    profiled = {"core": 1.0, "products": 2.0, "dispatch": 3.0, "rest": 4.0}
    shrink(speed.training_step, shapes=lambda _: [speed.tiny], PRODUCT=PRODUCT, profiled=lambda *_: profiled)
    dense, peers, profile = speed.training_step.measure(replace(bench, full=full))
    assert rows(dense, "name") == rows(profile, "name") == NAMES
    flops = rows(dense, "flops")
    counted = [3 * BATCH * flops_of(config, CONTEXT, CONTEXT) for config in speed.configs.values()]
    assert flops[:-1] == approx(counted[:-1])
    computed = (flops[-1] - counted[-1]) / (3 * 2 * EXPERT) + BALANCED * TOKENS  # MoE++'s assignments
    mixture = speed.shapes.model_of(speed.configs["MoE++"], bench).train()
    output = mixture(speed.shapes.batch_of(speed.tiny, bench), output_router_logits=True)
    selected, dropped = output.router_logits[0].topk(2).indices < 8, output.dropped_assignments[0][:8]
    assert computed == approx(int(selected.sum() - dropped.sum()))
    assert dropped.sum() > 0
    rates = [each / 2**place for place, each in enumerate(flops)]
    assert rows(dense, "rate") == approx(rates)
    assert rows(dense, "ratio") == approx([rate / flops[0] for rate in rates])
    assert rows(dense, "of_product") == approx([rate / (2 * PRODUCT**3 / 2**6) for rate in rates])
    assert rows(dense, "with_optimizer") == (rows(dense, "ratio") if full else [None] * 6)

    alone = {(row, key) for row in (0, 1, 3) for key in ("peer", "ratio", "quartiles")}
    names = ["Mixtral, eager", "Mixtral, grouped_mm", "BTX", "JetMoE", "MoA and top-2 feed-forward"]
    expected = [(name, TOKENS / 2**place) for place, name in enumerate(names)]
    assert rows(peers, "name", "rate", blank=alone) == expected
    pairs = [(record["peer"], record["ratio"]) for record in peers.records if record["peer"]]
    assert pairs == [("Mixtral, eager", 1 / 4), ("JetMoE", 1 / 2)]

    assert rows(profile, *profiled) == [(0.1, 0.2, 0.3, 0.4)] * 6
    cores = [6 * TOKENS * CONTEXT * WIDTH * attending for attending in (1, 4, 4, 1, 2, 1)]  # experts of a token
    large = 2 * PRODUCT**3
    expected = [(core / large, (each - core) / 2 / large) for core, each in zip(cores, flops, strict=True)]
    assert rows(profile, "core rate", "products rate") == [approx(pair) for pair in expected]


OPERATORS = {
    "core": lambda values: scaled_dot_product_attention(values, values, values),
    "products": lambda values: values @ values.mT,
    "dispatch": torch.sort,
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_are_told_apart(speed, bench, kind):
    seconds = speed.training_step.profiled(partial(OPERATORS[kind], torch.ones(1, 2, 64, 16)), bench)
    assert [name for name, taken in seconds.items() if taken and name != "rest"] == [kind]


def test_soft_attention(speed, bench, steady, shrink):
    shrink(speed.soft_attention, CACHED=4, CALLS={1: 2, 4: 1, 8: 1}, LONG=8)
    longest = [(row, "eager") for row in (2, 4, 7, 9)]  # left out where time is short
    for result in speed.soft_attention.measure(bench):
        assert rows(result, "variant", "pass", "tokens", "ratio", "eager", blank=longest) == [
            (variant, name, tokens, 2, None if tokens == "8" else 4)
            for variant in ("KV experts", "KV sharing")
            for name, counts in (("inference", "148"), ("forward and backward", "48"))
            for tokens in counts
        ]


@pytest.mark.parametrize("threads", [1, 2])
def test_parallel_block(speed, bench, steady, shrink, request, threads):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    for part in (speed.soft_attention, speed.parallel_block):
        shrink(part, CACHED=4, CALLS={1: 2, 8: 1}, LONG=8)
    found = ["sequential", "shared", "half", "threads"][: 2 * threads]  # one core has no halves
    missing = {"half", "half quartiles", "threads", "threads quartiles"} if threads == 1 else ()
    for result in speed.parallel_block.measure(replace(bench, threads=threads)):
        ratios = tuple(0.5**place for place in range(1, len(found) + 1))
        assert rows(result, "block", "tokens", *found, blank={(row, key) for row in range(4) for key in missing}) == [
            (block, tokens, *ratios) for block in ("BAM", "dense") for tokens in "18"
        ]


def test_generation(speed, bench, steady, shrink):
    shrink(speed.generation, shapes=lambda _: [speed.tiny], STREAM=(64, 32))
    shrink(speed.training_step, PRODUCT=PRODUCT)
    ids = speed.shapes.batch_of(speed.tiny, bench)
    results = speed.generation.measure(bench)
    for result, given, new, cached in zip(results, (ids, ids[:, :1]), (CONTEXT, 1), (0, CONTEXT), strict=True):
        assert rows(result, "name") == NAMES
        expected = [speed.work.pass_flops(config, BATCH, new, cached) for config in speed.configs.values()]
        flops, read = rows(result, "flops"), rows(result, "bytes")
        assert flops[:-1] == approx(expected[:-1])
        dense = count_parameters(speed.configs[DENSE]).total - (VOCABULARY - len(given.unique())) * WIDTH
        assert read[0] == 4 * dense + BATCH * cached * kv_cache_bytes_per_token(speed.configs[DENSE], 4)
        for place, (record, computed, moved) in enumerate(zip(result.records, flops, read, strict=True)):
            overs = [record[key] / 2**place for key in ("time", "over_flops", "over_bytes")]
            assert overs == approx([1, flops[0] / computed, read[0] / moved])
            # The product took a second; the second candidate, which reads 64 x 32 numbers of 4 bytes, took two.
            slower = moved / (64 * 32 * 4 / 2) > computed / (2 * PRODUCT**3)
            assert record["binds"] == ("bytes" if slower else "FLOPs")


def test_scaling(speed, bench, steady, shrink):
    part = speed.scaling
    for axis in part.axes(bench):
        assert {shape.tokens for shape, _ in axis.cases.values()} == {8192}
    shrink(part, axes=lambda _: [part.Axis("experts", {size: (speed.tiny, size) for size in (2, 4)})])
    (result,) = part.measure(bench)
    assert (result.settings["experts"], result.settings["width"]) == ("2 / 4", str(WIDTH))
    expected = []
    for name in MIXTURES:
        small, large = (BATCH * flops_of(part.mixtures_of(speed.tiny, size)[name], CONTEXT) for size in (2, 4))
        expected.append((name, 2, *map(approx, (small, small, small / large, 1 / 2, large / small / 2))))
        expected.append((name, 4, *map(approx, (large, large / 2, 1, 1, 1))))
    assert rows(result, "name", "size", "flops", "rate", "predicted", "measured", "ratio") == expected


def test_training_memory(speed, bench, shrink):
    values = torch.ones(1000, requires_grad=True)
    values.grad = torch.zeros(1000)
    held = speed.training_memory.held(lambda: values.exp().sum(), bench)
    assert held.kept == approx(4000, abs=64)  # the exponentials
    assert held.peak == approx(8000, abs=64)  # and a gradient

    large = replace(speed.tiny, vocabulary=8192, context=64)
    shrink(speed.training_memory, shapes=lambda _: [speed.tiny], large_vocabulary=lambda _: large)
    activations, logits = speed.training_memory.measure(bench)
    assert rows(activations, "name") == NAMES
    totals = [flops_per_token(config, CONTEXT).total for config in speed.configs.values()]
    assert rows(activations, "flops") == approx([total / totals[0] for total in totals])
    for key in ("kept", "peak", "checkpointed_peak"):
        found = rows(activations, key)
        expected = [each / found[0] / (total / totals[0]) for each, total in zip(found, totals, strict=True)]
        assert rows(activations, f"over_{key}") == approx(expected)
    assert all(low < middle < high for low, middle, high in rows(activations, "checkpointed", "kept", "peak"))
    assert rows(logits, "name") == [DENSE, "BAM, KV sharing", "BAM, KV sharing, skip_logits"]
    assert rows(logits, "copy") == [4 * large.tokens * large.vocabulary] * 3
    for _, whole, parts in (rows(logits, "kept"), rows(logits, "peak")):
        assert parts < whole


def test_graph_breaks_are_counted(speed, bench, shrink, request):
    request.addfinalizer(torch._dynamo.reset)
    part = speed.compiled
    shrink(part, CACHED=8, ROOM=16, pinned=lambda _: speed.tiny, can_compile=lambda _: False)
    (result,) = part.measure(bench)
    untimed = {(row, key) for row in range(10) for key in ("first", "ratio", "quartiles")}
    passes = [(name, each, "0") for name in MIXTURES for each in ("forward and backward", "decode step")]
    assert rows(result, "name", "pass", "breaks", blank=untimed) == passes

    model = speed.shapes.model_of(speed.configs["BTX"], bench)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (torch._dynamo.graph_break(), forward(hidden))[1]
    assert part.graph_breaks(model, "decode step", speed.tiny, bench) > 0
    assert "graph break: " in bench.console.file.getvalue()


def test_programs_are_run_and_watched(speed, tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(
        "import sys, time\nheld = b'x' * int(sys.argv[1])\ntime.sleep(0.3)\nassert len(held) > 1, 'too little'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program, report = speed.child_process.python_program("hungry", 1), tmp_path / "status"
    memory = program.watch(["2"], [str(2**26)], report)
    assert memory.above == memory.peak - memory.imports == approx(2**26, abs=2**23)
    program.run(["2"])
    for fails in (partial(program.run, ["1"]), partial(program.watch, ["2"], ["1"], report)):
        with pytest.raises(RuntimeError, match="too little"):
            fails()
    report.write_text("VmRSS:\t900 kB\nRssAnon:\t  30 kB\nRssFile:\t800 kB\nVmSwap:\t 2 kB\n")
    assert speed.child_process.anonymous_bytes(report) == 32 * 1024


def test_mixtures_are_built(speed, bench, shrink):
    part, builders = speed.upcycling, speed.builders.bamoe_builders(bench)
    shrink(part, shutil=SimpleNamespace(rmtree=lambda folder: None))  # what was built is looked at
    with part.dense_models(speed.tiny, bench) as inputs:
        candidates = part.Candidates(builders, {}, inputs, "absent")
        memory, largest = part.memory_of(builders["BTX"], inputs, candidates, bench)
        expert = load_model(inputs[0]).state_dict()["model.layers.0.mlp.down_proj.weight"]
        for name, key_value in (("BAM, KV experts", "experts"), ("BAM, KV sharing", "shared")):
            recipe, _ = read_recipe(builders[name].arguments(inputs, bench.work / "other")[1])
            assert (recipe.attention.key_value, len(recipe.experts)) == (key_value, 4)
    assert min(memory.imports, memory.peak) > 2**20
    assert largest == 4 * 2 * INNER * WIDTH * 2  # gate and up of all experts, in bfloat16
    mixture = load_model(bench.work / "out")
    assert (mixture.config.num_experts, mixture.config.num_experts_per_tok) == (4, 2)
    assert (mixture.model.layers[0].mlp.experts.down_proj == expert).all()


def test_builds_beside_copies_and_peers(speed):
    seconds = {"read": [1, 1, 1], "cp": [2, 3, 4], "cp, flushed": [4, 5, 9], "BTX": [10, 12, 20], "peer": [25, 26, 82]}
    turns = speed.harness.Turns(seconds)
    ratios = {"ratio": approx(10 / 3), "quartiles": "3.17 to 3.67", "work": approx(8 / 3), "flushed": approx(10 / 6)}
    assert speed.upcycling.beside_limits("BTX", turns, 2) == {"seconds": 12, "start": 2, "limit": 4, **ratios}
    ratios = {"ratio": 2.5, "quartiles": "2.33 to 3.30", "work": 3.0}
    found = speed.upcycling.beside_bamoe("peer", "BTX", turns, {"peer": 1, "BTX": 2})
    assert found == {"seconds": 26, "start": 1, **ratios}


def test_start_up(speed, bench, steady, shrink, tmp_path, monkeypatch):
    command = partial(speed.start_up.Command, threads=1)
    (tmp_path / "torch.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # a torch that is quick to import
    command(("-c", "exit(1)"), code=1)()
    with pytest.raises(RuntimeError, match="ended with 1"):
        command(("-c", "exit(1)"))()
    commands = {speed.start_up.PYTHON: command(("-c", "pass")), "torch": command(("-c", "import torch"))}
    shrink(speed.start_up, commands=lambda _: commands)
    (result,) = speed.start_up.measure(bench)
    modules = len(commands["torch"].modules())
    found = rows(result, "seconds", "ratio", "modules", "torch")
    assert found == [(1, 1, modules - 1, "no"), (2, 2, modules, "yes")]


def call(speed, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    speed.bench.main()


def test_a_part_leaves_its_record_and_its_section(speed, shrink, tmp_path, capsys, monkeypatch):
    harness, out = speed.harness, tmp_path / "out"
    columns = [harness.Column("name", "model", "text"), harness.Column("ratio", "over")]
    records = [{"name": "x", "ratio": 0.5}]

    def measure(bench):
        (bench.work / "large").touch()
        return [harness.Result("Trivial", columns, records, {"full": bench.full, "width": 8}, "Read.")] * 2

    shrink(speed.start_up, PART=harness.Part("start_up", measure, needs_cpu=True))
    call(speed, monkeypatch, out, "--part", "start_up", "--full", "--threads", 1)
    assert {path.name for path in out.iterdir()} == {"start_up.json", "benchmarks.md"}
    record = json.loads((out / "start_up.json").read_text())
    command = "python benchmarks/speed/bench.py OUT --part start_up --full --threads=1"
    assert (record["command"], record["environment"]["torch"]) == (command, version("torch"))
    assert [(each["title"], each["records"]) for each in record["results"]] == [("Trivial", records)] * 2
    table = "**Trivial**. Read.\n\n| model | over |\n| --- | ---: |\n| x | 0.50 |\n\nSettings: full True, width 8.\n\n"
    machine = f"{harness.processor()}, 1 threads, float32; torch {version('torch')}, "
    start = f"# Benchmarks\n\n<!-- measured: start_up -->\n{table * 2}`{command}`, on {machine}"
    assert (out / "benchmarks.md").read_text().startswith(start)
    assert capsys.readouterr().out.count("Trivial") == 2


def test_an_unknown_part_is_refused(speed, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as refused:
        call(speed, monkeypatch, tmp_path / "out", "--part", "unknown")
    assert (refused.value.code, (tmp_path / "out").exists()) == (2, False)
