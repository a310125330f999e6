"""support/answers.py: files of records are answered, each record once.

python -m pytest -q tests/test_answers.py
"""

import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT, write_jsonl

import data
import infer
import model as chatglm
from support import answers
from support.answers import without_prediction
from support.defaults import SAMPLE
from support.files import locked
from support.records import RecordReader

Q, R = {"instruction": "q"}, {"instruction": "r"}


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def as_text(records):
    return Counter(json.dumps(record, sort_keys=True) for record in records)


# --- a batch that is stopped goes on ----------------------------------------------------------


def test_a_batch_is_killed_and_run_again(trained, tmp_path, capsys):
    adapter, device = trained
    out = tmp_path / "out.jsonl"
    flags = ["--adapter", adapter, "--device", device, "--greedy", "--input", SAMPLE]
    common = [str(flag) for flag in [*flags, "--output"]]
    infer.main([*common, str(tmp_path / "whole.jsonl")])
    wanted = read_jsonl(tmp_path / "whole.jsonl")
    records = [record.value for record in RecordReader([SAMPLE])]
    assert as_text(map(without_prediction, wanted)) == as_text(records)
    right = [line["prediction"] == line["output"] for line in wanted if "output" in line]
    assert sum(right) >= 0.9 * len(right) > 50

    command = [sys.executable, str(ROOT / "infer.py"), *common, str(out), "--batch-size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not out.exists() or len(out.read_bytes()) < 2000:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < len(records)
    with open(out, "ab") as file:
        file.write('{"instruction": "你'.encode()[:-1])  # as if it was killed while it wrote
    infer.main([*common, str(out)])
    kept = f"({before.count(10)} answers in {out} are kept; for new ones, give another --output)"
    assert kept in capsys.readouterr().err
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    # Nothing is lost, nothing is there twice, and the size of a batch makes no difference.
    assert as_text(read_jsonl(out)) == as_text(wanted)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"whole.jsonl", "out.jsonl"}  # the lock that the killed process left is gone


@pytest.fixture
def answer_files(tmp_path, capsys, monkeypatch):
    """Answers files of records with the built-in model → (lines of --output, stderr, exit code)"""
    monkeypatch.chdir(tmp_path)  # no adapter is here

    def answer(*records, out="out.jsonl", **more):
        files = [tmp_path / "in0.jsonl", *(tmp_path / name for name in more)]
        for file, content in zip(files, [records, *more.values()], strict=True):
            file.write_text("".join(json.dumps(record) + "\n" for record in content))
        flags = ["--no-adapter", "--device", "cpu", "--greedy", "--max-new-tokens", "4"]
        flags += ["--input", *files, "--output", tmp_path / out]
        code = 0
        try:
            infer.main([str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
        return (None if code else read_jsonl(tmp_path / out)), capsys.readouterr().err, code

    return answer


# --- the records and their lines --------------------------------------------------------------


def test_records_of_every_kind(answer_files, tokenizer):
    call = {"role": "assistant", "content": "call()", "metadata": "tool"}
    talk = [{"role": "user", "content": "q"}, call]
    seen = [*talk, {"role": "observation", "content": "22"}]
    answered = [*seen, {"role": "assistant", "content": "Warm."}]
    records = [
        Q | {"output": "", "id": 7, "nested": {"b": [1.5, None]}},
        Q | {"input": "t", "output": "the reference", "half": "\ud800"},
        {"conversations": talk},
        {"conversations": seen},
        {"conversations": answered, "prediction": "an older one"},
    ]
    lines, err, code = answer_files(*records)
    assert code == 0, err
    questions = [without_prediction(record) for record in records]
    assert as_text(map(without_prediction, lines)) == as_text(questions)
    by = {json.dumps(without_prediction(line)): line["prediction"] for line in lines}
    said = [by[json.dumps(question)] for question in questions]
    assert said[3] == said[4] != said[2]  # the prompt is what comes before the last answer
    model = chatglm.load_model(chatglm.BUILT_IN, "cpu")
    for messages, text in ((talk[:1], said[0]), (talk[:1], said[2]), (seen, said[3])):
        prompt_ids = data.encode_prompt(tokenizer, messages)
        ids = infer.generate_naively(model, prompt_ids, 4, tokenizer.stop_ids)
        assert data.split_answer(tokenizer, ids)[1] == text
    assert answer_files(*records)[0] == lines  # there is nothing left to do


def test_equal_records_have_a_line_each(answer_files, tmp_path):
    lines, _, code = answer_files(Q, Q, R, Q, other=[Q])
    same = [line for line in lines if line["instruction"] == "q"]
    assert code == 0 and len(same) == 4 and len(lines) == 5
    write_jsonl(tmp_path / "out.jsonl", same[:2])
    lines, _, code = answer_files(Q, Q, R, Q, other=[Q])
    same = [line for line in lines if line["instruction"] == "q"]
    assert code == 0 and len(same) == 4 and len(lines) == 5


def test_metadata_of_a_prediction_is_kept(answer_files, monkeypatch, tokenizer):
    events = [(0, id) for id in tokenizer.encode("get_weather\ncall()")] + [(0, None)]
    monkeypatch.setattr(infer.Decoder, "generate", lambda *a: events)
    lines, _, _ = answer_files(Q | {"prediction_metadata": "older"})
    assert lines == [Q | {"prediction": "call()", "prediction_metadata": "get_weather"}]


def test_answers_that_are_cut_are_counted(answer_files):
    _, err, code = answer_files(Q, R)
    assert code == 0 and "(2 of 2 answers are cut at --max-new-tokens" in err


# --- mistakes ---------------------------------------------------------------------------------

ANSWERED, OTHER = '{"instruction": "q", "prediction": "p"}\n', '{"instruction": "other", '
NOT_OURS, NOT_HERE = "not a line that infer.py wrote", "this record is not in --input"
MISSPELT = "unknown key 'instrution'; did you mean 'instruction'?"


@pytest.mark.parametrize(
    "records, there, message",
    [
        ([Q, {"instrution": "q"}], None, f"in0.jsonl:2: {MISSPELT}"),
        ([{"conversations": [{"role": "system", "content": "s"}]}], None, "nothing to answer"),
        ([Q, {"instruction": "long " * 2000}], None, "in0.jsonl:2: the prompt has"),
        ([Q], OTHER + '"prediction": "p"}\n', f"out.jsonl:1: {NOT_HERE}"),
        ([Q], ANSWERED * 2, f"out.jsonl:2: {NOT_HERE}"),
        ([Q], '{"instruction": "q", "pred\n{"instruction": "q"', f"out.jsonl:1: {NOT_OURS}"),
        ([Q], '{"instruction": "q"}\n', f"out.jsonl:1: {NOT_OURS}"),
        ([Q], "[]\n", f"out.jsonl:1: {NOT_OURS}"),
        ([Q], '{"important": "notes"}', "out.jsonl: its last line is not one that infer.py wrote"),
        ([Q], None, "nowhere/out.jsonl: there is no such directory"),
        ([Q], None, "/: cannot write there; choose another --output"),
        ([Q], None, "/dev/zero: cannot write there; choose another --output"),
    ],
)
def test_a_mistake_changes_nothing(answer_files, tmp_path, records, there, message):
    in_nowhere = message.startswith("nowhere")
    out = message.split(":")[0] if in_nowhere or message.startswith("/") else "out.jsonl"
    if there:
        (tmp_path / out).write_text(there)
    _, err, code = answer_files(*records, out=out)
    assert code == 2 and message in err and err.count("error: ") == 1
    assert (tmp_path / out).exists() == bool(there or message.startswith("/"))
    assert not there or (tmp_path / out).read_text() == there


@pytest.mark.parametrize("there", [b"", b'{"instruction": "q"'])
def test_two_batches_never_write_to_one_file(answer_files, tmp_path, there):
    (tmp_path / "out.jsonl").write_bytes(there)
    with locked(tmp_path / ".out.jsonl.lock", "out.jsonl"):
        _, err, code = answer_files(Q)
    assert code == 2 and "out.jsonl: another process is writing there" in err
    assert (tmp_path / "out.jsonl").read_bytes() == there


def test_the_answers_do_not_replace_the_questions(answer_files, tmp_path):
    _, err, code = answer_files(Q, out="in0.jsonl")
    assert code == 2 and "in0.jsonl: it is an --input; choose another --output" in err
    assert read_jsonl(tmp_path / "in0.jsonl") == [Q]


def test_an_output_that_changed_meanwhile_is_not_cut(answer_files, tmp_path, monkeypatch):
    """Another batch has finished between reading --output and locking it."""
    plain = answers._encode

    def encode(*arguments):
        (tmp_path / "out.jsonl").write_text("another's answers\n")
        return plain(*arguments)

    monkeypatch.setattr(answers, "_encode", encode)
    _, err, code = answer_files(Q)
    assert code == 2 and "out.jsonl: it has changed meanwhile" in err
    assert (tmp_path / "out.jsonl").read_text() == "another's answers\n"
