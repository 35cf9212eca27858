// Blocks of CUDA threads on the host: each thread is a fiber, and barriers and shuffles are real.
// The blocks of a cluster run at the same time; others run one after another. Include it before
// host.hpp, whose definitions for a single thread it replaces.
#pragma once
#define __BLOCK__
#undef _FORTIFY_SOURCE  // its longjmp accepts no other stack
#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

// Blocks of several GPUs run at the same time, so each has static shared memory of its own.
#ifdef SEVERAL_GPUS
#define SHARED(T, name, n) T* const name = (T*)block->fixed(__COUNTER__, sizeof(T) * (n))
#endif

struct Dim3 {
    int x, y, z;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Barrier {
    int count = 0, round = 0;
};
struct Block {
    struct Fiber {
        ucontext_t context;  // of its first turn
        jmp_buf at;
        bool begun = false;
        std::unique_ptr<char[]> stack;
        const Barrier* waits = nullptr;
        int round = 0;
        bool over = false;
    };
    std::vector<Fiber> fibers;
    std::vector<unsigned long long> slots;
    // Of each thread that is the first of those that wait: of whole warps, and of parts of them, for
    // lanes may wait for their warp while others still exchange values.
    std::vector<Barrier> warps, parts;
    Barrier all;
    std::vector<char> memory;  // dynamic shared memory
    std::map<int, std::unique_ptr<char[]>> arrays;  // static shared memory
    Dim3 index;
    int now = 0;

    Block(int threads, int shared, Dim3 index)
        : fibers(threads), slots(threads), warps(threads), parts(threads), memory(shared), index(index) {}

    char* fixed(int number, size_t nbytes) {
        std::unique_ptr<char[]>& array = arrays[number];
        if (!array) array.reset(new char[nbytes]);
        return array.get();
    }
};
inline std::vector<Block>* cluster;
inline Block* block;
inline Barrier of_cluster;
inline jmp_buf scheduler;

// Jumps do not save signals as swapcontext does, which takes two system calls.
inline void yield_thread() {
    if (!_setjmp(block->fibers[block->now].at)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Block::Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
inline void wait(Barrier& b, int threads) {
    Block::Fiber& mine = block->fibers[block->now];
    mine.waits = &b, mine.round = b.round;
    if (++b.count == threads) b.count = 0, ++b.round;
    else yield_thread();
    mine.waits = nullptr;
}

inline void __syncthreads() { wait(block->all, blockDim.x * blockDim.y); }
inline int first_of_warp() { return block->now / 32 * 32; }
inline int lane() { return block->now % 32; }
inline void __syncwarp(unsigned mask = ~0u) {
    std::vector<Barrier>& barriers = mask == ~0u ? block->warps : block->parts;
    wait(barriers[first_of_warp() + __builtin_ctz(mask)], __builtin_popcount(mask));
}

inline void cluster_sync() { wait(of_cluster, blockDim.x * (int)cluster->size()); }
// Where p, in this block's dynamic shared memory, is in that of another block of the cluster.
template <class T>
T* in_block(T* p, int rank) {
    return (T*)((*cluster)[rank].memory.data() + ((char*)p - block->memory.data()));
}
// As in cluster.cuh. Blocks meet where they wait for the numbers.
struct Inbox {
    unsigned long long arrived;

    void open(int) {}
    void send(int rank, float* to, float x) { *in_block(to, rank) = x; }
    void wait(bool) { cluster_sync(); }
};
inline void blocks_start() {}
inline void blocks_started() { cluster_sync(); }

inline void fence_barriers() {}
// An mbarrier in 8 bytes: arrivals of a phase, those it still lacks, the phase, and bytes to come.
struct Arrivals {
    unsigned count : 16, missing : 16, phase : 1, nbytes : 31;
};
inline Arrivals& arrivals(unsigned long long* b) { return *(Arrivals*)b; }
inline void advance(Arrivals& b) {
    if (!b.missing && !b.nbytes) b.missing = b.count, b.phase ^= 1;
}
inline void barrier_init(unsigned long long* b, unsigned count) {
    arrivals(b) = {count, count, 0, 0};
}
inline void barrier_arrive(unsigned long long* b) { --arrivals(b).missing, advance(arrivals(b)); }
inline void copies_arrive(unsigned long long* b) { barrier_arrive(b); }
inline void barrier_expect(unsigned long long* b, unsigned nbytes) {
    arrivals(b).nbytes += nbytes;
    barrier_arrive(b);
}
inline void barrier_wait(unsigned long long* b, unsigned parity) {
    while (arrivals(b).phase == parity) yield_thread();
}
inline bool barrier_passed(unsigned long long* b, unsigned parity) {
    return arrivals(b).phase != parity;
}
template <class T>
void send(void* p, int rank, const T& x, unsigned long long* b) {
    __builtin_memcpy(in_block((char*)p, rank), &x, sizeof x);
    Arrivals& there = arrivals(in_block(b, rank));
    there.nbytes -= sizeof x;
    advance(there);
}
template <class T, class U>
T atomicAdd(T* at, U by) {
    const T before = *at;
    *at += by;
    return before;
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
    const unsigned before = *at;
    *at = before >= last ? 0 : before + 1;
    return before;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
void __stcs(T* at, T x) {
    *at = x;
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
T __shfl_down_sync(unsigned mask, T x, int by) {
    return exchanged(x, lane() + by < 32 ? lane() + by : lane(), mask);
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
// x of all lanes, combined.
template <class Op>
unsigned reduced(unsigned x, Op op) {
    for (int by = 16; by; by /= 2) x = op(x, __shfl_xor_sync(~0u, x, by));
    return x;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return a > b ? a : b; });
}

template <class Kernel>
Kernel* kernel_of_block;
template <class Kernel>
void run() {
    (*kernel_of_block<Kernel>)();
    block->fibers[block->now].over = true;
    yield_thread();
}

// A kernel over a grid; the threads of a block take turns. Clusters of blocks are along x.
template <class Kernel>
void launch(Dim3 grid, Dim3 shape, Kernel kernel, int shared = 0, int blocks = 1) {
    constexpr int STACK = 1 << 17;
    const int threads = shape.x * shape.y;
    kernel_of_block<Kernel> = &kernel;
    blockDim = shape, gridDim = grid;
    for (int i = 0; i < grid.x * grid.y * grid.z; i += blocks) {
        std::vector<Block> mine;
        for (int b = i; b < i + blocks; ++b)
            mine.emplace_back(threads, shared,
                              Dim3{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
        cluster = &mine, of_cluster = {};
        for (Block& each : mine)
            for (Block::Fiber& fiber : each.fibers) {
                fiber.stack.reset(new char[STACK]);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = STACK;
                makecontext(&fiber.context, run<Kernel>, 0);
            }
        for (bool going = true; going;) {
            going = false;
            for (Block& each : mine) {
                block = &each, blockIdx = each.index;
                for (each.now = 0; each.now < threads; ++each.now) {
                    Block::Fiber& fiber = each.fibers[each.now];
                    if (fiber.over) continue;
                    going = true;
                    if (fiber.waits && fiber.waits->round == fiber.round) continue;
                    threadIdx = {each.now % shape.x, each.now / shape.x, 0};
                    resume(fiber);
                }
            }
        }
    }
}
// -- several GPUs at the same time ------------------------------------------------------------------

// What a kernel calls in a wait for another GPU.
inline void let_others_run() { yield_thread(); }

struct Grid {
    std::function<void()> kernel;
    Dim3 grid, shape;
    int shared;
};
inline const std::function<void()>* kernel_now;
inline void run_grid() {
    (*kernel_now)();
    block->fibers[block->now].over = true;
    yield_thread();
}

// A kernel on each GPU. On each, `resident` blocks run at the same time, and the next one starts when
// one of them has ended. `order` decides who is next. False: they had not ended after `turns` of all.
inline bool launch_together(const std::vector<Grid>& grids, int resident, unsigned order, int turns) {
    constexpr int STACK = 1 << 16;
    std::vector<std::vector<std::unique_ptr<Block>>> live(grids.size());
    std::vector<int> next(grids.size(), 0);
    for (; turns; --turns) {
        bool going = false;
        order = order * 1664525u + 1013904223u;
        for (size_t turn = 0, first = order >> 16; turn < grids.size(); ++turn) {
            const size_t gpu = (first + turn) % grids.size();
            const Grid& mine = grids[gpu];
            const int threads = mine.shape.x * mine.shape.y;
            const int blocks = mine.grid.x * mine.grid.y * mine.grid.z;
            auto& here = live[gpu];
            for (size_t b = 0; b < here.size();) {
                bool over = true;
                for (auto& fiber : here[b]->fibers) over &= fiber.over;
                if (over) here.erase(here.begin() + b);
                else ++b;
            }
            while ((int)here.size() < resident && next[gpu] < blocks) {
                const int b = next[gpu]++;
                here.emplace_back(new Block(threads, mine.shared,
                                            Dim3{b % mine.grid.x, b / mine.grid.x % mine.grid.y,
                                                 b / mine.grid.x / mine.grid.y}));
                for (Block::Fiber& fiber : here.back()->fibers) {
                    fiber.stack.reset(new char[STACK]);
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = STACK;
                    makecontext(&fiber.context, run_grid, 0);
                }
            }
            going |= !here.empty();
            for (auto& each : here) {
                order = order * 1664525u + 1013904223u;
                if (order >> 28 == 0) continue;  // a block may be late
                block = each.get(), blockIdx = block->index;
                blockDim = mine.shape, gridDim = mine.grid, kernel_now = &mine.kernel;
                for (block->now = 0; block->now < threads; ++block->now) {
                    Block::Fiber& fiber = block->fibers[block->now];
                    if (fiber.over || fiber.waits && fiber.waits->round == fiber.round) continue;
                    threadIdx = {block->now % mine.shape.x, block->now / mine.shape.x, 0};
                    resume(fiber);
                }
            }
        }
        if (!going) return true;
    }
    return false;
}

template <class Kernel>
void launch(Dim3 grid, int threads, Kernel kernel, int shared = 0, int blocks = 1) {
    launch(grid, Dim3{threads, 1, 1}, kernel, shared, blocks);
}
