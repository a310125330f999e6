"""Writes a checkpoint of chatglm3-6b's shape and official layout with random weights.

Loading, training and decoding are measured with it where the real one is not at hand. It has 7
shards in fp16.

    python tests/benchmarks/random_checkpoint.py DIRECTORY --vocabulary tokenizer.model
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
import model as chatglm
from support import fp8
from support.bases import loading_options


@torch.no_grad()
def random_model(config, device, dtype):
    """Every matrix normal with standard deviation 0.02, every norm one, every bias zero."""
    with torch.device("meta"):
        model = chatglm.ChatGLMForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.zero_()
        elif name.endswith("layernorm.weight"):
            param.fill_(1)
        else:
            param.normal_(0, 0.02)
    return model


def random_base(config, device, dtype, load_in=None):
    """→ random_model, with the blocks' matrices quantised as model.load_model quantises them"""
    model = random_model(config, device, dtype)
    blocks = model.transformer.encoder.layers
    if load_in == "fp8":
        fp8.quantise_blocks(model, device)
    if load_in == "4bit":
        import bitsandbytes as bnb

        asked = loading_options("auto", "auto", load_in)["quantization_config"]
        kind = dict(quant_type=asked.bnb_4bit_quant_type)
        kind["compress_statistics"] = asked.bnb_4bit_use_double_quant
        for parent in [*blocks.modules()]:
            for name, old in [*parent.named_children()]:
                if type(old) is torch.nn.Linear:
                    size = (old.in_features, old.out_features, old.bias is not None)
                    new = bnb.nn.Linear4bit(*size, compute_dtype=dtype, device="meta", **kind)
                    weight = bnb.nn.Params4bit(old.weight.data, False, **kind, module=new)
                    new.weight, new.bias = weight.to(device), old.bias
                    setattr(parent, name, new)
    return model


def save(model, directory, shards):
    weights, index, last = list(model.state_dict().items()), {}, 0
    total = sum(tensor.nbytes for _, tensor in weights)
    done = 0
    parts = [{} for _ in range(shards)]
    for name, tensor in weights:
        last = min(shards - 1, done * shards // total)
        parts[last][name] = tensor
        done += tensor.nbytes
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--vocabulary", type=Path, required=True, help="the official tokenizer.model"
    )
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = chatglm.ChatGLMConfig(dtype="float16")
    model = random_model(config, "cuda" if torch.cuda.is_available() else "cpu", torch.float16)
    save(model, args.directory, shards=7)
    config.save_pretrained(args.directory)
    shutil.copy(args.vocabulary, args.directory / "tokenizer.model")
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.directory}: {count:,} random parameters in 7 shards")


if __name__ == "__main__":
    main()
