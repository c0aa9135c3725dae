// Products of a few rows with a matrix that is read once, at the memory's rate as long as there are few enough of them.
//
// XLA's takes longer in float32, and several times as long where weights are narrower: it widens all of them in a pass of its own.
// Here the weights of a few outputs are widened in registers, where a few rows meet them; further rows find them in a core's first cache.
//
// Letters: T rows, E inputs (a multiple of 16), F outputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_vectors.h"

namespace partinf {
namespace {

#ifdef __AVX512F__
constexpr int kRows = 4;  // times four outputs: as many sums as keep the multipliers busy
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kOutputs = 64;  // of a unit of work

// Four outputs of kTaken rows: x [kTaken, E] · weights [4, E]; out [kTaken, F]. `ahead`: fetch the four that come next.
template <int kTaken, typename T>
inline void Multiply(const float* x, const T* weights, int64_t inputs, bool ahead, float* out, int64_t outputs) {
  Vec sums[kTaken][4] = {};
  for (int64_t e = 0; e < inputs; e += kWidth) {
    Vec four[4];
    for (int n = 0; n < 4; ++n) {
      four[n] = Load(weights + n * inputs + e);
      if (ahead) __builtin_prefetch(weights + (4 + n) * inputs + e);
    }
    for (int t = 0; t < kTaken; ++t) {
      const Vec row = Load(x + t * inputs + e);
      for (int n = 0; n < 4; ++n) sums[t][n] += row * four[n];
    }
  }
  for (int t = 0; t < kTaken; ++t) {
    const Quarter found = Sums(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    std::memcpy(out + t * outputs, &found, sizeof found);
  }
}

// The same for all rows of x [T, E].
template <typename T>
void AllRows(const float* x, int64_t tokens, const T* weights, int64_t inputs, float* out, int64_t outputs) {
  int64_t t = 0;
  const auto rows = [&](auto taken, const auto* from, bool ahead) {
    Multiply<taken>(x + t * inputs, from, inputs, ahead, out + t * outputs, outputs);
    t += taken;
  };
  const auto all = [&](const auto* from, bool ahead) {
    for (; tokens - t >= kRows; ahead = false) rows(std::integral_constant<int, kRows>{}, from, ahead);
    if (kRows > 2 && tokens - t >= 2) rows(std::integral_constant<int, 2>{}, from, ahead);
    if (tokens > t) rows(std::integral_constant<int, 1>{}, from, ahead);
  };
  if (std::is_same_v<T, float> || tokens <= kRows) return all(weights, true);
  float* wide = Scratch(4 * inputs);  // widened once for all
  for (int64_t i = 0; i < 4 * inputs; i += kWidth) {
    Store(wide + i, Load(weights + i));
    __builtin_prefetch(weights + 4 * inputs + i);
  }
  all(wide, false);
}

// x [T, E], weights [F, E], F a multiple of 4 → [T, F]
ffi::Error Product(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer weights, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weights.dimensions()[0];
  if (inputs % kWidth != 0 || outputs % 4 != 0) return ffi::Error::InvalidArgument("a product of sizes that the kernel does not take");
  return ByType(weights.element_type(), [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(weights.untyped_data());
    Spread(pool, (outputs + kOutputs - 1) / kOutputs, [&](int64_t unit) {
      for (int64_t n = unit * kOutputs; n < std::min(outputs, (unit + 1) * kOutputs); n += 4) {
        AllRows(x.typed_data(), tokens, from + n * inputs, inputs, out->typed_data() + n, outputs);
      }
    });
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;
using partinf::Floats;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_product, partinf::Product,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Ret<Floats>());
