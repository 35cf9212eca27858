// Many elementwise ops on a few numbers, one after another in one block: a launch for each costs more
// than all of their work. What an op wrote, later ones read from memory, after a barrier.
// @kernel hot small
#include "common.cuh"

// to[i] = op(a[i step_a], b[i step_b]) for i < n; steps are in bytes, `to` is contiguous. Numbers are
// i32 or f32; all ops but COPY and CAST are of f32. p and q: their parameters.
enum { COPY, CAST, FILL, SCALE, CLAMP, ADD, SUB, MUL, DIV };
struct Instruction {
    char *to;
    const char *a, *b;
    int step_a, step_b, n, op;
    short from_int, to_int;
    float p, q;
};
constexpr int MOST_INSTRUCTIONS = 64;
struct Program {
    Instruction list[MOST_INSTRUCTIONS];
    int count;
};

__global__ void __launch_bounds__(256) small(const __grid_constant__ Program program) {
    begin();
    for (int k = 0; k < program.count; k++) {
        const Instruction& now = program.list[k];
        for (int i = threadIdx.x; i < now.n; i += 256) {
            const int bits = *(const int*)(now.a + i * now.step_a);
            if (now.from_int && now.to_int) {
                ((int*)now.to)[i] = bits;
                continue;
            }
            float x = now.from_int ? (float)bits : __int_as_float(bits);
            const float y = now.b ? *(const float*)(now.b + i * now.step_b) : 0;
            switch (now.op) {
                case FILL: x = now.p; break;
                case SCALE: x = now.q == 0 ? now.p * x : now.p * x + now.q; break;
                case CLAMP: x = x < now.p ? now.p : x > now.q ? now.q : x; break;
                case ADD: x += y; break;
                case SUB: x -= y; break;
                case MUL: x *= y; break;
                case DIV: x /= y; break;
            }
            if (now.to_int) ((int*)now.to)[i] = (int)x;
            else ((float*)now.to)[i] = x;
        }
        __syncthreads();
    }
}
