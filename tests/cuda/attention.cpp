// The f32 attention kernel, its combination and the survey of masks, run on the host.
// test_attention_host.py puts block.hpp, host.hpp and the kernels' sources in front.

extern "C" void attention(const Attention* a, const int* any_grid, const int* survey_grid,
                          const int* combine_grid) {
    const Attention argument = *a;
    if (argument.map)
        launch({survey_grid[0], survey_grid[1], survey_grid[2]}, 256, [=] { survey(argument); });
    launch({any_grid[0], any_grid[1], any_grid[2]}, 256,
           [=] { argument.ids ? any<64, 32, true>(argument) : any<64, 32, false>(argument); });
    if (argument.splits > 1)
        launch({combine_grid[0], combine_grid[1], 1}, 256,
               [=] { argument.d_v % 4 ? combine<1>(argument) : combine<4>(argument); });
}
extern "C" int attention_size() { return sizeof(Attention); }
