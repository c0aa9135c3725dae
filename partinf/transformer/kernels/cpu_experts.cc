// Products of rows sorted by expert with the matrix of their own expert: x [R, E] · weights [X, F, E] → [R, F] in float32.
//
// XLA's multiplies every row with every expert. Here the matrices of experts that have rows are read once, where they lie, by all cores;
// four rows at a time meet them, which is what there is of an expert when few tokens are decoded.

#include "cpu_products.h"

#include <cstdint>
#include <vector>

namespace partinf {
namespace {

constexpr int64_t kOutputs = 64;  // of an expert, for all of its rows: a unit of work

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
    while (end - t >= kTogether) some(std::integral_constant<int, kTogether>{});
    if constexpr (kTogether > 2) {
      if (end - t >= 2) some(std::integral_constant<int, 2>{});
    }
    while (end - t >= 1) some(std::integral_constant<int, 1>{});
  }
}

template <typename Unit, typename T>
void Multiply(ffi::ThreadPool& pool, const float* x, const T* weights, int64_t words, const std::vector<Expert>& experts, int64_t outputs,
              float* out) {
  const int64_t parts = (outputs + kOutputs - 1) / kOutputs;
  Spread(pool, parts * experts.size(), [&](int64_t unit) {
    const Expert expert = experts[unit / parts];
    const int64_t from = unit % parts * kOutputs, to = std::min(outputs, from + kOutputs);
    RowsOfExpert<Unit>(x, weights + expert.number * outputs * words, words, expert, from, to, outputs, out);
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
// sum of sizes are left as they are.
ffi::Error Grouped(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, Ints sizes, ffi::ResultBuffer<ffi::F32> out) {
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
    if (x.element_type() == ffi::F32) return Multiply<Ones>(pool, x.typed_data<float>(), from, inputs, experts, outputs, to);
    const auto* narrow = static_cast<const uint16_t*>(x.untyped_data());
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, uint16_t>) {  // two numbers of each at a time, where they are
      const auto* pairs = reinterpret_cast<const float*>(from);
      return Multiply<Pairs>(pool, reinterpret_cast<const float*>(narrow), pairs, inputs / 2, experts, outputs, to);
    }
#endif
    Multiply<Ones>(pool, Widened(narrow, first * inputs), from, inputs, experts, outputs, to);
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_grouped, partinf::Grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<partinf::Ints>()
                                  .Ret<partinf::Floats>());
