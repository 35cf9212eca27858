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
    std::vector<Barrier> warps;
    Barrier all;
    ucontext_t scheduler;
    int now = 0;

    explicit Block(int threads) : fibers(threads), slots(threads), warps(threads / 32) {}
    void wait(Barrier& b, int threads) {
        const int round = b.round;
        if (++b.count == threads) b.count = 0, ++b.round;
        while (b.round == round) swapcontext(&fibers[now].context, &scheduler);
    }
};
inline Block* block;

inline void __syncthreads() { block->wait(block->all, blockDim.x); }
inline void __syncwarp() { block->wait(block->warps[threadIdx.x / 32], 32); }

// The value of x in lane `from` of the warp.
template <class T>
T exchanged(T x, int from) {
    unsigned long long* slots = &block->slots[threadIdx.x / 32 * 32];
    __builtin_memcpy(&slots[threadIdx.x % 32], &x, sizeof x);
    __syncwarp();
    T y;
    __builtin_memcpy(&y, &slots[from], sizeof y);
    __syncwarp();
    return y;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int by) {
    return exchanged(x, threadIdx.x % 32 ^ by);
}
template <class T>
T __shfl_sync(unsigned, T x, int from) {
    return exchanged(x, from);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned long long* slots = &block->slots[threadIdx.x / 32 * 32];
    slots[threadIdx.x % 32] = x;
    __syncwarp();
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)slots[lane] << lane;
    __syncwarp();
    return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= exchanged(x, lane);
    return all;
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
void launch(Dim3 grid, int threads, Kernel kernel) {
    constexpr int STACK = 1 << 17;
    kernel_of_block<Kernel> = &kernel;
    blockDim = {threads, 1, 1}, gridDim = grid;
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
                threadIdx = {mine.now, 0, 0};
                swapcontext(&mine.scheduler, &mine.fibers[mine.now].context);
            }
        }
    }
}
