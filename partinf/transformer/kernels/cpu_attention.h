// What decode steps and prompts share of attention on a CPU (`cpu_attention.cc`, `cpu_prompts.cc`).
//
// Letters: B lanes, T prompt tokens, H query heads in groups of G per key-value head K, Q d_head (a multiple of 16), S tokens of a page,
// R heads of pages, n pages of a lane or slot, M keys.

#ifndef PARTINF_CPU_ATTENTION_H_
#define PARTINF_CPU_ATTENTION_H_

#include <cstdint>

#include "cpu_vectors.h"

namespace partinf {
namespace {

constexpr float kMasked = -1e30f;  // finite, so that a row without any key stays finite
constexpr float kLeast = -1e29f;   // below every score, and so far above a masked one that exp of the difference is 0

// c·tanh(x/c), to about c·1e-7; NaN for NaN.
inline Vec Capped(Vec x, float cap) {
  const Vec fade = Exp((x < 0.f ? x : -x) * (2.f / cap));
  const Vec found = (1.f - fade) / (1.f + fade) * cap;
  return x < 0.f ? -found : found;
}

// All pages of a device, [R, S, Q]; scales [R, S] where T is int8.
template <typename T>
struct Pages {
  const T *keys, *values;
  const float *key_scales, *value_scales;
  int64_t length, size;
};

template <typename T>
Pages<T> PagesOf(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values, const Floats& key_scales, const Floats& value_scales) {
  const auto shape = keys.dimensions();
  return {static_cast<const T*>(keys.untyped_data()), static_cast<const T*>(values.untyped_data()), key_scales.typed_data(),
          value_scales.typed_data(), shape[1], shape[2]};
}

}  // namespace
}  // namespace partinf

#endif  // PARTINF_CPU_ATTENTION_H_
