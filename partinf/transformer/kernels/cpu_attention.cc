// The core of attention on a CPU: softmax over keys that lie in pages, each page read once, where it lies.
//
// XLA has no such form: it gathers the pages of a tile into an array of its own and multiplies that in products of a few rows, which it
// makes one by one. Here the keys of a page meet the queries of all heads that share them while they are in a core's cache, and nothing
// but the running softmax is kept: `partinf/transformer/kernels.py` has the same computation for every platform.
//
// Pages hold float32, the bits of bfloat16 (as uint16), or int8 with a scale per token and head. Arithmetic is float32, or the processor
// multiplies bfloat16 and adds in float32. Letters as in cpu_attention.h.

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

// Calls some(first, number) for all heads of a group, four at a time while there are as many; the number is a constant.
template <typename Some>
inline void ByFours(int64_t group, const Some& some) {
  int64_t first = 0;
  const auto take = [&](auto heads) {
    some(first, heads);
    first += heads;
  };
  while (group - first >= 4) take(std::integral_constant<int, 4>{});
  if (group - first == 3) take(std::integral_constant<int, 3>{});
  if (group - first == 2) take(std::integral_constant<int, 2>{});
  if (group - first == 1) take(std::integral_constant<int, 1>{});
}

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
    ByFours(group, [&](int64_t g, auto heads) {
      AddValuesOf<heads>(out + g * size, size, weights + g * padded, padded, fades + g, values, seen);
    });
  }
  for (int64_t g = 0; g < group; ++g) {
    const float kept = std::max(mass[g], std::numeric_limits<float>::min());
    for (int64_t i = 0; i < size; ++i) out[g * size + i] /= kept;
    mass[g] = tops[g] + std::log(kept);
  }
}

// ---- in bfloat16: scores in tiles, values two keys at a time; sums and softmax in float32, weights of values rounded

constexpr int64_t kBlock = 2 * kWidth;  // keys of a block of scores, and numbers of a run of bfloat16

typedef uint16_t Numbers __attribute__((vector_size(64)));

inline Numbers LoadNumbers(const uint16_t* from) {
  Numbers found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline Numbers LoadNumbers(const int8_t* from) {
  Numbers found;
  float words[kWidth];
  Narrow(from, words);
  std::memcpy(&found, words, sizeof found);
  return found;
}

// Numbers of two keys side by side as words: those of every first four of eight dimensions, and those of the others.
inline Vec FirstFours(Numbers a, Numbers b) {
  return reinterpret_cast<Vec>(__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50,
                                                       19, 51, 24, 56, 25, 57, 26, 58, 27, 59));
}

inline Vec SecondFours(Numbers a, Numbers b) {
  return reinterpret_cast<Vec>(__builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54,
                                                       23, 55, 28, 60, 29, 61, 30, 62, 31, 63));
}

// out [kHeads, 32 · kRuns] = out · fade + weights · values of `count` keys; a run of out has the fours of its dimensions as above.
template <int kHeads, int kRuns, typename T>
inline void AddPairs(float* out, int64_t size, const uint16_t* weights, int64_t stride, const float* fades, const T* values, int64_t count) {
  Vec sums[kHeads][2 * kRuns];
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < 2 * kRuns; ++c) sums[h][c] = Load(out + h * size + c * kWidth) * fades[h];
  }
  for (int64_t key = 0; key < count; key += 2) {
    Vec words[2 * kRuns];
    for (int r = 0; r < kRuns; ++r) {
      const Numbers first = LoadNumbers(values + key * size + r * kBlock);
      const Numbers second = key + 1 < count ? LoadNumbers(values + (key + 1) * size + r * kBlock) : Numbers{};
      words[2 * r] = FirstFours(first, second), words[2 * r + 1] = SecondFours(first, second);
    }
    for (int h = 0; h < kHeads; ++h) {
      float pair;
      std::memcpy(&pair, weights + h * stride + key, sizeof pair);
      for (int c = 0; c < 2 * kRuns; ++c) sums[h][c] = Pairs::Add(sums[h][c], Splat(pair), words[c]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < 2 * kRuns; ++c) Store(out + h * size + c * kWidth, sums[h][c]);
  }
}

template <int kHeads, typename T>
void AddPairsOf(float* out, int64_t size, const uint16_t* weights, int64_t stride, const float* fades, const T* values, int64_t count) {
  int64_t c = 0;
  for (; c + 2 * kBlock <= size; c += 2 * kBlock) AddPairs<kHeads, 2>(out + c, size, weights, stride, fades, values + c, count);
  for (; c < size; c += kBlock) AddPairs<kHeads, 1>(out + c, size, weights, stride, fades, values + c, count);
}

// Four columns, from `sums` on, of sixteen rows [16, 16], as vectors.
inline void FourColumns(const float* sums, Vec (&found)[4]) {
  Vec rows[4];
  for (int i = 0; i < 4; ++i) {
    Quarter part[4];
    for (int n = 0; n < 4; ++n) std::memcpy(&part[n], sums + (4 * n + i) * kWidth, sizeof part[n]);
    const Half low = __builtin_shufflevector(part[0], part[1], 0, 1, 2, 3, 4, 5, 6, 7);
    const Half high = __builtin_shufflevector(part[2], part[3], 0, 1, 2, 3, 4, 5, 6, 7);
    rows[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  Vec half[4];
  for (int i = 0; i < 2; ++i) {
    half[i] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    half[2 + i] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 2; ++i) {
    found[2 * i] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    found[2 * i + 1] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
}

// The softmax of one page: scores [G, line] of `count` keys, those hidden among them, to weights; the rest of a line becomes 0.
inline void Soften(float* scores, int64_t line, int64_t count, int64_t group, uint16_t* weights, float* tops, float* mass, float* fades,
                   const float* value_scales) {
  for (int64_t g = 0; g < group; ++g) {
    float* mine = scores + g * line;
    for (int64_t i = count; i < line; ++i) mine[i] = kMasked;
    Vec most = Splat(tops[g]);
    for (int64_t i = 0; i < count; i += kWidth) most = Max(most, Load(mine + i));
    const float top = Largest(most);
    Vec total = {};
    for (int64_t i = 0; i < line; i += kWidth) {
      Vec weight = Exp(Load(mine + i) - top);
      total += weight;
      if (value_scales != nullptr) {
        for (int64_t j = 0; j < std::min<int64_t>(kWidth, count - i); ++j) weight[j] *= value_scales[i + j];
      }
      StoreNarrow(weights + g * line + i, weight);
    }
    fades[g] = Exp(Splat(tops[g] - top))[0];
    mass[g] = mass[g] * fades[g] + Sum(total);
    tops[g] = top;
  }
}

struct Query {  // of one lane and one key-value head
  const uint16_t* q;  // [G, Q]
  const int32_t* rows;
  int64_t held, head, least, position;
  uint16_t* out;  // [G, Q]
  float* mass;    // [G]
};

// As DecodeUnit. `then`: the first page of who is next.
template <typename T>
void DecodeInTiles(const Query& query, const Pages<T>& pages, float scale, float cap, int64_t group, const T* const (&then)[2]) {
  const int64_t size = pages.size, length = pages.length, line = (length + kBlock - 1) / kBlock * kBlock;
  const int64_t panels = (group + kWidth - 1) / kWidth, panel = size / 2 * kWidth;
  float* at = Scratch(panels * panel + kBlock * size + group * (size + line + line / 2 + 2) + panels * line * kWidth + 8 * kWidth);
  const auto part = [&](int64_t count) { return std::exchange(at, at + (count + kWidth - 1) / kWidth * kWidth); };
  float *queries = part(panels * panel), *sums = part(panels * line * kWidth), *out = part(group * size), *scores = part(group * line);
  auto *weights = reinterpret_cast<uint16_t*>(part(group * line / 2)), *wide = reinterpret_cast<uint16_t*>(part(kBlock * size / 2));
  float *tops = part(group), *fades = part(group);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t dim = 0; dim < size; dim += kBlock) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t g = p * kWidth + i;
        block[i] = g < group ? Load(reinterpret_cast<const float*>(query.q + g * size + dim)) : Vec{};
      }
      Turn(block);
      for (int i = 0; i < kWidth; ++i) Store(queries + p * panel + (dim / 2 + i) * kWidth, block[i]);
    }
  }
  std::fill(out, out + group * size, 0.f);
  std::fill(tops, tops + group, kLeast);
  std::fill(query.mass, query.mass + group, 0.f);
  for (int64_t page = query.least / length; page < query.held && page * length <= query.position; ++page) {
    const int64_t row = query.rows[page] + query.head, seen = std::min(length, query.position + 1 - page * length);
    const int64_t hidden = std::min(query.least - page * length, seen);
    const T *keys = pages.keys + row * length * size, *values = pages.values + row * length * size;
    const bool more = page + 1 < query.held && (page + 1) * length <= query.position;
    const int64_t next = more ? (query.rows[page + 1] + query.head) * length * size : 0;
    const T *next_keys = more ? pages.keys + next : then[0], *next_values = more ? pages.values + next : then[1];
    // All scores of the page in tiles first, and only then read: what a tile stores can be read late.
    for (int64_t first = 0; first < seen; first += kBlock) {
      const int64_t there = std::min(kBlock, length - first);
      FetchAll(next_keys + first * size, there * size);
      const uint16_t* block = wide;
      if constexpr (std::is_same_v<T, uint16_t>) {
        if (there == kBlock) block = keys + first * size;
        else std::memcpy(wide, keys + first * size, there * size * sizeof *wide);
      } else {
        for (int64_t i = 0; i < there * size; i += kBlock) Narrow(keys + first * size + i, reinterpret_cast<float*>(wide + i));
      }
      for (int64_t p = 0; p < panels; ++p) {
        Block<InTiles, 2, 1>(block, size, queries + p * panel, 0, size / kBlock, sums + (p * line + first) * kWidth, 0);
      }
    }
    for (int64_t first = 0; first < seen; first += kWidth) {
      FetchAll(next_values + first * size, kWidth * size);
      for (int64_t g = 0; g < group; g += 4) {
        Vec four[4];
        FourColumns(sums + (g / kWidth * line + first) * kWidth + g % kWidth, four);
        for (int64_t n = 0; n < std::min<int64_t>(4, group - g); ++n) {
          Vec score = four[n] * scale;
          if constexpr (std::is_same_v<T, int8_t>) {
            for (int64_t i = 0; i < std::min(int64_t{kWidth}, seen - first); ++i) score[i] *= pages.key_scales[row * length + first + i];
          }
          Store(scores + (g + n) * line + first, cap > 0.f ? Capped(score, cap) : score);
        }
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < hidden; ++i) scores[g * line + i] = kMasked;
    }
    const float* value_scales = std::is_same_v<T, int8_t> ? pages.value_scales + row * length : nullptr;
    Soften(scores, line, seen, group, weights, tops, query.mass, fades, value_scales);
    ByFours(group, [&](int64_t g, auto heads) {
      AddPairsOf<heads>(out + g * size, size, weights + g * line, line, fades + g, values, seen);
    });
  }
  for (int64_t g = 0; g < group; ++g) {
    const float kept = std::max(query.mass[g], std::numeric_limits<float>::min());
    for (int64_t i = 0; i < size; i += kBlock) {
      const Vec a = Load(out + g * size + i) / kept, b = Load(out + g * size + i + kWidth) / kept;
      StoreNarrow(query.out + g * size + i, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
      StoreNarrow(query.out + g * size + i + kWidth, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
    }
    query.mass[g] = tops[g] + std::log(kept);
  }
}

// q [B, K, G, Q], pages [R, S, Q], scales [R, S] or empty, rows [B, n], position [B], least [B] or empty → out [B, K, G, Q],
// mass [B, K, G]. q and out are float32, or bfloat16, which is multiplied in tiles and takes no pages of float32.
ffi::Error Decode(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values, Floats key_scales, Floats value_scales,
                  Ints rows, Ints position, Ints least, float scale, float cap, ffi::Result<ffi::AnyBuffer> out,
                  ffi::ResultBuffer<ffi::F32> mass) {
  const auto shape = q.dimensions();
  const int64_t kv_heads = shape[1], group = shape[2], size = shape[3], held = rows.dimensions()[1], units = shape[0] * kv_heads;
  const bool narrow = q.element_type() == ffi::BF16;
  if (narrow && (size % kBlock != 0 || keys.element_type() == ffi::F32 || !TilesPermitted())) {
    return ffi::Error::InvalidArgument("queries that no kernel takes");
  }
  return ByType(keys.element_type(), [&](auto element) {
    using T = decltype(element);
    const auto pages = PagesOf<T>(keys, values, key_scales, value_scales);
    const auto first = [&](int64_t lane) { return least.element_count() > 0 ? int64_t{least.typed_data()[lane]} : 0; };
    if constexpr (!std::is_same_v<T, float>) {
      if (narrow) {
        const int64_t ahead = pool.num_threads();
        return Spread(pool, units, [&](int64_t unit) {
          const int64_t lane = unit / kv_heads, offset = unit * group, then = std::min(unit + ahead, units - 1);
          const int64_t page = std::max<int64_t>(0, std::min(first(then / kv_heads) / pages.length, held - 1));
          const int64_t next = held == 0 ? 0 : (rows.typed_data()[then / kv_heads * held + page] + then % kv_heads) * pages.length * size;
          const Query query = {static_cast<const uint16_t*>(q.untyped_data()) + offset * size, rows.typed_data() + lane * held, held,
                               unit % kv_heads, first(lane), position.typed_data()[lane],
                               static_cast<uint16_t*>(out->untyped_data()) + offset * size, mass->typed_data() + offset};
          const TilesInUse used;
          DecodeInTiles(query, pages, scale, cap, group, {pages.keys + next, pages.values + next});
        });
      }
    }
    const auto* from = static_cast<const float*>(q.untyped_data());
    auto* to = static_cast<float*>(out->untyped_data());
    Spread(pool, units, [&](int64_t unit) {
      const int64_t lane = unit / kv_heads, offset = unit * group;
      DecodeUnit(from + offset * size, pages, rows.typed_data() + lane * held, held, unit % kv_heads, first(lane),
                 position.typed_data()[lane], scale, cap, group, to + offset * size, mass->typed_data() + offset);
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
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Ints>().Arg<Ints>().Arg<Ints>()
                                  .Attr<float>("scale").Attr<float>("cap")
                                  .Ret<ffi::AnyBuffer>().Ret<Floats>());
