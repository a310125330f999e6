"""DoRA and rsLoRA: the formulas, their files, training, merging, and train.py's fast paths.

python -m pytest -q tests/test_lora_kinds.py
"""

import json
import math
from functools import partial

import peft
import pytest
import torch
from conftest import (
    FIXTURES,
    LINEAR,
    new_run,
    random_samples,
    slow,
    trained_parameters,
    with_random_lora,
    write_layout,
)
from safetensors.torch import load_file, save_file
from test_train import CPU_AND_CUDA, cuda, trained_tensors

import data
import infer
import model as chatglm
import train
from support.adapters import adapter_tensors

BATCH = data.collate(random_samples([20, 30], 512))
KINDS = [
    pytest.param(dict(dora=True), id="DoRA"),
    pytest.param(dict(rslora=True), id="rsLoRA"),
    pytest.param(dict(dora=True, rslora=True), id="both"),
    pytest.param(dict(dora=True, target_modules=["word_embeddings", "output_layer"]), id="ends"),
]


def new_base(dtype="fp32"):
    return chatglm.load_model(FIXTURES / "tiny", "cpu", dtype)


def random_adapter(model, **options):
    """An adapter whose B and magnitudes are not what they are at first, in evaluation mode."""
    peft_model = with_random_lora(model, **dict(target_modules=LINEAR) | options)
    with torch.no_grad():
        for name, param in trained_parameters(peft_model).items():
            if "lora_magnitude_vector" in name:
                param.mul_(1 + torch.rand_like(param))
            elif "lora_embedding" in name:
                param.normal_(std=0.1)
    return peft_model.eval()


@torch.no_grad()
def logits(model, prefix_length=0):
    """Of three rows that begin alike. A prefix is computed once, as in training."""
    samples = random_samples([17, 17, 17], 512)
    for ids, _ in samples:
        ids[:4] = torch.arange(100, 104)
    batch = data.collate(samples, prefix_length)
    network = model.transformer
    hidden = network(batch.input_ids, batch.prefix).flatten(0, 1)
    return network.output_layer(hidden[batch.predicting])


# --- the formulas -----------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_computes_the_formula_of_add_lora(base, rslora, dora):
    peft_model = random_adapter(base, r=4, alpha=8, rslora=rslora, dora=dora)
    layer = base.transformer.encoder.layers[1].self_attention.query_key_value
    W, b = layer.base_layer.weight, layer.base_layer.bias
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    s = 8 / math.sqrt(4) if rslora else 8 / 4
    adapted = W + s * B @ A
    if dora:
        m = layer.lora_magnitude_vector["default"].weight
        adapted = m[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    x = torch.randn(5, W.shape[1])
    torch.testing.assert_close(layer(x), x @ adapted.T + b, rtol=1e-5, atol=1e-5)
    config = peft_model.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (rslora, dora)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_yet(kind):
    peft_model = chatglm.add_lora(new_base(), 4, 8, 0.0, **dict(target_modules=LINEAR) | kind)
    torch.testing.assert_close(logits(peft_model), logits(new_base()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dora_in_half_precision_starts_from_the_base_s_own_loss(dtype):
    """Bit for bit in train.py's micro-step. It leaves LoRA's input in the base's dtype, in which
    peft computes the norms: so they are rounded as the first magnitudes are, and cancel."""
    wanted = new_base(dtype)
    with torch.autocast("cpu", dtype=wanted.dtype):
        wanted = wanted.summed_loss(BATCH)
    peft_model = chatglm.add_lora(new_base(dtype), 4, 8, 0.0, LINEAR, dora=True)
    micro_step = train.make_micro_step(new_run(peft_model, "--device", "cpu"))
    assert torch.equal(micro_step(BATCH, torch.ones(())), wanted.detach())


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_the_same_here_and_in_plain_peft(base, tmp_path, kind):
    peft_model = random_adapter(base, **kind)
    wanted, saved = logits(peft_model), adapter_tensors(peft_model)
    assert any("magnitude" in name for name in saved) == kind.get("dora", False)
    assert not torch.allclose(wanted, logits(new_base()), atol=0.1)
    chatglm.save_adapter(peft_model, tmp_path)
    plain = peft.PeftModel.from_pretrained(new_base(), tmp_path)
    assert torch.equal(logits(plain), wanted)
    mine = chatglm.load_adapter(new_base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(mine), wanted)
    loaded = adapter_tensors(mine)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    # AdamW's moments are saved by the number of the parameter.
    assert list(trained_parameters(mine)) == list(trained_parameters(peft_model))
    again = chatglm.load_adapter(new_base(), tmp_path)
    assert not trained_parameters(again)


MAGNITUDE = "transformer.encoder.layers.1.self_attention.query_key_value.lora_magnitude_vector"
MAGNITUDE = f"base_model.model.{MAGNITUDE}"
OTHER_LAYER, NO_LAYER = (
    MAGNITUDE.replace("query_key_value", "dense"),
    MAGNITUDE.replace(".1.", ".9."),
)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(MAGNITUDE), f"missing {MAGNITUDE}"),
        (lambda w: w.update({MAGNITUDE: torch.ones(9)}), f"{MAGNITUDE} has shape [9], not [128]"),
        (lambda w: w.update({MAGNITUDE: torch.ones(128, 1)}), f"{MAGNITUDE} has shape [128, 1]"),
        (lambda w: w.update({f"{MAGNITUDE}.b": torch.ones(128)}), f"unknown {MAGNITUDE}.b"),
        (lambda w: w.update({NO_LAYER: torch.ones(128)}), "unknown base_model.model.transformer"),
        (lambda w: w.update({OTHER_LAYER: torch.ones(64)}), "self_attention.dense.lora_A"),
    ],
)
def test_a_magnitude_that_does_not_fit_is_refused(base, tmp_path, change, message):
    chatglm.save_adapter(random_adapter(base, target_modules=LINEAR[:1], dora=True), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="was not trained on this model") as error:
        chatglm.load_adapter(new_base(), tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("dora, fault", [(True, "unknown"), (False, "missing")])
def test_magnitudes_and_use_dora_go_together(base, tmp_path, dora, fault):
    chatglm.save_adapter(random_adapter(base, target_modules=LINEAR[:1], dora=dora), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": not dora}))
    with pytest.raises(ValueError, match=f"{fault} .*query_key_value.lora_magnitude_vector"):
        chatglm.load_adapter(new_base(), tmp_path)


# --- merging, answers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_gives_the_adapter_s_logits(base, tmp_path, kind):
    """As does the checkpoint that --merge-to writes, and a prefix that is computed once."""
    peft_model = random_adapter(base, **kind)
    wanted = logits(peft_model)
    torch.testing.assert_close(logits(peft_model, prefix_length=4), wanted, rtol=0, atol=1e-4)
    chatglm.save_adapter(peft_model, tmp_path / "adapter")
    merged = infer.add_adapter(new_base(), tmp_path / "adapter")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    write_layout(tmp_path / "merged", FIXTURES / "tiny", tmp_path / "adapter")
    exported = chatglm.load_model(tmp_path / "merged", "cpu")
    for model in (merged, exported):
        for prefix_length in (0, 4):
            torch.testing.assert_close(logits(model, prefix_length), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_fp16_model_answers_with_the_adapter_beside_its_weights(base, tmp_path, kind):
    """So do --load-in's quantised models, whose weights can't take the adapter in."""
    peft_model = random_adapter(base, **kind)
    wanted = logits(peft_model)
    chatglm.save_adapter(peft_model, tmp_path)
    beside = infer.add_adapter(new_base("fp16"), tmp_path, merge=False)
    assert {param.dtype for param in beside.parameters()} == {torch.half}
    assert (logits(beside) - wanted).norm() < 1e-2 * wanted.norm()
    steps = infer.Decoder(beside, infer.greedy).generate([[5, 6, 7]], 9)
    assert [id for _, id in steps if id is not None] == infer.generate_naively(beside, [5, 6, 7], 9)


# --- training ---------------------------------------------------------------------------------


def updates_of(samples, count):
    """→ the same update, of all the samples, `count` times"""
    return [data.make_update(0, len(samples), 0, samples)] * count


def train_on(run, updates):
    """Makes these updates as train.py's loop does → their losses, on the CPU"""
    micro_step, losses = train.make_micro_step(run), []
    for step, each in enumerate(updates):
        torch.manual_seed(step)  # of dropout
        loss, _ = train.train_update(micro_step, each, run.optimizer, run.scaler, max_norm=1.0)
        losses.append(loss)
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_moves_all_of_the_adapter_and_nothing_of_the_base(base, kind, dropout):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    options = dict(target_modules=LINEAR) | kind
    peft_model = chatglm.add_lora(base, 4, 8, dropout, **options)
    start = trained_tensors(peft_model)
    run = new_run(peft_model, "--device", "cpu", "--weight-decay", "0.1")
    train_on(run, updates_of(random_samples([20, 30], 512), count=3))
    per_layer = 3 if kind.get("dora") else 2
    assert len(start) == per_layer * sum("lora_A" in n or "embedding_A" in n for n in start)
    assert not any(torch.equal(t, start[name]) for name, t in trained_tensors(peft_model).items())
    after = base.state_dict().items()
    after = {n.replace(".base_layer", ""): t for n, t in after if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fp16_on_a_cpu_learns(kind, dropout):
    """In the micro-step of train.py, which leaves the input of LoRA in fp16."""
    options = dict(target_modules=LINEAR) | kind
    run = new_run(chatglm.add_lora(new_base("fp16"), 8, 32, dropout, **options), "--device", "cpu")
    run.optimizer.param_groups[0]["lr"] = 5e-3
    losses = train_on(run, updates_of(random_samples([20, 30], 512), count=20))
    assert run.scaler.is_enabled() and losses[-1] < 0.7 * losses[0]


# --- the fast paths ---------------------------------------------------------------------------


def losses_of_20_updates(device, *flags, dropout=0.0):
    """→ (20 losses, the trained tensors), of DoRA on the built-in model"""
    model = chatglm.load_model(chatglm.built_in_model(), device)
    torch.manual_seed(0)
    peft_model = chatglm.add_lora(model, 8, 32, dropout, LINEAR, dora=True)
    run = new_run(peft_model, "--device", device, "--max-steps", "20", *flags)
    losses = train_on(run, train.updates(run))
    assert len(losses) == 20
    return losses, trained_tensors(peft_model)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=slow), CPU_AND_CUDA[1]])
def test_compiled_dora_follows_eager(device):
    eager, _ = losses_of_20_updates(device, "--no-cuda-graphs")
    compiled, _ = losses_of_20_updates(device, "--no-cuda-graphs", "--compile")
    assert eager[-1] < eager[0] - 1
    tolerance = dict(rtol=0, atol=1e-5) if device == "cpu" else dict(rtol=1e-2, atol=0)
    torch.testing.assert_close(compiled, eager, **tolerance)


@cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_20_updates_with_graphs_are_bit_equal_to_launches(dropout, flags):
    runs = [
        losses_of_20_updates("cuda", graphs, *flags, dropout=dropout)
        for graphs in ("--no-cuda-graphs", "--cuda-graphs")
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], tensor) for name, tensor in runs[1][1].items())


@cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_replayed_micro_step_is_bit_equal_to_a_launched_one(compiled, dropout):
    """Losses and gradients of DoRA, for micro-batches of two shapes. No replay waits."""
    model = chatglm.load_model(chatglm.built_in_model(), "cuda")
    peft_model = random_adapter(model, dropout=dropout, dora=True).train()
    network, params = peft_model.get_base_model(), list(trained_parameters(peft_model).values())
    if compiled:
        train.compile_training(network)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)  # these gradients don't overflow
    micro_step = partial(train.forward_backward, network, scaler)
    batches = [data.collate(random_samples([n, n + 9], 1400)).to("cuda") for n in (20, 40)]
    supervised, results = torch.tensor(200.0, device="cuda"), []
    for each in (micro_step, train.CUDAGraphs(micro_step)):
        for param in params:
            param.grad = torch.zeros_like(param)
        torch.manual_seed(0)
        losses = [[each(batch, supervised) for batch in batches] for _ in range(4)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses.append([each(batch, supervised) for batch in batches])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([torch.tensor(losses), *(param.grad.clone() for param in params)])
    assert len(each.graphs) == 2
    for launched, replayed in zip(*results, strict=True):
        assert torch.equal(launched, replayed) and launched.isfinite().all() and launched.any()
    assert all(len(set(column)) == (5 if dropout else 1) for column in results[1][0].T.tolist())
