"""What a device can do: finding one, and the attention kernels that torch has for it.

python -m pytest -q tests/test_devices.py
"""

import warnings

import pytest
import torch
from conftest import (
    metrics_of,
    random_samples,
    refused,
    refused_by_infer,
    train_main,
    trained_parameters,
    with_random_lora,
)

import data
import infer
import model as chatglm
from support import bases, devices

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version."
)


def pretend(monkeypatch, is_available, error=None):
    """torch finds a GPU, or finds none and says `error`, as it does on a user's machine."""

    def init():
        if error:
            raise error

    def look():
        if error:  # as torch does
            warnings.warn(f"CUDA initialization: {error}", stacklevel=2)
        return is_available

    monkeypatch.setattr(torch.cuda, "is_available", look)
    monkeypatch.setattr(torch.cuda, "init", init)


NO_GPU = [
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("Found no NVIDIA driver on your system."),
    RuntimeError("No CUDA GPUs are available"),
]


# --- finding a device -------------------------------------------------------------------------


def test_a_gpu_is_taken_unless_the_cpu_is_wanted(monkeypatch):
    pretend(monkeypatch, is_available=True)
    found = [devices.find_device(wanted) for wanted in ("auto", "cuda", "cpu")]
    assert found == ["cuda", "cuda", "cpu"]


@pytest.mark.parametrize("error", NO_GPU, ids=str)
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch, error):
    pretend(monkeypatch, False, error)
    assert devices.find_device("auto") == devices.find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="^--device cuda: .* no CUDA device .*--device cpu$"):
        devices.find_device("cuda")


def test_a_driver_that_is_too_old_is_told_and_the_cpu_still_works(monkeypatch):
    """Training on the CPU in silence would be a bad surprise."""
    pretend(monkeypatch, False, RuntimeError(OLD_DRIVER))
    for wanted in ("auto", "cuda"):
        with pytest.raises(ValueError) as refusal:
            devices.find_device(wanted)
        text = str(refusal.value)
        assert text.startswith(f"--device {wanted}: ") and "driver is too old" in text
        assert torch.__version__ in text
        assert "update the driver" in text and "--device cpu" in text
    assert devices.find_device("cpu") == "cpu"


@pytest.mark.parametrize("error", [*NO_GPU, RuntimeError(OLD_DRIVER)], ids=str)
@pytest.mark.parametrize("wanted", ["auto", "cuda", "cpu"])
def test_torch_s_own_warning_is_not_shown(monkeypatch, recwarn, wanted, error):
    pretend(monkeypatch, False, error)
    warnings.simplefilter("always")
    try:
        devices.find_device(wanted)
    except ValueError:
        assert wanted != "cpu"
    assert not recwarn.list


@pytest.mark.parametrize("flags", [[], ["--device", "cuda"], ["--load-in", "fp8"]], ids=str)
def test_both_commands_tell_of_an_old_driver_in_one_line(tmp_path, monkeypatch, capsys, flags):
    pretend(monkeypatch, False, RuntimeError(OLD_DRIVER))
    line = refused(capsys, "--output-dir", tmp_path / "out", *flags)
    assert line.startswith("train.py: error: --device ") and "driver is too old" in line
    assert not (tmp_path / "out").exists()
    line = refused_by_infer(capsys, "--no-adapter", "--prompt", "q", *flags)
    assert line.startswith("infer.py: error: --device ") and "driver is too old" in line


def test_both_commands_refuse_cuda_without_a_gpu_in_one_line(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, False, NO_GPU[0])
    line = refused(capsys, "--output-dir", tmp_path / "out", "--device", "cuda")
    assert "--device cuda" in line and "use --device cpu" in line
    line = refused_by_infer(capsys, "--no-adapter", "--prompt", "q", "--device", "cuda")
    assert "--device cuda" in line and "use --device cpu" in line


def test_the_cpu_trains_under_an_old_driver_without_a_word_about_it(tmp_path, monkeypatch, recwarn):
    pretend(monkeypatch, False, RuntimeError(OLD_DRIVER))
    warnings.simplefilter("always")
    train_main("--output-dir", tmp_path, "--device", "cpu", "--max-steps", 1)
    assert len(metrics_of(tmp_path)) == 1
    assert not [each for each in recwarn if "driver" in str(each.message)]


def test_a_card_without_float8_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    """The message of check_float8 itself is in test_fp8.py."""
    monkeypatch.setattr(bases, "find_device", lambda wanted: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    line = refused(capsys, "--output-dir", tmp_path / "out", "--load-in", "fp8")
    assert "8.9" in line and "7.5" in line and "--load-in 4bit" in line
    line = refused_by_infer(capsys, "--no-adapter", "--prompt", "q", "--load-in", "fp8")
    assert "8.9" in line and "7.5" in line and "--load-in 4bit" in line


# --- other accelerators -----------------------------------------------------------------------


def pretend_accelerator(monkeypatch, kind):
    """torch finds an accelerator of this kind, or none."""

    def look(check_available=False):
        assert check_available  # else torch names what it was built for
        return kind and torch.device(kind)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", look)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_another_accelerator_is_taken_only_by_its_name(monkeypatch, kind):
    pretend(monkeypatch, False, NO_GPU[0])
    pretend_accelerator(monkeypatch, kind)
    found = [devices.find_device(wanted) for wanted in (kind, "cpu", "auto")]
    assert found == [kind, "cpu", "cpu"]
    with pytest.raises(ValueError, match="^--device cuda: "):
        devices.find_device("cuda")


NOT_THERE = [  # (what torch finds, what is wanted, how it is shown, what there is)
    (None, "mps", "mps", "cpu"),
    ("cuda", "mps", "mps", "cpu and cuda"),
    ("mps", "xpu", "xpu", "cpu and mps"),
    (None, "gpu", "gpu", "cpu"),
    (None, "cuda:0", "cuda:0", "cpu"),
    (None, "a\nb", r"'a\nb'", "cpu"),
]


@pytest.mark.parametrize("found, wanted, shown, there", NOT_THERE)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch, found, wanted, shown, there
):
    pretend_accelerator(monkeypatch, found)
    with pytest.raises(ValueError) as refusal:
        devices.find_device(wanted)
    what = "PyTorch finds no such device here"
    assert str(refusal.value) == f"--device {shown}: {what}; there is {there}"


def test_both_commands_refuse_another_accelerator_without_one_in_one_line(
    tmp_path, monkeypatch, capsys
):
    pretend_accelerator(monkeypatch, None)
    told = "error: --device mps: PyTorch finds no such device here; there is cpu"
    line = refused(capsys, "--output-dir", tmp_path / "out", "--device", "mps")
    assert line == f"train.py: {told}" and not (tmp_path / "out").exists()
    line = refused_by_infer(capsys, "--no-adapter", "--prompt", "q", "--device", "mps")
    assert line == f"infer.py: {told}"


def test_fp8_needs_a_card_or_a_cpu():
    devices.check_float8("cpu")
    with pytest.raises(ValueError, match="^--load-in fp8 needs --device cuda or cpu, not mps$"):
        devices.check_float8("mps")


# --- attention for grouped heads --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_cpu_has_grouped_attention_for_every_dtype(monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert devices.has_grouped_attention(torch.device("cpu"), dtype)


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_grouped_attention_on_cuda_needs_a_kernel_a_card_and_a_dtype(
    monkeypatch, capability, flash, cudnn
):
    asked = []

    def get_device_capability(device=None):
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: flash)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)
    device = torch.device("cuda", 1)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    found = [devices.has_grouped_attention(device, dtype) for dtype in dtypes]
    has_one = capability >= (8, 0) and (flash or cudnn)
    assert found == [has_one, has_one, False]
    assert set(asked) <= {device}  # not of the card that is current


def without_grouped_attention(monkeypatch):
    """The network then repeats keys and values. → a list that grows by what it asked for"""
    asked = []

    def has_grouped_attention(device, dtype):
        asked.append((device, dtype))
        return False

    monkeypatch.setattr(chatglm, "has_grouped_attention", has_grouped_attention)
    return asked


@pytest.mark.parametrize("prefix_length", [0, 5])
def test_repeated_keys_and_values_give_the_same_logits_and_gradients(
    base, monkeypatch, prefix_length
):
    peft_model = with_random_lora(base).train()
    model = peft_model.get_base_model()
    samples = random_samples([20, 27, 31], 512)
    for ids, _ in samples:
        ids[:prefix_length] = samples[0][0][:prefix_length]
    batch = data.collate(samples, prefix_length)
    assert len(batch.prefix) == prefix_length

    def outcome():
        peft_model.zero_grad()
        hidden = model.transformer(batch.input_ids, batch.prefix)
        logits = model.transformer.output_layer(hidden).detach()
        (model.summed_loss(batch) / 50).backward()
        return logits, {n: param.grad for n, param in trained_parameters(peft_model).items()}

    grouped = outcome()
    asked = without_grouped_attention(monkeypatch)
    repeated = outcome()
    assert asked == [(model.device, torch.float32)] * 2 * len(model.transformer.encoder.layers)
    assert all(grad.abs().max() > 1e-3 for grad in grouped[1].values())
    torch.testing.assert_close(repeated, grouped, rtol=1e-5, atol=1e-5)


def answer_of(model, prompts, count=20):
    """→ the greedy ids that each prompt is answered with"""
    answers = [[] for _ in prompts]
    for row, id in infer.Decoder(model).generate(prompts, count):
        answers[row] += [] if id is None else [id]
    return answers


def test_repeated_keys_and_values_give_the_same_answers(base, monkeypatch):
    """The cache holds what was not repeated."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [400]]
    wanted = answer_of(base, prompts)
    assert len({id for ids in wanted for id in ids}) > 5
    asked = without_grouped_attention(monkeypatch)
    assert answer_of(base, prompts) == wanted
    assert len(asked) == len(base.transformer.encoder.layers)  # prefill asks, a step does not


# --- the name of the kernel -------------------------------------------------------------------


def test_the_kernel_of_a_cpu_has_a_name(base):
    assert devices.attention_kernel(base) == "flash attention"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert devices.attention_kernel(base) == "math"


def test_a_device_without_a_choice_of_kernels_trains(tmp_path, monkeypatch, capsys):
    """On mps, torch has no such function."""

    def missing(*_, **__):
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice'")

    monkeypatch.setattr(torch, "_fused_sdp_choice", missing)
    train_main("--output-dir", tmp_path, "--device", "cpu", "--max-steps", 1)
    assert "attention: default kernel" in capsys.readouterr().out


def test_training_tells_its_attention_kernel_before_the_first_update(tmp_path, capsys, base):
    train_main("--output-dir", tmp_path, "--device", "cpu", "--max-steps", 1)
    out = capsys.readouterr().out
    assert f" attention: {devices.attention_kernel(base)} kernel\n" in out
    assert out.index("attention:") < out.index("speed ")


# --- on CUDA, where only efficient attention is left ------------------------------------------


@pytest.fixture
def enable_kernels():
    """enable_kernels(bool) → flash, cuDNN's and math attention may be chosen, or may not"""
    flags = torch.backends.cuda
    before = flags.flash_sdp_enabled(), flags.cudnn_sdp_enabled(), flags.math_sdp_enabled()

    def enable(*wanted):
        flags.enable_flash_sdp(wanted[0])
        flags.enable_cudnn_sdp(wanted[1])
        flags.enable_math_sdp(wanted[2])
        torch.compiler.reset()  # compiled code has decided between the kernels

    yield lambda wanted: enable(*[wanted] * 3)
    enable(*before)


@cuda
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_training_with_efficient_attention_follows_the_other_kernels(
    tmp_path, capsys, enable_kernels, dtype, flags
):
    losses = []
    for are_enabled in (True, False):
        enable_kernels(are_enabled)
        common = ["--device", "cuda", "--dtype", dtype, "--max-steps", 20, "--logging-steps", 1]
        train_main("--output-dir", tmp_path / str(are_enabled), *common, *flags)
        losses.append(torch.tensor([m["loss"] for m in metrics_of(tmp_path / str(are_enabled))]))
    assert "attention: efficient attention kernel\n" in capsys.readouterr().out
    assert len(losses[0]) == 20 and losses[0][-1] < losses[0][0] - 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)


@cuda
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_efficient_attention_answers(enable_kernels, dtype):
    model = chatglm.load_model(chatglm.built_in_model(), "cuda", dtype)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [400]]
    ids = torch.tensor([list(range(5, 69))], device="cuda")
    with torch.no_grad():
        wanted = model(ids).logits.double()
        enable_kernels(False)
        assert devices.attention_kernel(model) == "efficient attention"
        found = model(ids).logits.double()
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    answers = answer_of(model, prompts)
    assert [len(ids) for ids in answers] == [20] * 3
