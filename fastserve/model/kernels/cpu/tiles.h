// Products over pairs of bfloat16 in AMX's tiles, each 16 rows of 16 lanes.
//
// Rules: an element is the sum over steps of 16 lanes, in order: its bits depend on its row alone. They
// are not those that vectors give: within a step first and second numbers of pairs are added up apart.
// Must not know: what is multiplied.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define WITH_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_LANES = 16;

#ifdef WITH_TILES
constexpr bool HAS_TILES = true;

// Tiles for blocks of up to `rows` rows, at most 32, as long as it lives. A thread that kept them in
// use would have them saved whenever it gives way.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    alignas(64) Layout layout;
    const uint8_t upper = rows < TILE_ROWS ? rows : TILE_ROWS;
    const uint8_t lower = rows > TILE_ROWS ? rows - TILE_ROWS : upper;
    const uint8_t fifth = rows > TILE_ROWS ? lower : TILE_ROWS;  // rows, or columns
    const uint8_t heights[8] = {upper, upper, lower, lower, upper, fifth, TILE_ROWS, TILE_ROWS};
    for (int tile = 0; tile < 8; tile++) {
      layout.row_bytes[tile] = TILE_LANES * 4;
      layout.rows[tile] = heights[tile];
    }
    settle();
    _tile_loadconfig(&layout);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // out = a · b, or that added to `out`, of R times 16 rows and C times 16 columns: 2 by 2 or less, or
  // 1 by 4. `a` is [rows, 16 * steps] lanes, `b` [16 * steps, columns]; strides are bytes.
  template <int R, int C>
  INLINE void multiply(const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                       int64_t steps, void* out, int64_t out_stride, bool adds) const {
    const char *rows = (const char*)a, *columns = (const char*)b;
    // The second two tiles of sums: other rows, or other columns.
    char *upper = (char*)out, *lower = upper + (C == 4 ? 128 : TILE_ROWS * out_stride);
    constexpr bool HAS_SECOND = C > 1, HAS_THIRD = R > 1 || C > 2, HAS_FOURTH = R * C == 4;
    settle();
    if (adds) {
      _tile_loadd(0, upper, out_stride);
      if constexpr (HAS_SECOND) _tile_loadd(1, upper + 64, out_stride);
      if constexpr (HAS_THIRD) _tile_loadd(2, lower, out_stride);
      if constexpr (HAS_FOURTH) _tile_loadd(3, lower + 64, out_stride);
    } else {
      _tile_zero(0);
      if constexpr (HAS_SECOND) _tile_zero(1);
      if constexpr (HAS_THIRD) _tile_zero(2);
      if constexpr (HAS_FOURTH) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
      _tile_loadd(4, rows, a_stride);
      _tile_loadd(6, columns, b_stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (C > 1) {
        _tile_loadd(7, columns + 64, b_stride);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (C == 4) {
        _tile_loadd(5, columns + 128, b_stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, columns + 192, b_stride);
        _tile_dpbf16ps(3, 4, 6);
      }
      if constexpr (R == 2) {
        _tile_loadd(5, rows + TILE_ROWS * a_stride, a_stride);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
      rows += 64;
      columns += TILE_LANES * b_stride;
    }
    _tile_stored(0, upper, out_stride);
    if constexpr (HAS_SECOND) _tile_stored(1, upper + 64, out_stride);
    if constexpr (HAS_THIRD) _tile_stored(2, lower, out_stride);
    if constexpr (HAS_FOURTH) _tile_stored(3, lower + 64, out_stride);
    settle();
  }

 private:
  struct Layout {
    uint8_t palette = 1, first_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Compilers do not know that tiles are loaded from memory: what was written is there.
  static INLINE void settle() { asm volatile("" ::: "memory"); }
};

// Asks the system for tiles, which a process has to; whether it grants any.
inline bool open_tiles() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
constexpr bool HAS_TILES = false;

struct Tiles {
  explicit Tiles(int64_t) {}
  template <int R, int C>
  void multiply(const void*, int64_t, const void*, int64_t, int64_t, void*, int64_t, bool) const {}
};

inline bool open_tiles() { return false; }
#endif

}  // namespace
