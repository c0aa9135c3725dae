// Products of rows sorted by expert with the matrix of their own expert: x [R, E] · weights [X, F, E] → [R, F] in float32.
//
// XLA's multiplies every row with every expert. Here the matrices of experts that have rows are read once, where they lie, by all cores. A
// few rows at a time meet them, which is what there is of an expert when few tokens are decoded; more rows of bfloat16 do in tiles, where the
// processor has such and whoever compiles the program chose them.

#include "cpu_products.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace partinf {
namespace {

constexpr int64_t kOutputs = 64;  // of an expert, for all of its rows: a unit of work
constexpr int64_t kFew = 2;       // rows that take no longer without tiles
constexpr int64_t kBlock = 2 * kWidth;
#ifdef __AVX512F__
constexpr int kMost = 6;  // rows that meet four outputs
#else
constexpr int kMost = kTogether;
#endif

struct Expert {
  int64_t number, first, rows;
};

// Some outputs, four by four, of all rows of an expert. x: [R, words], weights: those of the expert [F, words], out: [R, F].
template <typename Unit, typename T>
void RowsOfExpert(const float* x, const T* weights, int64_t words, Expert expert, int64_t from, int64_t to, int64_t outputs, float* out) {
  for (int64_t n = from; n < to; n += 4) {
    int64_t t = expert.first;
    const int64_t end = expert.first + expert.rows;
    const auto some = [&](auto taken) {
      float* where[taken];
      for (int i = 0; i < taken; ++i) where[i] = out + (t + i) * outputs + n;
      Rows<Unit, taken>(x + t * words, weights + n * words, words, where);
      t += taken;
    };
    while (end - t >= kMost) some(std::integral_constant<int, kMost>{});
    if constexpr (kMost > kTogether) {
      if (end - t >= kTogether) some(std::integral_constant<int, kTogether>{});
    }
    if constexpr (kTogether > 2) {
      if (end - t >= 2) some(std::integral_constant<int, 2>{});
    }
    while (end - t >= 1) some(std::integral_constant<int, 1>{});
  }
}

// The panels of an expert's rows: x [R, inputs] of bfloat16.
void PreparePanels(const uint16_t* x, int64_t inputs, Expert expert, float* to) {
  for (int64_t first = 0; first < expert.rows; first += kWidth, to += inputs / 2 * kWidth) {
    for (int64_t e = 0; e < inputs; e += kBlock) {
      Vec rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const uint16_t* from = x + (expert.first + first + i) * inputs + e;
        rows[i] = first + i < expert.rows ? Load(reinterpret_cast<const float*>(from)) : Vec{};
      }
      Turn(rows);
      for (int64_t i = 0; i < kWidth; ++i) Store(to + (e / 2 + i) * kWidth, rows[i]);
    }
  }
}

// Outputs `from` to `to`, a multiple of 32, of all rows of an expert in tiles; panels: of its rows.
template <typename T>
void TilesOfExpert(const float* panels, const T* weights, int64_t inputs, Expert expert, int64_t from, int64_t to, int64_t outputs, float* out) {
  alignas(64) float sums[2][2][kTile];  // by panel, and by sixteen outputs
  const int64_t panel = inputs / 2 * kWidth;
  const TilesInUse used;
  for (int64_t n = from; n < to; n += kBlock) {
    const uint16_t* block = nullptr;
    if constexpr (std::is_same_v<T, uint16_t>) {
      block = weights + n * inputs;
    } else {
      float* narrow = Scratch(kBlock * inputs / 2);
      for (int64_t i = 0; i < kBlock * inputs; i += kBlock) Narrow(weights + n * inputs + i, narrow + i / 2);
      block = reinterpret_cast<const uint16_t*>(narrow);
    }
    for (int64_t first = 0; first < expert.rows; first += 2 * kWidth) {
      const float* mine = panels + first / kWidth * panel;
      const bool ahead = first == 0, both = expert.rows - first > kWidth;
      if (both) TilesOfTwo(mine, mine + panel, block, inputs, ahead, sums[0][0]);
      else for (int i = 0; i < 2; ++i) TilesOfPanel(mine, block + i * kWidth * inputs, inputs, ahead, sums[0][i]);
      for (int p = 0; p < (both ? 2 : 1); ++p) {
        const int64_t row = first + p * kWidth, rows = std::min<int64_t>(kWidth, expert.rows - row);
        for (int half = 0; half < 2; ++half) {
          Vec turned[kWidth];
          for (int64_t i = 0; i < kWidth; ++i) turned[i] = Load(sums[p][half] + i * kWidth);
          Turn(turned);
          for (int64_t i = 0; i < rows; ++i) Store(out + (expert.first + row + i) * outputs + n + half * kWidth, turned[i]);
        }
      }
    }
  }
}

// All experts: those with more than a few rows in tiles where `narrow`, x [R, inputs] of bfloat16, is given; the others by words of x.
template <typename Unit, typename T, typename Whole>
void Multiply(ffi::ThreadPool& pool, const float* x, const T* weights, int64_t words, const uint16_t* narrow, const Whole* matrices,
              int64_t inputs, const std::vector<Expert>& experts, int64_t outputs, float* out) {
  const int64_t parts = (outputs + kOutputs - 1) / kOutputs, panel = inputs / 2 * kWidth;
  std::vector<int64_t> places;  // where the panels of an expert lie, or -1
  int64_t taken = 0;
  for (const Expert& expert : experts) {
    const bool tiles = narrow != nullptr && expert.rows > kFew;
    places.push_back(tiles ? taken : -1);
    taken += tiles ? (expert.rows + kWidth - 1) / kWidth * panel : 0;
  }
  static thread_local std::vector<float> held;
  float* panels = Aligned(held, taken);
  const auto prepare = [&](int64_t number) {
    if (places[number] >= 0) PreparePanels(narrow, inputs, experts[number], panels + places[number]);
  };
  SpreadAfter(pool, taken == 0 ? 0 : experts.size(), prepare, parts * experts.size(), [&](int64_t unit) {
    const int64_t number = unit / parts, from = unit % parts * kOutputs, to = std::min(outputs, from + kOutputs);
    const Expert expert = experts[number];
    const int64_t first = expert.number * outputs;
    if constexpr (!std::is_same_v<Whole, float>) {
      if (places[number] >= 0) {
        return TilesOfExpert(panels + places[number], matrices + first * inputs, inputs, expert, from, to, outputs, out);
      }
    }
    RowsOfExpert<Unit>(x, weights + first * words, words, expert, from, to, outputs, out);
  });
}

// `rows` rows of x in float32.
template <typename X>
const float* Widened(const X* x, int64_t count) {
  if constexpr (std::is_same_v<X, float>) {
    return x;
  } else {
    static thread_local std::vector<float> held;
    float* to = Aligned(held, count);
    for (int64_t i = 0; i < count; i += kWidth) Store(to + i, Load(x + i));
    return to;
  }
}

// x [R, E] float32 or bfloat16, weights [X, F, E], sizes [X]: rows of each expert, those of the first one first → [R, F]; rows beyond the
// sum of sizes are left as they are. `tiles`: not 0 to multiply bfloat16 in them.
ffi::Error Grouped(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, Ints sizes, int32_t tiles,
                   ffi::ResultBuffer<ffi::F32> out) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weights.dimensions()[1];
  if (inputs % 32 != 0 || outputs % 4 != 0) return ffi::Error::InvalidArgument("experts of a size that is not multiplied");
  std::vector<Expert> experts;
  int64_t first = 0;
  for (size_t number = 0; number < sizes.element_count(); ++number) {
    const int64_t count = std::min<int64_t>(sizes.typed_data()[number], rows - first);
    if (count > 0) experts.push_back({static_cast<int64_t>(number), first, count});
    first += std::max<int64_t>(count, 0);
  }
  if (experts.empty()) return ffi::Error::Success();
  return ByType(weights.element_type(), [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(weights.untyped_data());
    float* to = out->typed_data();
    const uint16_t* none = nullptr;
    if (x.element_type() == ffi::F32) {
      return Multiply<Ones>(pool, x.typed_data<float>(), from, inputs, none, from, inputs, experts, outputs, to);
    }
    const auto* narrow = static_cast<const uint16_t*>(x.untyped_data());
    const bool whole = tiles != 0 && outputs % kBlock == 0 && !std::is_same_v<T, float> && TilesPermitted();
    const uint16_t* in_tiles = whole ? narrow : none;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, uint16_t>) {  // two numbers of each at a time, where they are
      const auto *words = reinterpret_cast<const float*>(narrow), *pairs = reinterpret_cast<const float*>(from);
      return Multiply<Pairs>(pool, words, pairs, inputs / 2, in_tiles, from, inputs, experts, outputs, to);
    }
#endif
    Multiply<Ones>(pool, Widened(narrow, first * inputs), from, inputs, in_tiles, from, inputs, experts, outputs, to);
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_grouped, partinf::Grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<partinf::Ints>()
                                  .Attr<int32_t>("tiles")
                                  .Ret<partinf::Floats>());
