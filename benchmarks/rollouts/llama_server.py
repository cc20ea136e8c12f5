"""llama.cpp's own HTTP server, from the wheel xllamacpp, for an interpreter that has nothing else:

    python llama_server.py MODEL.gguf [--threads 2] [--parallel 4] [--context 4096] [--no-prefix-cache]

It prints one line of JSON, {"url", "version"}, when it answers, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=4, help="sequences decoded at a time")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each of them")
    parser.add_argument("--no-prefix-cache", action="store_true")
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.port = 0
    params.n_parallel = options.parallel
    params.n_ctx = options.context * options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as exact as the weights may be
    params.cache_prompt = not options.no_prefix_cache
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address, "version": xllamacpp.__version__}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
