"""--load-in fp8: the product in float8, the model that it gives, and training and answers with it.

python -m pytest -q tests/test_fp8.py
"""

import copy

import pytest
import torch
from conftest import (
    metrics_of,
    random_samples,
    read_conversations,
    refused,
    refused_by_infer,
    train_main,
    trained_parameters,
    with_random_lora,
)
from torch import nn

import data
import infer
import model as chatglm
from support import bases, devices, fp8
from support.defaults import SAMPLE
from support.train_flags import LINEAR_LAYERS

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def error(found, wanted):
    """→ the norm of the difference, as a share of the norm of what is wanted"""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def rounded(x):
    """x [N, K] → what is left of it in float8, in fp64"""
    q, scale = fp8.quantise(x)
    return q.double() * scale.double()


def new_layer(dtype=torch.float32, bias=True, device="cpu"):
    """→ (an nn.Linear whose rows differ much in size, the same in float8)"""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 1, 80)[:, None]
    linear = linear.to(device, dtype)
    return linear, fp8.Float8Linear(copy.deepcopy(linear), device).to(device)


def forward_and_backward(layer, x, grad):
    """→ (the output, the gradient of x)"""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


def new_batch(dtype=torch.float32, device="cpu"):
    """→ (x [3, 5, 96], a gradient [3, 5, 80]) whose rows differ much in size"""
    torch.manual_seed(1)
    sizes = torch.logspace(-1, 1, 15).view(3, 5, 1)
    return [(torch.randn(3, 5, n) * sizes).to(device, dtype) for n in (96, 80)]


# --- rounding to float8 -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", CPU_AND_CUDA)
def test_an_element_is_within_half_a_step_of_itself(dtype, device):
    """Of 3 bits after the first, half a step is 2^-4. The smallest numbers are 2^-9 apart."""
    torch.manual_seed(0)
    x = torch.randn(60, 48) * torch.logspace(-4, 2, 60)[:, None] * torch.logspace(-4, 0, 48)
    x = x.to(device, dtype)
    q, scale = fp8.quantise(x)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (60, 1)
    x, scale = x.double(), scale.double()
    half_step = torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    assert ((q.double() * scale - x).abs() <= half_step * (1 + 1e-5)).all()
    assert (q.double().abs().amax(dim=1) == 448).all()  # each row uses the whole range
    assert (q.double() * x >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_stays_zeros(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    x[1] = 1.0
    q, scale = fp8.quantise(x)
    assert scale.isfinite().all()
    assert torch.equal(q.float() * scale, x.float())


def test_rounding_keeps_every_sign():
    """bases.fingerprint relies on it."""
    x = torch.tensor([[100.0, 1e-9, -1e-9, -1.0]])
    q, _ = fp8.quantise(x)
    assert torch.equal(q.float().signbit(), x.signbit())


# --- the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_and_gradient_are_those_of_the_rounded_factors(dtype, bias, device):
    """Only the sum is rounded then, to bf16."""
    linear, layer = new_layer(dtype, bias, device)
    x, grad = new_batch(dtype, device)
    y, x_grad = forward_and_backward(layer, x, grad)
    assert y.shape == (3, 5, 80) and x_grad.shape == x.shape
    assert y.dtype == x_grad.dtype == dtype
    weight = layer.weight.double() * layer.scale.double()
    assert error(weight, linear.weight) < 0.04
    wanted = rounded(x.flatten(0, 1)) @ weight.T + (linear.bias.double() if bias else 0)
    # Backward sums over the rows of the weights. So it is the gradient that takes their scales.
    wanted_grad = rounded(grad.flatten(0, 1) * layer.scale.T) @ layer.weight.double()
    for row, wanted_row in zip(y.flatten(0, 1), wanted, strict=True):
        assert error(row, wanted_row) < 1e-2
    for row, wanted_row in zip(x_grad.flatten(0, 1), wanted_grad, strict=True):
        assert error(row, wanted_row) < 1e-2


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_and_gradient_are_near_those_of_the_layer_itself(dtype, bias, device):
    linear, layer = new_layer(dtype, bias, device)
    x, grad = new_batch(dtype, device)
    y, x_grad = forward_and_backward(layer, x, grad)
    wanted, wanted_grad = forward_and_backward(linear.double(), x.double(), grad.double())
    assert error(y, wanted) < 0.06 and error(x_grad, wanted_grad) < 0.06


def test_the_bias_is_added_once_and_unrounded():
    linear, layer = new_layer()
    assert torch.equal(layer(torch.zeros(2, 96)), linear.bias.expand(2, -1))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)], ids=str)
def test_a_card_without_float8_is_refused(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(ValueError) as refusal:
        devices.check_float8("cuda")
    major, minor = capability
    text = str(refusal.value)
    assert "8.9 or more" in text and f"has {major}.{minor};" in text and "4bit" in text
    devices.check_float8("cpu")


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)], ids=str)
def test_a_card_with_float8_is_taken(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(devices, "multiply_float8", lambda device: None)
    devices.check_float8("cuda")


def test_a_torch_without_this_product_is_told(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("only per-tensor scaling\nException raised from …")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    what = r"can't multiply float8 matrices on this cpu \(RuntimeError: only per-tensor scaling\); "
    with pytest.raises(ValueError, match=what):
        devices.check_float8("cpu")


def test_the_weights_are_frozen():
    layer = new_layer()[1]
    assert not layer.weight.requires_grad and not layer.scale.requires_grad
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert (layer.in_features, layer.out_features) == (96, 80)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_transposed_copy_changes_no_bit(dtype, device):
    layer = new_layer(dtype, device=device)[1]
    x, grad = new_batch(dtype, device)
    without = forward_and_backward(layer, x, grad)
    fp8.store_transposed(layer)
    assert layer.transposed.shape == (96, 80)
    stored = forward_and_backward(layer, x, grad)
    assert torch.equal(stored[0], without[0]) and torch.equal(stored[1], without[1])


def test_transposes_are_stored_for_all_matrices_and_dropped_again():
    layers = nn.Sequential(new_layer()[1], new_layer()[1], nn.Linear(2, 2))
    assert not fp8.drop_transposed(layers)
    fp8.store_transposed(layers)
    first, second = layers[0].transposed, layers[1].transposed
    assert torch.equal(first.float(), layers[0].weight.float().t()) and second is not None
    fp8.drop_transposed(layers[0])
    fp8.store_transposed(layers)
    assert layers[0].transposed is not None and layers[1].transposed is second
    assert fp8.drop_transposed(layers)
    assert layers[0].transposed is layers[1].transposed is None
    assert not fp8.drop_transposed(layers)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(dtype, bad):
    """GradScaler must see an overflow. Rounding must not hide it."""
    layer = new_layer(dtype)[1]
    x, grad = new_batch(dtype)
    y, x_grad = forward_and_backward(layer, x, grad)
    bad_x, bad_grad = x.clone(), grad.clone()
    bad_x[0, 1, 7] = bad_grad[2, 3, 4] = bad
    found, found_grad = forward_and_backward(layer, bad_x, bad_grad)
    assert not found[0, 1].isfinite().any() and not found_grad[2, 3].isfinite().any()
    # The other rows are as they were.
    found[0, 1], found_grad[2, 3] = y[0, 1], x_grad[2, 3]
    assert torch.equal(found, y) and torch.equal(found_grad, x_grad)


def test_a_gradient_that_overflows_fp16_is_not_finite():
    layer = new_layer(torch.float16)[1]
    x, grad = new_batch(torch.float16)
    _, x_grad = forward_and_backward(layer, x, torch.full_like(grad, 60000.0))
    assert x_grad.isinf().any()


def test_grad_scaler_skips_the_step_of_an_overflow():
    layer, lora = new_layer(torch.float16)[1], nn.Linear(96, 96)
    x, grad = new_batch(torch.float16)
    grad[0, 0, 0] = torch.inf
    optimizer, scaler = torch.optim.SGD(lora.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    before = lora.weight.detach().clone()
    scale = scaler.scale(torch.ones(()))
    layer(lora(x.float()).half()).backward(grad)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(lora.weight, before) and scaler.get_scale() == scale / 2


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@torch.no_grad()
def test_compiled_code_widens_the_weights_for_one_row(device):
    """So one row is not rounded. Several rows are, as in eager code."""
    torch.compiler.reset()
    layer = new_layer(device=device)[1]
    x = new_batch(device=device)[0]
    compiled = torch.compile(layer, dynamic=False)
    one = x[:1, :1]
    y = compiled(one)
    weight = layer.weight.double() * layer.scale.double()
    wanted = one.double() @ weight.T + layer.bias.double()
    assert y.shape == (1, 1, 80) and error(y, layer(one)) < 0.06
    assert error(y, wanted) < 1e-3 < error(layer(one), wanted)
    assert error(compiled(x), layer(x)) < 1e-2


# --- the model --------------------------------------------------------------------------------


def load(load_in=None, device="cpu", dtype="auto"):
    return chatglm.load_model(chatglm.built_in_model(), device, dtype, load_in)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_matrices_of_the_blocks_are_float8_and_no_other(dtype):
    model, plain = load("fp8", dtype=dtype), load(dtype=dtype)
    layers = dict(model.named_modules())
    linear = {name: layer for name, layer in plain.named_modules() if type(layer) is nn.Linear}
    assert len(linear) == 4 * 4 + 1
    for name, layer in linear.items():
        is_of_a_block = ".layers." in name
        assert type(layers[name]) is (fp8.Float8Linear if is_of_a_block else nn.Linear)
        assert layers[name].weight.dtype == (fp8.E4M3 if is_of_a_block else layer.weight.dtype)
        assert layers[name].weight.shape == layer.weight.shape
    others = {n: p for n, p in plain.named_parameters() if not (".layers." in n and p.ndim > 1)}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in others.items())
    assert model.dtype == plain.dtype and not model.training


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_fingerprint_of_the_base_stays(tokenizer, dtype):
    found = bases.fingerprint(load("fp8", dtype=dtype), tokenizer.digest)
    assert found == bases.fingerprint(load(), tokenizer.digest)
    assert found["matrices"] and found["fixed"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_new_lora_weights_are_those_on_the_base_itself(dtype):
    """In fp32: peft would otherwise make them in the dtype of the weights beside them."""
    made = []
    for load_in in (None, "fp8"):
        torch.manual_seed(7)
        peft_model = chatglm.add_lora(load(load_in, dtype=dtype), 8, 32, 0.0, LINEAR_LAYERS)
        made.append(trained_parameters(peft_model))
    assert made[0].keys() == made[1].keys() and len(made[0]) == 4 * 4 * 2
    for name, param in made[0].items():
        assert param.dtype == made[1][name].dtype == torch.float32
        assert torch.equal(param, made[1][name])
        assert param.any() == ("lora_A" in name)


@pytest.mark.parametrize("saved_on, loaded_on", [(None, "fp8"), ("fp8", None)])
def test_an_adapter_of_one_base_loads_on_the_other(tmp_path, saved_on, loaded_on):
    trained = with_random_lora(load(saved_on), target_modules=LINEAR_LAYERS)
    chatglm.save_adapter(trained, tmp_path)
    loaded = chatglm.load_adapter(load(loaded_on), tmp_path, is_trainable=True)
    saved, found = trained_parameters(trained), trained_parameters(loaded)
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted, logits = trained.eval()(ids).logits, loaded.eval()(ids).logits
        base_logits = load(loaded_on)(ids).logits
    assert error(logits, wanted) < 0.2 < error(base_logits, wanted)


def test_the_loss_and_its_gradients_are_near_those_of_the_base_itself():
    batch = data.collate(random_samples([20, 30], 1400))
    results = []
    for load_in in (None, "fp8"):
        peft_model = with_random_lora(load(load_in), target_modules=LINEAR_LAYERS).train()
        loss = peft_model.get_base_model().summed_loss(batch) / 30
        loss.backward()
        params = trained_parameters(peft_model)
        results.append((loss, torch.cat([param.grad.flatten() for param in params.values()])))
    assert error(results[1][0], results[0][0]) < 0.02
    assert error(results[1][1], results[0][1]) < 0.5


# --- training ---------------------------------------------------------------------------------


def run_training(directory, *flags, device="cpu", steps=30):
    """`steps` updates of the built-in model → (losses, the adapter's bytes)"""
    common = ["--device", device, "--max-steps", steps, "--logging-steps", 1]
    train_main("--output-dir", directory, *common, *flags)
    losses = torch.tensor([line["loss"] for line in metrics_of(directory)])
    assert len(losses) == steps
    return losses, (directory / "adapter_model.safetensors").read_bytes()


def test_losses_on_a_cpu_follow_those_of_the_base_itself(tmp_path):
    plain, _ = run_training(tmp_path / "plain")
    quantised, _ = run_training(tmp_path / "fp8", "--load-in", "fp8")
    assert plain[-1] < plain[0] - 2 and not torch.equal(quantised, plain)
    torch.testing.assert_close(quantised, plain, rtol=0.02, atol=0)


def answers_of(directory, load_in, tokenizer, device="cuda"):
    """→ the greedy answers of a run's adapter to the sample's questions, as infer.py gives them"""
    model = infer.add_adapter(load(load_in, device), directory, merge=not load_in)
    questions = [messages[:1] for _, messages in read_conversations([SAMPLE])]
    prompts = [data.encode_prompt(tokenizer, messages) for messages in questions]
    answers = [[] for _ in prompts]
    for row, id in infer.Decoder(model).generate(prompts, 60, tokenizer.stop_ids):
        answers[row] += [] if id is None else [id]
    return answers


@cuda
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=str)
def test_losses_on_cuda_follow_those_of_the_base_itself(tmp_path, flags):
    """Two runs drift apart, as the loss falls steeply. So later losses are compared in means."""
    options = dict(device="cuda", steps=200)
    plain, _ = run_training(tmp_path / "plain", *flags, **options)
    quantised, _ = run_training(tmp_path / "fp8", *flags, "--load-in", "fp8", **options)
    assert plain[-20:].mean() < 2 and not torch.equal(quantised, plain)
    torch.testing.assert_close(quantised[:20], plain[:20], rtol=0.02, atol=0)
    means, wanted = (losses.view(10, 20).mean(dim=1) for losses in (quantised, plain))
    torch.testing.assert_close(means, wanted, rtol=0.1, atol=0)


@cuda
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=str)
def test_answers_are_those_learnt_on_the_base_itself(tmp_path, tokenizer, flags):
    """After the 750 updates of `python train.py`: after 200, the sample is not yet learnt."""
    answers = []
    for load_in in (None, "fp8"):
        directory = tmp_path / str(load_in)
        quantised = ["--load-in", load_in] if load_in else []
        train_main("--output-dir", directory, "--device", "cuda", *flags, *quantised)
        answers.append(answers_of(directory, load_in, tokenizer))
    assert len({tuple(ids) for ids in answers[0]}) > 100
    equal = sum(found == wanted for found, wanted in zip(*answers, strict=True))
    assert equal >= 0.9 * len(answers[0])


@cuda
@pytest.mark.parametrize("flags", [[], ["--system", "Be brief, and kind to all who ask."]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graph_replay_is_bit_equal_to_eager(tmp_path, flags, dropout):
    """With the transposed copies, which a graph reads where they are."""
    flags = ["--load-in", "fp8", "--lora-dropout", dropout, *flags]
    options = dict(device="cuda", steps=20)
    eager = run_training(tmp_path / "eager", *flags, "--no-cuda-graphs", **options)
    graphs = run_training(tmp_path / "graphs", *flags, "--cuda-graphs", **options)
    assert torch.equal(graphs[0], eager[0]) and graphs[1] == eager[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dora"], "DoRA does not work with --load-in fp8"),
        (["--modules-to-save", "dense"], "is quantised by --load-in, and can't be trained whole"),
    ],
)
def test_what_needs_the_weights_is_refused(tmp_path, capsys, flags, message):
    told = refused(capsys, "--load-in", "fp8", "--output-dir", tmp_path / "out", *flags)
    assert message in told and not (tmp_path / "out").exists()


def test_a_dora_adapter_is_refused(tmp_path, capsys):
    train_main("--dora", "--max-steps", 1, "--output-dir", tmp_path)
    capsys.readouterr()
    told = refused_by_infer(capsys, "--load-in", "fp8", "--adapter", tmp_path, "--prompt", "q")
    assert "DoRA does not work with --load-in fp8" in told


def test_an_adapter_with_a_whole_matrix_is_refused(tmp_path, capsys):
    train_main("--modules-to-save", "dense", "--max-steps", 1, "--output-dir", tmp_path)
    capsys.readouterr()
    told = refused_by_infer(capsys, "--load-in", "fp8", "--adapter", tmp_path, "--prompt", "q")
    assert "is quantised by --load-in, and can't be trained whole" in told
