"""`bamoe generate`: greedy, sampled, beams; from dense models and mixtures."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bamoe.checkpoints.loading import load_config, load_model
from bamoe.cli.main import main
from tests.training.tiny import dense, mixture, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    dense(folder / "dense", initializer_range=0.3)
    mixture(folder / "mixture", initializer_range=0.3)
    return folder


def text(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@torch.no_grad()
def greedy(model: Path, ids: list[int], new: int) -> str:
    network = load_model(model)
    for _ in range(new):
        ids = [*ids, int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_greedy_is_the_default(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = text(capsys, folder / kind, "the tide", "--max-new-tokens", 8)
    assert printed == greedy(folder / kind, tokenizer()("the tide")["input_ids"], 8)
    assert printed.startswith("the tide")
    assert text(capsys, folder / kind, "the tide", "--max-new-tokens", 8, "--temperature", 0) == printed
    assert text(capsys, folder / kind, "the tide", "--max-new-tokens", 8, "--top-k", 1) == printed


def test_sampling_follows_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        return text(capsys, folder / "mixture", "the", "--max-new-tokens", 12, "--temperature", 1, "--seed", seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_beams_and_an_empty_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(capsys, folder / "dense", "the", "--num-beams", 3, "--max-new-tokens", 4).startswith("the")
    assert text(capsys, folder / "dense", "", "--max-new-tokens", 4) == greedy(folder / "dense", [0], 4)


def test_mistakes_are_messages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder / "gone"), "the"]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert main(["generate", str(folder / "dense"), "the", "--temperature", "0", "--top-k", "2"]) == 1
    assert "--temperature 0 is greedy" in capsys.readouterr().err
    assert main(["generate", str(folder / "dense"), "the", "--top-k", "2", "--seed", str(2**32)]) == 1
    assert "--seed" in capsys.readouterr().err
    assert main(["generate", str(folder / "dense"), "the \udcff"]) == 1
    assert "the prompt is not UTF-8 text" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dense(tmp_path / "model", vocab_size=290)
    assert main(["generate", str(model), "the"]) == 1
    assert "the tokenizer has 300 tokens and the model 290" in capsys.readouterr().err


def test_a_continuation_past_the_models_positions_is_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = load_config(folder / "mixture").max_position_embeddings
    assert main(["generate", str(folder / "mixture"), "a", "--max-new-tokens", str(limit + 1)]) == 0
    assert f"the model is made for {limit}" in capsys.readouterr().err


def test_a_model_of_nan_is_no_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(folder / "mixture", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", str(broken), "a"]) == 1
    assert "its logits are NaN or infinite" in capsys.readouterr().err
