"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import os

import pytest

from peft_ogpsa.core.files import json_lines, replace_json, replacing


def test_the_new_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent  # on the same file system
        assert part.name.endswith(".part")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    replace_json(path, {"a": [1.5]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace_json(path, {"a": [float("inf")]})
    assert path.read_bytes() == b'{\n "a": [\n  1.5\n ]\n}\n'
    assert os.listdir(tmp_path) == ["result.json"]


def test_the_file_need_not_exist(tmp_path):
    with replacing(tmp_path / "new") as part:
        part.write_text("text")
    assert (tmp_path / "new").read_text() == "text"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file(tmp_path, error, written):
    path = tmp_path / "state.json"
    path.write_text("old")

    def write():
        with replacing(path) as part:
            if written:
                part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "state.json"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end


def test_json_lines_split_at_newlines_alone():
    text = '{"a": "one\u2028two\x85three"}\n\n  \n{"a": 2}\n'
    assert list(json_lines(text)) == [{"a": "one\u2028two\x85three"}, {"a": 2}]
    assert list(json_lines("")) == []


@pytest.mark.parametrize("line", ["{", "1", "[1]", '"a"', "nonsense"])
def test_a_line_that_is_no_object_is_named(line):
    with pytest.raises(ValueError, match=r"^line 3, is not a JSON object: "):
        list(json_lines(f'{{"a": 1}}\n\n{line}\n'))
