"""Compiled blocks that store only their inputs. Backward computes them again.

Blocks that are not compiled use torch.utils.checkpoint. It sets the random state before it computes
a block again, so that dropout repeats its mask. A CUDA graph can't capture that. In compiled blocks
the mask depends on a seed. The seed is an input, and is stored like the others.
"""

import torch
from torch import nn


def set_up_compiler():
    """Settings of torch.compile that the blocks need"""
    config = torch._dynamo.config
    # The norms' eps and LoRA's scale are constants. On a CPU they would become inputs otherwise.
    config.specialize_float = True
    # Blocks are compiled once for each combination of: kept, recomputed or evaluated; a common
    # prefix or none; with LoRA or without; float8 transposed or not. Past the limit, torch would
    # run them uncompiled, without recomputation. So reaching it is an error.
    config.recompile_limit = 64
    config.fail_on_recompile_limit_hit = True


def recompute_all(graph_module, inputs):
    """A backend of torch.compile: inductor, but only the inputs are stored for backward."""
    from torch._inductor.compile_fx import compile_fx  # this import takes two seconds

    with torch._functorch.config.patch(activation_memory_budget=0.0):  # 1.0 stores all
        return compile_fx(graph_module, inputs)


def hash_bits(bits):
    """int64 numbers below 2 ** 32 → others below 2 ** 32, which look random"""
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


class SeededDropout(nn.Module):
    """nn.Dropout, with a mask that depends on `seeds` [2], int64, and on the element's number.

    Torch's own dropout draws from a generator. A block that is computed again would draw a second
    time, and get another mask. Elements: at most 2 ** 32.
    """

    def __init__(self, p, seeds):
        super().__init__()
        self.p = p
        self.register_buffer("seeds", seeds, persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        first, second = self.seeds
        numbers = torch.arange(x.numel(), device=x.device).view(x.shape)
        is_kept = hash_bits(hash_bits(numbers ^ first) ^ second) >= round(self.p * 2**32)
        return torch.where(is_kept, x / (1 - self.p), 0)


def seed_dropouts(network, blocks):
    """Replaces every nn.Dropout of `blocks`. Each forward of `network` in training draws new seeds.

    Backward does not call `network`. So it computes with the seeds of forward.
    """
    dropouts = [
        (parent, name, child.p)
        for parent in blocks.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and child.p
    ]
    device = next(blocks.parameters()).device
    seeds = torch.zeros(len(dropouts), 2, dtype=torch.int64, device=device)
    for (parent, name, p), pair in zip(dropouts, seeds, strict=True):
        # `pair` is a view: draw_seeds changes it in place.
        setattr(parent, name, SeededDropout(p, pair).train(parent.training))

    def draw_seeds(module, inputs):
        if module.training:
            seeds.random_(2**32)

    if dropouts:
        network.register_forward_pre_hook(draw_seeds)
