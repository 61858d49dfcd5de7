// Products of bf16 in the tile registers of a processor that has them (AMX): of 16 rows of 16 words, a word being two
// neighbours along the summed dimension.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)

namespace effnet_fast {

// Rows, and words, of a tile.
constexpr int kTileSide = 16;

// While it lives, the thread's tile registers can be used.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide};
    } shapes;
    asm volatile("" : "+m"(shapes));  // here and below: the intrinsics do not say that they read memory
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// c (+)= a * b for R tiles of rows and V of columns, and a multiple of kTileSide words. Rows of a, b and c are so many floats
// apart.
template <int R, int V>
inline void multiply_tiles(int64_t words, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                           int64_t c_row, bool add) {
  const int64_t a_bytes = a_row * sizeof(float), b_bytes = b_row * sizeof(float), c_bytes = c_row * sizeof(float);
  float* low = c + kTileSide * c_row;
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (V == 2) _tile_loadd(1, c + kTileSide, c_bytes);
    if constexpr (R == 2) _tile_loadd(2, low, c_bytes);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, low + kTileSide, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < words; k += kTileSide, a += kTileSide, b += kTileSide * b_row) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, b + kTileSide, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + kTileSide * a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (V == 2) _tile_stored(1, c + kTileSide, c_bytes);
  if constexpr (R == 2) _tile_stored(2, low, c_bytes);
  if constexpr (R == 2 && V == 2) _tile_stored(3, low + kTileSide, c_bytes);
}

// to[column][word] = from[word][column] for whole tiles of columns and words; those from `words` on are zeros.
inline void transpose_words(const float* from, int64_t from_row, int64_t words, int64_t columns, float* to,
                            int64_t to_row) {
  for (int64_t column = 0; column < columns; column += kTileSide)
    for (int64_t word = 0; word < words; word += kTileSide) {
      Vec rows[kTileSide];
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i)
        rows[i] = word + i < words ? load(from + (word + i) * from_row + column) : Vec{};
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {  // each interleaves the upper half with the lower one
        Vec next[kTileSide];
#pragma GCC unroll 8
        for (int i = 0; i < kTileSide / 2; ++i) {
          next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
          next[2 * i + 1] =
              __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        std::memcpy(rows, next, sizeof rows);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) store(to + (column + i) * to_row + word, rows[i]);
    }
}

}  // namespace effnet_fast

#endif
