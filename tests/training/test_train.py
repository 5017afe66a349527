"""Training runs: what they learn, log and leave behind, and what they refuse."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from bamoe.checkpoints.loading import load_model
from bamoe.errors import BamoeError, CheckpointError, ConfigError, DataError
from bamoe.evaluation import evaluate
from bamoe.training import train
from bamoe.training.trainer import BlockCollator
from tests.training.tiny import corpus, dense, mixture, run_config, tokenizer


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("make", [dense, mixture])
def test_trains_and_leaves_a_complete_model(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path / "model")
    result = train(
        run_config(tmp_path, model, tokens=1920, validation=[{"name": "sea", "path": str(tmp_path / "sea.jsonl")}])
    )
    assert (result.tokens, result.steps) == (1920, 30)
    log = log_of(result.log)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert result.final_loss == losses[-1] < losses[0] - 1
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_config.json"} <= {
        path.name for path in result.output.iterdir()
    }
    assert not (result.output / "checkpoints").exists()
    assert not list(result.output.glob("*.bin"))
    # Evaluation at the end, of the same weights that were saved.
    score = evaluate(result.output, {"sea": tmp_path / "sea.jsonl"}).domains["sea"]
    assert log[-1]["eval_sea_perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    before = evaluate(model, {"sea": tmp_path / "sea.jsonl"}, sequence_length=16).domains["sea"]
    assert score.perplexity < before.perplexity / 2


def test_a_step_is_adamw_on_the_mean_loss_of_its_blocks(tmp_path: Path) -> None:
    """One step against AdamW written out, from the blocks the run saw."""
    model = dense(tmp_path / "model")
    seen: list[torch.Tensor] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kw: Any) -> None:
            seen.extend(batch["input_ids"] for batch in train_dataloader)

    settings = {"tokens": 64, "schedule": {"decay": "constant"}, "max_grad_norm": 0.0, "micro_batch_tokens": 16}
    result = train(run_config(tmp_path, model, **settings), callbacks=[Spy()])
    reference = load_model(model).train()
    batch = torch.cat(seen)
    assert batch.shape == (4, 16)
    loss = torch.nn.functional.cross_entropy(reference(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert result.final_loss == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    trained = load_file(result.output / "model.safetensors")
    for name, weight in reference.named_parameters():
        decay = 0.0 if "norm" in name else 0.1
        assert weight.grad is not None
        # AdamW's first step: the bias-corrected moments are the gradient and its square.
        step = weight.grad / (weight.grad.abs() + 1e-8)
        expected = weight * (1 - 1e-2 * decay) - 1e-2 * step
        certain = weight.grad.abs() > 1e-6  # near zero the sign is a matter of rounding
        torch.testing.assert_close(trained[name][certain], expected[certain].detach(), rtol=1e-4, atol=1e-5)


def test_the_log_has_the_schedule_and_the_tokens(tmp_path: Path) -> None:
    log = log_of(train(run_config(tmp_path, dense(tmp_path / "model"))).log)
    assert [entry["tokens"] for entry in log] == [64 * step for step in range(1, 11)]
    assert log[0]["learning_rate"] == pytest.approx(0.5e-2)
    assert log[1]["learning_rate"] == pytest.approx(1e-2)
    assert log[-1]["learning_rate"] == pytest.approx(0.1e-2)


def test_router_statistics_are_in_the_log(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model")
    settings = {"micro_batch_tokens": 16, "log_every_steps": 4, "save_every_tokens": 640}
    config = run_config(tmp_path, model, router_aux_loss_coef=0.5, router_z_loss_coef=0.25, **settings)
    result = train(config)
    log = log_of(result.log)
    assert [entry["step"] for entry in log] == [1, 4, 8, 10]
    for entry in log:
        expected = entry["loss"] - 0.5 * entry["aux_loss"] - 0.25 * entry["z_loss"]
        assert entry["cross_entropy"] == pytest.approx(expected, rel=1e-5)
        for kind in ("feed_forward", "attention"):
            for layer in range(2):
                at = f"{kind}_router/layer_{layer}/"
                assert 0 <= entry[at + "load_min"] <= 1 / 3 <= entry[at + "load_max"] <= 1
                assert 0 <= entry[at + "load_entropy"] <= math.log(3) + 1e-9
                assert 0 < entry[at + "token_entropy"] <= math.log(3) + 1e-6
    # The cross-entropy is that of the language model alone: near uniform over the vocabulary at first.
    assert log[0]["cross_entropy"] == pytest.approx(math.log(300), rel=0.02)
    assert json.loads((result.output / "config.json").read_text())["router_aux_loss_coef"] == 0.5


def test_gradient_accumulation_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    settings = [{}, {"micro_batch_tokens": 16}, {"gradient_checkpointing": True}]
    losses = [
        [
            entry["loss"]
            for entry in log_of(train(run_config(tmp_path, model, output=str(tmp_path / str(i)), **changes)).log)
        ]
        for i, changes in enumerate(settings)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


@pytest.mark.parametrize("make", [dense, mixture])
def test_masked_documents_do_not_see_each_other(tmp_path: Path, make: Any) -> None:
    """The loss of one step equals that of its documents, each run alone."""
    model = make(tmp_path / "model", **({"initializer_range": 0.2} if make is dense else {}))
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kw: Any) -> None:
            seen.extend(train_dataloader)

    coefficients = {} if make is dense else {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    config = run_config(tmp_path, model, tokens=64, schedule={}, document_mask=True, **coefficients)
    result = train(config, callbacks=[Spy()])
    reference = load_model(model)
    nats, tokens = 0.0, 0
    for row in torch.cat([batch["input_ids"] for batch in seen]):
        ends = [*(row == 0).nonzero()[:, 0].tolist(), 15]
        start = 0
        for end in ends:
            document = row[start : end + 1]
            if len(document) > 1:
                with torch.no_grad():
                    logits = reference(document[None]).logits[0]
                nats += float(torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum"))
                tokens += len(document) - 1
            start = end + 1
    assert tokens < 4 * 15  # some block holds two documents
    assert result.final_loss == pytest.approx(nats / tokens, rel=1e-5)


def test_collator_leaves_the_first_tokens_of_masked_documents_out() -> None:
    block = {"input_ids": np.array([5, 6, 0, 7]), "position_ids": np.array([0, 1, 2, 0])}
    batch = BlockCollator(tokenizer())([block, block])
    assert batch["labels"].tolist() == [[-100, 6, 0, -100]] * 2
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7]] * 2


def test_a_trained_mixture_and_its_checkpoints_load_with_plain_transformers(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model")
    (model / "bamoe_provenance.json").write_text('{"recipe": "bam"}')
    result = train(run_config(tmp_path, model, keep_checkpoints=True, save_every_tokens=320))
    assert (result.output / "bamoe_provenance.json").read_text() == '{"recipe": "bam"}'
    checkpoint = result.output / "checkpoints" / "checkpoint-10"
    assert (result.output / "checkpoints" / "checkpoint-5").is_dir()
    code = {path.name for path in model.glob("*.py")}
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = load_model(result.output)(ids).logits
    for directory in (result.output, checkpoint):
        assert {path.name for path in directory.glob("*.py")} == code > {"modeling_bamoe.py"}
        assert "auto_map" in json.loads((directory / "config.json").read_text())
        loaded = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        torch.testing.assert_close(loaded(ids).logits, expected)
        assert AutoTokenizer.from_pretrained(directory, trust_remote_code=True).eos_token == "<eos>"


def test_the_models_special_ids_and_cache_setting_stay(tmp_path: Path) -> None:
    model = dense(tmp_path / "model", eos_token_id=[0, 7], bos_token_id=3)
    output = train(run_config(tmp_path, model)).output
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, output))
    assert after == before | {"architectures": ["LlamaForCausalLM"]}


def test_bfloat16_weights_and_autocast(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    weights = train(
        run_config(tmp_path, model, tokens=64, schedule={}, dtype="bfloat16", output=str(tmp_path / "a"))
    ).output
    assert load_file(weights / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    mixed = train(run_config(tmp_path, model, tokens=64, schedule={}, autocast="bfloat16", output=str(tmp_path / "b")))
    assert load_file(mixed.output / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    exact = train(run_config(tmp_path, model, tokens=64, schedule={}, output=str(tmp_path / "c")))
    assert mixed.final_loss == pytest.approx(exact.final_loss, rel=1e-2)
    assert mixed.final_loss != exact.final_loss


def test_divergence_ends_the_run_with_advice(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_every_tokens": 640}
    config = run_config(tmp_path, dense(tmp_path / "model"), **settings)
    with pytest.raises(BamoeError, match=r"the loss is (nan|inf) at step \d+.*lower learning_rate"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.filterwarnings("ignore:mlp.gate")  # building such a model warns
def test_a_router_that_cannot_learn_is_refused_before_training(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(ConfigError, match=r"cannot be trained: mlp\.gate"):
        train(run_config(tmp_path, model))
    assert not (tmp_path / "run").exists()


def with_changed_file(name: str, content: str | None) -> Any:
    def change(model: Path) -> None:
        if content is None:
            (model / name).unlink()
        else:
            (model / name).write_text(content)

    return change


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (with_changed_file("model.safetensors", None), {}, CheckpointError, "no weights"),
        (with_changed_file("model.safetensors", "x"), {}, CheckpointError, "truncated or corrupt"),
        (with_changed_file("config.json", "{"), {}, CheckpointError, "config"),
        (with_changed_file("config.json", '{"model_type": "mystery"}'), {}, CheckpointError, "mystery"),
        (with_changed_file("tokenizer.json", "{"), {}, CheckpointError, "no tokenizer that can be read"),
        (None, {"model": "gone/model/x"}, CheckpointError, "no such directory"),
        (None, {"sequence_length": 128, "batch_tokens": 128}, ConfigError, "more than the 64 positions"),
        (None, {"router_z_loss_coef": 0.1}, ConfigError, r"router_z_loss_coef: .* \(llama\) has no such router loss"),
        (None, {"data": [{"name": "a", "path": "gone.txt"}]}, DataError, "gone.txt does not exist"),
    ],
)
def test_mistakes_leave_no_output(
    tmp_path: Path, change: Any, settings: dict[str, Any], error: type[BamoeError], message: str
) -> None:
    model = dense(tmp_path / "model")
    if change is not None:
        change(model)
    with pytest.raises(error, match=message):
        train(run_config(tmp_path, model) | settings)
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"lacks 9 weights of LlamaForCausalLM.*layers.2"):
        train(run_config(tmp_path, model))
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ConfigError, match="the tokenizer has 300 tokens and the model 200"):
        train(run_config(tmp_path, model))


def test_a_terminal_shows_one_bar_with_the_last_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    result = train(run_config(tmp_path, dense(tmp_path / "model")))
    shown = capsys.readouterr()
    assert "10/10" in shown.err
    assert f"loss={result.final_loss:.4g}" in shown.err
    assert "learning_rate" not in shown.out + shown.err


def test_a_corpus_is_repeated_when_it_is_exhausted(tmp_path: Path) -> None:
    path = corpus(tmp_path / "small.jsonl", "sea", documents=2)
    config = run_config(tmp_path, dense(tmp_path / "model"), data=[{"name": "small", "path": str(path)}])
    assert train(config).tokens == 640
