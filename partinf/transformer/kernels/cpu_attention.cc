// The core of attention on a CPU: softmax over keys that lie in pages, each page read once, where it lies.
//
// XLA has no such form: it gathers the pages of a tile into an array of its own and multiplies that in products of a few rows, which it
// makes one by one. Here the keys of a page meet the queries of all heads that share them while they are in a core's cache, and nothing
// but the running softmax is kept: `partinf/transformer/kernels.py` has the same computation for every platform.
//
// Pages hold float32, the bits of
// bfloat16 (as uint16), or int8 with a scale per token and head; arithmetic is float32.
// Letters as in cpu_attention.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_attention.h"

namespace partinf {
namespace {

// Scores of one query [Q] with sixteen keys, of which `count` exist.
inline void Scores(const float* q, const float* keys, int64_t count, int64_t size, float* scores) {
  for (int64_t first = 0; first < std::min<int64_t>(count, kWidth); first += 8) {
    const float* from[8];
    for (int i = 0; i < 8; ++i) from[i] = keys + std::min(first + i, count - 1) * size;
    Vec sums[8] = {};
    for (int64_t c = 0; c < size; c += kWidth) {
      const Vec part = Load(q + c);
      for (int i = 0; i < 8; ++i) sums[i] += part * Load(from[i] + c);
    }
    for (int i = 0; i < 8; i += 4) {
      const Quarter four = Sums(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
      std::memcpy(scores + first + i, &four, sizeof four);
    }
  }
}

// out [heads, kChunks · 16] = out · fade + weights · values, for the `count` keys of a page.
template <int kHeads, int kChunks, typename T>
inline void AddValues(float* out, int64_t size, const float* weights, int64_t stride, const float* fades, const T* values, int64_t count) {
  Vec sums[kHeads][kChunks];
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kChunks; ++c) sums[h][c] = Load(out + h * size + c * kWidth) * fades[h];
  }
  for (int64_t key = 0; key < count; ++key) {
    Vec value[kChunks];
    for (int c = 0; c < kChunks; ++c) value[c] = Load(values + key * size + c * kWidth);
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kChunks; ++c) sums[h][c] += value[c] * weights[h * stride + key];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kChunks; ++c) Store(out + h * size + c * kWidth, sums[h][c]);
  }
}

template <int kHeads, typename T>
void AddValuesOf(float* out, int64_t size, const float* weights, int64_t stride, const float* fades, const T* values, int64_t count) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= size; c += 4 * kWidth) AddValues<kHeads, 4>(out + c, size, weights, stride, fades, values + c, count);
  for (; c < size; c += kWidth) AddValues<kHeads, 1>(out + c, size, weights, stride, fades, values + c, count);
}

// Fetches a run of numbers that comes next.
template <typename T>
inline void FetchAll(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) Fetch(from + i, 0);
}

// One lane and one key-value head: q and out [G, Q], mass [G], rows [n] of the head's pages; sees keys from `least` to `position`.
template <typename T>
void DecodeUnit(const float* q, const Pages<T>& pages, const int32_t* rows, int64_t held, int64_t head, int64_t least, int64_t position,
                float scale, float cap, int64_t group, float* out, float* mass) {
  const int64_t size = pages.size, length = pages.length, padded = (length + kWidth - 1) / kWidth * kWidth;
  float* scaled = Scratch(group * (size + padded + 2) + kWidth * size);
  float *wide = scaled + group * size, *weights = wide + kWidth * size, *fades = weights + group * padded, *tops = fades + group;
  for (int64_t i = 0; i < group * size; ++i) scaled[i] = q[i] * scale, out[i] = 0.f;
  for (int64_t g = 0; g < group; ++g) tops[g] = kLeast, mass[g] = 0.f;
  for (int64_t page = least / length; page < held && page * length <= position; ++page) {
    const int64_t row = rows[page] + head, seen = std::min(length, position + 1 - page * length), hidden = least - page * length;
    const T* keys = pages.keys + row * length * size;
    const T* values = pages.values + row * length * size;
    const bool more = page + 1 < held && (page + 1) * length <= position;
    const T* next = pages.keys + (more ? rows[page + 1] + head : row) * length * size;
    for (int64_t first = 0; first < seen; first += kWidth) {
      const int64_t count = std::min<int64_t>(seen - first, kWidth);
      const bool last = first + kWidth >= seen;
      FetchAll(values + first * size, count * size);  // memory answers while these keys are worked on
      if (!last || more) FetchAll(last ? next : keys + (first + kWidth) * size, kWidth * size);
      const float* sixteen;
      if constexpr (std::is_same_v<T, float>) {
        sixteen = keys + first * size;
      } else {
        for (int64_t i = 0; i < count * size; i += kWidth) Store(wide + i, Load(keys + first * size + i));
        sixteen = wide;
      }
      for (int64_t g = 0; g < group; ++g) {
        float* scores = weights + g * padded + first;
        Scores(scaled + g * size, sixteen, count, size, scores);
        if constexpr (std::is_same_v<T, int8_t>) {
          for (int64_t i = 0; i < count; ++i) scores[i] *= pages.key_scales[row * length + first + i];
        }
        if (cap > 0.f) Store(scores, Capped(Load(scores), cap));
        for (int64_t i = first; i < std::min(hidden, first + count); ++i) scores[i - first] = kMasked;
        for (int64_t i = count; i < kWidth; ++i) scores[i] = kMasked;
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      float* line = weights + g * padded;
      Vec most = Splat(tops[g]);
      for (int64_t i = 0; i < seen; i += kWidth) most = Max(most, Load(line + i));
      const float top = Largest(most);
      Vec total = {};
      for (int64_t i = 0; i < seen; i += kWidth) {
        const Vec weight = Exp(Load(line + i) - top);
        Store(line + i, weight);
        total += weight;
      }
      fades[g] = Exp(Splat(tops[g] - top))[0];
      mass[g] = mass[g] * fades[g] + Sum(total);
      tops[g] = top;
      if constexpr (std::is_same_v<T, int8_t>) {
        for (int64_t i = 0; i < seen; ++i) line[i] *= pages.value_scales[row * length + i];
      }
    }
    int64_t g = 0;
    const auto add = [&](auto heads) {
      AddValuesOf<heads>(out + g * size, size, weights + g * padded, padded, fades + g, values, seen);
      g += heads;
    };
    while (group - g >= 4) add(std::integral_constant<int, 4>{});
    if (group - g == 3) add(std::integral_constant<int, 3>{});
    if (group - g == 2) add(std::integral_constant<int, 2>{});
    if (group - g == 1) add(std::integral_constant<int, 1>{});
  }
  for (int64_t g = 0; g < group; ++g) {
    const float kept = std::max(mass[g], std::numeric_limits<float>::min());
    for (int64_t i = 0; i < size; ++i) out[g * size + i] /= kept;
    mass[g] = tops[g] + std::log(kept);
  }
}

// q [B, K, G, Q], pages [R, S, Q], scales [R, S] or empty, rows [B, n], position [B], least [B] or empty → out [B, K, G, Q],
// mass [B, K, G].
ffi::Error Decode(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer keys, ffi::AnyBuffer values, Floats key_scales, Floats value_scales,
                  Ints rows, Ints position, Ints least, float scale, float cap, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> mass) {
  const auto shape = q.dimensions();
  const int64_t kv_heads = shape[1], group = shape[2], size = shape[3], held = rows.dimensions()[1];
  return ByType(keys.element_type(), [&](auto element) {
    const auto pages = PagesOf<decltype(element)>(keys, values, key_scales, value_scales);
    Spread(pool, shape[0] * kv_heads, [&](int64_t unit) {
      const int64_t lane = unit / kv_heads, offset = unit * group;
      const int64_t from = least.element_count() > 0 ? least.typed_data()[lane] : 0;
      DecodeUnit(q.typed_data() + offset * size, pages, rows.typed_data() + lane * held, held, unit % kv_heads, from,
                 position.typed_data()[lane], scale, cap, group, out->typed_data() + offset * size, mass->typed_data() + offset);
    });
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;
using partinf::Floats, partinf::Ints;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_decode, partinf::Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Ints>().Arg<Ints>().Arg<Ints>()
                                  .Attr<float>("scale").Attr<float>("cap")
                                  .Ret<Floats>().Ret<Floats>());
