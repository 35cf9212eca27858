// flash_attn_ext of the latent cache (576/512 or 512/512, V is a view of K): a block reads each
// byte of the cache once and uses it both as key and as value. With LIST, keys come from a query's
// list.
//
// Two designs. (a) wgmma: 64 rows; two warpgroups own half of the 512 columns each and exchange
// weights. Good from 64 rows on, but at 16 heads three quarters of the work is wasted. (b) mma
// m16n8k16: rows in steps of 16, so 16 heads fit exactly. The warps split the keys and elements of
// a tile for the scores and the columns for the sums; weights pass through shared memory. At one
// query both designs wait for memory, and (b) runs on 8.0 and up: it is this file. From 17 rows on,
// (a) is faster on 9.0: attention_latent_hopper.cu (128 heads, 16384 keys, H200: 29 us against 42;
// 16 heads: 17 against 14).
//
// A block takes 16 MI WM rows and one split of the keys, in tiles of BN keys; two tiles are in
// flight or in use. Rows of 1152 bytes are swizzled: chunk c (16 bytes) of row r is at c ^ (r & 7).
// With tiles of 64 keys, 16 or 64 rows need the shared memory of 9.0. With 32 keys they fit on 8.0;
// 16 rows, 4 warps and 32 keys fit on every GPU from 8.0 on.
//
// Scores of 16 rows (`Slice`): a tile of 64 keys is 144 ldmatrix and two barriers. A design that
// lost by count: a warp takes all elements of its 8 keys, 432 ldmatrix, for which shared memory
// takes 1,728 clocks, because all warps read all queries; a loop of 18 steps waits for its loads
// nine times.
//
// Lists: a block has the rows of one query, and its threads gather the rows of the cache. Few
// queries take 16 rows per block, however many heads there are: 128 heads, 2048 of 65536 rows, f16,
// H100: 15.2 us; with 32 rows 15.7, with wgmma and 64 rows 17.8 (of these, 5 for the twice as many
// parts). Prompts of many heads: attention_list_hopper.cu.
// @kernel hot latent<{__half|__nv_bfloat16}, {576|512}, 1, 1, 8, 64, false, {false|true}>
// @kernel hot latent<__half, {576|512}, 1, 1, 8, 64, true, {false|true}>
// @kernel hot 80 latent<{__half|__nv_bfloat16}, 576, 1, 2, 4, 32, false, {false|true}>
// @kernel hot 80 latent<__half, 576, 1, 2, 4, 32, true, {false|true}>
// @kernel 90a latent<{__half|__nv_bfloat16}, {576|512}, 2, 2, 4, 64, false, {false|true}>
// @kernel 80 latent<{__half|__nv_bfloat16}, {576|512}, 2, 2, 4, 32, false, {false|true}>
// @kernel hot latent<__half, {576|512}, 2, 2, 4, 32, true, false>
// @kernel latent<__half, {576|512}, 2, 2, 4, 32, true, true>
// @kernel hot 80 86 89 120a latent<{__half|__nv_bfloat16}, {576|512}, 1, 1, 4, 32, false, {false|true}>
// @kernel hot 80 86 89 120a latent<__half, {576|512}, 1, 1, 4, 32, true, {false|true}>
#include "attention_latent.cuh"

template <class T, int DK, int MI, int WM, int WN, int BN, bool Q8, bool LIST>
__global__ void __launch_bounds__(BOUND<MI, WM, WN>, 1) latent(const __grid_constant__ Attention a) {
    latent_block<T, DK, MI, WM, WN, BN, Q8, LIST>(a, blockIdx.x);
}
