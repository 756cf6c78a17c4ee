"""Run in the environment of the engines: answer prompts by llama.cpp's server. Reads a request as JSON, and prints the answers."""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    request = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.cache_ram_mib = request["base"], request["cache_ram"]
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.warmup = 1024, 1, 0, False
    parameters.cpuparams.n_threads = 2
    # By default, keys and values are in float16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, scale) for file, scale in request["adapters"]]
    server = xllamacpp.Server(parameters)
    print(json.dumps([ask(server.listening_address, body) for body in request["bodies"]]))


def ask(url: str, body: dict) -> dict:
    fixed = {"temperature": 0, "n_probs": 1, "return_tokens": True, "ignore_eos": True}
    data = json.dumps({**fixed, **body}).encode()
    sent = urllib.request.Request(f"{url}/completion", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
