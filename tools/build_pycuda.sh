#!/bin/sh
# Build a pycuda wheel on a machine without a GPU, a driver or a CUDA toolkit.
#
#   sh tools/build_pycuda.sh [PYTHON [OUTDIR]]      then   PYTHON -m pip install OUTDIR/pycuda-*.whl
#
# pycuda is distributed as source and needs three things that are often missing. This script
# provides or avoids them:
#   cuda.h ...  from the pip wheels of the CUDA headers, installed into a temporary folder
#   libcuda.so  an empty library with the right name; the driver brings the real one.
#               --no-as-needed (first on the line) keeps the wheel's dependency on it
#   CURAND      switched off; it is on by default, but pyggml does not use it
# The script needs a C++ compiler, but no nvcc: NVRTC compiles our kernels at run time.
set -eu

python=${1:-python3}
out=${2:-dist}
version=${PYCUDA_VERSION:-2026.1}
headers=${CUDA_HEADERS_VERSION:-13.0.*}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/home" "$work/lib" "$out"

"$python" -m pip install -q --no-deps --target "$work/site" \
    "nvidia-cuda-runtime==$headers" "nvidia-cuda-crt==$headers" "nvidia-cuda-profiler-api==$headers"
header=$(find "$work/site" -name cuda.h | head -n 1)
test -n "$header" || { echo "build_pycuda: no cuda.h in the header wheels $headers" >&2; exit 1; }

echo 'void pyggml_link_only(void) {}' > "$work/stub.c"
${CC:-cc} -shared -fPIC "$work/stub.c" -Wl,-soname,libcuda.so.1 -o "$work/lib/libcuda.so"

# pycuda's build reads this file from the home folder; it has priority over an nvcc on PATH.
cat > "$work/home/.aksetup-defaults.py" <<END
CUDA_ROOT = "$work"
CUDA_INC_DIR = ["$(dirname "$header")"]
CUDADRV_LIB_DIR = ["$work/lib"]
CUDA_ENABLE_CURAND = False
CXXFLAGS = ["-O1", "-g0", "-w"]
END

env HOME="$work/home" LDFLAGS=-Wl,--no-as-needed "$python" -m pip wheel -q --no-deps \
    --no-cache-dir -w "$work/out" "pycuda==$version"

wheel=$(ls "$work"/out/pycuda-"$version"-*.whl)
"$python" -m zipfile -e "$wheel" "$work/unpacked"
if ! grep -q libcuda.so.1 "$work"/unpacked/pycuda/_driver*.so; then
    echo "build_pycuda: the linker dropped libcuda.so.1; the wheel would not find the driver" >&2
    exit 1
fi
mv "$wheel" "$out"
echo "built; now: $python -m pip install $out/$(basename "$wheel")"
