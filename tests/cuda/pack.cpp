// The kernels that pack weights, run on the host. test_loading.py puts kernels/pack.cu, without its
// includes, between host.hpp and this.

template <class F>
int run_pack(const int* grid, const unsigned char* raw, const Packed& to, int first) {
    launch({grid[0], grid[1], grid[2]}, 256, [=] { pack<F>(raw, to, first); });
    return 0;
}

template <class F>
int run_pack16(const int* grid, const unsigned char* raw, const Packed& to, int first) {
    launch({grid[0], grid[1], grid[2]}, 256, [=] { pack16<F>(raw, to, first); });
    return 0;
}
