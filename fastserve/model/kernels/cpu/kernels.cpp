// The kernels that kernels.py calls, in C++17, without any library.
//
// Rules: an entry takes the threads that it runs in and one pointer to its packed arguments
// (kernels.py lays them out). What is computed for a row or token is one fixed sequence of
// operations, so that its bits depend neither on its neighbours nor on the number of threads; where
// tiles take over from some number of rows on, on which side of it that number is.

#include "layers.h"

namespace {

template <typename Args, void (*kernel)(const Args&, Chunks, int64_t)>
void run_stage(Threads& threads, const Args& args) {
  const Stage stage = stage_of<Args, kernel>(args);
  if (stage.chunks > 0) threads.run(&stage, &stage + 1);
}

}  // namespace

#define STAGE(kernel, suffix, T, Args)                                        \
  extern "C" void kernel##_##suffix(Threads* threads, const Args* arguments) { \
    run_stage<Args, kernel<T>>(*threads, *arguments);                          \
  }

#define ENTRIES(suffix, T)                                                             \
  STAGE(rms_norm, suffix, T, NormArgs)                                                 \
  STAGE(layer_norm, suffix, T, NormArgs)                                               \
  STAGE(head_rms_norm, suffix, T, HeadNormArgs)                                        \
  STAGE(silu_mul, suffix, T, SiluArgs)                                                 \
  STAGE(rotate_and_write, suffix, T, WriteArgs)                                        \
  STAGE(attend, suffix, T, AttendArgs)                                                 \
  STAGE(project, suffix, T, ProjectArgs)                                               \
  extern "C" void run_layers_##suffix(Threads* threads, const LayersArgs* arguments) { \
    run_layers<T>(*threads, *arguments);                                               \
  }                                                                                    \
  extern "C" int64_t per_lane_##suffix() { return ProductOf<T>::Kind::PER_LANE; }

ENTRIES(float32, float)
ENTRIES(bfloat16, BFloat16)

extern "C" bool knows_tiles() { return HAS_TILES; }
extern "C" bool has_tiles() { return open_tiles(); }

extern "C" Threads* alone() { return new Alone; }
extern "C" Threads* own_team(int64_t size) { return new Team(size); }
extern "C" Threads* openmp_team(OpenMP::Parallel* parallel, int64_t size) {
  return new OpenMP(parallel, size);
}
extern "C" void close_threads(Threads* threads) { delete threads; }
