"""The built-in corpora: reproducible, disjoint, and the word problems right."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from bamoe.data.builtin import DOMAINS, describe, paragraph_key, write_builtin_corpora
from bamoe.data.word_problems import word_problems

MINIMUM = {"general": 300_000, "code": 300_000, "law": 60_000, "math": 300_000}  # training characters


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return write_builtin_corpora(tmp_path_factory.mktemp("data"), max_characters=450_000)


def texts(path):
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def paragraphs(documents):
    return {paragraph_key(part) for text in documents for part in re.split(r"\n\s*\n", text)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_and_validation_share_no_paragraph(corpora, domain):
    train, valid = (texts(corpora[domain][part].path) for part in ("train", "valid"))
    assert len(paragraphs(valid)) > 20
    assert not paragraphs(train) & paragraphs(valid)
    assert min(len(text.strip()) for text in train + valid) >= 200


@pytest.mark.parametrize("domain", DOMAINS)
def test_sizes_and_hashes_are_those_of_the_files(corpora, domain):
    assert corpora[domain]["train"].characters > MINIMUM[domain]
    for part in ("train", "valid"):
        file = corpora[domain][part]
        content = Path(file.path).read_bytes()
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.documents == len(texts(file.path))
        assert file.characters == sum(map(len, texts(file.path))) > 5_000


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(corpora, tmp_path):
    def hashes(written):
        return {
            (domain, part): file["sha256"]
            for domain, parts in describe(written).items()
            for part, file in parts.items()
        }

    assert hashes(write_builtin_corpora(tmp_path / "a", max_characters=450_000)) == hashes(corpora)
    other = hashes(write_builtin_corpora(tmp_path / "b", seed=1, max_characters=450_000))
    assert all(other[key] != value for key, value in hashes(corpora).items())


def test_code_has_no_docstrings_or_comments(corpora):
    import ast

    for text in texts(corpora["code"]["valid"].path):
        assert not re.search(r"^\s*#", text, re.MULTILINE)
        assert not re.search(r"^(class|def) .*:\n\s+(\"\"\"|''')", text, re.MULTILINE)
    # A document that lost no repeated paragraph still parses.
    assert any(_parses(ast, text) for text in texts(corpora["code"]["valid"].path))


def _parses(ast, text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_every_step_of_every_word_problem_is_right():
    operations = {
        "+": lambda *numbers: sum(numbers),
        "-": lambda left, right: left - right,
        "*": lambda left, right: left * right,
        "/": lambda left, right: left / right,
    }
    equations = 0
    for problem in islice(word_problems(seed=3), 2000):
        steps, answer = problem.split("\nAnswer: ")[1].rsplit(" The answer is ", 1)
        found = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", steps)
        assert len(found) >= 2 or steps.count("=") == len(found) == 1, problem
        for left, right in found:
            _, *signs = re.findall(r"\d+|[-+*/]", left)[0:1] + re.findall(r" ([-+*/]) ", left)
            assert len(set(signs)) == 1
            assert operations[signs[0]](*map(int, re.findall(r"\d+", left))) == int(right), problem
            equations += 1
        # The answer follows from the last step.
        assert found[-1][1] == answer.rstrip("."), problem
        assert int(answer.rstrip(".")) >= 0
    assert equations > 5000
