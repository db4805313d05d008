#!/usr/bin/env bash
# vLLM 0.20.2 for a machine that has torch 2.11 for CUDA 13 and Python 3.12, but reaches no package registry: everything
# that `vllm serve` imports for a dense text model with adapters on a Hopper GPU, in one archive, in parts that fit a copy.
#
#   bench/vllm_wheels.sh FOLDER          writes FOLDER/part.aa ... (110 MB); needs pip, unzip, xz, 0.9 GB of disk
#
# There, with the parts in FOLDER:
#
#   mkdir -p /root/vllm && cat FOLDER/part.* | xz -dc | tar -x -C /root/vllm
#   PYTHONPATH=/root/vllm HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \
#       python3 -m vllm.entrypoints.cli.main serve MODEL --enable-lora ...
#
# PYTHONPATH is for the server alone: the trainer's process needs none of it.
#
# It counts on packages that come with torch, transformers (run with 5.17.0), peft and accelerate, and on aiohttp, click,
# cloudpickle, einops, h11, httpx, nvidia-ml-py, opencv-python-headless, pillow, prometheus-client, protobuf, psutil,
# py-cpuinfo, regex, rich, scipy, sentencepiece, setuptools, tiktoken, uvloop and xxhash, which are not in the archive.
set -euo pipefail
folder=${1:?FOLDER}
part_bytes=${PART_BYTES:-42000000}

packages=(
  vllm==0.20.2
  # the server: routes, requests, replies
  fastapi==0.136.1 starlette==0.52.1 uvicorn==0.46.0 python-multipart==0.0.34 prometheus-fastapi-instrumentator==7.1.0
  watchfiles==1.3.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
  openai==2.33.0 distro==1.9.0 sniffio==1.3.1 openai-harmony==0.0.8 partial-json-parser==0.2.1.1.post7
  model-hosting-container-standards==0.1.16 jmespath==1.1.0
  # messages between the server's processes, hashes of prefixes and of images
  pyzmq==27.3.0 msgspec==0.23.0 cbor2==6.3.0 pybase64==1.5.1 cachetools==8.0.2 setproctitle==1.3.8 blake3==1.0.11
  # imported whatever the model and the request
  gguf==0.19.0 llguidance==1.3.0 xgrammar==0.1.33
)
# What such a server never loads: FlashAttention 2 (on Hopper 3 is taken, and the import of 2 may fail), kernels for mixtures
# of experts (likewise), for MLA and for FP8 (imported by models that have them), a static library, headers.
left_out=(
  'vllm/vllm_flash_attn/_vllm_fa2_C*' 'vllm/_moe_C*' 'vllm/_flashmla*' 'vllm/third_party/deep_gemm/*'
  'xgrammar/lib/*.a' '*/include/*' '*.data/*'
)

mkdir -p "$folder"
wheels=$folder/wheels tree=$folder/tree
rm -rf "$tree" "$folder"/part.*
mkdir -p "$wheels" "$tree"
platforms=()
for name in manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_28 manylinux_2_31 manylinux_2_34 manylinux_2_35; do
  platforms+=(--platform "${name}_x86_64")
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$wheels" "${packages[@]}"
for wheel in "$wheels"/*.whl; do
  unzip -q -o "$wheel" -d "$tree" -x "${left_out[@]}" 2> >(grep -v 'excluded filename not matched' >&2)
done
tar -C "$tree" --sort=name --owner=0 --group=0 -c . | xz -6 -T2 | split -b "$part_bytes" - "$folder/part."
rm -rf "$tree"
ls -l "$folder"/part.*
