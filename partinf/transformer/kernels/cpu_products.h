// The inner loops of products on a CPU: how rows of x meet rows of a matrix in registers.
//
// Letters: T rows of x, E inputs, F outputs. A *word* is four bytes of what is contracted: one float32, or two bfloat16 where the machine
// multiplies them as pairs and adds in float32 (`Pairs`). A *panel* is sixteen rows of x turned over: [words, 16], a vector for every word.

#ifndef PARTINF_CPU_PRODUCTS_H_
#define PARTINF_CPU_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define PARTINF_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace partinf {
namespace {

struct Ones {  // a word is one number
  static inline Vec Add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

struct Pairs {  // a word is two of bfloat16, whose products are exact in float32
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  static inline Vec Add(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
#else
  static inline Vec Add(Vec sum, Vec a, Vec b) { return sum + First(a) * First(b) + Second(a) * Second(b); }
  static inline Vec First(Vec words) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(words) << 16); }
  static inline Vec Second(Vec words) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(words) & int32_t(0xffff0000)); }
#endif
};

// Sixteen words of two numbers each, which bfloat16 holds exactly.
inline void Narrow(const int8_t* from, float* to) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  const auto words = _mm512_cvtne2ps_pbh((__m512)Load(from + kWidth), (__m512)Load(from));
  std::memcpy(to, &words, sizeof words);
#else
  typedef uint16_t Bits __attribute__((vector_size(32)));
  for (int half = 0; half < 2; ++half) {
    const auto wide = reinterpret_cast<IntVec>(Load(from + half * kWidth));
    const Bits bits = __builtin_convertvector(wide >> 16, Bits);
    std::memcpy(to + half * kWidth / 2, &bits, sizeof bits);
  }
#endif
}

// Sixteen vectors turned over: element j of vector i becomes element i of vector j.
inline void Turn(Vec (&rows)[kWidth]) {
  Vec half[kWidth];
  for (int i = 0; i < 16; i += 2) {
    half[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    half[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      rows[j] = __builtin_shufflevector(half[j], half[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      rows[j + 2] = __builtin_shufflevector(half[j], half[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = i; j < i + 4; ++j) {
      half[j] = __builtin_shufflevector(rows[j], rows[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      half[j + 4] = __builtin_shufflevector(rows[j], rows[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int j = 0; j < 8; ++j) {
    rows[j] = __builtin_shufflevector(half[j], half[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    rows[j + 8] = __builtin_shufflevector(half[j], half[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

// ---- rows: vectors lie along what is contracted, and are summed at the end

constexpr int64_t kAhead = 8192;  // bytes between what is multiplied and what is fetched meanwhile
#ifdef __AVX512F__
constexpr int kTogether = 4;  // rows of x that meet four of weights: as many sums as keep the multipliers busy
#else
constexpr int kTogether = 1;
#endif

// Four outputs of kTaken rows: x [kTaken, words] · weights [4, words]; out: where those of each row go.
template <typename Unit, int kTaken, typename T>
__attribute__((noinline)) void Rows(const float* x, const T* weights, int64_t words, float* const* out) {
  Vec sums[kTaken][4] = {};
  for (int64_t w = 0; w < words; w += kWidth) {
    Vec four[4];
    if (w * sizeof(T) % 64 == 0) {
      for (int n = 0; n < 4; ++n) Fetch(weights + n * words + w, kAhead);
    }
    for (int n = 0; n < 4; ++n) four[n] = Load(weights + n * words + w);
    for (int t = 0; t < kTaken; ++t) {
      const Vec row = Load(x + t * words + w);
      for (int n = 0; n < 4; ++n) sums[t][n] = Unit::Add(sums[t][n], four[n], row);
    }
  }
  for (int t = 0; t < kTaken; ++t) {
    const Quarter found = Sums(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    std::memcpy(out[t], &found, sizeof found);
  }
}

// ---- panels: a vector holds sixteen rows of x, and meets one word of the weights at a time

constexpr int64_t kSpan = 64;    // rows of x that are worked on together: four panels
constexpr int64_t kDepth = 128;  // words that are worked on at once: of four panels, they fill most of a core's first cache

// kOutputs outputs of kPanels panels, and their words from `from` to `to`: sums [kOutputs, kSpan] = what is there, unless those are the
// first, + weights [kOutputs, words] · panels. `ahead`: fetch the outputs that come next.
template <typename Unit, int kOutputs, int kPanels>
inline void Meet(const float* const* panels, const float* weights, int64_t words, int64_t from, int64_t to, bool ahead, float* sums) {
  Vec held[kOutputs][kPanels];
  for (int n = 0; n < kOutputs; ++n) {
    for (int p = 0; p < kPanels; ++p) held[n][p] = from == 0 ? Vec{} : Load(sums + n * kSpan + p * kWidth);
  }
  for (int64_t begin = from; begin < to; begin += kWidth) {
    if (ahead) {
      for (int n = 0; n < kOutputs; ++n) Fetch(weights + n * words + begin, 4 * kOutputs * words);
    }
    for (int64_t w = begin; w < begin + kWidth; ++w) {
      Vec rows[kPanels];
      for (int p = 0; p < kPanels; ++p) rows[p] = Load(panels[p] + w * kWidth);
      for (int n = 0; n < kOutputs; ++n) {
        const Vec word = Splat(weights[n * words + w]);
        for (int p = 0; p < kPanels; ++p) held[n][p] = Unit::Add(held[n][p], word, rows[p]);
      }
    }
  }
  for (int n = 0; n < kOutputs; ++n) {
    for (int p = 0; p < kPanels; ++p) Store(sums + n * kSpan + p * kWidth, held[n][p]);
  }
}

// The same for all `outputs`.
template <typename Unit, int kPanels>
__attribute__((noinline)) void MeetAll(const float* const* panels, const float* weights, int64_t words, int64_t from, int64_t to,
                                       int64_t outputs, bool ahead, float* sums) {
#ifdef __AVX512F__
  constexpr int kMost = kPanels == 1 ? 16 : kPanels == 2 ? 12 : kPanels == 3 ? 8 : 6;
#else
  constexpr int kMost = 4 / kPanels > 0 ? 4 / kPanels : 1;
#endif
  int64_t n = 0;
  const auto some = [&](auto count) {
    Meet<Unit, count, kPanels>(panels, weights + n * words, words, from, to, ahead, sums + n * kSpan);
    n += count;
  };
  while (outputs - n >= kMost) some(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 2) {
    while (outputs - n >= 2) some(std::integral_constant<int, 2>{});
  }
  while (outputs - n >= 1) some(std::integral_constant<int, 1>{});
}

// ---- tiles: a unit of the processor multiplies sixteen rows of weights and a panel, 32 numbers of bfloat16 at a time

constexpr int64_t kTile = kWidth * kWidth;  // sums of sixteen outputs and a panel

#ifdef PARTINF_TILES
constexpr int64_t kStep = 32;

// Whether the system lets this process use tiles; it has to be asked.
inline bool TilesPermitted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the state that it permits
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// A thread may use tiles as long as this lives.
struct TilesInUse {
  struct Shape {  // what the processor reads: eight tiles of sixteen rows of 64 bytes
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  TilesInUse() {
    static constexpr Shape shape;  // in memory whatever the compiler makes of it: GCC knows not all that the instruction reads
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
};

// What was stored so far is in memory before tiles are loaded: GCC does not know that the instruction reads any.
inline void Settle() { __asm__ volatile("" ::: "memory"); }

// Sixteen outputs of one panel, weights [16, inputs]: sums [16, 16]. Even and odd steps add up apart, since a product waits for the sum that
// it adds to. `ahead`: fetch as many outputs that come next.
inline void TilesOfPanel(const float* panel, const uint16_t* weights, int64_t inputs, bool ahead, float* sums) {
  alignas(64) float odd[kTile];
  Settle();
  _tile_zero(0);
  _tile_zero(1);
  const int64_t row = 2 * inputs;  // bytes
  for (int64_t e = 0; e < inputs; e += 2 * kStep) {
    if (ahead) {
      for (int i = 0; i < 32; ++i) Fetch(weights + kWidth * (inputs + e) + kStep * i, 0);
    }
    _tile_loadd(4, weights + e, row);
    _tile_loadd(6, panel + e / 2 * kWidth, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (e + kStep < inputs) {
      _tile_loadd(5, weights + e + kStep, row);
      _tile_loadd(7, panel + (e + kStep) / 2 * kWidth, 64);
      _tile_dpbf16ps(1, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, odd, 64);
  for (int i = 0; i < kTile; i += kWidth) Store(sums + i, Load(sums + i) + Load(odd + i));
}

// 32 outputs of two panels: sums [2, 2, 16, 16], those of the first panel first. All that is contracted at once: sums that are put away and
// loaded again take longer than what leaves the first cache meanwhile.
inline void TilesOfTwo(const float* first, const float* second, const uint16_t* weights, int64_t inputs, bool ahead, float* sums) {
  Settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t row = 2 * inputs;  // bytes
  for (int64_t e = 0; e < inputs; e += kStep) {
    if (ahead) {
      for (int i = 0; i < 32; ++i) Fetch(weights + 2 * kWidth * (inputs + e) + kStep * i, 0);
    }
    _tile_loadd(4, weights + e, row);
    _tile_loadd(6, first + e / 2 * kWidth, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, second + e / 2 * kWidth, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, weights + kWidth * inputs + e, row);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTile, 64);
  _tile_stored(2, sums + 2 * kTile, 64);
  _tile_stored(3, sums + 3 * kTile, 64);
}
#else
inline bool TilesPermitted() { return false; }
struct TilesInUse {};
inline void TilesOfPanel(const float*, const uint16_t*, int64_t, bool, float*) {}
inline void TilesOfTwo(const float*, const float*, const uint16_t*, int64_t, bool, float*) {}
#endif

// ---- blocks: rows of bfloat16 numbers, as weights lie, that meet panels, and whose sums come out row by row

struct InPairs {  // as vectors
  struct InUse {
    InUse() {}
  };
};

#ifdef PARTINF_TILES
struct InTiles {
  using InUse = TilesInUse;
};
#else
using InTiles = InPairs;
#endif

// rows [16 · kHigh, 32 · steps] of bfloat16, `stride` numbers apart, · kWide panels, `apart` words apart: to [16 · kHigh, 16] for each panel,
// `beside` apart.
template <typename Unit, int kHigh, int kWide>
inline void Block(const uint16_t* rows, int64_t stride, const float* panels, int64_t apart, int64_t steps, float* to, int64_t beside) {
#ifdef PARTINF_TILES
  if constexpr (std::is_same_v<Unit, InTiles>) {
    Settle();
    _tile_zero(0);
    if constexpr (kWide == 2) _tile_zero(1);
    if constexpr (kHigh == 2) _tile_zero(2);
    if constexpr (kHigh == 2 && kWide == 2) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, rows + s * kStep, 2 * stride);
      _tile_loadd(6, panels + s * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kWide == 2) {
        _tile_loadd(7, panels + apart + s * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kHigh == 2) {
        _tile_loadd(5, rows + kWidth * stride + s * kStep, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kWide == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, 64);
    if constexpr (kWide == 2) _tile_stored(1, to + beside, 64);
    if constexpr (kHigh == 2) _tile_stored(2, to + kTile, 64);
    if constexpr (kHigh == 2 && kWide == 2) _tile_stored(3, to + beside + kTile, 64);
    return;
  }
#endif
  constexpr int kOnce = 8;
  for (int64_t first = 0; first < kHigh * kWidth; first += kOnce) {
    Vec held[kOnce][kWide] = {};
    for (int64_t w = 0; w < steps * kWidth; ++w) {
      Vec panel[kWide];
      for (int p = 0; p < kWide; ++p) panel[p] = Load(panels + p * apart + w * kWidth);
      for (int i = 0; i < kOnce; ++i) {
        float word;
        std::memcpy(&word, rows + (first + i) * stride + 2 * w, sizeof word);
        for (int p = 0; p < kWide; ++p) held[i][p] = Pairs::Add(held[i][p], Splat(word), panel[p]);
      }
    }
    for (int i = 0; i < kOnce; ++i) {
      for (int p = 0; p < kWide; ++p) Store(to + p * beside + (first + i) * kWidth, held[i][p]);
    }
  }
}

}  // namespace
}  // namespace partinf

#endif  // PARTINF_CPU_PRODUCTS_H_
