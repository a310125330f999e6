"""What a device can do: whether there is one, and which kernels torch has for it."""

import warnings

import torch
from torch.nn.attention import SDPBackend

from support.config import DTYPES
from support.errors import one_line, printable
from support.fp8 import quantise, scaled_product


def find_device(wanted):
    """auto, cpu, cuda, or another device that torch has (mps, xpu, …) → the type of the device.

    auto is cuda or cpu. Raises ValueError if the device is not there. For auto, also if the NVIDIA
    driver is too old, because training on the CPU would be a bad surprise.
    """
    if wanted == "cpu":
        return "cpu"
    if wanted not in ("auto", "cuda"):
        other = torch.accelerator.current_accelerator(check_available=True)
        if other and other.type == wanted:
            return wanted
        what = f"--device {printable(wanted)}: PyTorch finds no such device here"
        raise ValueError(f"{what}; there is cpu{f' and {other.type}' if other else ''}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is told below
        if torch.cuda.is_available():
            return "cuda"
    try:
        torch.cuda.init()  # raises torch's reason for finding no device
        reason = ""
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    if "driver on your system is too old" in reason:
        what = f"the NVIDIA driver is too old for torch {torch.__version__}"
        remedy = "update the driver, install a torch for this one, or use --device cpu"
        raise ValueError(f"--device {wanted}: {what}; {remedy}")
    if wanted == "cuda":
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return "cpu"


def dtype_of(device, name):
    """auto, fp16, bf16 or fp32 → the torch.dtype of a base on this device"""
    return DTYPES[("fp16" if device == "cuda" else "fp32") if name == "auto" else name]


def multiply_float8(device):
    """A small product with one scale a row, which older versions of torch can't make everywhere."""
    x = torch.ones(32, 32, device=device)
    return scaled_product(x, *quantise(x), x.dtype)


def check_float8(device):
    """Raises ValueError if the device can't multiply float8 matrices. A CPU can, slowly."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--load-in fp8 needs --device cuda or cpu, not {device}")
    if device == "cuda" and (found := torch.cuda.get_device_capability()) < (8, 9):
        needs = "--load-in fp8 needs a card of compute capability 8.9 or more"
        raise ValueError(f"{needs}, and this one has {found[0]}.{found[1]}; use --load-in 4bit")
    try:
        multiply_float8(device)
    except RuntimeError as error:
        what = f"torch {torch.__version__} can't multiply float8 matrices on this {device}"
        raise ValueError(
            f"--load-in fp8: {what} ({one_line(error)}); use --load-in 4bit"
        ) from error


@torch.compiler.assume_constant_result  # compiled code asks once
def has_grouped_attention(device, dtype):
    """Whether torch has an attention kernel for grouped heads that holds no [T, T] matrix.

    On CUDA these are flash attention and cuDNN's. Without them, model.SelfAttention copies keys and
    values for each query head.
    """
    if device.type != "cuda":
        return True
    enabled = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
    is_new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
    return enabled and is_new_enough and dtype in (torch.float16, torch.bfloat16)


def attention_kernel(model):
    """→ the name of the kernel that torch chooses for this model's attention"""
    config, heads = model.config, model.config.num_attention_heads
    is_grouped = has_grouped_attention(model.device, model.dtype)
    groups = config.multi_query_group_num if is_grouped else heads
    options = dict(dtype=model.dtype, device=model.device, requires_grad=True)
    q = torch.empty(1, heads, 64, config.kv_channels, **options)
    k = torch.empty(1, groups, 64, config.kv_channels, **options)
    try:
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=is_grouped)
    except NotImplementedError:  # on mps, for example
        return "default"
    return SDPBackend(choice).name.lower().replace("_", " ")
