#!/bin/sh
# The ring under the thread, address and undefined-behaviour sanitizers: first the core with two
# threads (stress.cpp; once more optimised, where the memory model shows), then the Python unit
# tests with a `_host` of the ring alone, built under the address sanitizer.
#   csrc/ring/sanitize.sh [PYTHON]      CXX and SANITIZE_RECORDS may be set
set -eu

cd "$(dirname "$0")/../.."
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
cxx=${CXX:-g++}
records=${SANITIZE_RECORDS:-10000}
out=build/sanitize
warnings="-Wall -Wextra -Werror"
mkdir -p "$out"

stress() {  # NAME FLAGS...
    program=$out/stress-$1
    shift
    echo "stress: $*"
    "$cxx" -std=c++20 $warnings -pthread -Icsrc "$@" csrc/ring/stress.cpp -o "$program"
    "$program" "$records"
}
stress thread -O1 -g -fsanitize=thread
stress address -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
stress plain -O2

# Apart from the working tree, so that the normal build stays what it is.
tree=$out/tree
rm -rf "$tree"
mkdir -p "$tree"
cp -r nodeserve tests pyproject.toml "$tree"
rm -f "$tree"/nodeserve/*.so
cat > "$tree/host.cpp" <<'END'
#include <pybind11/pybind11.h>
void bind_ring(pybind11::module_& module);
PYBIND11_MODULE(_host, module) { bind_ring(module); }
END
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
includes=$("$python" -m pybind11 --includes)
echo "unit tests of the ring: -fsanitize=address,undefined"
# Word splitting is meant: several flags in one variable.
"$cxx" -std=c++20 -O1 -g -fvisibility=hidden -fPIC -shared -fsanitize=address,undefined \
    -fno-sanitize-recover=all $includes -Icsrc "$tree/host.cpp" csrc/ring/bind.cpp \
    -o "$tree/nodeserve/_host$suffix"
cd "$tree"
# The interpreter leaks at exit, so leaks are not counted. libstdc++ goes with libasan, which must
# find the real __cxa_throw before Python loads it.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 \
    "$python" -m pytest -q -p no:cacheprovider tests/unit/test_ring.py tests/unit/test_channel.py
