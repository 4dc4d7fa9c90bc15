"""The journal: what was written is read back; what was damaged is dropped and said."""

import json

import pytest

from evalkit import store
from evalkit.errors import InputError
from evalkit.types import Completion

ANSWERS = [
    Completion("a" * 32, " 18\n", finish="stop", stop="\n", n_prompt=7, n_generated=3),
    Completion("b" * 32, logprobs=(-0.5, -2.25), finish="choice", n_cached=128),
    Completion("c" * 32, "", finish="context"),
    Completion("d" * 32, 'quote " and "sum":"x', finish="error", error="it broke"),
]


@pytest.fixture
def folder(tmp_path):
    made = store.create(str(tmp_path), "model", "run")
    with made:
        for answer in ANSWERS:
            made.append("gsm_cot", answer)
    return made


def test_answers_come_back_equal_and_are_plain_json(folder):
    assert list(folder.completions("gsm_cot").values()) == ANSWERS
    lines = folder.file("gsm_cot", "completions").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [a.key for a in ANSWERS]


def test_a_torn_tail_a_flipped_byte_and_a_doubled_line(folder):
    path = folder.file("gsm_cot", "completions")
    lines = path.read_bytes().splitlines(keepends=True)
    flipped = lines[1].replace(b"-0.5", b"-0.6")
    path.write_bytes(lines[0] + lines[0] + flipped + lines[2] + lines[3][:20])
    said = []
    found = folder.completions("gsm_cot", said.append)
    assert list(found.values()) == [ANSWERS[0], ANSWERS[2]]
    assert said == [f"{path}: 2 damaged lines dropped; those answers are asked for again"]


def test_an_answer_after_a_torn_tail_stands_on_its_own_line(folder):
    path = folder.file("gsm_cot", "completions")
    path.write_bytes(path.read_bytes()[:-9])
    again = Completion(ANSWERS[3].key, "second try")
    with folder:
        folder.append("gsm_cot", again)
    assert folder.completions("gsm_cot")[again.key] == again


def test_an_error_gives_way_to_a_later_answer(folder):
    with folder:
        folder.append("gsm_cot", Completion(ANSWERS[3].key, "fine"))
        folder.append("gsm_cot", Completion(ANSWERS[0].key, "another"))
    found = folder.completions("gsm_cot")
    assert (found[ANSWERS[3].key].text, found[ANSWERS[0].key].text) == ("fine", " 18\n")


def test_a_second_writer_is_refused(folder):
    with folder, pytest.raises(InputError, match="another process is writing"), store.RunFolder(folder.path):
        pass


def test_an_existing_run_is_not_written_over(folder, tmp_path):
    with pytest.raises(InputError, match="exists; choose another --name"):
        store.create(str(tmp_path), "model", "run")


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="letters, digits"):
        store.create(str(tmp_path), "model", "../x")
