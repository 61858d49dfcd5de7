// Small matrix products whose operands lie in cache: the inner loops of the 1x1 convolutions.
//
// An operand is made of 32-bit words along the summed dimension: a float, or (where the processor multiplies pairs of
// bf16) two neighbouring bf16. The left operand is read word by word and broadcast, the right one in vectors of columns;
// both in tiles where the processor has registers for them (tiles.h).
#pragma once

#include <array>
#include <utility>
#include <variant>

#include "tensors.h"
#include "tiles.h"

namespace effnet_fast {

// Rows that are multiplied together in vectors: as many sums as the register file holds.
constexpr int kVectorRows = kLanes == 16 ? 12 : 6;

// A word is one float.
struct FloatWords {
  static constexpr int kDepth = 1;  // elements of the summed dimension in a word
  static constexpr bool kTiles = false;
  static constexpr int kRows = kVectorRows;  // that are multiplied together
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
  static void store_row(float* row, int64_t column, Vec v) { store(row + column, v); }
  static Vec pair(Vec first, Vec) { return first; }
};

#if defined(__AVX512BF16__)
// A word is two bf16, the first in the lower half.
struct BFloat16Words {
  static constexpr int kDepth = 2;
#if defined(__AMX_BF16__)
  static constexpr bool kTiles = true;
  static constexpr int kRows = 2 * kTileSide;
#else
  static constexpr bool kTiles = false;
  static constexpr int kRows = kVectorRows;
#endif
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static void store_row(float* row, int64_t column, Vec v) { store((BFloat16*)row + column, v); }
  static Vec pair(Vec first, Vec second) {
    alignas(64) static constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved),
                                         (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};
template <class T>
using ProductWords = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16Words, FloatWords>;
#else
template <class T>
using ProductWords = FloatWords;
#endif

// Outside of the products. A processor with tiles multiplies vectors of bf16 pairs at a quarter of the rate of floats
// (Emerald Rapids: 1.3 and 5.4 vectors a nanosecond).
template <class T>
using Words = std::conditional_t<ProductWords<T>::kTiles, FloatWords, ProductWords<T>>;

// Words that so many elements make, the last perhaps not full.
template <class W>
constexpr int64_t words_of(int64_t elements) {
  return (elements + W::kDepth - 1) / W::kDepth;
}

// So many rows, columns or words, rounded up to tiles where there are such.
template <class W>
constexpr int64_t whole_tiles(int64_t count) {
  return W::kTiles ? (count + 15) / 16 * 16 : count;
}

// Words of a product's summed dimension, which ends with words of zeros if it is cut into tiles.
template <class W>
constexpr int64_t product_words(int64_t elements) {
  return whole_tiles<W>(words_of<W>(elements));
}

// Vectors of columns that are computed together.
constexpr int kPanelVectors = 2;
constexpr int64_t kPanelColumns = kPanelVectors * kLanes;
// Words that are summed up at once: as many as leave the panel of columns in the first-level cache while all rows pass.
constexpr int64_t kMaxWords = 320;

// What a thread must hold to multiply words W.
#if defined(__AMX_BF16__)
template <class W>
using ProductRegisters = std::conditional_t<W::kTiles, TileRegisters, std::monostate>;
#else
template <class W>
using ProductRegisters = std::monostate;
#endif

// c[m, :] (+)= sum over k of a[m, k] * b[k, :] for M rows and V vectors of columns. Word (m, k) of a is at
// a + m * a_row + k * a_step, of b at b + k * b_step.
template <class W, int M, int V>
void multiply_tile(int64_t words, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                   float* c, int64_t c_row, bool add) {
  Vec sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = add ? load(c + m * c_row + v * kLanes) : Vec{};
  for (int64_t k = 0; k < words; ++k, a += a_step, b += b_step) {
    Vec column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t word;
      std::memcpy(&word, a + m * a_row, sizeof word);
      const Vec value = (Vec)(word - Int{});
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = W::multiply_add(value, column[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + m * c_row + v * kLanes, sum[m][v]);
}

// The same for any number of rows and words, cut into tiles that are as even as can be. V: vectors in the panel of columns.
// With kTiles, a_step is 1, and rows up to whole tiles are read and written.
template <class W, int V>
void multiply_panel(int64_t rows, int64_t words, const float* a, int64_t a_row, int64_t a_step, const float* b,
                    int64_t b_step, float* c, int64_t c_row, bool add) {
#if defined(__AMX_BF16__)
  if constexpr (W::kTiles) {
    for (int64_t k = 0; k < words; k += kMaxWords)
      for (int64_t row = 0; row < rows; row += W::kRows)
        (rows - row > kTileSide ? multiply_tiles<2, V> : multiply_tiles<1, V>)(
            std::min(words - k, kMaxWords), a + row * a_row + k, a_row, b + k * b_step, b_step, c + row * c_row, c_row,
            add || k > 0);
    return;
  }
#endif
  using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);
  constexpr auto kTiles = []<int... M>(std::integer_sequence<int, M...>) {
    return std::array<Tile, sizeof...(M)>{&multiply_tile<W, M + 1, V>...};
  }(std::make_integer_sequence<int, kVectorRows>{});
  const int64_t tiles = (rows + kVectorRows - 1) / kVectorRows, blocks = (words + kMaxWords - 1) / kMaxWords;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = words * block / blocks, depth = words * (block + 1) / blocks - k;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
      kTiles[count - 1](depth, a + first * a_row + k * a_step, a_row, a_step, b + k * b_step, b_step,
                        c + first * c_row, c_row, add || block > 0);
    }
  }
}

// Calls f.template operator()<V>(panel) for the panels [begin, end) of so many vectors of columns; the last may be
// narrower.
template <class F>
inline void for_each_panel(int64_t begin, int64_t end, int64_t vectors, F&& f) {
  for (int64_t panel = begin; panel < end; ++panel)
    if ((panel + 1) * kPanelVectors <= vectors)
      f.template operator()<kPanelVectors>(panel);
    else
      f.template operator()<1>(panel);
}

// A left operand: word (m, k) is at words + m * row + k * step.
struct LeftOperand {
  const float* words;
  int64_t row, step;
};

// The left operand whose word (m, k) is at from + k * from_row + m: as it lies there, or transposed into `room`, whose rows
// are room_row apart, where tiles read it.
template <class W>
inline LeftOperand columns_as_rows(const float* from, int64_t from_row, int64_t words, int64_t columns,
                                   float* room, int64_t room_row) {
#if defined(__AMX_BF16__)
  if constexpr (W::kTiles) {
    transpose_words(from, from_row, words, columns, room, room_row);
    return {room, room_row, 1};
  }
#endif
  return {from, 1, from_row};
}

// The right operand of a product in panels [panel][word][column of the panel]: element (k, column) of a matrix of floats
// is at from + k * k_step + column * column_step, one of the steps being 1. Columns beyond the last are zero, and so are
// words.
template <class W>
inline Tensor pack_panels(const float* from, int64_t depth, int64_t columns, int64_t k_step, int64_t column_step) {
  constexpr int64_t kBlock = 64;  // of the summed dimension, transposed in cache where a column lies in one piece
  const int64_t vectors = (columns + kLanes - 1) / kLanes, words = product_words<W>(depth);
  Tensor packed = empty_floats({words * vectors * kLanes});
  torch::stable::parallel_for(0, (vectors + kPanelVectors - 1) / kPanelVectors, 4, [&](int64_t begin, int64_t end) {
    float block[kBlock][kPanelColumns] = {};
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelColumns, count = std::min(kPanelColumns, columns - first);
      const int64_t width = std::min(kPanelColumns, vectors * kLanes - first);
      if (count < kPanelColumns) std::memset(block, 0, sizeof block);
      float* to = floats(packed) + first * words;
      for (int64_t k = 0; k < depth; k += kBlock) {
        const int64_t size = std::min(kBlock, depth - k);
        if (column_step == 1) {
          for (int64_t i = 0; i < size; ++i) std::memcpy(block[i], from + (k + i) * k_step + first, count * sizeof(float));
        } else {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t i = 0; i < size; ++i) block[i][c] = from[(first + c) * column_step + k + i];
        }
        for (int64_t i = 0; i < size; i += W::kDepth, to += width)
          for (int64_t lane = 0; lane < width; lane += kLanes)
            store(to + lane, W::pair(load(block[i] + lane), load(block[i + W::kDepth - 1] + lane)));
      }
      std::memset(to, 0, (words - depth / W::kDepth) * width * sizeof(float));
    }
  });
  return packed;
}

// Floats (or words) between rows of a matrix in scratch: an odd number of cache lines, so that the rows of a column fall
// into different sets of the cache.
inline int64_t padded_row(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

}  // namespace effnet_fast
