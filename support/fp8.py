"""--load-in fp8: the blocks' matrices in float8 (e4m3), with one scale a row.

Tensor cores multiply float8 matrices twice as fast as fp16. Both factors of a product must be
float8. So each product first rounds its activations, with one scale a row. A matrix takes half the
memory of fp16. Where memory allows, training also stores its transpose, because backward is faster
with it.
"""

import torch
from torch import nn

E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa; the largest number is 448


def quantise(x):
    """x [N, K] → (q [N, K] in float8, scale [N, 1] in fp32), with x ≈ q × scale

    Zeros stay zeros. What is not finite stays not finite, so that GradScaler sees it.
    """
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x.float() / scale).to(E4M3), scale


def scaled_product(x, q, scale, dtype):
    """x [M, K], q [N, K], scale [N, 1] → about x times the transpose of q × scale: [M, N]"""
    x, x_scale = quantise(x)
    # With one scale a row, not all cards can return fp16.
    options = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch._scaled_mm(x, q.t(), x_scale, scale.t(), **options).to(dtype)


class Float8Product(torch.autograd.Function):
    """scaled_product, with the gradient of x. The weights are frozen."""

    @staticmethod
    def forward(ctx, x, q, scale, transposed):
        ctx.save_for_backward(q, scale, transposed)
        return scaled_product(x, q, scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        q, scale, transposed = ctx.saved_tensors
        if transposed is None:
            transposed = q.t().contiguous()  # _scaled_mm reads its second factor by columns
        # Backward sums over the rows of q. So their scales are multiplied into the gradient, and
        # the rows of the transpose have the scale 1.
        ones = torch.ones_like(transposed[:, :1], dtype=torch.float32)
        return scaled_product(grad * scale.t(), transposed, ones, grad.dtype), None, None, None


class Float8Linear(nn.Linear):
    """A frozen nn.Linear in float8."""

    def __init__(self, linear, device):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype  # peft makes LoRA's weights in this dtype
        q, scale = quantise(linear.weight.detach().to(device))
        self.weight, self.bias = nn.Parameter(q, requires_grad=False), linear.bias
        self.register_buffer("scale", scale)
        self.register_buffer("transposed", None)  # for backward: see store_transposed

    def forward(self, x):
        rows = x.flatten(0, -2)
        if len(rows) == 1 and torch.compiler.is_compiling():
            # With one row, most of the time is reading the weights. Compiled code converts them as
            # it reads them. So x need not be rounded.
            # as_strided makes inductor store x. Else it computes x (SiLU, a norm) for each output.
            row = rows.contiguous().as_strided((self.in_features,), (1,))
            y = (self.weight.float() * row.float()).sum(1) * self.scale.squeeze(1)
            y = y.to(x.dtype)
        else:
            y = Float8Product.apply(rows, self.weight, self.scale, self.transposed)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def quantise_blocks(model, device):
    """Quantises every nn.Linear of the blocks, one by one on the device. → the model, all there"""
    for parent in [*model.transformer.encoder.layers.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Float8Linear(child, device))
    return model.to(device)


def float8_layers(model):
    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def store_transposed(model):
    """Stores the transposes of all float8 matrices, or none if memory runs out."""
    try:
        for layer in float8_layers(model):
            if layer.transposed is None:
                layer.transposed = layer.weight.t().contiguous()
    except torch.OutOfMemoryError:
        drop_transposed(model)


def drop_transposed(model):
    """Frees the transposes. → whether there were any"""
    stored = [layer for layer in float8_layers(model) if layer.transposed is not None]
    for layer in stored:
        layer.transposed = None
    return bool(stored)
