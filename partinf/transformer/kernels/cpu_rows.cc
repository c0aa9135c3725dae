// What a layer does between its products, row by row: norms, gated activations, and what queries, keys and values go through.
//
// XLA makes several passes over memory of each of them, some in float32; here a row is read and written once. Arithmetic is float32, and what
// comes out has the type of what goes in.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_vectors.h"

namespace partinf {
namespace {

constexpr int64_t kWorth = 1 << 14;       // numbers of a unit of work: below, another thread is not worth waking
constexpr float kLargest = 3.3895314e38f;  // of bfloat16, which every type of a cache holds

inline void Put(float* to, Vec v) { Store(to, v); }
inline void Put(uint16_t* to, Vec v) { StoreNarrow(to, v); }

inline Vec Absolute(Vec x) { return x < 0.f ? -x : x; }

// Calls work(row) for all rows, some at a time on every thread; `each`: numbers of a row.
template <typename Work>
void EachRow(ffi::ThreadPool& pool, int64_t rows, int64_t each, const Work& work) {
  const int64_t together = kWorth / std::max<int64_t>(each, 1) + 1;
  Spread(pool, (rows + together - 1) / together, [&](int64_t unit) {
    for (int64_t row = unit * together; row < std::min(rows, (unit + 1) * together); ++row) work(row);
  });
}

template <typename Run>
ffi::Error ByFloat(ffi::DataType type, const Run& run) {
  if (type == ffi::F32) run(float{});
  else if (type == ffi::BF16) run(uint16_t{});
  else return ffi::Error::InvalidArgument("rows are float32 or bfloat16");
  return ffi::Error::Success();
}

// 1 / sqrt(mean of squares + eps) of `count` numbers.
template <typename X>
float Inverse(const X* x, int64_t count, float eps) {
  Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Vec a = Load(x + i), b = Load(x + i + kWidth);
    sums[0] += a * a, sums[1] += b * b;
  }
  if (i < count) sums[0] += Load(x + i) * Load(x + i);
  return 1.f / std::sqrt(Sum(sums[0] + sums[1]) / static_cast<float>(count) + eps);
}

// x [T, E], weight [E], live [T] or empty: not 0 where a row holds something → x / sqrt(mean of squares + eps) · (offset + weight), 0 in other
// rows.
ffi::Error Norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, Ints live, float eps, float offset,
                ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  return ByFloat(x.element_type(), [&](auto element) {
    using X = decltype(element);
    const auto* from = static_cast<const X*>(x.untyped_data());
    const auto* by = static_cast<const X*>(weight.untyped_data());
    auto* to = static_cast<X*>(out->untyped_data());
    EachRow(pool, rows, size, [&](int64_t row) {
      const X* mine = from + row * size;
      if (live.element_count() != 0 && live.typed_data()[row] == 0) {
        std::memset(to + row * size, 0, size * sizeof(X));
        return;
      }
      const float inverse = Inverse(mine, size, eps);
      for (int64_t i = 0; i < size; i += kWidth) Put(to + row * size + i, Load(mine + i) * inverse * (Load(by + i) + offset));
    });
  });
}

// hidden [T, 2, F], live [T] or empty → [T, F]: g · sigmoid(linear · g + cubic · g³) · u of its halves, 0 in rows that hold nothing.
ffi::Error Gated(ffi::ThreadPool pool, ffi::AnyBuffer hidden, Ints live, float linear, float cubic, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = hidden.dimensions()[0], size = hidden.dimensions()[2];
  return ByFloat(hidden.element_type(), [&](auto element) {
    using X = decltype(element);
    const auto* from = static_cast<const X*>(hidden.untyped_data());
    auto* to = static_cast<X*>(out->untyped_data());
    EachRow(pool, rows, 2 * size, [&](int64_t row) {
      const X *gates = from + 2 * row * size, *ups = gates + size;
      if (live.element_count() != 0 && live.typed_data()[row] == 0) {
        std::memset(to + row * size, 0, size * sizeof(X));
        return;
      }
      for (int64_t i = 0; i < size; i += kWidth) {
        const Vec gate = Load(gates + i);
        const Vec at = gate * (cubic == 0.f ? Splat(linear) : linear + cubic * gate * gate), small = Exp(-Absolute(at));  // 0 · ∞ is NaN
        const Vec part = (at < 0.f ? small : Splat(1.f)) / (1.f + small);
        Put(to + row * size + i, gate * part * Load(ups + i));
      }
    });
  });
}

// One head [Q]: normalised, if there is a weight [Q], and turned by the angles [half] of its token, if there are any.
template <typename X>
inline void Head(const X* from, int64_t size, const X* weight, float eps, const float* cos, const float* sin, int64_t half, float* to) {
  const float inverse = weight == nullptr ? 1.f : Inverse(from, size, eps);
  const auto number = [&](int64_t i) { return weight == nullptr ? Load(from + i) : Load(from + i) * inverse * Load(weight + i); };
  for (int64_t i = 0; i < half; i += kWidth) {
    const Vec first = number(i), second = number(half + i), c = Load(cos + i), s = Load(sin + i);
    Store(to + i, first * c - second * s);
    Store(to + half + i, second * c + first * s);
  }
  for (int64_t i = 2 * half; i < size; i += kWidth) Store(to + i, number(i));
}

// x [T, N, Q], cos and sin [T, half] or empty, weight [Q] or empty → every head as by `Head`. `values`: N are keys and as many values, which
// stay as they are; where either is no number, the key becomes NaN and the value 0 (`partinf.transformer.attention`).
ffi::Error Heads(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats cos, Floats sin, ffi::AnyBuffer weight, float eps, int32_t values,
                 ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = x.dimensions()[0], heads = x.dimensions()[1], size = x.dimensions()[2];
  const int64_t half = cos.element_count() == 0 ? 0 : cos.dimensions()[1], turned = values != 0 ? heads / 2 : heads;
  return ByFloat(x.element_type(), [&](auto element) {
    using X = decltype(element);
    const auto* from = static_cast<const X*>(x.untyped_data());
    const auto* by = weight.element_count() == 0 ? nullptr : static_cast<const X*>(weight.untyped_data());
    auto* to = static_cast<X*>(out->untyped_data());
    EachRow(pool, rows, heads * size, [&](int64_t row) {
      float* head = Scratch(size);
      for (int64_t n = 0; n < turned; ++n) {
        const int64_t at = (row * heads + n) * size, other = at + turned * size;
        Head(from + at, size, by, eps, cos.typed_data() + row * half, sin.typed_data() + row * half, half, head);
        for (int64_t i = 0; i < size; i += kWidth) {
          Vec key = Load(head + i);
          if (values != 0) {
            const Vec value = Load(from + other + i);
            const IntVec numbers = (Absolute(key) <= kLargest) & (Absolute(value) <= kLargest);
            key = numbers ? key : Splat(std::nanf(""));
            Put(to + other + i, numbers ? value : Vec{});
          }
          Put(to + at + i, key);
        }
      }
    });
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;
using partinf::Floats, partinf::Ints;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_norm, partinf::Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Ints>()
                                  .Attr<float>("eps").Attr<float>("offset")
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_gated, partinf::Gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<Ints>()
                                  .Attr<float>("linear").Attr<float>("cubic")
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_heads, partinf::Heads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>().Arg<ffi::AnyBuffer>()
                                  .Attr<float>("eps").Attr<int32_t>("values")
                                  .Ret<ffi::AnyBuffer>());
