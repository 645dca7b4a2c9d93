// Paged attention.
//
// Keys and values are read in spans of fixed positions. A span is brought into the layout that the
// products below want (keys: one position per lane), once for all queries that share it; the
// softmax is carried from span to span.

#pragma once

#include <optional>

#include "products.h"
#include "stage.h"
#include "tiles.h"

namespace {

constexpr int64_t SPAN = 32;  // positions
constexpr int64_t FEW = 4;    // queries, for which a span is read as it is multiplied

struct AttendArgs {
  const void* qkv;
  void* out;
  const void* kv;         // keys of the layer in block 0
  const int64_t* pieces;  // [pieces, 4]: first token, tokens, row of the tables, first position
  const int64_t* tables;
  float* scratch;         // a part for each thread
  int64_t scratch_stride;  // floats of a part
  int64_t num_pieces, parts;  // parts: how many chunks a piece is, each some of its heads
  int64_t table_stride, block_size, block_stride, value_offset;
  int64_t heads, kv_heads, head_dim;
  int64_t tile_rows;  // queries of a key-value head from which on AMX multiplies them; 0: never
  double scale;

  int64_t chunks() const { return num_pieces * parts; }
};

// Sequences have any length.
template <>
constexpr bool IS_EVEN<AttendArgs> = false;

// The queries of a piece for one key-value head, and their state from span to span.
struct Queries {
  float* lanes;     // [rows, padded / PER_LANE]
  float* sums;      // [rows, padded] weighted values so far
  float* peaks;     // [rows] largest score so far
  float* totals;    // [rows, 16] weights so far, by lane
};

// What a span needs while it is worked on.
struct SpanScratch {
  float* keys;      // [padded / PER_LANE, SPAN]
  float* values;    // [SPAN / PER_LANE, padded]
  float* scores;    // [rows, SPAN]
  float* weights;   // [rows, SPAN / PER_LANE]
  float* factors;   // [rows]
};

template <typename T>
struct Attend {
  typedef typename ProductOf<T>::Kind Product;
  const AttendArgs& args;
  const int64_t dim = args.head_dim;
  const int64_t padded = (dim + 31) / 32 * 32;
  const int64_t lanes = padded / Product::PER_LANE;
  const int64_t group = args.heads / args.kv_heads;
  const int64_t row_width = args.kv_heads * dim;
  const int64_t token_width = (args.heads + 2 * args.kv_heads) * dim;
  const float scale = float(args.scale) * LOG2_E;
  // Rows of memory behind queries, which their last tiles may reach into.
  const int64_t spare = HAS_TILES && args.tile_rows > 0 ? TILE_ROWS : 0;

  explicit Attend(const AttendArgs& args) : args(args) {}

  void start(const Queries& queries, int64_t token, int64_t tokens, int64_t kv_head) const {
    for (int64_t r = 0; r < tokens * group; r++) {
      const T* query = (const T*)args.qkv + (token + r / group) * token_width;
      query += (kv_head * group + r % group) * dim;
      for (int64_t i = 0; i < lanes; i += 16) {
        const int64_t left = dim - i * Product::PER_LANE;
        store(queries.lanes + r * lanes + i,
              left > 0 ? Product::load_lanes(query + i * Product::PER_LANE, left) : F16{});
      }
      std::memset(queries.sums + r * padded, 0, padded * sizeof(float));
      std::memset(queries.totals + r * 16, 0, 64);
      queries.peaks[r] = -INFINITY;
    }
  }

  // Positions past the last one of the piece repeat it, so that no other slot is ever read.
  void locate(const int64_t* table, int64_t first, int64_t last, int64_t* offsets) const {
    const int64_t size = args.block_size;
    int64_t block = first / size, inside = first % size;
    for (int64_t i = 0; i < SPAN; i++) {
      if (first + i > last) {
        offsets[i] = offsets[i - 1];
        continue;
      }
      offsets[i] = table[block] * args.block_stride + inside * row_width;
      if (++inside == size) inside = 0, block++;
    }
  }

  // Lanes [i, i + 16) of sixteen keys, one position per lane.
  INLINE void load_part(const T* const* rows, const int64_t* jumps, int64_t i, F16* part) const {
    const int64_t column = i * Product::PER_LANE, left = dim - column;
    for (int r = 0; r < 16; r++) {
      const T* row = rows[r] + column;
      __builtin_prefetch(row + jumps[r], 0, 2);
      part[r] = left > 0 ? Product::load_lanes(row, left) : F16{};
    }
    transpose(part);
  }

  void pack_keys(const T* const* rows, const int64_t* jumps, int64_t count,
                 float* to) const {
    for (int64_t first = 0; first < count; first += 16)
      for (int64_t i = 0; i < lanes; i += 16) {
        F16 part[16];
        load_part(rows + first, jumps + first, i, part);
        for (int r = 0; r < 16; r++) store(to + (i + r) * SPAN + first, part[r]);
      }
  }

  // One span for the queries [from, rows) of one head, which reach into it. `jumps` lead to the
  // rows of the next span: blocks lie anywhere, so that only we can tell the cache in time.
  void span(const Queries& queries, const SpanScratch& scratch, const T* const* keys,
            const T* const* values, const int64_t* jumps, int64_t from, int64_t rows,
            int64_t start, int64_t position, const Tiles* tiles) const {
    const int64_t last = position + (rows - 1) / group;
    const int64_t count = last - start + 1 < SPAN ? last - start + 1 : SPAN;
    const int64_t depth = (count + Product::PER_LANE - 1) / Product::PER_LANE;
    constexpr int64_t WIDTH = SPAN / Product::PER_LANE;
    const bool in_tiles = tiles && is_for_tiles(rows - from), is_few = !in_tiles && rows - from <= FEW;
    const float* lanes_from = queries.lanes + from * lanes;
    float* sums = queries.sums + from * padded;
    if (is_few) {
      switch (rows - from) {
        case 1: score_few<1>(lanes_from, keys, jumps, count, scratch.scores); break;
        case 2: score_few<2>(lanes_from, keys, jumps, count, scratch.scores); break;
        case 3: score_few<3>(lanes_from, keys, jumps, count, scratch.scores); break;
        default: score_few<4>(lanes_from, keys, jumps, count, scratch.scores);
      }
    } else if (in_tiles) {  // which are always full
      pack_keys(keys, jumps, SPAN, scratch.keys);
      Product::pack_values(values, jumps, scratch.values, SPAN, dim, padded);
      multiply_in(*tiles, lanes_from, lanes, scratch.keys, SPAN, rows - from, lanes, SPAN, nullptr,
                    scratch.scores, SPAN);
    } else {
      pack_keys(keys, jumps, count, scratch.keys);
      Product::pack_values(values, jumps, scratch.values, count, dim, padded);
      multiply<Product>(lanes_from, lanes, scratch.keys, SPAN, rows - from, lanes, SPAN, nullptr,
                        scratch.scores, SPAN);
    }
    for (int64_t r = from; r < rows; r++)
      weigh(queries, r, scratch.scores + (r - from) * SPAN, position + r / group - start,
            scratch.weights + (r - from) * WIDTH, scratch.factors + r - from);
    if (is_few) {
      switch (rows - from) {
        case 1: add_few<1>(scratch, values, jumps, depth, sums); break;
        case 2: add_few<2>(scratch, values, jumps, depth, sums); break;
        case 3: add_few<3>(scratch, values, jumps, depth, sums); break;
        default: add_few<4>(scratch, values, jumps, depth, sums);
      }
    } else if (in_tiles) {
      multiply_in(*tiles, scratch.weights, WIDTH, scratch.values, padded, rows - from, WIDTH, padded,
                    scratch.factors, sums, padded);
    } else {
      multiply<Product>(scratch.weights, WIDTH, scratch.values, padded, rows - from, depth, padded,
                        scratch.factors, sums, padded);
    }
  }

  // A few queries read a span as they multiply it, unless all are to be computed alike.
  bool is_for_tiles(int64_t rows) const {
    return HAS_TILES && Product::PER_LANE == 2 && args.tile_rows > 0 && rows >= args.tile_rows &&
           (args.tile_rows == 1 || rows > FEW);
  }

  // As `multiply`, in tiles, all sixteen rows of the last ones.
  void multiply_in(const Tiles& tiles, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     int64_t rows, int64_t depth, int64_t columns, const float* factors, float* out,
                     int64_t out_stride) const {
    if (factors)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns && factors[r] != 1.0f; i += 16)
          store(out + r * out_stride + i, load(out + r * out_stride + i) * factors[r]);
    const int64_t a_bytes = a_stride * sizeof(float), b_bytes = b_stride * sizeof(float);
    const int64_t out_bytes = out_stride * sizeof(float), steps = depth / TILE_LANES;
    for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS)
      for (int64_t i = 0; i < columns; i += 32) {
        const float* lanes = a + row * a_stride;
        float* to = out + row * out_stride + i;
        if (rows - row > TILE_ROWS)
          tiles.multiply<2, 2>(lanes, a_bytes, b + i, b_bytes, steps, to, out_bytes, factors);
        else
          tiles.multiply<1, 2>(lanes, a_bytes, b + i, b_bytes, steps, to, out_bytes, factors);
      }
  }

  // Scores of R queries, whose keys are not worth keeping in the layout of the product.
  template <int R>
  INLINE void score_few(const float* queries, const T* const* rows, const int64_t* jumps,
                        int64_t count, float* scores) const {
    for (int64_t first = 0; first < count; first += 16) {
      F16 sums[R];
      for (int q = 0; q < R; q++) sums[q] = F16{};
      for (int64_t i = 0; i < lanes; i += 16) {
        F16 part[16];
        load_part(rows + first, jumps + first, i, part);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
#pragma GCC unroll 4
          for (int q = 0; q < R; q++)
            sums[q] = Product::multiply_add(queries[q * lanes + i + r], part[r], sums[q]);
      }
      for (int q = 0; q < R; q++) store(scores + q * SPAN + first, sums[q]);
    }
  }

  // Adds the weighted values of a span to the sums of R queries.
  template <int R>
  INLINE void add_few(const SpanScratch& scratch, const T* const* values, const int64_t* jumps,
                      int64_t depth, float* sums) const {
    int64_t i = 0;
    for (; i + 64 <= padded; i += 64) add_columns<R, 2>(scratch, values, jumps, depth, i, sums + i);
    if (i < padded) add_columns<R, 1>(scratch, values, jumps, depth, i, sums + i);
  }

  template <int R, int C>
  INLINE void add_columns(const SpanScratch& scratch, const T* const* values, const int64_t* jumps,
                          int64_t depth, int64_t column, float* out) const {
    constexpr int64_t WIDTH = SPAN / Product::PER_LANE;
    F16 sums[R][2 * C];
    for (int q = 0; q < R; q++)
      for (int c = 0; c < 2 * C; c++)
        sums[q][c] = load(out + q * padded + 16 * c) * scratch.factors[q];
    for (int64_t k = 0; k < depth; k++) {
      F16 columns[2 * C];
#pragma GCC unroll 2
      for (int c = 0; c < C; c++)
        Product::load_values(values, jumps, k, column + 32 * c, dim, columns + 2 * c);
#pragma GCC unroll 4
      for (int q = 0; q < R; q++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++)
          sums[q][c] =
              Product::multiply_add(scratch.weights[q * WIDTH + k], columns[c], sums[q][c]);
    }
    for (int q = 0; q < R; q++)
      for (int c = 0; c < 2 * C; c++) store(out + q * padded + 16 * c, sums[q][c]);
  }

  // Turns the scores of a query, which sees positions up to `reach`, into weights.
  INLINE void weigh(const Queries& queries, int64_t r, const float* scores, int64_t reach,
                    float* weights, float* factor) const {
    constexpr int64_t NUM = SPAN / 16;
    F16 parts[NUM];
    for (int64_t i = 0; i < NUM; i++) parts[i] = load(scores + 16 * i);
    if (reach < SPAN - 1) {
      const I16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const F16 hidden = splat(-INFINITY);
      for (int64_t i = 0; i < NUM; i++)
        parts[i] = choose(index + int32_t(16 * i) <= int32_t(reach), parts[i], hidden);
    }
    F16 most = parts[0];
    for (int64_t i = 1; i < NUM; i++) most = larger(most, parts[i]);
    const float peak = queries.peaks[r], here = largest(most);
    const float top = here > peak ? here : peak;
    const float kept = here > peak ? exp2(splat((peak - top) * scale))[0] : 1.0f;
    float* totals = queries.totals + r * 16;
    F16 total = load(totals) * kept;
    for (int64_t i = 0; i < NUM; i += 2) {
      const F16 first = exp2(parts[i] * scale - top * scale);
      const F16 second = exp2(parts[i + 1] * scale - top * scale);
      total = Product::pack_weights(first, second, weights + 16 * i / Product::PER_LANE, total);
    }
    store(totals, total);
    *factor = kept;
    queries.peaks[r] = top;
  }

  void finish(const Queries& queries, int64_t token, int64_t tokens, int64_t kv_head) const {
    for (int64_t r = 0; r < tokens * group; r++) {
      T* out = (T*)args.out + (token + r / group) * args.heads * dim;
      out += (kv_head * group + r % group) * dim;
      float* sums = queries.sums + r * padded;
      Product::unpack(sums, padded);
      const float inverse = 1.0f / sum(load(queries.totals + r * 16));
      for (int64_t i = 0; i < dim; i += 16)
        store_some(out + i, load(sums + i) * inverse, dim - i);
    }
  }

  // Some heads of a piece, side by side, so that what they read is one stream.
  void heads(const int64_t* piece, int64_t head, int64_t num, float* scratch) const {
    const int64_t token = piece[0], tokens = piece[1], position = piece[3];
    const int64_t* table = args.tables + piece[2] * args.table_stride;
    const int64_t rows = tokens * group, last = position + tokens - 1;
    SpanScratch buffers;
    auto carve = [&](int64_t size) { return scratch += size, scratch - size; };
    buffers.keys = carve(lanes * SPAN);
    buffers.values = carve(SPAN / Product::PER_LANE * padded);
    const int64_t held = rows + spare;
    buffers.scores = carve(held * SPAN);
    buffers.weights = carve(held * SPAN);
    buffers.factors = carve((rows + 15) / 16 * 16);
    Queries queries{scratch, scratch + num * held * padded, scratch + 2 * num * held * padded,
                    scratch + 2 * num * held * padded + (num * held + 15) / 16 * 16};
    auto of = [&](int64_t h) {
      return Queries{queries.lanes + h * held * lanes, queries.sums + h * held * padded,
                     queries.peaks + h * held, queries.totals + h * held * 16};
    };
    std::optional<Tiles> tiles;
    if (is_for_tiles(rows)) tiles.emplace(rows < 2 * TILE_ROWS ? rows : 2 * TILE_ROWS);
    for (int64_t h = 0; h < num; h++) start(of(h), token, tokens, head + h);
    int64_t offsets[SPAN], following[SPAN];
    locate(table, 0, last, following);
    for (int64_t first = 0; first <= last; first += SPAN) {
      int64_t jumps[SPAN];
      std::memcpy(offsets, following, sizeof offsets);
      if (first + SPAN <= last) locate(table, first + SPAN, last, following);
      for (int64_t i = 0; i < SPAN; i++) jumps[i] = following[i] - offsets[i];
      const int64_t from = first > position ? (first - position) * group : 0;
      for (int64_t h = 0; h < num; h++) {
        const T *keys[SPAN], *values[SPAN];
        const T* base = (const T*)args.kv + (head + h) * dim;
        for (int64_t i = 0; i < SPAN; i++)
          keys[i] = base + offsets[i], values[i] = keys[i] + args.value_offset;
        span(of(h), buffers, keys, values, jumps, from, rows, first, position,
             tiles ? &*tiles : nullptr);
      }
    }
    for (int64_t h = 0; h < num; h++) finish(of(h), token, tokens, head + h);
  }
};

template <typename T>
void attend(const AttendArgs& args, Chunks chunks, int64_t thread) {
  const Attend<T> kernel(args);
  float* scratch = args.scratch + thread * args.scratch_stride;
  const int64_t share = args.kv_heads / args.parts;
  for (int64_t chunk = chunks.first; chunk < chunks.stop; chunk++) {
    const int64_t* piece = args.pieces + chunk / args.parts * 4;
    const int64_t head = chunk % args.parts * share, num = piece[1] == 1 ? share : 1;
    for (int64_t h = head; h < head + share; h += num) kernel.heads(piece, h, num, scratch);
  }
}

}  // namespace
