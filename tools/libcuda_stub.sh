#!/bin/sh
# Build a fake libcuda.so.1 for a machine without a driver, so that pycuda can be imported there and
# tests can check the errors on a machine without a GPU.
#
#   sh tools/libcuda_stub.sh PYTHON OUTDIR          PYTHON must have pycuda
#   LD_LIBRARY_PATH=OUTDIR pyggml doctor            `make stub` does both and runs the tests
#
# Every call returns CUDA_ERROR_NO_DEVICE (100). cuDriverGetVersion reports 13000, or the number in
# LIBCUDA_STUB_VERSION; 12020 imitates a driver that is too old.
set -eu

python=$1
out=$2
mkdir -p "$out"

package=$("$python" -c 'import importlib.util as u; print(u.find_spec("pycuda").submodule_search_locations[0])')
set -- "$package"/_driver*.so

{
    cat <<'END'
#include <stdlib.h>
int cuDriverGetVersion(int *version) {
    const char *text = getenv("LIBCUDA_STUB_VERSION");
    *version = text ? atoi(text) : 13000;
    return 0;
}
int cuGetErrorName(int code, const char **text) {
    *text = "CUDA_ERROR_NO_DEVICE";
    return 0;
}
int cuGetErrorString(int code, const char **text) {
    *text = "no CUDA-capable device is detected";
    return 0;
}
END
    nm -D --undefined-only "$1" | awk '{ print $2 }' | grep '^cu[A-Z]' | sort -u |
        grep -vx -e cuDriverGetVersion -e cuGetErrorName -e cuGetErrorString |
        sed 's/.*/int &(void) { return 100; }/'
} > "$out/libcuda_stub.c"
${CC:-cc} -shared -fPIC -w -Wl,-soname,libcuda.so.1 "$out/libcuda_stub.c" -o "$out/libcuda.so.1"
