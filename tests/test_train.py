import copy
import json
import os
from functools import partial

import pytest
import torch
from conftest import FIXTURES, random_samples, run, write_jsonl
from safetensors.torch import load_file

import data
import infer
import model as chatglm
import train


def lora_state(peft_model):
    return {n.replace(".default", ""): p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}


def new_optimizer(peft_model, **kwargs):
    return torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], **kwargs)


def update(peft_model, micro_batches, optimizer, scaler=None):
    """One update as train.py's loop makes it → (loss, norm)"""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    step = partial(train.micro_step, peft_model.get_base_model(), scaler)
    supervised = sum(int((batch["targets"] != data.IGNORE).sum()) for batch in micro_batches)
    return train.train_update(step, micro_batches, supervised, optimizer, scaler, max_grad_norm=1.0)


# --- the update -------------------------------------------------------------------------------------------------------


def test_golden_training_run(golden):
    """20 updates of the official implementation: the same losses, gradient norms and adapter."""
    directory, expected = golden
    peft_model = chatglm.load_adapter(chatglm.load_model(directory, "cpu"), directory / "adapter", is_trainable=True)
    optimizer = new_optimizer(peft_model, lr=1e-3, weight_decay=0.01)
    for step, (ids, prompt_len) in enumerate(
        zip(expected["train_input_ids"], expected["train_prompt_len"], strict=True)
    ):
        labels = ids.clone()
        for row, length in zip(labels, prompt_len, strict=True):
            row[:length] = data.IGNORE
        micro_batches = [data.collate(list(zip(ids[i : i + 2], labels[i : i + 2], strict=True))) for i in (0, 2)]
        loss, norm = update(peft_model, micro_batches, optimizer)
        assert abs(loss - expected["train_loss"][step]) < 1e-5
        assert abs(norm - expected["train_grad_norm"][step]) < 1e-5
    assert step == 19
    for name, tensor in lora_state(peft_model).items():
        torch.testing.assert_close(tensor, expected[f"trained.{name}"], rtol=0, atol=1e-5)


def trainable_base(base):
    """Its LoRA starts away from zero, so that every gradient counts."""
    return chatglm.load_adapter(base, FIXTURES / "tiny" / "adapter", is_trainable=True)


def test_the_split_into_micro_batches_does_not_matter_nor_does_padding_or_a_shared_prefix(base):
    start = trainable_base(base)
    samples = random_samples([9, 12, 17, 23, 24, 31, 33, 40], 512)
    for ids, labels in samples:
        ids[:9] = torch.arange(100, 109)
        labels[2:9] = torch.arange(102, 109)  # a part of what they share is learnt
        labels[9:14] = data.IGNORE

    def split_update(split, padding=0, shared=0):
        peft_model = copy.deepcopy(start)
        micro_batches = [data.collate(samples[i : i + split], shared) for i in range(0, 8, split)]
        for batch in micro_batches if padding else []:
            rows, length = batch["input_ids"].shape
            row, column = batch["positions"] // length, batch["positions"] % length
            batch["positions"] = row * (length + padding) + column
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, padding))
        # SGD at rate 1: the change is the clipped gradient itself, which AdamW's first step would hide in its sign
        optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
        loss, norm = update(peft_model, micro_batches, optimizer)
        return {**lora_state(peft_model), "loss": loss, "norm": norm}

    wanted = split_update(8)
    assert wanted["norm"] > 1  # so the update was clipped
    for how in ((4,), (2,), (1,), (8, 16), (1, 8), (8, 0, 8), (2, 0, 8), (4, 0, 5), (1, 0, 8)):
        for name, tensor in split_update(*how).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_the_base_is_bit_identical_after_training(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft_model = chatglm.add_lora(base, 4, 8, 0.1, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
    lora = lora_state(peft_model)
    optimizer = new_optimizer(peft_model, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        batch = data.collate(random_samples([20, 30], 512, seed))
        update(peft_model.train(), [batch], optimizer)
    assert not any(torch.equal(tensor, lora[name]) for name, tensor in lora_state(peft_model).items())
    after = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items() if "lora_" not in n}
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
    scaler, batch = torch.amp.GradScaler("cpu", init_scale=2.0**40), data.collate(random_samples([20, 30], 512))
    before = lora_state(peft_model)
    _, norm = update(peft_model, [batch], optimizer, scaler)
    assert not torch.isfinite(norm) and scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state(peft_model).items())


def test_overflows_are_counted_and_shown(tmp_path, monkeypatch, capsys):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, **kwargs, init_scale=2.0**26))
    train.main(f"--dtype fp16 --device cpu --max-steps 20 --logging-steps 5 --output-dir {tmp_path}".split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = lines[-1]["skipped"]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert 1 <= skipped < 20 and lines[-1]["loss_scale"] == 2.0 ** (26 - skipped)
    shown = capsys.readouterr()
    assert f"{skipped} updates skipped because fp16 overflowed" in shown.out
    assert f"skipped={skipped}" in shown.err


def test_a_run_that_diverges_stops_and_saves_nothing(tmp_path, tokenizer, monkeypatch, capsys):
    loss = chatglm.ChatGLMForCausalLM.summed_loss
    monkeypatch.setattr(chatglm.ChatGLMForCausalLM, "summed_loss", lambda *args: loss(*args) * torch.nan)
    flags = "--max-steps 9 --save-steps 5 --dtype fp32 --device cpu".split()
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--output-dir", str(tmp_path)])
    assert stop.value.code == 2 and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    told = capsys.readouterr().err
    assert "NaN or infinite since update 1, of the samples at" in told and "last intact checkpoint is none" in told
    first = data.batch_order(data.ConversationDataset([data.SAMPLE], tokenizer, 512).lengths, 8, 42, 0)[0]
    assert all(f"sample.jsonl:{i + 1}" in told for i in first)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_whole_modules_train_and_answer_in_half_precision(tmp_path, dtype):
    directory, target = tmp_path / "out", ["--target-modules", "word_embeddings", "query_key_value"]
    flags = [
        "--modules-to-save",
        "output_layer",
        "final_layernorm",
        "--dtype",
        dtype,
        "--device",
        "cpu",
        "--max-steps",
        20,
    ]
    train.main([str(a) for a in [*target, *flags, "--output-dir", directory, "--logging-steps", 5]])
    losses = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    names = load_file(directory / "adapter_model.safetensors").keys()
    assert sum("output_layer.weight" in n or "final_layernorm.weight" in n for n in names) == 2
    assert sum("word_embeddings" in n for n in names) == 2
    args = infer.parse_args(["--prompt", "q", "--adapter", str(directory), "--device", "cpu", "--dtype", dtype])
    model = infer.with_adapter(infer.set_up(args)[0], args)
    assert len(list(infer.new_decoder(model, args).generate([[5, 6, 7]], 3))) == 4  # three ids, and the end


def test_learning_rate():
    def rates(schedule, warmup):
        return [round(train.learning_rate(step, 6, 1.0, warmup, schedule), 3) for step in range(6)]

    assert rates("linear", 0) == [1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    assert rates("linear", 2) == [0.333, 0.667, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", 2) == [0.333, 0.667, 1.0, 0.854, 0.5, 0.146]
    assert rates("constant", 1) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says_and_repeats_bit_for_bit(tmp_path):
    data_file = write_jsonl(
        tmp_path / "d.jsonl", [{"instruction": f"n {i}", "output": f"m {i * i}"} for i in range(21)]
    )
    arguments = ["--data", data_file, "--max-steps", 7, "--save-steps", 3, "--logging-steps", 2, "--system", "甲"]
    runs = [run("train.py", *arguments, "--output-dir", tmp_path / name) for name in "ab"]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors", "training_args.json"]
    whole = [*adapter, "metrics.jsonl", "training_state.json", "training_state.safetensors", "SHA256SUMS"]
    assert names == sorted([*adapter, "metrics.jsonl", *(f"checkpoint-{n}/{f}" for n in (3, 6, 7) for f in whole)])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0), (4, 1), (6, 1), (7, 2)]
    out = runs[0].stdout
    assert out.startswith("The built-in tiny model, random weights.")
    assert "21 samples" in out and "249,856 parameters" in out and "⟦\n" in out
    assert f"python infer.py --adapter {tmp_path / 'a'} --prompt" in out
    assert json.loads((tmp_path / "a" / "training_args.json").read_text("utf-8"))["system"] == "甲"
    weights, half = (load_file(tmp_path / "a" / d / "adapter_model.safetensors") for d in (".", "checkpoint-3"))
    assert any(not torch.equal(weights[name], half[name]) for name in weights)


def test_logged_loss_is_the_mean_over_learnt_tokens(tmp_path):
    """Rate 0: every line's loss is that of the untouched base, which can be computed directly."""
    answers = ["a", "b c d e f g h i j k l m n o p q r s t", "c d"]
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "x", "output": a} for a in answers])
    size = ["--batch-size", 1, "--gradient-accumulation-steps", 2]
    arguments = ["--data", file, "--epochs", 1, "--learning-rate", 0, "--logging-steps", 100, *size]
    train.main([str(a) for a in [*arguments, "--output-dir", tmp_path / "out", "--device", "cpu"]])
    logged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    model, tokenizer = chatglm.load_model(chatglm.TINY, "cpu"), data.ChatGLMTokenizer(chatglm.TINY)
    dataset = data.ConversationDataset([file], tokenizer, 512)
    sums = [model(ids[None], labels=labels[None]).loss * (labels != data.IGNORE).sum() for ids, labels in dataset]
    assert logged["loss"] == pytest.approx(sum(sums).item() / dataset.supervised, abs=1e-5)
    assert logged["tokens"] == sum(dataset.lengths)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere.json"], "nowhere.json: No such file or directory; check the path"),
        (["--data", "bad.jsonl"], "bad.jsonl:2: unknown key 'instrution'; did you mean 'instruction'?"),
        (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["--data", "long.jsonl", "--max-length", "8"], "no sample has a token to learn within 8 tokens"),
        (["--model", "./nowhere"], "neither a directory nor a hub id"),
        (["--model", "no_weights"], "no_weights: cannot load this model"),
        (["--target-modules", "query_key_vale"], "did you mean 'query_key_value'?"),
        (["--modules-to-save", "outputlayer"], "did you mean 'output_layer'?"),
        (["--target-modules", "(*"], "is not a regular expression"),
        (["--target-modules", "(.*)+dense"], "at most three of * + ? {, and none of them after a bracket"),
        (
            ["--lora-r", "1024", "--target-modules", "query_key_value"],
            "LoRA's rank 1024 is more than its layers have, ",
        ),
        (["--target-modules", "nothing.*"], "no module of the model is named 'nothing.*'"),
        (["--target-modules", "self_attention"], "is no linear layer"),
        (["--batch-size", "0"], "must be between 1 and"),
        (["--learning-rate", "nan"], "must be between 0.0 and"),
        (["--lora-dropout", "1"], "must be between 0.0 and 0.99"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--seed", "9" * 30], "must be between 0 and"),
        (["--lora-r", "1.5"], "invalid whole number value: '1.5'"),
        (["--system", "\udcff"], "'\\udcff': not UTF-8"),
        (["--max-length", "2000"], "this model takes at most 1024 tokens"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--learn", "1"], "unrecognized arguments: --learn 1"),
        (["--gradient-checkpointing", "most"], "invalid number of blocks value: 'most'"),
        (["--model", "\udcff"], "'\\udcff': not UTF-8"),
        (["--output-dir", "bad.jsonl/out"], "bad.jsonl/out: cannot write there"),
        (["--output-dir", ""], "--output-dir : cannot write there"),
        (["--data", "/dev/zero"], "/dev/zero: not a file; check the path"),
    ]
    + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "PyTorch finds no CUDA device here")]),
)
def test_a_user_s_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": "b"}, {"instrution": "a", "output": "b"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    (tmp_path / "out" / "metrics.jsonl").write_text("")  # as an earlier run leaves it
    write_jsonl(tmp_path / "long.jsonl", [{"instruction": "a b c d e f g", "output": "b"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "no_weights").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "no_weights" / name).write_bytes((chatglm.TINY / name).read_bytes())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--output-dir", "out", "--overwrite", *arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_compiling_without_a_compiler_is_a_clear_line_before_anything_is_written(tmp_path):
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent"}
    flags = ["--compile", "--max-steps", 2, "--device", "cpu", "--output-dir", tmp_path / "out"]
    done = run("train.py", *flags, env=os.environ | caches)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and "error: --compile: " in errors[0] and "leave it out" in errors[0], done.stderr


def test_help_shows_every_default():
    done = run("train.py", "--help")
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0 and "(default: 0.0001)" in shown and "(default: output/ChatGLM)" in shown
