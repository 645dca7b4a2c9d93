// A stage: work that is cut into chunks, which threads may do in any order and at the same time.

#pragma once

#include <cstdint>

namespace {

// Chunks that a thread does one after the other.
struct Chunks {
  int64_t first, stop;
};

struct Stage {
  void (*work)(const void* args, Chunks chunks, int64_t thread);
  const void* args;
  int64_t chunks;  // fewer than 2^24
  bool is_even;    // whether one takes about as long as another
};

template <typename Args>
constexpr bool IS_EVEN = true;

template <typename Args, void (*kernel)(const Args&, Chunks, int64_t thread)>
void do_chunks(const void* args, Chunks chunks, int64_t thread) {
  kernel(*(const Args*)args, chunks, thread);
}

// The stage of a kernel; arguments say how many chunks they make.
template <typename Args, void (*kernel)(const Args&, Chunks, int64_t)>
Stage stage_of(const Args& args) {
  return Stage{do_chunks<Args, kernel>, &args, args.chunks(), IS_EVEN<Args>};
}

// Rows of a chunk: some thousands of elements, which outweigh that it is handed out.
inline int64_t rows_of_chunk(int64_t width) { return width >= 8192 ? 1 : 8192 / width; }

inline int64_t chunks_of(int64_t rows, int64_t width) {
  const int64_t step = rows_of_chunk(width);
  return (rows + step - 1) / step;
}

// Calls `body(row)` for the rows of chunks.
template <typename Body>
inline __attribute__((always_inline)) void for_rows(Chunks chunks, int64_t rows, int64_t width,
                                                    Body body) {
  const int64_t step = rows_of_chunk(width);
  const int64_t stop = chunks.stop * step < rows ? chunks.stop * step : rows;
  for (int64_t row = chunks.first * step; row < stop; row++) body(row);
}

}  // namespace
