// A block of CUDA threads on the host: each is a fiber, and barriers and shuffles are real. Include
// it before host.hpp, whose definitions for a single thread it replaces.
#pragma once
#define __BLOCK__
#include <ucontext.h>

#include <memory>
#include <vector>

struct Dim3 {
    int x, y, z;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Barrier {
    int count = 0, round = 0;
};
struct Block {
    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        bool over = false;
    };
    std::vector<Fiber> fibers;
    std::vector<unsigned long long> slots;
    std::vector<Barrier> warps;  // of each thread that is the first of those that wait
    Barrier all;
    ucontext_t scheduler;
    int now = 0;

    explicit Block(int threads) : fibers(threads), slots(threads), warps(threads) {}
    void wait(Barrier& b, int threads) {
        const int round = b.round;
        if (++b.count == threads) b.count = 0, ++b.round;
        while (b.round == round) swapcontext(&fibers[now].context, &scheduler);
    }
};
inline Block* block;

inline void __syncthreads() { block->wait(block->all, blockDim.x * blockDim.y); }
inline int first_of_warp() { return block->now / 32 * 32; }
inline int lane() { return block->now % 32; }
inline void __syncwarp(unsigned mask = ~0u) {
    block->wait(block->warps[first_of_warp() + __builtin_ctz(mask)], __builtin_popcount(mask));
}

// The value of x in lane `from` of the warp.
template <class T>
T exchanged(T x, int from, unsigned mask = ~0u) {
    unsigned long long* slots = &block->slots[first_of_warp()];
    __builtin_memcpy(&slots[lane()], &x, sizeof x);
    __syncwarp(mask);
    T y;
    __builtin_memcpy(&y, &slots[from], sizeof y);
    __syncwarp(mask);
    return y;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by) {
    return exchanged(x, lane() ^ by, mask);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from) {
    return exchanged(x, from, mask);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by) {
    return exchanged(x, lane() < by ? lane() : lane() - by, mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (unsigned)exchanged(x, i) << i;
    return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= exchanged(x, i);
    return all;
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    unsigned least = x;
    for (int i = 0; i < 32; ++i) {
        const unsigned other = exchanged(x, i);
        if (other < least) least = other;
    }
    return least;
}

template <class Kernel>
Kernel* kernel_of_block;
template <class Kernel>
void run() {
    (*kernel_of_block<Kernel>)();
    block->fibers[block->now].over = true;
    swapcontext(&block->fibers[block->now].context, &block->scheduler);
}

// A kernel over a grid, block after block; a block's threads take turns.
template <class Kernel>
void launch(Dim3 grid, Dim3 shape, Kernel kernel) {
    constexpr int STACK = 1 << 17;
    const int threads = shape.x * shape.y;
    kernel_of_block<Kernel> = &kernel;
    blockDim = shape, gridDim = grid;
    for (int i = 0; i < grid.x * grid.y * grid.z; ++i) {
        Block mine(threads);
        block = &mine;
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        for (Block::Fiber& fiber : mine.fibers) {
            fiber.stack.reset(new char[STACK]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK;
            makecontext(&fiber.context, run<Kernel>, 0);
        }
        for (bool going = true; going;) {
            going = false;
            for (mine.now = 0; mine.now < threads; ++mine.now) {
                if (mine.fibers[mine.now].over) continue;
                going = true;
                threadIdx = {mine.now % shape.x, mine.now / shape.x, 0};
                swapcontext(&mine.scheduler, &mine.fibers[mine.now].context);
            }
        }
    }
}
template <class Kernel>
void launch(Dim3 grid, int threads, Kernel kernel) {
    launch(grid, Dim3{threads, 1, 1}, kernel);
}
