// A tile of prompts' queries and the keys that it takes up, in two forms: float32, and numbers of bfloat16 that are multiplied two at a time
// or in tiles, whose softmax is of float32 as well.
//
// A query is a column, so that no sum goes across a vector.

#ifndef PARTINF_CPU_PROMPT_TILE_H_
#define PARTINF_CPU_PROMPT_TILE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu_attention.h"
#include "cpu_products.h"

namespace partinf {
namespace {

struct Scoring {
  float scale, cap;  // cap 0 for none
};

// Which queries see some keys: those of their owner from their position on. Owner and position of key i are `owners[i · moves]` and
// `positions[i · moves]`. Where there is a window, its place is `places[i]`, and a query sees it from the query's `least` on. `all`: every
// query sees them.
struct Sight {
  const int32_t *owners, *positions;
  int64_t moves;
  const int32_t *places, *least;
  bool all;
};

// A running softmax: what is known of each of a tile's queries.
struct Columns {
  float *top, *mass, *fade;
  int32_t *owner, *position;  // padding has owner -2, which no key has
  int32_t *least, *floor;     // the first position of the window, and the first of what is stored that is in it
  int64_t vectors, size;      // of sixteen queries; d_head
  Scoring scoring;

  static constexpr int64_t kFloats = 7;  // of scratch memory for each query

  Columns(float*& at, int64_t rows, int64_t count, int64_t size, Scoring scoring)
      : vectors((count + kWidth - 1) / kWidth), size(size), scoring(scoring) {
    const auto part = [&] { return std::exchange(at, at + rows); };
    const auto ints = [&] { return reinterpret_cast<int32_t*>(part()); };
    top = part(), mass = part(), fade = part(), owner = ints(), position = ints(), least = ints(), floor = ints();
    std::fill(top, top + rows, kLeast);
    std::fill(mass, mass + rows, 0.f);
  }

  // Which of sixteen queries see a key.
  IntVec Sees(const Sight& sight, int64_t query, int64_t key) const {
    IntVec mine, place;
    std::memcpy(&mine, owner + query, sizeof mine);
    std::memcpy(&place, position + query, sizeof place);
    IntVec seen = (mine == sight.owners[key * sight.moves]) & (place >= sight.positions[key * sight.moves]);
    if (sight.least != nullptr) {
      IntVec from;
      std::memcpy(&from, sight.least + query, sizeof from);
      seen &= from <= sight.places[key];
    }
    return seen;
  }
};

// ---- in float32

struct FloatTile : Columns {
  using Number = float;
  using InUse = InPairs::InUse;  // of the processor's unit for matrices: none
  static constexpr int64_t kRows = 96;     // queries: with 64 floats each, they and the output fill half of a core's second cache
  static constexpr int64_t kKeys = 64;     // at most, that are taken up at once
  static constexpr bool kInPlace = true;   // stored keys of this type are read where they lie
#ifdef __AVX512F__
  static constexpr int kVectors = 6;  // of queries that meet four keys, or four dimensions of values, in registers
#else
  static constexpr int kVectors = 1;
#endif
  float *queries, *out, *scores;  // [Q, kRows], [Q, kRows], [kKeys, kRows]

  static int64_t Floats(int64_t size) { return kRows * (2 * size + kKeys + kFloats); }

  FloatTile(float*& at, int64_t count, int64_t size, Scoring scoring) : Columns(at, kRows, count, size, scoring) {
    const auto part = [&](int64_t length) { return std::exchange(at, at + length); };
    queries = part(kRows * size), out = part(kRows * size), scores = part(kRows * kKeys);
  }

  // Queries [Q] of all columns, wherever they lie.
  void Begin(const float* const* from) {
    for (int64_t row = 0; row < vectors * kWidth; ++row) {
      for (int64_t i = 0; i < size; ++i) queries[i * kRows + row] = from[row][i] * scoring.scale, out[i * kRows + row] = 0.f;
    }
  }

  // to [four, kRows] = to · fade + Σ over i < count of left[i · step + four · across] · right [i, kRows], for kCount vectors.
  template <int kCount>
  static void Multiply(float* to, const float* fade, const float* left, const int64_t (&across)[4], int64_t step, const float* right,
                       int64_t count) {
    Vec sums[4][kCount];
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kCount; ++v) {
        sums[i][v] = fade == nullptr ? Vec{} : Load(to + i * kRows + v * kWidth) * Load(fade + v * kWidth);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      Vec row[kCount];
      for (int v = 0; v < kCount; ++v) row[v] = Load(right + k * kRows + v * kWidth);
      for (int i = 0; i < 4; ++i) {
        const float factor = left[k * step + across[i]];
        for (int v = 0; v < kCount; ++v) sums[i][v] += row[v] * factor;
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kCount; ++v) Store(to + i * kRows + v * kWidth, sums[i][v]);
    }
  }

  // The same for all vectors of a tile.
  void MultiplyAll(float* to, const float* fade, const float* left, const int64_t (&across)[4], int64_t step,
                          const float* right, int64_t count) const {
    int64_t first = 0;
    const auto multiply = [&](auto vectors) {
      const int64_t at = first * kWidth;
      Multiply<vectors>(to + at, fade == nullptr ? nullptr : fade + at, left, across, step, right + at, count);
      first += vectors;
    };
    while (vectors - first >= kVectors) multiply(std::integral_constant<int, kVectors>{});
    if constexpr (kVectors > 1) {
      while (vectors - first >= 2) multiply(std::integral_constant<int, 2>{});
      if (vectors > first) multiply(std::integral_constant<int, 1>{});
    }
  }

  // Adds `count` keys and values [count, Q], which have no scales of their own any more.
  void Absorb(const float* keys, const float* values, const float*, const float*, int64_t count, const Sight& sight) {
    for (int64_t key = 0; key < count; key += 4) {
      int64_t across[4];
      for (int i = 0; i < 4; ++i) across[i] = std::min(key + i, count - 1) * size;
      MultiplyAll(scores + key * kRows, nullptr, keys, across, 1, queries, size);
    }
    for (int64_t v = 0; v < vectors * kWidth; v += kWidth) {
      float* column = scores + v;
      const Vec before = Load(top + v);
      Vec most = before;
      if (scoring.cap > 0.f) {
        for (int64_t key = 0; key < count; ++key) Store(column + key * kRows, Capped(Load(column + key * kRows), scoring.cap));
      }
      if (!sight.all) {
        for (int64_t key = 0; key < count; ++key) {
          Store(column + key * kRows, Sees(sight, v, key) ? Load(column + key * kRows) : Splat(kMasked));
        }
      }
      for (int64_t key = 0; key < count; ++key) most = Max(most, Load(column + key * kRows));
      Vec total = {};
      for (int64_t key = 0; key < count; ++key) {
        const Vec weight = Exp(Load(column + key * kRows) - most);
        Store(column + key * kRows, weight);
        total += weight;
      }
      const Vec faded = Exp(before - most);
      Store(fade + v, faded);
      Store(mass + v, Load(mass + v) * faded + total);
      Store(top + v, most);
    }
    const int64_t across[4] = {0, 1, 2, 3};
    for (int64_t dim = 0; dim < size; dim += 4) {
      MultiplyAll(out + dim * kRows, fade, values + dim, across, size, scores, count);
    }
  }

  // The output of the first `count` queries, to [Q] each, and their masses.
  void End(int64_t count, float* const* to, float* const* masses) const {
    for (int64_t row = 0; row < count; ++row) {
      const float kept = std::max(mass[row], std::numeric_limits<float>::min());
      for (int64_t i = 0; i < size; ++i) to[row][i] = out[i * kRows + row] / kept;
      *masses[row] = top[row] + std::log(kept);
    }
  }
};

// ---- in bfloat16: products by `Unit`, sums and softmax in float32, weights of values rounded

constexpr float kLog2 = 0.6931471806f;

// 2^x for x <= 0 to 4e-6 of it, which is rounded to bfloat16 afterwards; 0 far below, NaN for NaN.
inline Vec PowerOfTwo(Vec x) {
#ifndef __AVX512F__
  const Vec given = x;
  x = Max(Splat(-126.f), x);  // in this order, which lets NaN through
#endif
  const Vec shifted = x + 12582912.f, whole = shifted - 12582912.f, rest = x - whole;  // to a whole number, in the lowest bits of the first
  Vec value = Splat(9.6760371e-3f);
  for (float term : {5.59220356e-2f, 2.40221074e-1f, 6.93121034e-1f, 1.00000008f}) value = value * rest + term;
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)value, (__m512)whole);
#else
  return given < -126.f ? Vec{} : value * reinterpret_cast<Vec>((reinterpret_cast<IntVec>(shifted) + 127) << 23);
#endif
}

// Sixteen words of two numbers that are no less than 0, or NaN, rounded to bfloat16.
inline Vec RoundedPair(Vec low, Vec high) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const Words first = reinterpret_cast<Words>(low) + 0x8000u, second = reinterpret_cast<Words>(high) + 0x8000u;
  return reinterpret_cast<Vec>((first >> 16) | (second & 0xffff0000u));
}

template <typename Unit>
struct PairTile : Columns {
  using Number = uint16_t;
  using InUse = typename Unit::InUse;
  static constexpr int64_t kRows = 128, kKeys = 128;
  static constexpr bool kInPlace = false;  // stored keys are copied: several pages at once
  static constexpr int64_t kBlock = 2 * kWidth;
  float *queries;     // [vectors, Q / 2, 16] words
  float *out;         // [vectors, Q, 16]
  float *scores;      // [vectors, kKeys, 16]
  float *weights;     // [vectors, kKeys / 2, 16] words, of keys that lie sixteen apart
  float *turned;      // [Q, kKeys / 2] words, values of the same keys
  float *sums;        // [2, 32, 16]
  uint16_t *padded;   // [kKeys, Q]

  static int64_t Floats(int64_t size) { return kRows * (size / 2 + size + kKeys + kKeys / 2 + kFloats) + kKeys * size + kBlock * kBlock; }

  PairTile(float*& at, int64_t count, int64_t size, Scoring scoring) : Columns(at, kRows, count, size, scoring) {
    const auto part = [&](int64_t length) { return std::exchange(at, at + length); };
    queries = part(kRows * size / 2), out = part(kRows * size), scores = part(kRows * kKeys), weights = part(kRows * kKeys / 2);
    turned = part(kKeys * size / 2), sums = part(kBlock * kBlock), padded = reinterpret_cast<uint16_t*>(part(kKeys * size / 2));
  }

  void Begin(const uint16_t* const* from) {
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t dim = 0; dim < size; dim += kBlock) {
        Vec block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = Load(reinterpret_cast<const float*>(from[v * kWidth + i] + dim));
        Turn(block);
        for (int i = 0; i < kWidth; ++i) Store(queries + ((v * size + dim) / 2 + i) * kWidth, block[i]);
      }
    }
    std::fill(out, out + kRows * size, 0.f);
  }

  // Adds `count` keys and values [count, Q]; scales of each key and value, or null.
  void Absorb(const uint16_t* keys, const uint16_t* values, const float* key_scales, const float* value_scales, int64_t count,
              const Sight& sight) {
    const int64_t filled = (count + kBlock - 1) / kBlock * kBlock;
    if (count < filled) {
      std::memcpy(padded, keys, count * size * sizeof *keys);
      std::memset(padded + count * size, 0, (filled - count) * size * sizeof *keys);
      keys = padded;
    }
    for (int64_t key = 0; key < filled; key += kBlock) {
      EachPair([&](int64_t v, auto wide) {
        float* to = scores + (v * kKeys + key) * kWidth;
        Block<Unit, 2, wide>(keys + key * size, size, queries + v * size / 2 * kWidth, size / 2 * kWidth, size / kBlock, to, kKeys * kWidth);
      });
    }
    for (int64_t v = 0; v < vectors; ++v) Weigh(v, key_scales, value_scales, count, filled, sight);
    TurnValues(values, count, filled);
    for (int64_t dim = 0; dim < size; dim += kBlock) {
      EachPair([&](int64_t v, auto wide) {
        const auto* rows = reinterpret_cast<const uint16_t*>(turned) + dim * kKeys;
        Block<Unit, 2, wide>(rows, kKeys, weights + v * kKeys / 2 * kWidth, kKeys / 2 * kWidth, filled / kBlock, sums, kBlock * kWidth);
        for (int n = 0; n < wide; ++n) {
          const Vec faded = Load(fade + (v + n) * kWidth);
          const float* from = sums + n * kBlock * kWidth;
          float* to = out + ((v + n) * size + dim) * kWidth;
          for (int64_t i = 0; i < kBlock * kWidth; i += kWidth) Store(to + i, Load(to + i) * faded + Load(from + i));
        }
      });
    }
  }

  void End(int64_t count, uint16_t* const* to, float* const* masses) const {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t rows = std::min<int64_t>(kWidth, count - v * kWidth);
      const Vec kept = Max(Splat(std::numeric_limits<float>::min()), Load(mass + v * kWidth)), part = 1.f / kept;
      for (int64_t dim = 0; dim < size; dim += kBlock) {
        Vec block[kWidth];
        const float* from = out + (v * size + dim) * kWidth;
        for (int i = 0; i < kWidth; ++i) block[i] = Joined(Load(from + 2 * i * kWidth) * part, Load(from + (2 * i + 1) * kWidth) * part);
        Turn(block);
        for (int64_t i = 0; i < rows; ++i) Store(reinterpret_cast<float*>(to[v * kWidth + i] + dim), block[i]);
      }
      for (int64_t i = 0; i < rows; ++i) *masses[v * kWidth + i] = top[v * kWidth + i] * kLog2 + std::log(kept[i]);
    }
  }

 private:
  // Calls visit(v, how many) for two vectors of queries at a time, and for the last one alone.
  template <typename Visit>
  void EachPair(const Visit& visit) const {
    for (int64_t v = 0; v + 2 <= vectors; v += 2) visit(v, std::integral_constant<int, 2>{});
    if (vectors % 2 != 0) visit(vectors - 1, std::integral_constant<int, 1>{});
  }

  // Scores of sixteen queries to weights; `top` holds the largest in units of log 2.
  void Weigh(int64_t v, const float* key_scales, const float* value_scales, int64_t count, int64_t filled, const Sight& sight) {
    float* column = scores + v * kKeys * kWidth;
    const Vec before = Load(top + v * kWidth);
    float factor = scoring.scale / kLog2;
    Vec most = Splat(kMasked);
    if (sight.all && scoring.cap <= 0.f && key_scales == nullptr) {
      Vec others[3] = {most, most, most};
      int64_t key = 0;
      for (; key + 4 <= count; key += 4) {
        most = Max(most, Load(column + key * kWidth));
        for (int i = 0; i < 3; ++i) others[i] = Max(others[i], Load(column + (key + 1 + i) * kWidth));
      }
      for (; key < count; ++key) most = Max(most, Load(column + key * kWidth));
      most = Max(Max(most, others[0]), Max(others[1], others[2])) * factor;
    } else {
      for (int64_t key = 0; key < count; ++key) {
        Vec score = Load(column + key * kWidth) * (key_scales == nullptr ? scoring.scale : scoring.scale * key_scales[key]);
        if (scoring.cap > 0.f) score = Capped(score, scoring.cap);
        score *= 1.f / kLog2;
        if (!sight.all) score = Sees(sight, v * kWidth, key) ? score : Splat(kMasked);
        Store(column + key * kWidth, score);
        most = Max(most, score);
      }
      factor = 1.f;
    }
    const Vec now = Max(before, most);
    Vec total[2] = {};
    float* to = weights + v * kKeys / 2 * kWidth;
    const auto weight = [&](int64_t key) { return PowerOfTwo(Load(column + key * kWidth) * factor - now); };
    const auto give = [&](int64_t key, Vec low, Vec high) {
      if (value_scales != nullptr) low *= value_scales[std::min(key, count - 1)], high *= value_scales[std::min(key + kWidth, count - 1)];
      Store(to + (key / kBlock * kWidth + key % kBlock) * kWidth, RoundedPair(low, high));
    };
    int64_t key = 0;
    for (; key + kBlock <= count; key += kBlock) {
      for (int i = 0; i < kWidth; ++i) {
        const Vec low = weight(key + i), high = weight(key + kWidth + i);
        total[0] += low, total[1] += high;
        give(key + i, low, high);
      }
    }
    for (int i = 0; key < filled && i < kWidth; ++i) {
      const Vec low = key + i < count ? weight(key + i) : Vec{}, high = key + kWidth + i < count ? weight(key + kWidth + i) : Vec{};
      total[0] += low, total[1] += high;
      give(key + i, low, high);
    }
    const Vec faded = PowerOfTwo(before - now);
    Store(fade + v * kWidth, faded);
    Store(mass + v * kWidth, Load(mass + v * kWidth) * faded + total[0] + total[1]);
    Store(top + v * kWidth, now);
  }

  // values [count, Q] to `turned`, zeros up to `filled`.
  void TurnValues(const uint16_t* values, int64_t count, int64_t filled) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    for (int64_t key = 0; key < filled; key += kBlock) {
      for (int64_t dim = 0; dim < size; dim += kBlock) {
        Vec low[kWidth], high[kWidth];
        const auto row = [&](int64_t at) { return at < count ? Load(reinterpret_cast<const float*>(values + at * size + dim)) : Vec{}; };
        for (int i = 0; i < kWidth; ++i) low[i] = row(key + i), high[i] = row(key + kWidth + i);
        Turn(low);
        Turn(high);
        for (int i = 0; i < kWidth; ++i) {
          const auto a = reinterpret_cast<Words>(low[i]), b = reinterpret_cast<Words>(high[i]);
          float* to = turned + (dim + 2 * i) * kKeys / 2 + key / 2;
          Store(to, reinterpret_cast<Vec>((a & 0xffffu) | (b << 16)));
          Store(to + kKeys / 2, reinterpret_cast<Vec>((a >> 16) | (b & 0xffff0000u)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace partinf

#endif  // PARTINF_CPU_PROMPT_TILE_H_
