"""The Modelfile, from which `ollama create` makes a model of a GGUF file."""

import unicodedata

from support.defaults import SAMPLING

# The prompt format in Go's template language, without tools. Older versions of Ollama don't read
# the template in the GGUF file. The system message is the first of .Messages.
OLLAMA_TEMPLATE = (
    "[gMASK]<sop>{{ range .Messages }}"
    '<|{{ if eq .Role "tool" }}observation{{ else }}{{ .Role }}{{ end }}|>\n'
    "{{ if .Content }} {{ .Content }}{{ end }}{{ end }}<|assistant|>"
)


def modelfile_text(file_name, system, context):
    """→ the text of a Modelfile, for `ollama create`.

    system: the system message, or None; context: how many tokens the model takes
    """
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{OLLAMA_TEMPLATE}"""']
    if system and _can_be_system(system):
        lines.append(f'SYSTEM """{system}"""')
    elif system:
        lines.append("# A Modelfile can't hold the system message: send it with each request.")
    lines += [f'PARAMETER stop "<|{role}|>"' for role in ("user", "observation")]
    lines += [f"PARAMETER num_ctx {min(context, 8192)}"]
    # infer.py has no top_k; Ollama's default is 40.
    lines += [f"PARAMETER {name} {value}" for name, value in (SAMPLING | {"top_k": 0}).items()]
    return "\n".join(lines) + "\n"


def _can_be_system(text):
    """Whether Ollama reads the text back. It drops what Go doesn't call printable, such as U+3000,
    and three quotation marks end SYSTEM."""
    printable = (c in " \t\n" or unicodedata.category(c)[0] in "LMNPS" for c in text)
    return all(printable) and '"""' not in text and not text.endswith('"')
