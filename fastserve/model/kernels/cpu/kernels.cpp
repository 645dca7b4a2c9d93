// The kernels that kernels.py calls, in C++17, without any library.
//
// Rules: every entry takes one pointer to its packed arguments (kernels.py lays them out)
// and may run in several threads at once, which take shares of the work by counting up `next`.
// What is computed for a row or token is one fixed sequence of operations, so that its bits depend
// neither on its neighbours nor on the number of threads.

#include "attention.h"
#include "row_kernels.h"

#define ENTRIES(suffix, T)                                                                       \
  extern "C" void rms_norm_##suffix(NormArgs* args) { rms_norm<T>(args); }                       \
  extern "C" void layer_norm_##suffix(NormArgs* args) { layer_norm<T>(args); }                   \
  extern "C" void head_rms_norm_##suffix(HeadNormArgs* args) { head_rms_norm<T>(args); }         \
  extern "C" void silu_mul_##suffix(SiluArgs* args) { silu_mul<T>(args); }                       \
  extern "C" void rotate_and_write_##suffix(WriteArgs* args) { rotate_and_write<T>(args); }      \
  extern "C" void attend_##suffix(AttendArgs* args) { attend<T>(args); }

ENTRIES(float32, float)
ENTRIES(bfloat16, BFloat16)
