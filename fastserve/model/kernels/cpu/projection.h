// A projection: rows times a weight that lies in panels.
//
// A panel is 64 outputs over the whole depth, [depth / PER_LANE, 64, PER_LANE], so that it is read
// from beginning to end; what is missing in the last one is zero. A chunk is the columns of a panel,
// or some of them, for some rows. A weight of int8 has a scale for each output; its numbers become
// those of the product as they are read: for a few rows in registers, for more in memory that stays
// in the cache while the rows pass.
// Rules: the sum of an element runs over the depth in order and is rounded once, scaled and with
// what it is added to: its bits do not depend on the rows beside it, but for the choice of tiles.

#pragma once

#include <vector>

#include "products.h"
#include "stage.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL = 64;        // outputs
constexpr int64_t ROWS_OF_TASK = 96;  // rows of a chunk: they stay in the cache while panels pass
constexpr int64_t WIDENED_ROWS = 13;  // from so many on, a panel of int8 is widened in memory
constexpr int64_t LINE = 64;          // bytes of the cache
constexpr int64_t AHEAD = 4096;       // bytes of a panel that are under way while it is widened

struct ProjectArgs {
  const void* x;        // [rows, depth]
  const void* panels;   // [width / PANEL, panel_stride]
  const void* bias;     // [width]; may be null
  const float* scales;  // [width], of a weight of int8; null: panels are of the dtype
  void* out;            // [rows, width]
  int64_t rows, depth, width;
  int64_t panel_stride;  // elements
  int64_t columns;       // of a chunk, where one holds all rows: 16, 32 or 64
  int64_t adds;          // whether to what lies in `out`
  int64_t tile_rows;     // of a chunk, from which on they are multiplied in tiles; 0: never

  int64_t row_chunks() const { return (rows + ROWS_OF_TASK - 1) / ROWS_OF_TASK; }
  int64_t parts() const { return (width + chunk_columns() - 1) / chunk_columns(); }
  int64_t chunks() const { return row_chunks() * parts(); }

  // Of a chunk: more rows make more chunks, and need no narrow ones for balance.
  int64_t chunk_columns() const {
    int64_t taken = columns;
    for (int64_t num = row_chunks(); num > 1 && taken < PANEL; num /= 2) taken *= 2;
    return taken;
  }
};

// What is called for from memory while a block is computed.
struct Ahead {
  const char* from;  // null: nothing
  int64_t step;      // bytes with each step, one or two lines
};

// A call of its own, so that every block rounds alike before it adds something.
__attribute__((noinline)) void scale_sums(F16* sums, int64_t rows, int64_t sixteens,
                                          const float* scales, int64_t count) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < sixteens && 16 * c < count; c++)
      sums[r * sixteens + c] *= load_some(scales + 16 * c, count - 16 * c);
}

template <typename T>
struct Project {
  typedef typename ProductOf<T>::Kind Product;
#ifdef __AVX512F__
  static constexpr int MOST_COLUMNS = 4, MOST_ROWS = 6;  // sixteens; their sums stay in registers
#else
  static constexpr int MOST_COLUMNS = 1, MOST_ROWS = 4;
#endif
  static constexpr int64_t STEP = PANEL * Product::PER_LANE;  // numbers of a panel
  const ProjectArgs& args;
  const int64_t chunk_width = args.chunk_columns();
  const char* next = nullptr;  // the panel of the thread's next chunk, where it is to be called for

  // R rows times 16 * C columns of a panel.
  template <int R, int C, typename W>
  INLINE void block(const T* x, const W* panel, int64_t row, int64_t column, Ahead ahead) const {
    const int64_t steps = args.depth / Product::PER_LANE, stride = args.depth;
    F16 sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] = F16{};
    for (int64_t k = 0; k < steps; k++) {
      F16 columns[C];
      load_columns(panel, columns);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float lane = Product::load_lane(x + r * stride + k * Product::PER_LANE);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
          sums[r][c] = Product::multiply_add(lane, columns[c], sums[r][c]);
      }
      if (ahead.from) {
        __builtin_prefetch(ahead.from, 0, 2);
        __builtin_prefetch(ahead.from + ahead.step - LINE, 0, 2);
        ahead.from += ahead.step;
      }
      panel += STEP;
    }
    if constexpr (sizeof(W) == 1)
      for (int r = 0; r < R; r++)
        for (int c = 0; c + 1 < C; c += 2) Product::put_in_order(sums[r][c], sums[r][c + 1]);
    if (args.scales) {
      F16 copies[R * C];  // so that sums stay in registers
      for (int i = 0; i < R * C; i++) copies[i] = sums[i / C][i % C];
      scale_sums(copies, R, C, args.scales + column, args.width - column);
      for (int i = 0; i < R * C; i++) sums[i / C][i % C] = copies[i];
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) finish(sums[r][c], row + r, column + 16 * c);
  }

  template <int C>
  static INLINE void load_columns(const T* panel, F16 (&columns)[C]) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++)
      columns[c] = Product::load_columns(panel + 16 * c * Product::PER_LANE);
  }
  template <int C>
  static INLINE void load_columns(const int8_t* panel, F16 (&columns)[C]) {
    if constexpr (C == 1) columns[0] = Product::load_columns(panel);
#pragma GCC unroll 8
    for (int c = 0; c + 1 < C; c += 2)
      Product::load_two(panel + 16 * c * Product::PER_LANE, columns[c], columns[c + 1]);
  }

  INLINE void finish(F16 sum, int64_t row, int64_t column) const {
    const int64_t count = args.width - column;
    if (count <= 0) return;
    if (args.bias) sum += load_some((const T*)args.bias + column, count);
    T* out = (T*)args.out + row * args.width + column;
    if (args.adds) sum += load_some(out, count);
    store_some(out, sum, count);
  }

  template <int C, typename W>
  void blocks(const W* panel, int64_t first, int64_t stop, int64_t column) const {
    int64_t num = (stop - first + MOST_ROWS - 1) / MOST_ROWS, called = 0;
    // One block reads its panel from memory, others again from the cache: the next panel comes evenly
    // over all of them, so that memory does not wait for sums. A single block needs no help.
    const int64_t steps = args.depth / Product::PER_LANE, panel_bytes = steps * STEP * number_bytes();
    const int64_t share = (STEP * number_bytes() + num * LINE - 1) / (num * LINE) * LINE;
    const bool calls = next && num > 1;
    // As even as they can be: a block of few rows does not hide how long a sum takes.
    for (; num > 0; num--) {
      const int64_t rows = (stop - first + num - 1) / num;
      const T* x = (const T*)args.x + first * args.depth;
      const Ahead ahead{calls && called < panel_bytes ? next + called : nullptr, share};
      called += steps * share;
      switch (rows) {
        case 1: block<1, C>(x, panel, first, column, ahead); break;
        case 2: block<2, C>(x, panel, first, column, ahead); break;
        case 3: block<3, C>(x, panel, first, column, ahead); break;
        case 4: block<4, C>(x, panel, first, column, ahead); break;
        case 5: block<5, C>(x, panel, first, column, ahead); break;
        default: block<6, C>(x, panel, first, column, ahead);
      }
      first += rows;
    }
  }

  template <typename W>
  void columns(const W* panel, int64_t first, int64_t stop, int64_t column) const {
    for (int64_t left = chunk_width / 16; left > 0;) {
      const int64_t sixteens = left < MOST_COLUMNS ? left : MOST_COLUMNS;
      if (sixteens == 4)
        blocks<MOST_COLUMNS < 4 ? 1 : 4>(panel, first, stop, column);
      else if (sixteens == 2)
        blocks<MOST_COLUMNS < 2 ? 1 : 2>(panel, first, stop, column);
      else
        blocks<1>(panel, first, stop, column);
      panel += 16 * sixteens * Product::PER_LANE;
      column += 16 * sixteens;
      left -= sixteens;
    }
  }

  // To widen a panel in memory pays for some rows only, unless all are to be computed alike.
  bool is_for_tiles(int64_t rows) const {
    return HAS_TILES && Product::PER_LANE == 2 && args.tile_rows > 0 && rows >= args.tile_rows &&
           (args.tile_rows == 1 || !args.scales || rows >= WIDENED_ROWS) &&
           args.depth % (2 * TILE_LANES) == 0;
  }

  // The first `rows` of R times 16 rows, and 16 * C columns of a panel.
  template <int R, int C>
  void tile_block(const Tiles& tiles, const T* panel, int64_t row, int64_t rows,
                  int64_t column) const {
    F16 sums[R * TILE_ROWS][C];
    tiles.multiply<R, C>((const T*)args.x + row * args.depth, args.depth * sizeof(T), panel,
                         STEP * sizeof(T), args.depth / (2 * TILE_LANES), sums, sizeof sums[0],
                         false);
    if (args.scales) scale_sums(sums[0], rows, C, args.scales + column, args.width - column);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < C; c++) finish(sums[r][c], row + r, column + 16 * c);
  }

  void tile_columns(const T* panel, int64_t first, int64_t stop, int64_t column) const {
    for (int64_t rows; first < stop; first += rows) {
      rows = stop - first < 2 * TILE_ROWS ? stop - first : 2 * TILE_ROWS;
      const Tiles tiles(rows);
      if (rows <= TILE_ROWS && chunk_width == PANEL) {
        tile_block<1, 4>(tiles, panel, first, rows, column);
        continue;
      }
      for (int64_t i = 0; i < chunk_width; i += 32) {
        const T* columns = panel + i * Product::PER_LANE;
        if (rows > TILE_ROWS && chunk_width > 16)
          tile_block<2, 2>(tiles, columns, first, rows, column + i);
        else if (rows > TILE_ROWS)
          tile_block<2, 1>(tiles, columns, first, rows, column + i);
        else if (chunk_width > 16)
          tile_block<1, 2>(tiles, columns, first, rows, column + i);
        else
          tile_block<1, 1>(tiles, columns, first, rows, column + i);
      }
    }
  }

  // The numbers of a chunk's columns at the same places of this thread's memory.
  const T* widen(const int8_t* panel) const {
    static thread_local std::vector<T> memory;
    const size_t size = args.depth * PANEL + LINE / sizeof(T);
    if (memory.size() < size) memory.resize(size);
    T* widened = (T*)((uintptr_t(memory.data()) + LINE - 1) / LINE * LINE);
    const int64_t numbers = chunk_width * Product::PER_LANE;
    for (int64_t step = 0; step < args.depth * PANEL; step += STEP) {
      for (int64_t i = step; i < step + numbers; i += 64)
        __builtin_prefetch(panel + AHEAD + i, 0, 2);
      for (int64_t i = step; i < step + numbers; i += 16 * Product::PER_LANE)
        Product::store_columns(widened + i, Product::load_columns(panel + i));
    }
    return widened;
  }

  int64_t number_bytes() const { return args.scales ? 1 : sizeof(T); }

  // Where the columns of a chunk begin, in numbers of the weight.
  int64_t start_of(int64_t chunk) const {
    const int64_t column = chunk % args.parts() * chunk_width;
    return column / PANEL * args.panel_stride + column % PANEL * Product::PER_LANE;
  }

  void chunk(int64_t chunk) const {
    const int64_t first = chunk / args.parts() * ROWS_OF_TASK;
    const int64_t stop = first + ROWS_OF_TASK < args.rows ? first + ROWS_OF_TASK : args.rows;
    const int64_t column = chunk % args.parts() * chunk_width;
    const int64_t start = start_of(chunk);
    const int8_t* numbers = (const int8_t*)args.panels + start;
    const T* weights = (const T*)args.panels + start;
    if (is_for_tiles(stop - first))
      tile_columns(args.scales ? widen(numbers) : weights, first, stop, column);
    else if (!args.scales)
      columns(weights, first, stop, column);
    else if (stop - first < WIDENED_ROWS)
      columns(numbers, first, stop, column);
    else
      columns(widen(numbers), first, stop, column);
  }
};

template <typename T>
void project(const ProjectArgs& args, Chunks chunks, int64_t) {
  Project<T> kernel{args};
  // Several threads take turns by themselves: one reads while another computes.
  const bool is_alone = chunks.stop - chunks.first == args.chunks();
  const bool calls = is_alone && 16 * kernel.MOST_COLUMNS == PANEL && kernel.chunk_width == PANEL;
  for (int64_t chunk = chunks.first; chunk < chunks.stop; chunk++) {
    const char* next = (const char*)args.panels + kernel.start_of(chunk + 1) * kernel.number_bytes();
    kernel.next = calls && chunk + 1 < chunks.stop ? next : nullptr;
    kernel.chunk(chunk);
  }
}

}  // namespace
