"""support/bases.py: finding the base that is meant, and telling one base from another.

python -m pytest -q tests/test_bases.py
"""

import errno
import http.server
import json
import os
import re
import shutil
import threading
import time

import pytest
import torch
from conftest import ANSWER, FIXTURES, QUESTION, adapter_of, refused, refused_by_infer, run

import data
import infer
import model as chatglm
from support import bases, config
from support.config import DTYPES
from support.defaults import ADAPTER_DIR

UNFINISHED = (
    "no adapter here yet; finish the run with train.py --resume, or give a checkpoint of it, "
    "for example --adapter"
)

# --- finding a base ---------------------------------------------------------------------------


def test_a_directory_gets_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "some" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to("some")
    monkeypatch.chdir(tmp_path)
    for name in ("some/base", "./some/base/", "link/base", str(tmp_path / "some" / "base")):
        assert bases.resolve_base(name) == str(tmp_path / "some" / "base")


def test_a_hub_id_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("THUDM/chatglm3-6b", "some_one/glm_3.1"):
        assert bases.resolve_base(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "nowhere", "./no/where", "no/where/", "no/where/here", "/no/where", "a b/c", "file"],
)
def test_what_is_neither_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is neither a directory nor a hub id; --model takes"):
        bases.resolve_base(name)


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("hub", ["answers", "refuses", "is silent"])
def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(tmp_path, monkeypatch, hub):
    """Its library would try for half a minute and more."""
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:  # the system accepts for it
        if hub == "answers":
            threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if hub == "refuses" else server.server_port
        monkeypatch.setattr(bases.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(bases.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(bases.constants, "HF_HUB_CACHE", str(tmp_path))
        started = time.monotonic()
        assert bases.resolve_base("some_one/glm") == "some_one/glm"
        assert bases.constants.HF_HUB_OFFLINE == (hub != "answers")
        if hub == "answers":
            server.shutdown()
        else:
            with pytest.raises(ValueError, match="without a network, give the directory of a"):
                data.ChatGLMTokenizer("some_one/glm")
        assert time.monotonic() - started < 10


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(bases.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(bases, "get_session", lambda: time.sleep(15))
    started = time.monotonic()
    bases.go_offline_without_hub()
    assert bases.constants.HF_HUB_OFFLINE and time.monotonic() - started < 10


@pytest.mark.parametrize("where", ["directory", "config.json", "adapter"])
def test_chatglm2_is_told_in_one_line(tmp_path, monkeypatch, capsys, where):
    """Its prompts have another format."""
    config._warn_once.cache_clear()
    base = shutil.copytree(
        FIXTURES / "tiny", tmp_path / ("ChatGLM2-6b" if where == "directory" else "base")
    )
    name = "THUDM/chatglm2-6b"
    if where == "config.json":
        content = json.loads((base / "config.json").read_text()) | {"_name_or_path": name}
        (base / "config.json").write_text(json.dumps(content))
    for _ in range(2):
        path = bases.find_base(str(base))
        model = chatglm.load_model(path, "cpu")
        if where == "adapter":
            content = json.loads((base / "adapter" / "adapter_config.json").read_text())
            content["base_model_name_or_path"] = name
            (base / "adapter" / "adapter_config.json").write_text(json.dumps(content))
        chatglm.load_adapter(model, base / "adapter")
    assert capsys.readouterr().err.count("seems to be ChatGLM2") == 1


def test_a_base_without_a_configuration_has_no_dtype(tmp_path):
    with pytest.raises(ValueError, match="no model here: it has no config.json"):
        bases.own_dtype(str(tmp_path))


def test_chatglm3_is_no_chatglm2(capsys):
    config._warn_once.cache_clear()
    bases.find_base(str(FIXTURES / "tiny"))
    chatglm.load_adapter(chatglm.load_model(FIXTURES / "tiny", "cpu"), FIXTURES / "tiny/adapter")
    assert "ChatGLM2" not in capsys.readouterr().err


def test_the_base_is_the_one_given_or_the_adapter_s_or_the_built_in_one(tmp_path, monkeypatch):
    adapter = str(FIXTURES / "tiny" / "adapter")
    monkeypatch.chdir(tmp_path)
    assert bases.find_base("someone/glm", adapter, False) == "someone/glm"
    for no_adapter in (False, True):
        assert bases.find_base(None, adapter, no_adapter) == str(FIXTURES / "tiny")
    assert bases.find_base(None, ADAPTER_DIR, True) is None


def test_the_base_is_found_beside_the_adapter(tmp_path):
    base = bases.base_of_adapter(FIXTURES / "tiny" / "adapter")  # it says ".."
    assert base == str(FIXTURES / "tiny")
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "THUDM/chatglm3-6b"}')
    assert bases.base_of_adapter(tmp_path) == "THUDM/chatglm3-6b"
    config.write_text("{}")
    with pytest.raises(ValueError, match="names no base"):
        bases.base_of_adapter(tmp_path)


@pytest.mark.parametrize("file", ["SHA256SUMS", "training_state.json"])
def test_an_unfinished_run_is_told_from_no_run(tmp_path, file):
    for number in (20, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    with pytest.raises(ValueError, match="no adapter here; run train.py first"):
        bases.base_of_adapter(tmp_path)
    for number in (20, 100):
        (tmp_path / f"checkpoint-{number}" / file).touch()
    with pytest.raises(ValueError, match=re.escape(f"{UNFINISHED} {tmp_path}/checkpoint-100")):
        bases.base_of_adapter(tmp_path)


def test_a_directory_of_another_name_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-of-mine-5").mkdir()
    (tmp_path / "checkpoint-of-mine-5" / "training_state.json").touch()
    with pytest.raises(ValueError, match="no adapter here; run train.py first"):
        bases.base_of_adapter(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "nowhere: no adapter here"),
        (["--adapter", "nowhere", "--no-adapter"], "nowhere: no adapter here"),
        (["--adapter", "moved"], "its base '/gone' is not there; give --model DIR_OR_HUB_ID"),
        (["--adapter", "unfinished"], UNFINISHED),
        (["--adapter", "noted"], "training_args.json: damaged"),
    ],
)
def test_a_mistake_is_one_clear_line_of_the_command(
    tmp_path, monkeypatch, capsys, arguments, message
):
    for name, base in (("moved", "/gone"), ("noted", str(chatglm.BUILT_IN))):
        shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(config))
    (tmp_path / "noted" / "training_args.json").write_text("[1]")
    (tmp_path / "unfinished" / "checkpoint-100").mkdir(parents=True)
    (tmp_path / "unfinished" / "checkpoint-100" / "SHA256SUMS").touch()
    monkeypatch.chdir(tmp_path)
    assert message in refused_by_infer(capsys, "--prompt", "q", *arguments)


def test_a_hub_id_is_read_from_the_hub_s_cache(trained, tmp_path, capsys):
    adapter, device = trained
    cached = tmp_path / "hub" / "models--someone--glm"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(chatglm.BUILT_IN, cached / "snapshots" / ("0" * 40))
    common = ["--adapter", adapter, "--device", device, "--prompt", QUESTION, "--greedy"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("infer.py", *common, "--model", "someone/glm", env=environment)
    assert done.stdout == f"{ANSWER}\n", done.stderr
    with pytest.raises(SystemExit) as stop:
        infer.main([str(each) for each in (*common, "--model", "someone/else")])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "someone/else: cannot read the vocabulary" in told
    assert len(told.splitlines()) <= 2 and "Traceback" not in told


# --- the base is the one that was trained on --------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-32k"])
def test_a_fingerprint_is_the_same_in_every_dtype_and_only_that_base_s(name):
    def found(model):
        return bases.fingerprint(model, "a digest")

    in_each = [found(chatglm.load_model(FIXTURES / name, "cpu", dtype)) for dtype in DTYPES]
    first = in_each[0]
    assert first == in_each[1] == in_each[2] and first["vocabulary"] == "a digest"
    assert len(first["fixed"]) == len(first["matrices"]) == 64
    model = chatglm.load_model(FIXTURES / name, "cpu")
    with torch.no_grad():
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight.neg_()
    other = found(model)
    assert other["fixed"] == first["fixed"] and other["matrices"] != first["matrices"]
    with torch.no_grad():
        model.transformer.output_layer.weight.neg_()
    assert found(model)["fixed"] != first["fixed"]


@pytest.mark.parametrize(
    "base, what",
    [
        ({}, None),
        ({"matrices": None}, None),  # trained on a quantised base
        ({"shape": {"num_layers": 3}}, "other shape"),
        ({"vocabulary": "0"}, "other vocabulary"),
        ({"fixed": "0"}, "other weights"),
        ({"matrices": "0"}, "other weights"),
    ],
)
def test_another_base_is_refused_unless_forced(tmp_path, capsys, base, what):
    adapter = adapter_of(tmp_path / "a", **base)
    common = ["--adapter", str(adapter), "--device", "cpu", "--prompt", "q"]
    common += ["--max-new-tokens", "3"]
    if what:
        error = refused_by_infer(capsys, *common)
        assert f"{adapter} was trained on a base with {what}; give that one with --model" in error
        infer.main([*common, "--no-adapter"])
        common.append("--force")
    infer.main(common)


def test_training_stores_what_its_base_is(trained):
    adapter, _ = trained
    base = json.loads((adapter / "training_args.json").read_text())["base"]
    digest = data.ChatGLMTokenizer(chatglm.BUILT_IN).digest
    assert base == bases.fingerprint(chatglm.load_model(chatglm.BUILT_IN, "cpu"), digest)


@pytest.mark.parametrize("tools", [[], 3, {"names": 3}, {"names": [["f"]]}])
def test_what_an_adapter_says_of_its_tools_may_be_damaged(tmp_path, tools):
    (tmp_path / "training_args.json").write_text(json.dumps({"tools": tools}))
    if not tools:  # it says nothing
        assert bases.trained_with(tmp_path) == (None, {}, {})
        return
    with pytest.raises(ValueError, match="training_args.json: damaged; copy it again"):
        bases.trained_with(tmp_path)


def test_an_adapter_in_place_of_a_base_is_told(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    for told in (
        refused(capsys, "--model", tmp_path, "--output-dir", tmp_path / "out"),
        refused_by_infer(capsys, "--model", tmp_path, "--prompt", "q"),
    ):
        assert f"{tmp_path} is an adapter, not a base: infer.py takes it as --adapter" in told


def test_a_built_in_model_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text((chatglm.BUILT_IN / "config.json").read_text())
    monkeypatch.setattr(chatglm, "BUILT_IN", tmp_path)

    def replace(*paths):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    told = refused(capsys, "--output-dir", tmp_path / "out")
    what = f"the built-in model can't be written to {tmp_path}: Permission denied"
    assert f"{what}; give --model, or use a copy of the project" in told
