// The kernels that pack weights, run on the host. test_loading.py puts kernels/pack.cu, without its
// includes, between host.hpp and this.

template <class F>
int run_pack(int grid, const unsigned char* raw, const Packed& to, int first, int n, Tensor ids) {
    launch({grid, 1, 1}, 256 * PARTS, [=] { pack<F>(raw, to, first, n, ids); });
    return 0;
}

template <class F>
int run_pack16(int grid, const unsigned char* raw, const Packed& to, int first, int n, Tensor ids) {
    launch({grid, 1, 1}, 256 * PARTS16, [=] { pack16<F>(raw, to, first, n, ids); });
    return 0;
}
