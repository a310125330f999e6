"""support/gguf.py: exports that llama.cpp reads, compared with llama.cpp itself.

python -m pytest -q tests/test_gguf.py
"""

import importlib.util
import json
import random

import gguf as gguf_library
import numpy as np
import pytest
import torch
from conftest import (
    ANSWER,
    LINEAR,
    QUESTION,
    adapter_of,
    merged_model,
    read_conversations,
    reference,
    refused_by_infer,
    with_random_lora,
)

import data
import infer
import model as chatglm
from support import gguf, self_check
from support.defaults import SAMPLE
from support.ollama import modelfile_text
from support.self_check import LlamaCppReader
from support.tokenizer_files import CHAT_TEMPLATE


def written(file, base, adapter=None, file_type="f32", tokenizer=None):
    """Writes a GGUF file with the built-in model's vocabulary. → its MergedModel"""
    model = merged_model(base, adapter)
    tokenizer = tokenizer or data.ChatGLMTokenizer(chatglm.BUILT_IN)
    gguf.ModelFile(model, tokenizer, CHAT_TEMPLATE, file_type).write(file, lambda count: None)
    return model


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A directory with f32.gguf, of the trained adapter in the built-in model, and the adapter"""
    adapter, _ = trained
    directory = tmp_path_factory.mktemp("gguf")
    infer.main(
        ["--adapter", str(adapter), "--gguf", str(directory / "f32.gguf"), "--gguf-type", "f32"]
    )
    return directory, adapter


def prompts_of(tokenizer, count):
    """→ ids of prompts: of the sample's conversations, from the longest on"""
    conversations = [messages for _, messages in read_conversations([SAMPLE])]
    prompts = [data.encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
    return sorted(prompts, key=len)[::-1][:count]


def largest_difference(reader, model, prompts):
    """→ (of log-probabilities, whether all greedy tokens are equal)"""
    largest, equal, compared = 0.0, True, 0
    for ids in prompts:
        answer = reader.answer(ids)
        row = ids + [step.id for step in answer]
        ours = model.logits(torch.tensor([row]))[0, len(ids) - 1 :].log_softmax(-1)
        for step, mine in zip(answer, ours, strict=False):
            assert len(step.log_probs) in (0, 20)
            for id, theirs in step.log_probs.items():
                largest = max(largest, abs(mine[id].item() - theirs))
                compared += 1
            equal &= step.id == mine.argmax().item()
    assert compared >= 20 * len(prompts)  # of each prompt's answer at least one step
    return largest, equal


def test_llama_cpp_computes_the_same(exported, tokenizer, monkeypatch):
    """20 prompts, 40 greedy tokens of each, the 20 likeliest tokens of each step, in fp32."""
    directory, adapter = exported
    monkeypatch.setattr(self_check, "NEW_TOKENS", 40)
    model = merged_model(chatglm.BUILT_IN, adapter)
    reader = LlamaCppReader(directory / "f32.gguf")
    largest, equal = largest_difference(reader, model, prompts_of(tokenizer, 20))
    assert largest < 1e-4 and equal


def test_a_long_rotary_base(tmp_path, monkeypatch):
    """rope_ratio 50, as in chatglm3-6b-32k, and 700 tokens"""
    monkeypatch.setattr(self_check, "NEW_TOKENS", 4)
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((chatglm.BUILT_IN / "config.json").read_text()) | {"rope_ratio": 50}
    (base / "config.json").write_text(json.dumps(config))
    chatglm.built_in_model()
    (base / "model.safetensors").symlink_to(chatglm.BUILT_IN / "model.safetensors")
    model = written(tmp_path / "m.gguf", base)
    ids = torch.randint(3, 1400, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    largest, equal = largest_difference(LlamaCppReader(tmp_path / "m.gguf"), model, [ids])
    assert largest < 1e-4 and equal
    other = merged_model(chatglm.BUILT_IN).logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert (other - model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)).abs().max() > 0.01


def test_the_chat_endpoint_answers(exported):
    directory, _ = exported
    reader = LlamaCppReader(directory / "f32.gguf")
    messages = [{"role": "user", "content": QUESTION}]
    found = reader.post("/v1/chat/completions", messages=messages, temperature=0)
    assert found["choices"][0]["message"]["content"].strip() == ANSWER
    assert found["choices"][0]["finish_reason"] == "stop"


def test_every_stop_id_ends_an_answer(exported, tokenizer):
    reader = LlamaCppReader(exported[0] / "f32.gguf")
    for id in tokenizer.stop_ids:
        forced = dict(n_predict=4, temperature=0, logit_bias=[[id, 1000]])
        assert reader.post("/completion", prompt=[5, 6], **forced)["stop_type"] == "eos"


def test_ids_are_sentencepiece_s(exported, tokenizer):
    """Of random texts in the prompt format, and of the sample."""
    reader = LlamaCppReader(exported[0] / "f32.gguf")
    letters = "ab  \n\t甄嬛，。𝄞é0\u3000😀<|user|>[gMASK]"
    chosen = random.Random(0)
    texts = ["".join(chosen.choices(letters, k=chosen.randrange(1, 30))) for _ in range(300)]
    texts += [m["content"] for _, messages in read_conversations([SAMPLE]) for m in messages]
    texts += ["a [MASK] b [sMASK] <s> <eop> sop"]
    special = ("<|user|>", "[gMASK]", "</s>")
    for text in texts:
        if text and not any(name in text for name in special):
            found = reader.post(
                "/tokenize", content=f"[gMASK]<sop><|user|>\n {text}", parse_special=True
            )
            wanted = data.encode_prompt(tokenizer, [{"role": "user", "content": text}])[:-1]
            assert found["tokens"] == wanted, text


def test_ids_of_the_official_vocabulary(tmp_path, official_tokenizer):
    """Of huanhuan.json's texts"""
    config = dict(num_layers=1, hidden_size=32, ffn_hidden_size=32, num_attention_heads=2)
    config |= dict(kv_channels=16, multi_query_group_num=2)
    config = chatglm.ChatGLMConfig(**config)
    chatglm.ChatGLMForCausalLM(config).save_pretrained(tmp_path / "base")
    written(tmp_path / "m.gguf", tmp_path / "base", tokenizer=official_tokenizer)
    reader = LlamaCppReader(tmp_path / "m.gguf")
    records = json.loads(reference("data/huanhuan.json").read_text("utf-8"))
    texts = {text for record in records for text in record.values() if text}
    for text in sorted(texts)[::8]:
        found = reader.post("/tokenize", content=f"<|user|>\n {text}", parse_special=True)["tokens"]
        wanted = data.encode_prompt(official_tokenizer, [{"role": "user", "content": text}])[2:-1]
        assert found == wanted, text


@pytest.mark.parametrize(
    "kind",
    [
        dict(target_modules=LINEAR),
        dict(target_modules=LINEAR, rslora=True),
        dict(target_modules=["query_key_value", "output_layer"]),
    ],
)
def test_an_adapter_beside_the_base_is_the_merged_model(tmp_path, tokenizer, monkeypatch, kind):
    monkeypatch.setattr(self_check, "NEW_TOKENS", 8)
    base = chatglm.load_model(chatglm.built_in_model(), "cpu")
    chatglm.save_adapter(with_random_lora(base, **kind), tmp_path / "a")
    written(tmp_path / "base.gguf", chatglm.BUILT_IN)
    model = written(tmp_path / "merged.gguf", chatglm.BUILT_IN, tmp_path / "a")
    gguf.write_adapter(tmp_path / "a.gguf", model)
    gguf.check_adapter(tmp_path / "a.gguf", model)
    prompts = [*prompts_of(tokenizer, 4)]
    beside = LlamaCppReader(tmp_path / "base.gguf", tmp_path / "a.gguf")
    merged = LlamaCppReader(tmp_path / "merged.gguf")
    for reader in (beside, merged):
        largest, equal = largest_difference(reader, model, prompts)
        assert largest < 1e-4 and equal
    without = LlamaCppReader(tmp_path / "base.gguf")
    assert largest_difference(without, model, prompts)[0] > 0.01


def test_alphas_and_ranks_of_single_layers(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(self_check, "NEW_TOKENS", 8)
    base = chatglm.load_model(chatglm.built_in_model(), "cpu")
    chatglm.save_adapter(with_random_lora(base, target_modules=LINEAR), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    patterns = dict(alpha_pattern={"dense": 3, "layers.1.mlp.dense_h_to_4h": 20})
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
    written(tmp_path / "base.gguf", chatglm.BUILT_IN)
    model = merged_model(chatglm.BUILT_IN, tmp_path / "a")
    assert len({layer.scaling["default"] for layer in model.lora.values()}) == 3
    gguf.write_adapter(tmp_path / "a.gguf", model)
    gguf.check_adapter(tmp_path / "a.gguf", model)
    reader = LlamaCppReader(tmp_path / "base.gguf", tmp_path / "a.gguf")
    largest, equal = largest_difference(reader, model, prompts_of(tokenizer, 3))
    assert largest < 1e-4 and equal


@pytest.mark.parametrize(
    "kind, message",
    [
        (dict(target_modules=LINEAR, dora=True), "the adapter is DoRA: a GGUF adapter can't hold"),
        (dict(modules_to_save=["output_layer"]), "the adapter replaces transformer.output_layer"),
        (dict(target_modules=["word_embeddings"]), "which is an embedding: a GGUF adapter can't"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused(tmp_path, capsys, kind, message):
    base = chatglm.load_model(chatglm.built_in_model(), "cpu")
    chatglm.save_adapter(with_random_lora(base, **kind), tmp_path / "a")
    flags = ["--adapter", tmp_path / "a", "--model", chatglm.BUILT_IN]
    flags += ["--gguf-adapter", tmp_path / "m"]
    told = refused_by_infer(capsys, *flags)
    assert message in told and "give --gguf FILE, which merges it" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_gguf_adapter_is_not_checked_without_an_adapter(tmp_path):
    base = chatglm.load_model(chatglm.built_in_model(), "cpu")
    chatglm.save_adapter(with_random_lora(base), tmp_path / "a")
    gguf.write_adapter(tmp_path / "a.gguf", merged_model(chatglm.BUILT_IN, tmp_path / "a"))
    with pytest.raises(ValueError, match="can't be compared without an adapter; give --adapter"):
        gguf.check_adapter(tmp_path / "a.gguf", merged_model(chatglm.BUILT_IN))


# --- types ------------------------------------------------------------------------------------


def answers_of(reader):
    """→ how many of the sample's questions llama.cpp answers word for word, and of how many"""
    conversations = [messages for _, messages in read_conversations([SAMPLE])]
    # llama.cpp's chat endpoint does not pass metadata on.
    plain = [each for each in conversations if not any(m.get("metadata") for m in each)]
    right = 0
    for *before, answer in plain:
        messages = [{"role": m["role"], "content": m["content"]} for m in before]
        options = dict(temperature=0, max_tokens=128)
        found = reader.post("/v1/chat/completions", messages=messages, **options)
        right += found["choices"][0]["message"]["content"].strip() == answer["content"].strip()
    return right, len(plain)


@pytest.mark.parametrize("file_type, share", [("f32", 1.0), ("q8_0", 0.95), ("q4_0", 0.9)])
def test_quantised_files_answer_the_sample(exported, tmp_path, file_type, share):
    """The share of the answers that are the same word for word"""
    _, adapter = exported
    written(tmp_path / "m.gguf", chatglm.BUILT_IN, adapter, file_type)
    right, count = answers_of(LlamaCppReader(tmp_path / "m.gguf"))
    print(f"{file_type}: {right} of {count}")
    assert right >= share * count


def test_types_of_tensors(tmp_path):
    """Norms and biases are fp32; q4_0 keeps the embedding and the output layer in q8_0; a row that
    is no multiple of a block is fp16."""
    written(tmp_path / "m.gguf", chatglm.BUILT_IN, file_type="q4_0")
    types = {
        t.name: t.tensor_type.name for t in gguf_library.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == types["blk.3.attn_qkv.bias"] == "F32"
    assert types["blk.2.ffn_down.weight"] == "Q4_0"
    assert gguf.type_of("blk.0.ffn_down.weight", (8, 48), "q8_0").name == "F16"


# --- the check --------------------------------------------------------------------------------


def export_flags(tmp_path, *flags):
    adapter = adapter_of(tmp_path / "a")
    return ["--adapter", str(adapter), "--gguf", str(tmp_path / "m.gguf"), *flags]


def change(file, name):
    """Changes one number of a tensor in a GGUF file."""
    reader = gguf_library.GGUFReader(file, "r+")
    tensor = next(each for each in reader.tensors if each.name == name)
    tensor.data.reshape(-1).view(np.float32)[5] += 1.0
    reader.data.flush()


@pytest.mark.parametrize("has_llama_cpp", [True, False])
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "output.weight"])
def test_a_changed_tensor_is_found(tmp_path, monkeypatch, capsys, name, has_llama_cpp):
    """The export is deleted, and the error names the tensor."""
    write = gguf.ModelFile.write

    def with_a_fault(self, file, progress):
        write(self, file, progress)
        change(file, name)

    monkeypatch.setattr(gguf.ModelFile, "write", with_a_fault)
    if not has_llama_cpp:
        without(monkeypatch, "xllamacpp")
    flags = export_flags(tmp_path, "--gguf-type", "f32")
    told = refused_by_infer(capsys, *flags)
    assert f"{name} is not the model's transformer." in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_llama_cpp_finds_a_changed_tensor_too(exported, tmp_path, tokenizer):
    directory, adapter = exported
    file = tmp_path / "m.gguf"
    file.write_bytes((directory / "f32.gguf").read_bytes())
    change(file, "output_norm.weight")
    model = merged_model(chatglm.BUILT_IN, adapter)
    prompts = [(m, data.encode_prompt(tokenizer, m)) for m in self_check.CONVERSATIONS]
    with pytest.raises(self_check.Differs, match="log-probabilities differ by at most"):
        self_check.compare(LlamaCppReader(file), model, prompts, self_check.LIMITS["f32"])


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


def test_without_llama_cpp_the_command_is_printed(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "xllamacpp")
    infer.main(export_flags(tmp_path))
    told = capsys.readouterr().out
    assert "checked  31 tensors" in told and f"--check {tmp_path}/m.gguf\n" in told
    assert "llama.cpp (" not in told


def test_without_gguf_there_is_a_hint(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "gguf")
    told = refused_by_infer(capsys, *export_flags(tmp_path))
    assert told.endswith("GGUF files need gguf: pip install -r requirements-export.txt")


def test_the_modelfile(tmp_path):
    """It has the system message that was trained with, and the prompt format."""
    system = 'He said "hi".\n甄嬛 {{ .System }}'
    adapter = adapter_of(tmp_path / "a", system)
    infer.main(["--adapter", str(adapter), "--gguf", str(tmp_path / "m.gguf"), "--no-check"])
    told = (tmp_path / "m.Modelfile").read_text("utf-8")
    assert told.startswith('FROM ./m.gguf\nTEMPLATE """[gMASK]<sop>{{ range .Messages }}<|')
    assert f'"""\nSYSTEM """{system}"""\nPARAMETER stop "<|user|>"\n' in told
    assert told.endswith(
        "num_ctx 1024\nPARAMETER temperature 0.8\nPARAMETER top_p 0.8\nPARAMETER top_k 0\n"
    )
    assert "SYSTEM" not in modelfile_text("m.gguf", None, 8192)
    for text in (
        'three """',
        "a wide\u3000space",
        'its "end"',
        "joined 👩\u200d🚀",
    ):  # Ollama changes these
        told = modelfile_text("m.gguf", text, 32768)
        assert (
            "SYSTEM" not in told and "# A Modelfile can't hold" in told and "num_ctx 8192" in told
        )
