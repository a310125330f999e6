"""support/tokenizer_files.py: other engines get the ids of data.py.

python -m pytest -q tests/test_tokenizer_files.py
"""

import io
import json
import random
import struct

import jinja2
import pytest
import sentencepiece
from conftest import ROOT, reference
from transformers import AutoTokenizer, GenerationConfig

import data
import model as chatglm
from support.files import write_files
from support.tokenizer_files import special_tokens, tokenizer_files
from support.tools import tool_call, tools_message

# These names become special ids in any text. So random texts must not have them.
MATCHED = {"[gMASK]", "<sop>", "</s>", "<unk>", *(f"<|{role}|>" for role in data.ROLES)}
# From each kind, characters are drawn equally often.
KINDS = [
    " ",
    "\n",
    "\t\r\v\f\0\x1b\x7f",
    "\u2581\u3000\xa0\u200b\u2028\ufeff\ufffd",  # sentencepiece's space, and other odd ones
    "".join(map(chr, range(0x21, 0x7F))),
    "".join(map(chr, range(0x4E00, 0x5000))),
    "".join(map(chr, range(0xA0, 0x3400))),
    "👋🏽‍🌈🏳️😀🇨🇳",
    "".join(map(chr, range(0x300, 0x370))),  # combining marks
    "\u0378\u0e5c\ufdd0\uffff\U0001fffe\U000e0080\U0010ffff",  # unassigned, and no characters
    "".join(map(chr, range(0xE000, 0xE100))) + "\U000f0000",  # private use
]


def random_text(draw, longest=24):
    kinds = draw.sample(KINDS, draw.randint(1, len(KINDS)))
    text = "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(longest)))
    return draw.choice(["", "", " ", "  ", "\n"]) + text + draw.choice(["", "", " ", "  ", "\n"])


def repetitive_text(draw, texts):
    """Pieces of the vocabulary, again and again: here the order of merges matters most."""
    some = [draw.choice(texts) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.5:
        some = "".join(some)  # its characters
    text = "".join(draw.choice(some) for _ in range(draw.randint(1, 30)))
    return draw.choice(texts)[draw.randrange(3) :] + text


def random_conversation(draw):
    messages = []
    if draw.random() < 0.2:
        messages.append(tools_message([random_text(draw) + "f: x"]))
    for _ in range(draw.randint(1, 5)):
        message = {"role": draw.choice(data.ROLES), "content": random_text(draw)}
        if draw.random() < 0.3:
            message["content"] = draw.choice(["", " ", "\n", " \n ", "你好 "])
        if draw.random() < 0.3:
            message["metadata"] = random_text(draw, 6).replace("\n", "")
        messages.append(message)
    return messages


@pytest.fixture(scope="session", params=["tokenizer", "official_tokenizer"])
def both(request, tmp_path_factory):
    """(data.py's tokenizer, what transformers loads from its files)"""
    tokenizer = request.getfixturevalue(request.param)
    directory = tmp_path_factory.mktemp("files")
    write_files(directory, tokenizer_files(tokenizer, 2048))
    return tokenizer, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def check_ids(both, texts):
    tokenizer, fast = both
    assert not any(name in text for text in texts for name in MATCHED)
    ids = fast(texts)["input_ids"]
    differ = [text for text, mine in zip(texts, ids, strict=True) if mine != tokenizer.encode(text)]
    assert differ == []


# --- the vocabulary ---------------------------------------------------------------------------


def test_ids_of_random_texts(both):
    draw = random.Random(1)
    texts = [random_text(draw) for _ in range(10000)]
    check_ids(both, ["", "\0", "a\0b", " ", *texts])


def test_ids_of_repetitive_texts(both):
    draw, pieces = random.Random(2), both[0].pieces
    texts = pieces.id_to_piece([*range(259, pieces.get_piece_size())])  # after special and bytes
    check_ids(both, [repetitive_text(draw, texts) for _ in range(10000)])


def test_ids_of_a_real_data_set(both):
    records = json.loads(reference("data/huanhuan.json").read_text("utf-8"))
    texts = [record[key] for record in records for key in ("instruction", "output")]
    assert len(texts) == 2 * 3729
    check_ids(both, texts)


def test_the_names_that_text_must_not_have(both):
    """No others become special ids. "sop" and "eop" are inside of English words."""
    tokenizer, fast = both
    check_ids(both, ["philosophy people isopod sop eop develop Aesop", "sop", "eop", "<0x0A>"])
    names = {*special_tokens(tokenizer), *tokenizer.special, "<s>", "</s>", "<unk>"}
    text_ids = {name: tokenizer.encode(f"a{name}b") for name in names}
    assert {name for name in names if fast(f"a{name}b")["input_ids"] != text_ids[name]} == MATCHED
    for name, id in special_tokens(tokenizer).items():
        assert (fast.convert_tokens_to_ids(name), fast.convert_ids_to_tokens(id)) == (id, name)


def test_answers_come_back_from_their_ids(both):
    tokenizer, fast = both
    draw = random.Random(3)
    for number in range(2000):
        metadata, content = random_text(draw, 6).replace("\n", ""), random_text(draw)
        metadata = draw.choice(["", metadata])
        ids = tokenizer.encode(f"{metadata}\n") + tokenizer.encode(content)
        stop = tokenizer.stop_ids[number % 3]
        answer = fast.decode([*ids, stop, 0], skip_special_tokens=True)
        written = f"{metadata}\n {content}" if content else f"{metadata}\n"
        assert answer == written.replace("\u2581", " ")  # sentencepiece writes a space so


def test_what_stands_beside_the_vocabulary(tmp_path, tokenizer):
    files = tokenizer_files(tokenizer, 2048)
    write_files(tmp_path, files)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == ([*tokenizer.stop_ids], 0)
    config = json.loads(files["tokenizer_config.json"])
    assert "auto_map" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # generate() wants these
    fast = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert (fast.model_max_length, fast.pad_token_id, fast.eos_token_id) == (2048, 0, 2)
    assert {fast.all_special_ids.count(fast.convert_tokens_to_ids(name)) for name in MATCHED} == {1}
    short, long = tokenizer.encode("a"), tokenizer.encode("a b")
    rows = fast(["a", "a b"], padding=True)
    assert rows["input_ids"] == [[0] * (len(long) - len(short)) + short, long]


# --- a vocabulary of another kind -------------------------------------------------------------

LIKE_CHATGLM3 = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
)
OTHER_KINDS = [
    dict(model_type="unigram"),
    dict(normalization_rule_name="nfkc"),
    dict(add_dummy_prefix=False),
    dict(remove_extra_whitespaces=True),
    dict(treat_whitespace_as_suffix=True),
    dict(user_defined_symbols=["to le"]),
]


def trained_vocabulary(directory, **options):
    """→ the tokenizer of a small vocabulary of sentencepiece"""
    written, lines = io.BytesIO(), (ROOT / "README.md").read_text("utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=700,
        minloglevel=2,
        **LIKE_CHATGLM3 | options,
    )
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    return data.ChatGLMTokenizer(directory)


def test_a_vocabulary_of_the_same_kind(tmp_path):
    assert "tokenizer.json" in tokenizer_files(trained_vocabulary(tmp_path), 64)


@pytest.mark.parametrize("options", OTHER_KINDS, ids=str)
def test_a_vocabulary_of_another_kind_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="^no tokenizer.json can stand for"):
        tokenizer_files(trained_vocabulary(tmp_path, **options), 64)


NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
ONE_MORE = [  # (piece, score, kind); the last score of the vocabulary is -1140
    ("ee", -1140.0, NORMAL),  # which of two equal scores comes first?
    ("ee", 0.0, NORMAL),  # a score that is higher than those before
    ("e龘", -2000.0, NORMAL),  # 龘 is no piece
    ("ohe", -2000.0, UNUSED),
    ("ohe", -2000.0, USER_DEFINED),
]


@pytest.mark.parametrize("piece, score, kind", ONE_MORE)
def test_one_piece_of_another_kind_is_refused(tmp_path, piece, score, kind):
    raw, name = (chatglm.BUILT_IN / "tokenizer.model").read_bytes(), piece.encode()
    fields = b"\n" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score)
    fields += b"\x18" + bytes([kind])
    (tmp_path / "tokenizer.model").write_bytes(raw + b"\n" + bytes([len(fields)]) + fields)
    with pytest.raises(ValueError, match="^no tokenizer.json can stand for"):
        tokenizer_files(data.ChatGLMTokenizer(tmp_path), 64)


# --- the template -----------------------------------------------------------------------------


def prompt_ids(both, messages, add_generation_prompt=True, tools=None):
    options = dict(tools=tools, tokenize=True, return_dict=False)
    options["add_generation_prompt"] = add_generation_prompt
    return both[1].apply_chat_template(messages, **options)


def check_prompt(both, wanted, messages=None, tools=None):
    """The template's ids for `messages` and `tools` are those of data.py for `wanted`."""
    messages = wanted if messages is None else messages
    ids = data.encode_prompt(both[0], wanted)
    assert prompt_ids(both, messages, tools=tools) == ids, wanted
    assert prompt_ids(both, messages, False, tools) == ids[:-1], wanted


def test_prompts_of_random_conversations(both):
    draw = random.Random(4)
    for _ in range(2000):
        check_prompt(both, random_conversation(draw))


@pytest.mark.parametrize("both", ["official_tokenizer"], indirect=True)
def test_prompts_of_the_official_code(both):
    count = 0
    for line in reference("golden/conversations.jsonl").read_text("utf-8").splitlines():
        golden = json.loads(line)
        messages = golden["messages"]
        if any(name in message["content"] for message in messages for name in MATCHED):
            continue  # one of them: see MATCHED
        last_answer = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        assert prompt_ids(both, messages[:last_answer]) == golden["prompt_ids"]
        whole = prompt_ids(both, messages, add_generation_prompt=False)
        assert whole == golden["input_ids"][:-1]  # without </s>
        count += 1
    assert count == 51


USER = {"role": "user", "content": "天气？"}
TOOLS = [
    {"name": "f", "描述": "a \"b\" <c> & 'd'\n\t\\ é", "parameters": {"x": [], "y": {}}},
    {"type": "function", "function": {"name": "g", "default": [1.0, 1e-07, True, None, ""]}},
]
ARGUMENTS = [
    {"city": "厦门", "days": 3},
    {"b": None, "a": [1.5, True, 1e-07, 10**20], "c": {"d": "it's"}},
    {"text": "a\nb\t\\n '\" \u3000\x01 {{ x }} {% y %}"},
    {},
    None,
]


def openai_call(arguments, content=None):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def test_tools_become_the_system_message_in_front(both):
    system = {"role": "system", "content": "Be brief."}
    check_prompt(both, [tools_message(TOOLS), system, USER], [system, USER], tools=TOOLS)
    check_prompt(both, [USER], tools=[])


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_a_call_becomes_the_native_call(both, arguments):
    call, result = tool_call("f", arguments), {"role": "observation", "content": "22"}
    said = {"role": "assistant", "content": " Wait.\n"}
    openai_result = {"role": "tool", "tool_call_id": "1", "content": "22"}
    check_prompt(both, [USER, call], [USER, openai_call(arguments)])
    messages = [USER, openai_call(arguments, " Wait.\n"), openai_result]
    check_prompt(both, [USER, said, call, result], messages)
    check_prompt(both, [call, result], [openai_call(arguments, " \n"), openai_result])
    named = {"role": "assistant", "content": "", "metadata": "g"}
    check_prompt(both, [named, call], [openai_call(arguments) | {"metadata": "g"}])


def test_roles_of_other_clients(both):
    others = [{"role": role, "content": "a"} for role in ("developer", "tool", "function")]
    roles = ("system", "observation", "observation")
    check_prompt(both, [{"role": role, "content": "a"} for role in roles], others)


REFUSED = [
    ({"role": "bot", "content": "a"}, "ChatGLM3 has no role bot"),
    ({"role": "user", "content": None}, "the content of a message must be one text"),
    ({"role": "user"}, "the content of a message must be one text"),
    ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "must be one text"),
    (openai_call({}, [{"type": "text", "text": "a"}]), "must be one text"),
    (openai_call('{"x": 1}'), "the arguments of a call must be an object, not a text of JSON"),
    (openai_call({}) | {"role": "user", "content": "a"}, "only if it is the assistant's"),
    (openai_call({}) | {"tool_calls": openai_call({})["tool_calls"] * 2}, "one call only"),
]


@pytest.mark.parametrize("message, told", REFUSED)
def test_what_the_format_can_not_express_is_refused(both, message, told):
    with pytest.raises(jinja2.TemplateError, match=told):
        both[1].apply_chat_template([USER, message], tokenize=False)
