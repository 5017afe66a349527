"""YAML that people write: every mistake is one ConfigError that names the file and the place."""

import pytest

from bamoe.errors import ConfigError
from bamoe.schema import StrictModel, load, parse, read_yaml


class Pair(StrictModel):
    left: int
    right: int = 0


def write(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "when: 2024-13-45",
        f"left: {'9' * 5000}",
        "left: !!int foo",
        "left: !!float foo",
        "left: !!bool foo",
        "left: !!timestamp foo",
        "left: [",
        "left: !!python/name:os.system x",
        "[" * 5000,
    ],
    ids=lambda text: text[:24],
)
def test_text_that_yaml_cannot_construct(tmp_path, text):
    with pytest.raises(ConfigError, match=r"file\.yaml is not valid YAML"):
        read_yaml(write(tmp_path, text))


@pytest.mark.parametrize("text", ["a: 1\n? [a, b]\n: c", "a: 1\n? {a: b}\n: c"])
def test_a_key_that_is_no_word(tmp_path, text):
    with pytest.raises(ConfigError, match=r"file\.yaml: line 2: a key must be a plain word"):
        read_yaml(write(tmp_path, text))


def test_a_key_twice(tmp_path):
    with pytest.raises(ConfigError, match="line 2: the key 'left' appears twice"):
        read_yaml(write(tmp_path, "left: 1\nleft: 2"))


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(ConfigError, match="cannot read"):
            read_yaml(path)


def test_anchors_and_plain_values(tmp_path):
    assert read_yaml(write(tmp_path, "left: &a [1, 2024-12-05]\nright: *a"))["left"][0] == 1


def test_every_problem_with_the_value_seen(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "lefd: 1\nright: x"), Pair)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for part in ("unknown key 'lefd'; did you mean 'left'?", "missing key 'left'", "right: ", "(found 'x')"):
        assert part in str(caught.value)


def test_a_long_value_is_cut_short(tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse({"left": "x" * 5000}, Pair, "pair")
    assert len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match="thousands of digits"):
        load(write(tmp_path, f"left: [0x{'f' * 5000}]"), Pair)
    with pytest.raises(ConfigError, match="thousands of digits"):
        parse({"left": [16**5000]}, Pair, "pair")
