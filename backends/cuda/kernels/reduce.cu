// Reductions along rows: sums, argmax, sorting.
// @kernel sum_rows
// @kernel argmax
// @kernel argmax_of
// @kernel sort_rows
// @kernel make_keys
// @kernel merge_far
// @kernel merge_near
// @kernel first_ids
#include "sort.cuh"

// A row of `a`: blockIdx.x counts over ne1 and ne2, blockIdx.y over ne3.
__device__ __forceinline__ const char* row_of(const Tensor& a) {
    return (const char*)a.row<float>(blockIdx.x % a.ne[1], blockIdx.x / a.ne[1], blockIdx.y);
}

__global__ void sum_rows(Tensor out, Tensor a) {
    begin();
    const char* x = row_of(a);
    float sum = 0;
    for (int i = threadIdx.x; i < a.ne[0]; i += blockDim.x) sum += *(const float*)(x + (long long)i * a.nb[0]);
    sum = block_reduce<Sum>(sum, 0);
    if (threadIdx.x == 0)
        *out.at<float>(0, blockIdx.x % a.ne[1], blockIdx.x / a.ne[1], blockIdx.y) = sum;
}

__device__ __forceinline__ Key warp_least(Key x) {
    for (int lane = 16; lane; lane >>= 1) {
        Key other = __shfl_xor_sync(~0u, x, lane);
        x = other < x ? other : x;
    }
    return x;
}
__device__ __forceinline__ int* result_of_row(const Tensor& out, int row, int i3) {
    return out.at<int>(row % out.ne[0], row / out.ne[0], i3, 0);
}

// The id of a row's largest element, the first among equals; the result has dimensions 1, 2 and 3
// of a. Up to 32 blocks (gridDim.z) may share a row; each then writes its best key.
__global__ void argmax(Tensor out, Tensor a, Key* keys) {
    begin();
    __shared__ Key parts[32];
    const char* x = row_of(a);
    Key best = LAST_KEY;
    for (int i = blockIdx.z * blockDim.x + threadIdx.x; i < a.ne[0]; i += blockDim.x * gridDim.z) {
        Key key = sort_key(*(const float*)(x + (long long)i * a.nb[0]), i, true);
        best = key < best ? key : best;
    }
    best = warp_least(best);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_least(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : LAST_KEY);
    if (threadIdx.x != 0) return;
    if (gridDim.z == 1) *result_of_row(out, blockIdx.x, blockIdx.y) = (int)(unsigned)best;
    else keys[((long long)blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z + blockIdx.z] = best;
}

// One warp per row: the best of its `parts` keys.
__global__ void argmax_of(Tensor out, const Key* keys, int parts) {
    begin();
    const Key* mine = keys + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * parts;
    Key best = warp_least(threadIdx.x < parts ? mine[threadIdx.x] : LAST_KEY);
    if (threadIdx.x == 0) *result_of_row(out, blockIdx.x, blockIdx.y) = (int)(unsigned)best;
}

// Rows that fit in shared memory: `padded` keys, a power of two.
__global__ void sort_rows(Tensor out, Tensor a, int padded, int descending) {
    begin();
    extern __shared__ Key keys[];
    const char* x = row_of(a);
    for (int i = threadIdx.x; i < padded; i += blockDim.x)
        keys[i] = i < a.ne[0] ? sort_key(*(const float*)(x + (long long)i * a.nb[0]), i, descending) : LAST_KEY;
    sort_shared(keys, padded, 0);
    for (int i = threadIdx.x; i < out.ne[0]; i += blockDim.x)
        *out.at<int>(i, blockIdx.x % a.ne[1], blockIdx.x / a.ne[1], blockIdx.y) = (int)(unsigned)keys[i];
}

// Longer rows, in global memory [rows][padded]: each block sorts PART keys; runs are then merged,
// far pairs in global memory and near ones in shared memory.
#define PART 4096

// blockIdx.x: row; blockIdx.y: part of it.
__global__ void make_keys(Key* memory, Tensor a, int padded, int descending) {
    begin();
    __shared__ Key keys[PART];
    int row = blockIdx.x, i1 = row % a.ne[1], rest = row / a.ne[1];
    const char* x = (const char*)a.row<float>(i1, rest % a.ne[2], rest / a.ne[2]);
    int base = blockIdx.y * PART;
    for (int i = threadIdx.x; i < PART; i += blockDim.x)
        keys[i] = base + i < a.ne[0]
                      ? sort_key(*(const float*)(x + (long long)(base + i) * a.nb[0]), base + i, descending)
                      : LAST_KEY;
    sort_shared(keys, PART, base);
    Key* mine = memory + (long long)row * padded + base;
    for (int i = threadIdx.x; i < PART; i += blockDim.x) mine[i] = keys[i];
}

__global__ void merge_far(Key* memory, int padded, int size, int stride) {
    begin();
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    Key* row = memory + (long long)blockIdx.x * padded;
    int low = 2 * i - (i & (stride - 1)), high = low + stride;
    Key a = row[low], b = row[high];
    if ((a > b) == ((low & size) == 0)) row[low] = b, row[high] = a;
}

__global__ void merge_near(Key* memory, int padded, int size) {
    begin();
    __shared__ Key keys[PART];
    int base = blockIdx.y * PART;
    Key* mine = memory + (long long)blockIdx.x * padded + base;
    for (int i = threadIdx.x; i < PART; i += blockDim.x) keys[i] = mine[i];
    merge_shared(keys, PART, size, PART / 2, base);
    for (int i = threadIdx.x; i < PART; i += blockDim.x) mine[i] = keys[i];
}

__global__ void first_ids(Tensor out, const Key* memory, int padded) {
    begin();
    int i = blockIdx.y * blockDim.x + threadIdx.x, row = blockIdx.x;
    if (i >= out.ne[0]) return;
    int i1 = row % out.ne[1], rest = row / out.ne[1];
    *out.at<int>(i, i1, rest % out.ne[2], rest / out.ne[2]) =
        (int)(unsigned)memory[(long long)row * padded + i];
}
