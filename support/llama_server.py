"""llama.cpp's server in a process of its own, from the package xllamacpp.

    python -m support.llama_server FILE.gguf CONTEXT THREADS [ADAPTER.gguf]

It prints its address, or what is wrong with the file, and ends when its input does. It is not ended
in the usual way, because xllamacpp can wait for ever then.
"""

import os
import sys

import xllamacpp


def serve(file, context, threads, adapter=None):
    """→ the server, which answers in threads. Raises RuntimeError if it can't read a file."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    params.n_ctx, params.n_parallel, params.verbosity = int(context), 1, -1
    params.warmup, params.use_jinja = False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    # Exact, so that differences come from the file alone.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        server = serve(*sys.argv[1:])
        print(server.listening_address, flush=True)
        sys.stdin.read()
    except Exception as error:
        print(f"can't open it: {error}", flush=True)
    finally:
        os._exit(0)
