"""The fast paths give the plain path's run."""

import json
import re
from functools import partial

import pytest
import torch
from conftest import random_samples, write_jsonl

import data
import infer
import model as chatglm
import train

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run_training(directory, *flags, device="cpu"):
    """20 updates of the built-in model → (losses, the adapter's bytes)"""
    arguments = ["--output-dir", directory, "--device", device, "--max-steps", 20, "--logging-steps", 1, *flags]
    train.main([str(argument) for argument in arguments])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    return torch.tensor([line["loss"] for line in lines]), (directory / "adapter_model.safetensors").read_bytes()


def test_partial_checkpointing_on_a_cpu_is_bit_equal(tmp_path):
    plain = run_training(tmp_path / "plain", "--lora-dropout", 0.1)
    for blocks in (2, "all"):
        losses, adapter = run_training(
            tmp_path / str(blocks), "--lora-dropout", 0.1, "--gradient-checkpointing", blocks
        )
        assert torch.equal(losses, plain[0]) and adapter == plain[1]


def test_compiled_blocks_on_a_cpu(tmp_path):
    plain, compiled = run_training(tmp_path / "plain")[0], run_training(tmp_path / "compiled", "--compile")[0]
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--gradient-checkpointing", "2"]])
def test_a_system_message_computed_once_follows_one_computed_in_each_sample(tmp_path, monkeypatch, device, flags):
    records = [
        {"instruction": f"{i} times {i}" + "?" * (i % 9), "output": f"{i * i}, I think" * (1 + i % 3)}
        for i in range(61)
    ]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", file, "--system", "Be brief, and kind to all who ask.", *flags]
    once, _ = run_training(tmp_path / "once", *flags, device=device)
    shared, collate = [], data.collate

    def collate_each(samples, tokens):
        shared.append(tokens)
        return collate(samples)

    monkeypatch.setattr(data, "collate", collate_each)
    in_each, _ = run_training(tmp_path / "each", *flags, device=device)
    assert min(shared) >= 16
    tolerance = dict(rtol=0, atol=1e-5) if device == "cpu" else dict(rtol=1e-2, atol=0)
    torch.testing.assert_close(once, in_each, **tolerance)


def test_the_loss_in_chunks_is_the_loss(base, monkeypatch):
    peft_model = chatglm.add_lora(base, 4, 8, 0.0, ["query_key_value"], ["output_layer"])
    batch = data.collate(random_samples([200, 260, 300], 512))
    results = []
    for chunk in (10**6, 128, 100):
        monkeypatch.setattr(chatglm, "LOSS_CHUNK", chunk)
        peft_model.zero_grad()
        loss = base.summed_loss(*batch.values())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in peft_model.parameters() if p.requires_grad)])
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-4)
    assert results[0][0] > 1000


@pytest.mark.parametrize("checkpointed, most", [(0, 64), (2, 8)])
def test_few_logits_are_held(base, monkeypatch, checkpointed, most):
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 64)
    base.train().transformer.encoder.checkpointed_layers = checkpointed
    sizes, plain = [], base._loss

    def loss(hidden, targets):
        sizes.append(len(hidden))
        return plain(hidden, targets)

    monkeypatch.setattr(base, "_loss", loss)
    base.summed_loss(*data.collate(random_samples([90, 110], 512)).values())
    assert sum(sizes) == 256 and set(sizes) == {most}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_chunk_drops_the_same(base, monkeypatch, compiled):
    """LoRA dropout on the output layer: the gradient along a direction is the loss's slope in that direction."""
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 128)
    peft_model = chatglm.add_lora(base, 4, 8, 0.5, ["output_layer"])
    if compiled:
        base._loss = torch.compile(base._loss, dynamic=True)
    params = [p for p in peft_model.parameters() if p.requires_grad]
    batch = data.collate(random_samples([200, 260], 512))

    def loss():
        torch.manual_seed(0)
        return base.summed_loss(*batch.values())

    for param in params:
        param.data = torch.randn(param.shape) * 0.1
    directions, step = [torch.randn_like(p) for p in params], 3e-3
    loss().backward()
    along = sum((p.grad * d).sum() for p, d in zip(params, directions, strict=True))
    values = []
    for sign in (1, -1):
        for param, direction in zip(params, directions, strict=True):
            param.data += sign * step * direction
        values.append(loss().detach())
        for param, direction in zip(params, directions, strict=True):
            param.data -= sign * step * direction
    torch.testing.assert_close(along, (values[0] - values[1]) / (2 * step), rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_quantised_base_trains_saves_and_answers(tmp_path, load_in, device):
    pytest.importorskip("bitsandbytes", reason="needs requirements-quantization.txt")
    losses, _ = run_training(tmp_path, "--load-in", load_in, device=device)
    assert losses[-1] < losses[0] - 1
    arguments = ["--prompt", "q", "--adapter", tmp_path, "--device", device, "--load-in", load_in]
    args = infer.parse_args([str(a) for a in arguments])
    base, _, _ = infer.set_up(args)  # which is known again, though its matrices are quantised
    model = infer.with_adapter(base, args)
    qkv = model.transformer.encoder.layers[1].self_attention.query_key_value
    assert qkv.base_layer.weight.dtype in (torch.uint8, torch.int8) and hasattr(qkv, "lora_A")
    assert len(list(infer.new_decoder(model, args).generate([[5, 6, 7]], 5))) == 6


def test_quantisation_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chatglm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install -r requirements-quantization.txt"):
        chatglm.load_model(chatglm.TINY, "cpu", load_in="4bit")


@cuda
@pytest.mark.parametrize("graphs", [False, True])
def test_an_update_never_waits_for_the_device(graphs):
    model = chatglm.add_lora(chatglm.load_model(chatglm.tiny_model(), "cuda"), 8, 32, 0.1, ["query_key_value"])
    params = [p for p in model.parameters() if p.requires_grad]
    scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.AdamW(params, fused=True)
    step = partial(train.micro_step, model.train().get_base_model(), scaler)
    step = train.CUDAGraphs(step) if graphs else step
    batch = data.collate(random_samples([20, 30], 1400))
    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    train.train_update(step, [batch, batch], 66, optimizer, scaler, 1.0)  # what is made once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = train.train_update(step, [batch, batch], 66, optimizer, scaler, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@cuda
@pytest.mark.parametrize("flags", [[], ["--system", "Be brief, and kind to all who ask."]])  # which is a prefix
@pytest.mark.parametrize("dropout", [0.0, 0.1])  # a run that is resumed launches what an undisturbed one replays
def test_graph_replay_is_bit_equal_to_eager(tmp_path, flags, dropout):
    flags = ["--lora-dropout", dropout, *flags]
    eager = run_training(tmp_path / "eager", *flags, "--no-cuda-graphs", device="cuda")
    graphs = run_training(tmp_path / "graphs", *flags, "--cuda-graphs", device="cuda")
    assert torch.equal(graphs[0], eager[0]) and graphs[1] == eager[1]


@cuda
def test_compiled_graphs_follow_eager(tmp_path):
    eager = run_training(tmp_path / "eager", "--no-cuda-graphs", device="cuda")[0]
    compiled = run_training(tmp_path / "compiled", "--compile", "--no-cuda-graphs", device="cuda")
    graphs = run_training(tmp_path / "graphs", "--compile", "--cuda-graphs", device="cuda")
    torch.testing.assert_close(compiled[0], eager, rtol=1e-2, atol=0)
    assert torch.equal(graphs[0], compiled[0]) and graphs[1] == compiled[1]


@cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_are_bit_equal_to_launches_and_draw_dropout_anew(compiled):
    """Micro-batches of three shapes, of which two may be captured: losses and gradients, LoRA's B not being zero."""
    model = chatglm.add_lora(chatglm.load_model(chatglm.tiny_model(), "cuda"), 8, 32, 0.5, ["query_key_value"])
    network, params = model.train().get_base_model(), [p for p in model.parameters() if p.requires_grad]
    if compiled:
        for layer in network.transformer.encoder.layers:
            layer.compile(dynamic=True)
    torch.manual_seed(0)
    for param in params:
        torch.nn.init.normal_(param, std=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)  # at which these gradients don't overflow
    step = partial(train.micro_step, network, scaler)
    batches = [data.collate(random_samples([n, n + 9], 1400)).values() for n in (20, 40, 60)]
    results = []
    for each in (step, train.CUDAGraphs(step, most=2)):
        for param in params:
            param.grad = torch.zeros_like(param)
        torch.manual_seed(0)
        losses = [
            [each(*(t.cuda() for t in batch), torch.tensor(200.0, device="cuda")) for batch in batches]
            for _ in range(5)
        ]
        results.append([torch.tensor(losses), *(param.grad.clone() for param in params)])
    assert len(each.graphs) == 2
    for launched, replayed in zip(*results, strict=True):
        assert torch.equal(launched, replayed) and launched.isfinite().all()
    assert all(len(set(column)) == 5 for column in results[1][0].T.tolist())


@pytest.mark.parametrize("needed", [0, 1, 3, 4, 5])
def test_auto_takes_as_few_blocks_as_fit(base, monkeypatch, needed):
    """A stand-in for the micro-step that runs out of memory until `needed` of the 4 blocks are checkpointed."""
    tried = []

    def step(model, *rest):
        tried.append(model.transformer.encoder.checkpointed_layers)
        if tried[-1] < needed:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "micro_step", step)
    model = chatglm.add_lora(chatglm.load_model(chatglm.tiny_model(), "cpu"), 8, 32, 0.1, ["query_key_value"])
    network, optimizer = model.get_base_model(), torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    args, scaler = train.parse_args(["--compile"]), torch.amp.GradScaler(enabled=False)
    dataset = data.ConversationDataset([data.SAMPLE], data.ChatGLMTokenizer(chatglm.TINY), 512)
    if needed > 4:
        with pytest.raises(ValueError, match="out of memory on the longest micro-batch"):
            train.make_step(args, network, scaler, optimizer, dataset)
        return
    train.make_step(args, network, scaler, optimizer, dataset)
    assert network.transformer.encoder.checkpointed_layers == needed == tried[-1]
    train.make_step(args, network, scaler, optimizer, dataset, decided=4)  # as a run that is resumed had it
    assert tried[-1] == 4
    if needed:
        with pytest.raises(ValueError, match="out of memory"):
            train.make_step(args, network, scaler, optimizer, dataset, decided=needed - 1)


@cuda
def test_out_of_memory_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    def step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "micro_step", step)
    with pytest.raises(SystemExit) as stop:
        train.main(["--output-dir", str(tmp_path / "out"), "--device", "cuda"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "try a smaller --batch-size" in capsys.readouterr().err


@cuda
def test_partial_checkpointing_and_chunks_on_cuda_follow_the_plain_path(tmp_path, monkeypatch):
    common = ["--no-cuda-graphs", "--lora-dropout", 0.1]
    plain = run_training(tmp_path / "plain", *common, device="cuda")[0]
    for blocks in (1, "all"):
        flags = [*common, "--gradient-checkpointing", blocks]
        losses = run_training(tmp_path / str(blocks), *flags, device="cuda")[0]
        torch.testing.assert_close(losses, plain, rtol=1e-2, atol=0)
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 64)
    losses = run_training(tmp_path / "chunks", *common, device="cuda")[0]
    torch.testing.assert_close(losses, plain, rtol=1e-2, atol=0)


@cuda
def test_auto_stores_what_fits(tmp_path, capsys):
    """The memory that the allocator may take is cut down until not all blocks fit, and then not even one."""
    records = [{"instruction": f"{'qr'[i % 2]}", "output": "a b c d " * 120} for i in range(64)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", str(file), "--device", "cuda", "--batch-size", "64", "--max-steps", "1"]
    total = torch.cuda.get_device_properties(0).total_memory
    outcomes = []
    try:
        for mebibytes in (8000, *range(1500, 100, -50)):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / total)
            try:
                train.main([*flags, "--output-dir", str(tmp_path / str(mebibytes))])
                outcomes.append(int(re.search(r"(\d) of \d blocks checkpointed", capsys.readouterr().out)[1]))
            except SystemExit as stop:
                assert stop.code == 2 and "out of memory on the longest micro-batch" in capsys.readouterr().err
                assert not (tmp_path / str(mebibytes)).exists()
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcomes == sorted(outcomes) and outcomes[0] == 0 and outcomes[-1] > 0 and len(outcomes) < 29
