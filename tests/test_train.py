"""train.py: one update, the run, the command, and the fast paths, which give the plain path's run.

python -m pytest -q tests/test_train.py
"""

import copy
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FIXTURES,
    LIKE_BUILT_IN,
    ON_SMALL_BASE,
    metrics_of,
    random_samples,
    reference,
    refused,
    run,
    train_main,
    trained_parameters,
    write_jsonl,
)
from safetensors.torch import load_file

import data
import infer
import model as chatglm
import train
from support.defaults import SAMPLE
from support.train_flags import LINEAR_LAYERS

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=cuda)]


def trained_tensors(peft_model):
    """Copies of what is trained, as it is now."""
    return {n: param.detach().clone() for n, param in trained_parameters(peft_model).items()}


def new_optimizer(peft_model, **options):
    return torch.optim.AdamW(trained_parameters(peft_model).values(), **options)


def update(peft_model, micro_batches, optimizer, scaler=None):
    """One update as train.py's loop makes it → (the loss, the gradients' norm)"""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    micro_step = partial(train.forward_backward, peft_model.get_base_model(), scaler)
    supervised = sum(int((batch.targets != data.IGNORE).sum()) for batch in micro_batches)
    one = data.Update(0, micro_batches, samples=0, tokens=0, supervised=supervised)
    return train.train_update(micro_step, one, optimizer, scaler, max_norm=1.0)


# --- one update -------------------------------------------------------------------------------


def test_golden_training_run(golden):
    """20 updates of the official implementation: the same losses, gradient norms and adapter."""
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")
    peft_model = chatglm.load_adapter(model, directory / "adapter", is_trainable=True)
    optimizer = new_optimizer(peft_model, lr=1e-3, weight_decay=0.01)
    data_of_updates = zip(expected["train_input_ids"], expected["train_prompt_len"], strict=True)
    for step, (ids, prompt_lengths) in enumerate(data_of_updates):
        labels = ids.clone()
        for row, length in zip(labels, prompt_lengths, strict=True):
            row[:length] = data.IGNORE
        samples = list(zip(ids, labels, strict=True))
        micro_batches = [data.collate(samples[:2]), data.collate(samples[2:])]
        loss, norm = update(peft_model, micro_batches, optimizer)
        assert abs(loss - expected["train_loss"][step]) < 1e-5
        assert abs(norm - expected["train_grad_norm"][step]) < 1e-5
    assert step == 19 and len(samples) == 4
    for name, tensor in trained_tensors(peft_model).items():
        torch.testing.assert_close(tensor, expected[f"trained.{name}"], rtol=0, atol=1e-5)


def pad_more(batch, padding):
    """A MicroBatch of the same samples, with more padding on the right of each row."""
    length = batch.input_ids.shape[1]
    row, column = batch.predicting // length, batch.predicting % length
    return batch._replace(
        input_ids=F.pad(batch.input_ids, (0, padding)),
        predicting=row * (length + padding) + column,
    )


def test_neither_the_split_into_micro_batches_nor_padding_nor_a_prefix_matters(base):
    # Its LoRA starts away from zero, so that every gradient counts.
    start = chatglm.load_adapter(base, FIXTURES / "tiny" / "adapter", is_trainable=True)
    samples = random_samples([9, 12, 17, 23, 24, 31, 33, 40], 512)
    for ids, labels in samples:
        ids[:9] = torch.arange(100, 109)
        labels[2:9] = torch.arange(102, 109)  # a part of what they share is learnt
        labels[9:14] = data.IGNORE

    def update_of(rows, padding=0, prefix_length=0):
        peft_model = copy.deepcopy(start)
        parts = [samples[i : i + rows] for i in range(0, 8, rows)]
        micro_batches = [data.collate(part, prefix_length) for part in parts]
        if padding:
            micro_batches = [pad_more(batch, padding) for batch in micro_batches]
        # SGD at rate 1: the change is the clipped gradient. AdamW's first step is only its sign.
        optimizer = torch.optim.SGD(trained_parameters(peft_model).values(), lr=1.0)
        loss, norm = update(peft_model, micro_batches, optimizer)
        return {**trained_tensors(peft_model), "loss": loss, "norm": norm}

    wanted = update_of(8)
    assert wanted["norm"] > 1  # so the update was clipped
    for how in ((4,), (2,), (1,), (8, 16), (1, 8), (8, 0, 8), (2, 0, 8), (4, 0, 5), (1, 0, 8)):
        for name, tensor in update_of(*how).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_the_base_is_bit_identical_after_training(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft_model = chatglm.add_lora(base, 4, 8, 0.1, LINEAR_LAYERS)
    start = trained_tensors(peft_model)
    optimizer = new_optimizer(peft_model, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        batch = data.collate(random_samples([20, 30], 512, seed))
        update(peft_model.train(), [batch], optimizer)
    assert not any(torch.equal(t, start[name]) for name, t in trained_tensors(peft_model).items())
    after = base.state_dict().items()
    after = {n.replace(".base_layer", ""): t for n, t in after if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def half_precision():
    base = chatglm.load_model(FIXTURES / "tiny", "cpu", "fp16")
    peft_model = chatglm.add_lora(base, 8, 32, 0.0, ["query_key_value", "dense_4h_to_h"])
    return peft_model, new_optimizer(peft_model, lr=5e-3)


def test_fp16_on_a_cpu_learns():
    peft_model, optimizer = half_precision()
    scaler, batch = torch.amp.GradScaler("cpu"), data.collate(random_samples([20, 30], 512))
    losses = [update(peft_model, [batch], optimizer, scaler)[0].item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_an_fp16_overflow_skips_the_update_and_lowers_the_scale():
    peft_model, optimizer = half_precision()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batch = data.collate(random_samples([20, 30], 512))
    before = trained_tensors(peft_model)
    _, norm = update(peft_model, [batch], optimizer, scaler)
    assert not torch.isfinite(norm) and scaler.get_scale() == 2.0**39
    assert all(torch.equal(t, before[name]) for name, t in trained_tensors(peft_model).items())


def test_learning_rate():
    def rates(schedule, warmup_steps):
        flags = ["--learning-rate", "1", "--lr-schedule", schedule]
        args = train.parse_args([*flags, "--warmup-steps", str(warmup_steps)])
        return [round(train.learning_rate(step, 6, args), 3) for step in range(6)]

    assert rates("linear", 0) == [1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    assert rates("linear", 2) == [0.333, 0.667, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", 2) == [0.333, 0.667, 1.0, 0.854, 0.5, 0.146]
    assert rates("constant", 1) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


# --- the run ----------------------------------------------------------------------------------


TRAINED = (
    "alpaca_empty_history.json alpaca_empty_system.json alpaca_history.json alpaca_null_input.json "
    "alpaca_system.json conversation_id.jsonl conversations_with_system_beside.jsonl "
    "ends_with_user.jsonl extra_from_key.jsonl glm3_loss_false.jsonl glm3_tool_turn.json "
    "glm3_tools_top_level.jsonl openai_content_parts.jsonl openai_weight0.jsonl "
    "prompt_response.jsonl qa.csv sharegpt.json starts_with_assistant.jsonl "
    "two_paragraph_answers.jsonl advertisegen.jsonl"
).split()


@pytest.mark.parametrize("name", TRAINED)
def test_a_file_of_a_reported_kind_is_trained_on(tmp_path, name):
    """Files such as people have sent. The others are refused: see test_records.py."""
    flags = ["--data", reference(f"cases/{name}"), "--max-steps", 2, "--device", "cpu"]
    keys = ["--keys", "content=instruction", "summary=output"]
    train_main(*flags, *(keys if "advertisegen" in name else []), "--output-dir", tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_run_writes_what_it_says_and_repeats_bit_for_bit(tmp_path):
    """One run is made in a new process, and one in this process, perhaps after others."""
    records = [{"instruction": f"n {i}", "output": f"m {i * i}"} for i in range(21)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", file, "--max-steps", 7, "--save-steps", 3, "--logging-steps", 2]
    flags += ["--system", "甲"]
    a, b = tmp_path / "a", tmp_path / "b"
    done = run("train.py", *flags, "--output-dir", a)
    assert done.returncode == 0, done.stderr
    train_main(*flags, "--output-dir", b)
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors", "training_args.json"]
    state = ["metrics.jsonl", "training_state.json", "training_state.safetensors", "SHA256SUMS"]
    whole = [f"checkpoint-{n}/{name}" for n in (3, 6, 7) for name in adapter + state]
    assert names == sorted([*adapter, "metrics.jsonl", "run.args", *whole])
    for name in names:
        if name == "run.args":  # which names the directory
            continue
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    lines = [(line["step"], line["epoch"]) for line in metrics_of(a)]
    assert lines == [(2, 0), (4, 1), (6, 1), (7, 2)]
    out = done.stdout
    assert out.startswith("The built-in tiny model, random weights.")
    assert "21 samples" in out and "249,856 parameters" in out and "⟦\n" in out
    assert f"python infer.py --adapter {a} --prompt" in out
    assert '"system": "甲"' in (a / "training_args.json").read_text("utf-8")
    weights, half = (load_file(d / "adapter_model.safetensors") for d in (a, a / "checkpoint-3"))
    assert any(not torch.equal(weights[name], half[name]) for name in weights)


def test_logged_loss_is_the_mean_over_learnt_tokens(tmp_path):
    """At rate 0, each line's loss is that of the untouched base, which is computed directly."""
    answers = ["a", "b c d e f g h i j k l m n o p q r s t", "c d"]
    records = [{"instruction": "x", "output": answer} for answer in answers]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", file, "--epochs", 1, "--learning-rate", 0, "--logging-steps", 100]
    flags += ["--batch-size", 1, "--gradient-accumulation-steps", 2, "--device", "cpu"]
    train_main(*flags, "--output-dir", tmp_path / "out")
    (logged,) = metrics_of(tmp_path / "out")
    model = chatglm.load_model(chatglm.BUILT_IN, "cpu")
    tokenizer = data.ChatGLMTokenizer(chatglm.BUILT_IN)
    dataset = data.ConversationDataset([file], tokenizer, 512)
    total = 0.0
    for ids, labels in dataset:
        learnt = (labels != data.IGNORE).sum()
        total += model(ids[None], labels=labels[None]).loss.item() * learnt.item()
    assert logged["loss"] == pytest.approx(total / sum(dataset.supervised), abs=1e-5)
    assert logged["tokens"] == sum(dataset.lengths)


def test_overflows_are_counted_and_shown(tmp_path, monkeypatch, capsys):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = "--dtype fp16 --device cpu --max-steps 20 --logging-steps 5".split()
    train_main(*ON_SMALL_BASE, *flags, "--batch-size", 1, "--output-dir", tmp_path)
    lines = metrics_of(tmp_path)
    skipped = lines[-1]["skipped"]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert 1 <= skipped < 20 and lines[-1]["loss_scale"] == 2.0 ** (26 - skipped)
    shown = capsys.readouterr()
    assert f"{skipped} updates skipped because fp16 overflowed" in shown.out
    assert f"skipped={skipped}" in shown.err


def spoil_the_loss(monkeypatch, factor, first):
    """The loss of micro-batch `first`, counted from 1, and of all later ones, times `factor`."""
    plain, calls = chatglm.ChatGLMForCausalLM.summed_loss, []

    def spoilt(*args):
        calls.append(0)
        return plain(*args) * (factor if len(calls) >= first else 1)

    monkeypatch.setattr(chatglm.ChatGLMForCausalLM, "summed_loss", spoilt)


def places(tokenizer, size, number):
    """Where the samples of update `number`, counted from 0, of the sample's first epoch are."""
    dataset = data.ConversationDataset([SAMPLE], tokenizer, 512)
    order = data.update_order(range(len(dataset)), dataset.lengths, size, 42, 0)
    return ", ".join(dataset.places[i] for i in order[number])


def test_a_run_that_diverges_stops_and_saves_nothing(tmp_path, tokenizer, monkeypatch, capsys):
    spoil_the_loss(monkeypatch, torch.nan, first=1)
    flags = "--max-steps 9 --save-steps 5 --dtype fp32 --device cpu --output-dir".split()
    told = refused(capsys, *flags, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.args"]
    where = f"of the samples at {places(tokenizer, 8, 0)}; the last intact checkpoint is none"
    assert f"NaN or infinite since update 1, {where}" in told


def test_a_loss_that_stays_infinite_in_fp16(tmp_path, tokenizer, monkeypatch, capsys):
    """The message names the first update, its samples, and the last intact checkpoint."""
    spoil_the_loss(monkeypatch, torch.inf, first=15)  # that is update 8, of two micro-batches
    flags = "--max-steps 60 --save-steps 5 --logging-steps 1 --dtype fp16 --device cpu".split()
    flags += [*ON_SMALL_BASE, "--batch-size", "1", "--gradient-accumulation-steps", "2"]
    told = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    where = f"of the samples at {places(tokenizer, 2, 7)}; the last intact checkpoint is "
    assert f"NaN or infinite since update 8, {where}" in told
    lines = metrics_of(tmp_path / "out")
    assert (lines[-1]["step"], lines[-1]["skipped"]) == (26, 19) and lines[6]["skipped"] == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_whole_modules_train_and_answer_in_half_precision(tmp_path, dtype):
    directory, device = tmp_path / "out", ["--device", "cpu", "--dtype", dtype]
    flags = ["--target-modules", "word_embeddings", "query_key_value"]
    flags += ["--modules-to-save", "output_layer", "final_layernorm", *device]
    flags += ["--batch-size", 2, "--max-steps", 8, "--logging-steps", 2]
    train_main(*ON_SMALL_BASE, *flags, "--output-dir", directory)
    losses = [line["loss"] for line in metrics_of(directory)]
    assert losses[-1] < losses[0]
    names = load_file(directory / "adapter_model.safetensors").keys()
    assert sum("output_layer.weight" in n or "final_layernorm.weight" in n for n in names) == 2
    assert sum("word_embeddings" in n for n in names) == 2
    args = infer.parse_args(["--prompt", "q", "--adapter", str(directory), *device])
    model, tokenizer, preamble = infer.load(args)
    model = infer.add_adapter(model, args.adapter)
    decoder = infer.new_assistant(args, model, tokenizer, preamble).decoder
    assert len(list(decoder.generate([[5, 6, 7]], 3))) == 4  # three ids, and the end


# --- the command ------------------------------------------------------------------------------

NO_CUDA = [(["--device", "cuda"], "PyTorch finds no CUDA device here")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere.json"], "nowhere.json: No such file or directory; check the path"),
        (
            ["--data", "bad.jsonl"],
            "bad.jsonl:2: unknown key 'instrution'; did you mean 'instruction'?",
        ),
        (["--data", "empty.jsonl"], "empty.jsonl: it has no records"),
        (
            ["--data", "long.jsonl", "--max-length", "8"],
            "no sample has a token to learn within 8 tokens",
        ),
        (["--data", "/dev/zero"], "/dev/zero: not a file; check the path"),
        (["--model", "./nowhere"], "neither a directory nor a hub id"),
        (["--model", "no_weights"], "no_weights: cannot load this model"),
        (["--model", "\udcff"], "'\\udcff' is not valid UTF-8"),
        (["--system", "\udcff"], "'\\udcff' is not valid UTF-8"),
        (["--max-length", "2000"], "this model takes at most 1024 tokens"),
        (["--output-dir", "bad.jsonl/out"], "bad.jsonl/out: cannot write there"),
        (["--output-dir", ""], "--output-dir : cannot write there"),
        (["--target-modules", "query_key_vale"], "did you mean 'query_key_value'?"),
        (["--target-modules", "(*"], "is not a regular expression"),
        (["--target-modules", "nothing.*"], "no module of the model is named 'nothing.*'"),
        (["--target-modules", "self_attention"], "is no linear layer"),
        (["--modules-to-save", "outputlayer"], "did you mean 'output_layer'?"),
        (["--lora-r", "1.5"], "invalid whole number value: '1.5'"),
        (["--lora-dropout", "1"], "must be between 0.0 and 0.99"),
        (["--learning-rate", "nan"], "must be between 0.0 and"),
        (["--batch-size", "0"], "must be between 1 and"),
        (["--seed", "9" * 30], "must be between 0 and"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--gradient-checkpointing", "most"], "must be all, off, auto, or a number of blocks"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a CUDA device; leave it out"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--learn", "1"], "unrecognized arguments: --learn 1"),
        *([] if torch.cuda.is_available() else NO_CUDA),
    ],
)
def test_a_user_s_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    """Nothing is written or deleted, not even with --overwrite."""
    good = {"instruction": "a", "output": "b"}
    write_jsonl(tmp_path / "bad.jsonl", [good, {"instrution": "a", "output": "b"}])
    write_jsonl(tmp_path / "long.jsonl", [{"instruction": "a b c d e f g", "output": "b"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    (tmp_path / "out" / "metrics.jsonl").write_text("")  # as an earlier run leaves it
    (tmp_path / "no_weights").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "no_weights" / name).write_bytes((chatglm.BUILT_IN / name).read_bytes())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "--output-dir", "out", "--overwrite", *arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_compiling_without_a_compiler_is_told_before_anything_is_written(tmp_path):
    without = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent"}
    flags = ["--compile", "--max-steps", 2, "--device", "cpu", "--output-dir", tmp_path / "out"]
    done = run("train.py", *flags, env=os.environ | without)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "error: --compile: " in errors[0] and "leave it out" in errors[0]


@pytest.mark.parametrize(
    "flags, warning",
    [
        (["--learning-rate", 0], "--learning-rate 0: nothing is learnt"),
        (["--lora-alpha", 0], "--lora-alpha 0: LoRA's output is multiplied by 0"),
        (["--warmup-steps", 2], "--warmup-steps 2: the run has 2 updates, so the learning rate"),
        (["--warmup-steps", 1], None),
    ],
)
def test_flags_with_which_nothing_is_learnt_are_told(tmp_path, capsys, flags, warning):
    train_main("--max-steps", 2, "--output-dir", tmp_path, *flags)
    told = capsys.readouterr().out
    assert f"warning: {warning}" in told if warning else "warning" not in told


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for default in ("0.0001; without --model: 0.003", "3; without --model: 50", "output/ChatGLM"):
        assert f"(default: {default})" in shown
    assert f"(default: query_key_value; without --model: {' '.join(LINEAR_LAYERS)})" in shown


# --- the fast paths ---------------------------------------------------------------------------


def run_training(directory, *flags, device="cpu"):
    """20 updates, of the built-in model if flags name no other → (losses, the adapter's bytes)"""
    common = ["--device", device, "--max-steps", 20, "--logging-steps", 1]
    train_main("--output-dir", directory, *common, *flags)
    losses = torch.tensor([line["loss"] for line in metrics_of(directory)])
    assert len(losses) == 20
    return losses, (directory / "adapter_model.safetensors").read_bytes()


def test_checkpointed_blocks_on_a_cpu_are_bit_equal(tmp_path):
    flags = [*ON_SMALL_BASE, "--target-modules", "all"]  # with dropout
    plain = run_training(tmp_path / "plain", *flags)
    flags += ["--gradient-checkpointing"]
    for blocks in (2, "all"):
        losses, adapter = run_training(tmp_path / str(blocks), *flags, blocks)
        assert torch.equal(losses, plain[0]) and adapter == plain[1]


def test_compiled_blocks_on_a_cpu(tmp_path):
    plain, _ = run_training(tmp_path / "plain")
    compiled, _ = run_training(tmp_path / "compiled", "--compile")
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--gradient-checkpointing", "2"]])
def test_a_system_message_computed_once_or_in_each_sample(tmp_path, monkeypatch, device, flags):
    records = []
    for i in range(61):
        question = f"{i} times {i}" + "?" * (i % 9)
        answer = f"{i * i}, I think" * (1 + i % 3)
        records.append({"instruction": question, "output": answer})
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", file, "--system", "Be brief, and kind to all who ask.", *flags]
    if device == "cpu" and "--compile" not in flags:  # with it, a small model saves little time
        flags += LIKE_BUILT_IN
    once, _ = run_training(tmp_path / "once", *flags, device=device)
    lengths, collate = [], data.collate

    def collate_each(samples, prefix_length, sizes=None):
        lengths.append(prefix_length)
        return collate(samples, 0, sizes)

    monkeypatch.setattr(data, "collate", collate_each)
    in_each, _ = run_training(tmp_path / "each", *flags, device=device)
    assert min(lengths) >= 16
    tolerance = dict(rtol=0, atol=1e-5) if device == "cpu" else dict(rtol=1e-2, atol=0)
    torch.testing.assert_close(once, in_each, **tolerance)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("load_in", ["4bit", "fp8"])
def test_a_quantised_base_trains_saves_and_answers(tmp_path, capsys, load_in, device):
    if load_in == "4bit":
        pytest.importorskip("bitsandbytes", reason="needs requirements-quantization.txt")
    losses, _ = run_training(tmp_path, "--load-in", load_in, device=device)
    assert losses[-1] < losses[0] - 1
    assert f" --adapter {tmp_path} --load-in {load_in} --prompt " in capsys.readouterr().out
    flags = ["--prompt", "q", "--adapter", tmp_path, "--device", device, "--load-in", load_in]
    args = infer.parse_args([str(flag) for flag in flags])
    # The base is known again, though its matrices are quantised.
    model, tokenizer, preamble = infer.load(args)
    model = infer.add_adapter(model, args.adapter, merge=False)
    qkv = model.transformer.encoder.layers[1].self_attention.query_key_value
    assert qkv.base_layer.weight.dtype.itemsize == 1 and hasattr(qkv, "lora_A")
    decoder = infer.new_assistant(args, model, tokenizer, preamble).decoder
    assert len(list(decoder.generate([[5, 6, 7]], 5))) == 6


# --- the fast paths on CUDA -------------------------------------------------------------------


def built_in_lora_on_cuda(dropout):
    """→ (the network in training mode, what is trained)"""
    model = chatglm.load_model(chatglm.built_in_model(), "cuda")
    peft_model = chatglm.add_lora(model, 8, 32, dropout, ["query_key_value"])
    return peft_model.train().get_base_model(), list(trained_parameters(peft_model).values())


@cuda
@pytest.mark.parametrize("graphs", [False, True])
def test_an_update_never_waits_for_the_device(graphs):
    network, params = built_in_lora_on_cuda(dropout=0.1)
    scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.AdamW(params, fused=True)
    micro_step = partial(train.forward_backward, network, scaler)
    micro_step = train.CUDAGraphs(micro_step) if graphs else micro_step
    batch = data.collate(random_samples([20, 30], 1400))
    batch = data.MicroBatch(*(tensor.pin_memory() for tensor in batch))
    one = data.Update(0, [batch, batch], samples=4, tokens=100, supervised=66)
    train.train_update(micro_step, one, optimizer, scaler, 1.0)  # what is made once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = train.train_update(micro_step, one, optimizer, scaler, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@cuda
@pytest.mark.parametrize("flags", [[], ["--system", "Be brief, and kind to all who ask."]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graph_replay_is_bit_equal_to_eager(tmp_path, flags, dropout):
    """So a resumed run may launch what an undisturbed one replays. --system gives a prefix."""
    flags = ["--lora-dropout", dropout, *flags]
    eager = run_training(tmp_path / "eager", *flags, "--no-cuda-graphs", device="cuda")
    graphs = run_training(tmp_path / "graphs", *flags, "--cuda-graphs", device="cuda")
    assert torch.equal(graphs[0], eager[0]) and graphs[1] == eager[1]


@cuda
def test_compiled_graphs_follow_eager(tmp_path):
    eager, _ = run_training(tmp_path / "eager", "--no-cuda-graphs", device="cuda")
    flags = ["--compile", "--no-cuda-graphs"]
    compiled = run_training(tmp_path / "compiled", *flags, device="cuda")
    graphs = run_training(tmp_path / "graphs", "--compile", "--cuda-graphs", device="cuda")
    torch.testing.assert_close(compiled[0], eager, rtol=1e-2, atol=0)
    assert torch.equal(graphs[0], compiled[0]) and graphs[1] == compiled[1]


@cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_are_bit_equal_to_launches_and_draw_dropout_anew(compiled):
    """Losses and gradients of micro-batches of three shapes, of which two may be captured."""
    network, params = built_in_lora_on_cuda(dropout=0.5)
    if compiled:
        for layer in network.transformer.encoder.layers:
            layer.compile(dynamic=True)
    torch.manual_seed(0)
    for param in params:
        torch.nn.init.normal_(param, std=0.1)  # LoRA's B is zero at first
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)  # these gradients don't overflow
    micro_step = partial(train.forward_backward, network, scaler)
    batches = [data.collate(random_samples([n, n + 9], 1400)) for n in (20, 40, 60)]
    supervised = torch.tensor(200.0, device="cuda")
    results = []
    for each in (micro_step, train.CUDAGraphs(micro_step, max_graphs=2)):
        for param in params:
            param.grad = torch.zeros_like(param)
        torch.manual_seed(0)
        losses = [[each(b.to("cuda"), supervised) for b in batches] for _ in range(5)]
        results.append([torch.tensor(losses), *(param.grad.clone() for param in params)])
    assert len(each.graphs) == 2
    for launched, replayed in zip(*results, strict=True):
        assert torch.equal(launched, replayed) and launched.isfinite().all()
    assert all(len(set(column)) == 5 for column in results[1][0].T.tolist())


@cuda
def test_checkpointed_blocks_and_chunks_on_cuda_follow_the_plain_path(tmp_path, monkeypatch):
    common = ["--no-cuda-graphs", "--lora-dropout", 0.1]
    plain, _ = run_training(tmp_path / "plain", *common, device="cuda")
    for blocks in (1, "all"):
        flags = [*common, "--gradient-checkpointing", blocks]
        losses, _ = run_training(tmp_path / str(blocks), *flags, device="cuda")
        torch.testing.assert_close(losses, plain, rtol=1e-2, atol=0)
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 64)
    losses, _ = run_training(tmp_path / "chunks", *common, device="cuda")
    torch.testing.assert_close(losses, plain, rtol=1e-2, atol=0)
