// Products x [T, E] · weights [F, E] → [T, F], weights read once where they lie, as float32, bfloat16 or int8. Sums are in float32, and what
// comes out too, or rounded to bfloat16, which saves whoever wants that a pass over it.
//
// XLA's takes longer for a few rows, and several times as long where weights are narrower: it widens all of them in a pass of its own.
// There are five forms, and which is fastest depends on the processor, the type and the number of rows: whoever compiles a program chooses,
// by what was measured (`partinf/transformer/kernels/choices.py`). All add in float32, and give the same but for the order of additions.
//
// Rows of x that hold nothing (`live`) are left out: they cost nothing and come out as zeros.

#include "cpu_products.h"

#include <cstdint>
#include <vector>

namespace partinf {
namespace {

enum Form : int32_t { kRows, kRowsOfPairs, kPanels, kPanelsOfPairs, kTiles };  // as `Form` in choices.py numbers them

constexpr int64_t kCached = 512 << 10;  // bytes of weights that stay in a core's second cache while all rows of x meet them

constexpr int64_t kUnit = 256;  // outputs of a unit of work at most
constexpr int64_t kKept = 4;    // panels up to which weights, which come from memory, meet all of them one after the other

constexpr bool OfPairs(int32_t form) { return form == kRowsOfPairs || form == kPanelsOfPairs || form == kTiles; }

// One product: what all of its units share.
struct Task {
  const float* x;             // prepared: rows, or panels
  std::vector<int32_t> live;  // the rows of x that hold something, in order
  int64_t inputs, outputs, words;
  int32_t form;
  void* out;    // [T, outputs]
  bool narrow;  // bfloat16

  int64_t panels() const { return (static_cast<int64_t>(live.size()) + kWidth - 1) / kWidth; }

  // `count` numbers of the row `place` of those that hold something, from output `first` on; up to the next multiple of sixteen are read.
  void Give(const float* from, int64_t place, int64_t first, int64_t count) const {
    const int64_t at = live[place] * outputs + first, whole = count / kWidth * kWidth;
    if (narrow) {
      auto* to = static_cast<uint16_t*>(out) + at;
      for (int64_t n = 0; n < whole; n += kWidth) StoreNarrow(to + n, Load(from + n));
      if (whole < count) StoreNarrow(to + whole, Load(from + whole), count - whole);
    } else {
      auto* to = static_cast<float*>(out) + at;
      for (int64_t n = 0; n < whole; n += kWidth) Store(to + n, Load(from + n));
      if (whole < count) std::memcpy(to + whole, from + whole, (count - whole) * sizeof(float));
    }
  }
};

// Numbers that all threads read while the caller waits for them; they stay for its next product.
inline float* Prepared(size_t count) {
  static thread_local std::vector<float> held;
  return Aligned(held, count);
}

// Sixteen words of a row of x, from word `w` on.
template <typename X>
inline Vec WordsOf(const X* row, int64_t w, bool pairs) {
  if constexpr (std::is_same_v<X, float>) return Load(row + w);
  else return pairs ? Load(reinterpret_cast<const float*>(row) + w) : Load(row + w);
}

// x [T, E] as rows of words.
template <typename X>
void PrepareRows(const X* x, const Task& task, float* to) {
  for (const int32_t row : task.live) {
    for (int64_t w = 0; w < task.words; w += kWidth) Store(to + w, WordsOf(x + row * task.inputs, w, OfPairs(task.form)));
    to += task.words;
  }
}

// One panel of x, the words from `from` to `to`.
template <typename X>
__attribute__((noinline)) void PreparePanel(const X* x, const Task& task, int64_t panel, int64_t from, int64_t to, float* packed) {
  packed += panel * task.words * kWidth;
  for (int64_t w = from; w < to; w += kWidth) {
    Vec rows[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const size_t t = panel * kWidth + i;
      rows[i] = t < task.live.size() ? WordsOf(x + task.live[t] * task.inputs, w, OfPairs(task.form)) : Vec{};
    }
    Turn(rows);
    for (int64_t i = 0; i < kWidth; ++i) Store(packed + (w + i) * kWidth, rows[i]);
  }
}

// sums [outputs, kSpan] of the rows from `first` on, turned over, to out: row by row, as long as they are, since memory takes that best.
__attribute__((noinline)) void Hand(const float* sums, const Task& task, int64_t first, int64_t output, int64_t count) {
  alignas(64) float lines[kWidth * kUnit];
  const int64_t rows = std::min<int64_t>(kSpan, task.live.size() - first);
  for (int64_t t = 0; t < rows; t += kWidth) {
    for (int64_t n = 0; n < count; n += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = Load(sums + (n + i) * kSpan + t);
      Turn(block);
      for (int64_t i = 0; i < kWidth; ++i) Store(lines + i * kUnit + n, block[i]);
    }
    for (int64_t i = 0; i < std::min<int64_t>(kWidth, rows - t); ++i) task.Give(lines + i * kUnit, first + t + i, output, count);
  }
}

// Some outputs, four by four, of all rows.
template <typename Unit, typename T>
void RowsUnit(const Task& task, const T* weights, int64_t from, int64_t to) {
  const int64_t count = task.live.size();
  for (int64_t n = from; n < to; n += 4) {
    int64_t t = 0;
    const auto some = [&](auto taken) {
      float four[taken][kWidth];
      float* out[taken];
      for (int i = 0; i < taken; ++i) out[i] = four[i];
      Rows<Unit, taken>(task.x + t * task.words, weights + n * task.words, task.words, out);
      for (int i = 0; i < taken; ++i) task.Give(four[i], t + i, n, 4);
      t += taken;
    };
    while (count - t >= kTogether) some(std::integral_constant<int, kTogether>{});
    if constexpr (kTogether > 2) {
      if (count - t >= 2) some(std::integral_constant<int, 2>{});
    }
    while (count - t >= 1) some(std::integral_constant<int, 1>{});
  }
}

// `count` rows of weights as words: where they are, or in scratch memory, where rows of zeros make them a multiple of `whole`.
template <typename T>
const float* WordsOfWeights(const Task& task, const T* weights, int64_t count, int64_t whole) {
  const int64_t size = count * task.inputs, words = task.words, line = 64 / sizeof(T);
  const bool pairs = OfPairs(task.form), there = std::is_same_v<T, float> || (std::is_same_v<T, uint16_t> && pairs);
  if (there && count % whole == 0) return reinterpret_cast<const float*>(weights);
  const int64_t padded = (count + whole - 1) / whole * whole;
  float* to = Scratch(padded * words);
  std::fill(to + count * words, to + padded * words, 0.f);
  if (there) return static_cast<const float*>(std::memcpy(to, weights, size * sizeof(T)));
  for (int64_t i = 0; i < size; i += 2 * kWidth) {
    if (i % line == 0) Fetch(weights + i, kAhead);
    if constexpr (std::is_same_v<T, int8_t>) {
      if (pairs) {
        Narrow(weights + i, to + i / 2);
        continue;
      }
    }
    for (int64_t half = i; half < std::min(size, i + 2 * kWidth); half += kWidth) Store(to + half, Load(weights + half));
  }
  return to;
}

// Some outputs of all panels.
template <typename Unit, typename T>
void PanelsUnit(const Task& task, const T* weights, int64_t from, int64_t to) {
  constexpr int64_t kMost = kSpan / kWidth, kBlock = 2 * kWidth;  // panels, and outputs, that meet at once
  alignas(64) float sums[kUnit * kSpan];
  const int64_t panels = task.panels(), words = task.words;
  const float* rows = WordsOfWeights(task, weights + from * task.inputs, to - from, 1);
  const bool there = rows == reinterpret_cast<const float*>(weights + from * task.inputs);
  for (int64_t first = 0; first < panels; first += kMost) {
    const int64_t taken = std::min(kMost, panels - first), depth = taken == kMost ? kDepth : words;
    const float* with[kMost];
    for (int64_t p = 0; p < kMost; ++p) with[p] = task.x + (first + std::min(p, taken - 1)) * words * kWidth;
    for (int64_t begin = 0; begin < words; begin += depth) {
      const int64_t end = std::min(words, begin + depth);
      for (int64_t n = 0; n < to - from; n += kBlock) {
        const int64_t outputs = std::min(kBlock, to - from - n);
        const auto meet = [&](auto number) {
          MeetAll<Unit, number>(with, rows + n * words, words, begin, end, outputs, there && first == 0, sums + n * kSpan);
        };
        if (taken == 1) meet(std::integral_constant<int, 1>{});
        if (taken == 2) meet(std::integral_constant<int, 2>{});
        if (taken == 3) meet(std::integral_constant<int, 3>{});
        if (taken == 4) meet(std::integral_constant<int, 4>{});
      }
    }
    Hand(sums, task, first * kWidth, from, to - from);
  }
}

// sums [32, 16] of up to 32 outputs of a panel to out, turned over: of bfloat16 two outputs at a time, so that a row of them is a whole line.
inline void HandTiles(const Task& task, const float* sums, int64_t panel, int64_t output, int64_t outputs) {
  const int64_t first = panel * kWidth, rows = std::min<int64_t>(kWidth, task.live.size() - first);
  Vec block[kWidth];
  if (task.narrow && outputs == 2 * kWidth) {
    for (int64_t i = 0; i < kWidth; ++i) block[i] = Joined(Load(sums + 2 * i * kWidth), Load(sums + (2 * i + 1) * kWidth));
    Turn(block);
    auto* to = static_cast<uint16_t*>(task.out) + output;
    for (int64_t i = 0; i < rows; ++i) Store(reinterpret_cast<float*>(to + task.live[first + i] * task.outputs), block[i]);
    return;
  }
  for (int64_t n = 0; n < outputs; n += kWidth) {
    alignas(64) float line[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) block[i] = Load(sums + (n + i) * kWidth);
    Turn(block);
    const int64_t count = std::min<int64_t>(kWidth, outputs - n);
    for (int64_t i = 0; i < rows; ++i) {
      Store(line, block[i]);
      task.Give(line, first + i, output + n, count);
    }
  }
}

// Up to 32 outputs of two panels, or of one that is the last: weights [outputs, inputs], rows of zeros up to a multiple of sixteen.
void TilesBlock(const Task& task, const uint16_t* weights, int64_t panel, int64_t output, int64_t outputs, bool ahead) {
  alignas(64) float sums[2][2][kTile];  // by panel, and by sixteen outputs
  const int64_t size = task.words * kWidth, count = std::min<int64_t>(2, task.panels() - panel);
  const float* panels = task.x + panel * size;
  if (count == 2 && outputs > kWidth) {
    TilesOfTwo(panels, panels + size, weights, task.inputs, ahead, sums[0][0]);
  } else {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t n = 0; n < outputs; n += kWidth) {
        TilesOfPanel(panels + p * size, weights + n * task.inputs, task.inputs, ahead && p == 0, sums[p][n / kWidth]);
      }
    }
  }
  for (int64_t p = 0; p < count; ++p) HandTiles(task, sums[p][0], panel + p, output, outputs);
}

// Some outputs of all panels, in tiles: where rows are few, weights pass once; where they are many, panels pass once, two at a time, by weights
// that stay in the core's second cache.
template <typename T>
void TilesUnit(const Task& task, const T* weights, int64_t from, int64_t to) {
  constexpr int64_t kBlock = 2 * kWidth;
  const float* words = WordsOfWeights(task, weights + from * task.inputs, to - from, kWidth);
  const auto* rows = reinterpret_cast<const uint16_t*>(words);
  const bool there = words == reinterpret_cast<const float*>(weights + from * task.inputs);
  const int64_t panels = task.panels(), taken = panels <= kKept ? panels : 2;
  const TilesInUse used;
  for (int64_t first = 0; first < panels; first += taken) {
    for (int64_t n = 0; n < to - from; n += kBlock) {
      for (int64_t p = first; p < std::min(panels, first + taken); p += 2) {
        TilesBlock(task, rows + n * task.inputs, p, from + n, std::min(kBlock, to - from - n), there && p == 0);
      }
    }
  }
}

// What is done before a product: prepare(0) to prepare(count - 1).
template <typename Prepare>
struct Preparation {
  int64_t count;
  Prepare prepare;
};

// The units of a product, each some outputs.
template <typename Unit, typename T, typename Prepare>
void Multiply(ffi::ThreadPool& pool, const Task& task, const T* weights, const Preparation<Prepare>& before) {
  const bool rows = task.form == kRows || task.form == kRowsOfPairs;
  // A few for each thread, of what fits its cache; larger ones where the panels that pass by them do not fit.
  const int64_t larger = task.form == kTiles && task.panels() > kKept ? 2 : 1, threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t fitting = std::min(larger * kCached / (4 * task.words), task.outputs * larger / (4 * threads));
  const int64_t each = std::clamp<int64_t>(fitting / 32 * 32, 32, kUnit);
  SpreadAfter(pool, before.count, before.prepare, (task.outputs + each - 1) / each, [&](int64_t unit) {
    const int64_t from = unit * each, to = std::min(task.outputs, from + each);
    if (rows) return RowsUnit<Unit>(task, weights, from, to);
    if constexpr (std::is_same_v<Unit, Pairs> && !std::is_same_v<T, float>) {
      if (task.form == kTiles) return TilesUnit(task, weights, from, to);
    }
    PanelsUnit<Unit>(task, weights, from, to);
  });
}

template <typename T, typename Prepare>
void MultiplyInForm(ffi::ThreadPool& pool, const Task& task, const T* weights, const Preparation<Prepare>& before) {
  if constexpr (std::is_same_v<T, float>) {
    Multiply<Ones>(pool, task, weights, before);
  } else if (!OfPairs(task.form)) {
    Multiply<Ones>(pool, task, weights, before);
  } else if (task.form == kRowsOfPairs) {
    if constexpr (std::is_same_v<T, uint16_t>) Multiply<Pairs>(pool, task, reinterpret_cast<const float*>(weights), before);
  } else {
    Multiply<Pairs>(pool, task, weights, before);
  }
}

// x as the form takes it, then the product.
template <typename X, typename T>
void Run(ffi::ThreadPool& pool, Task& task, const X* x, const T* weights) {
  constexpr int64_t kPart = 512;  // words
  if (task.form == kRows || task.form == kRowsOfPairs) {
    float* to = Prepared(task.live.size() * task.words);
    task.x = to;
    PrepareRows(x, task, to);
    const auto none = [](int64_t) {};
    return MultiplyInForm(pool, task, weights, Preparation<decltype(none)>{0, none});
  }
  float* to = Prepared(task.panels() * task.words * kWidth);
  task.x = to;
  const int64_t parts = (task.words + kPart - 1) / kPart;
  const auto prepare = [&](int64_t unit) {
    const int64_t from = unit % parts * kPart;
    PreparePanel(x, task, unit / parts, from, std::min(task.words, from + kPart), to);
  };
  MultiplyInForm(pool, task, weights, Preparation<decltype(prepare)>{task.panels() * parts, prepare});
}

// x [T, E] float32 or bfloat16, weights [F, E], live [T] or empty: not 0 where a row of x holds something → [T, F], 0 in other rows, in
// float32 or bfloat16.
ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, Ints live, int32_t form,
                   ffi::Result<ffi::AnyBuffer> out) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weights.dimensions()[0];
  const bool narrow = x.element_type() == ffi::BF16, pairs = OfPairs(form);
  if (inputs % (pairs ? 32 : 16) != 0 || outputs % 4 != 0 || (pairs && !narrow) || (form == kTiles && !TilesPermitted())) {
    return ffi::Error::InvalidArgument("a product that this form does not make");
  }
  if (live.element_count() != 0 && static_cast<int64_t>(live.element_count()) != tokens) {
    return ffi::Error::InvalidArgument("rows that hold something are said of all rows or of none");
  }
  Task task = {nullptr, {}, inputs, outputs, pairs ? inputs / 2 : inputs, form, out->untyped_data(), out->element_type() == ffi::BF16};
  const int64_t line = out->size_bytes() / std::max<int64_t>(tokens, 1);
  for (int64_t t = 0; t < tokens; ++t) {
    if (live.element_count() == 0 || live.typed_data()[t] != 0) task.live.push_back(static_cast<int32_t>(t));
    else std::memset(static_cast<char*>(task.out) + t * line, 0, line);
  }
  if (task.live.empty()) return ffi::Error::Success();
  return ByType(weights.element_type(), [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(weights.untyped_data());
    if (narrow) Run(pool, task, static_cast<const uint16_t*>(x.untyped_data()), from);
    else Run(pool, task, static_cast<const float*>(x.untyped_data()), from);
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_product, partinf::Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<partinf::Ints>()
                                  .Attr<int32_t>("form")
                                  .Ret<ffi::AnyBuffer>());

// Whether this machine multiplies in tiles; it is asked for once, before the first product does.
extern "C" int partinf_has_tiles() { return partinf::TilesPermitted(); }
