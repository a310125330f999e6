"""The vocabulary and the prompt format, in the files that other engines read.

transformers, vLLM and SGLang read tokenizer.json and the template, llama.cpp reads the template.
The ids are those of data.py, with one exception. A template joins all messages into one text. So
these names become special ids even if a user types them: [gMASK], <sop>, </s>, <unk>, <|system|>,
<|user|>, <|assistant|>, <|observation|>.

llama.cpp gives the template no metadata. In a call's arguments a few of its values differ from
Python's: 1e-07 is 0.0, and some characters have no escape.
"""

import itertools
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from support.defaults import SAMPLING
from support.files import as_json
from support.tools import HEADER

OTHER_NAMES = {"sop": "<sop>", "eop": "<eop>"}  # "sop" would match inside "philosophy"
NOT_IN_PROMPTS = ("[MASK]", "[sMASK]", "<eop>")

# data.encode_conversation's format, in jinja. The space is the one that sentencepiece puts before
# the content. What the format can't express is refused. A call is written as support/tools.py does:
# [value] | string is Python's repr, but llama.cpp's has no escapes.
CHAT_TEMPLATE = r"""
{%- set other_roles = {"developer": "system", "tool": "observation", "function": "observation"} -%}
{%- set has_escapes = "\\n" in (["\n"] | string) -%}
{{- "[gMASK]<sop>" -}}
{%- if tools -%}
  {{- "<|system|>\n HEADER\n" ~ (tools | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = other_roles.get(message.role, message.role) -%}
  {%- set calls = message.tool_calls or [] -%}
  {%- set content = message.content or "" -%}
  {%- if role not in ["system", "user", "assistant", "observation"] -%}
    {{- raise_exception("ChatGLM3 has no role " ~ message.role) -}}
  {%- elif content is not string or (message.content is not string and not calls) -%}
    {{- raise_exception("the content of a message must be one text") -}}
  {%- elif calls and (role != "assistant" or calls | length > 1) -%}
    {{- raise_exception("a message can have one call only, and only if it is the assistant's") -}}
  {%- endif -%}
  {%- if content | trim or message.metadata or not calls -%}
    {{- "<|" ~ role ~ "|>" ~ (message.metadata or "") ~ "\n" -}}
    {{- " " ~ content if content else "" -}}
  {%- endif -%}
  {%- for call in calls -%}
    {%- set arguments = call.function.arguments or {} -%}
    {%- if arguments is not mapping -%}
      {{- raise_exception("the arguments of a call must be an object, not a text of JSON") -}}
    {%- endif -%}
    {{- "<|assistant|>" ~ call.function.name ~ "\n ```python\ntool_call(" -}}
    {%- for name, value in arguments.items() -%}
      {%- if value is string and not has_escapes -%}
        {%- set value = value | replace("\\", "\\\\") | replace("\n", "\\n") -%}
      {%- endif -%}
      {{- (", " if not loop.first else "") ~ name ~ "=" ~ ([value] | string)[1:-1] -}}
    {%- endfor -%}
    {{- ")\n```" -}}
  {%- endfor -%}
{%- endfor -%}
{{- "<|assistant|>" if add_generation_prompt else "" -}}
""".strip().replace("HEADER", HEADER)


def special_tokens(tokenizer):
    """→ {name: id} of a data.ChatGLMTokenizer's special tokens, as other engines name them"""
    return {OTHER_NAMES.get(name, name): id for name, id in tokenizer.special.items()}


def tokenizer_files(tokenizer, context):
    """→ {file name: bytes}, for a data.ChatGLMTokenizer and a context of so many tokens.

    Raises ValueError if tokenizer.json can't represent the vocabulary.
    """
    end, padding = map(tokenizer.pieces.id_to_piece, (tokenizer.eos_id, 0))
    in_prompts = [name for name in special_tokens(tokenizer) if name not in NOT_IN_PROMPTS]
    fast = _fast_tokenizer(tokenizer)
    fast.add_special_tokens([AddedToken(t, normalized=False) for t in (padding, end, *in_prompts)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 4 and 5 know this name
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds another
        "padding_side": "left",  # the answer follows the last token of a row
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "pad_token": padding,
        "unk_token": padding,
        "additional_special_tokens": in_prompts,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = dict(eos_token_id=tokenizer.stop_ids, pad_token_id=0, do_sample=True, **SAMPLING)
    return {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": as_json(config),
        "generation_config.json": as_json(generation),
    }


def _fast_tokenizer(tokenizer):
    """→ the same tokenizer, of the library `tokenizers`. Raises ValueError if they differ.

    sentencepiece joins the two neighbours that make the piece with the highest score. So each way
    to split a piece into two pieces is a merge here, and merges are in the order of the scores.
    """
    pieces = tokenizer.pieces
    names = pieces.id_to_piece([*range(pieces.get_piece_size())])
    not_text = (pieces.is_unknown, pieces.is_control, pieces.is_byte)
    ids = [id for id in range(len(names)) if not any(is_kind(id) for is_kind in not_text)]
    texts = [names[id] for id in ids]
    known, splits = {*texts}, ((text[:k], text[k:]) for text in texts for k in range(1, len(text)))
    merges = [(left, right) for left, right in splits if left in known and right in known]
    # The special tokens have an id, but no merge. So a text becomes one only if it is "added".
    vocabulary = {name: id for id, name in enumerate(names)} | special_tokens(tokenizer)
    fast = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token=names[0]))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    fast.normalizer = normalizers.Sequence(spaces)
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])

    scores = pieces.get_score(ids)
    has_order = all(high > low for high, low in itertools.pairwise(scores))
    has_characters = pieces.is_unknown(0) and {*"".join(texts)} <= known
    # A piece in the file: its score (\x15 and 4 bytes), then its type (\x18): 4 is user-defined,
    # 5 is unused.
    has_odd_types = re.search(rb"(?s)\x15.{4}\x18[\4\5]", pieces.serialized_model_proto())
    if has_odd_types or not (has_order and has_characters and _encode_alike(fast, pieces, texts)):
        what = "BPE with byte fallback, falling scores, a dummy prefix and no normalisation"
        raise ValueError(f"no tokenizer.json can stand for this tokenizer.model: it must be {what}")
    return fast


def _encode_alike(fast, pieces, texts):
    """Whether both tokenizers give the same ids for all characters and pieces"""
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    neighbours = ["".join(texts[first : first + 100]) for first in range(0, len(texts), 100)]
    probes = [characters, "  a  b  ", *neighbours]
    return [each.ids for each in fast.encode_batch_fast(probes)] == pieces.encode(probes)
