// The core of attention on a CPU: softmax over keys that lie in pages, each page read once, where it lies.
//
// XLA has no such form: it gathers the pages of a tile into an array of its own and multiplies that in products of a few rows, which it
// makes one by one. Here the keys of a page meet the queries of all heads that share them while they are in a core's cache, and nothing
// but the running softmax is kept: `partinf/transformer/kernels.py` has the same computation for every platform.
//
// Pages hold float32, the bits of
// bfloat16 (as uint16), or int8 with a scale per token and head; arithmetic is float32.
//
// Letters: B lanes, T prompt tokens, H query heads in groups of G per key-value head K, Q d_head (a multiple of 16), S tokens of a page,
// R heads of pages, n pages of a lane or slot, M keys.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

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

// ---- prompt tokens

constexpr int64_t kRows = 96;  // queries of a tile: with 64 floats each, they and the output fill half of a core's second cache
constexpr int64_t kKeys = 64;  // keys of a tile
#ifdef __AVX512F__
constexpr int kVectors = 6;  // of queries that meet four keys, or four dimensions of values, in registers
#else
constexpr int kVectors = 1;
#endif

struct Tile {  // a running softmax; a query is a column, so that no sum goes across a vector
  float *queries, *out;  // [Q, kRows]
  float* scores;         // [kKeys, kRows]
  float *top, *mass, *fade;
  int32_t *owner, *position;  // [kRows]; padding has owner -2, which no key has
  int32_t *least, *floor;     // [kRows] the first position of the window, and the first of what is stored that is in it
  int64_t vectors, size;
  float cap;
};

// to [four, kRows] = to · fade + Σ over i < count of left[i · step + four · across] · right [i, kRows], for kCount vectors.
template <int kCount>
inline void Multiply(float* to, const float* fade, const float* left, const int64_t (&across)[4], int64_t step, const float* right,
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
inline void MultiplyAll(const Tile& tile, float* to, const float* fade, const float* left, const int64_t (&across)[4], int64_t step,
                        const float* right, int64_t count) {
  int64_t first = 0;
  const auto multiply = [&](auto vectors) {
    const int64_t at = first * kWidth;
    Multiply<vectors>(to + at, fade == nullptr ? nullptr : fade + at, left, across, step, right + at, count);
    first += vectors;
  };
  while (tile.vectors - first >= kVectors) multiply(std::integral_constant<int, kVectors>{});
  if constexpr (kVectors > 1) {
    while (tile.vectors - first >= 2) multiply(std::integral_constant<int, 2>{});
    if (tile.vectors > first) multiply(std::integral_constant<int, 1>{});
  }
}

// Adds `count` keys and values [count, Q] to a tile. They are seen by queries of their owner from their position on; owner and position of
// key i are `owners[i · moves]` and `positions[i · moves]`. Where there is a window, its place is `places[i]`, and a query sees it from the
// query's `least` on. `all`: by every query.
void Absorb(const Tile& tile, const float* keys, const float* values, int64_t count, const int32_t* owners, const int32_t* positions,
            int64_t moves, const int32_t* places, const int32_t* least, bool all) {
  const int64_t size = tile.size;
  for (int64_t key = 0; key < count; key += 4) {
    int64_t across[4];
    for (int i = 0; i < 4; ++i) across[i] = std::min(key + i, count - 1) * size;
    MultiplyAll(tile, tile.scores + key * kRows, nullptr, keys, across, 1, tile.queries, size);
  }
  for (int64_t v = 0; v < tile.vectors * kWidth; v += kWidth) {
    float* column = tile.scores + v;
    const Vec before = Load(tile.top + v);
    Vec top = before;
    if (tile.cap > 0.f) {
      for (int64_t key = 0; key < count; ++key) Store(column + key * kRows, Capped(Load(column + key * kRows), tile.cap));
    }
    if (!all) {
      IntVec owner, position, from = {};
      std::memcpy(&owner, tile.owner + v, sizeof owner);
      std::memcpy(&position, tile.position + v, sizeof position);
      if (least != nullptr) std::memcpy(&from, least + v, sizeof from);
      for (int64_t key = 0; key < count; ++key) {
        IntVec seen = (owner == owners[key * moves]) & (position >= positions[key * moves]);
        if (least != nullptr) seen &= from <= places[key];
        Store(column + key * kRows, seen ? Load(column + key * kRows) : Splat(kMasked));
      }
    }
    for (int64_t key = 0; key < count; ++key) top = Max(top, Load(column + key * kRows));
    Vec total = {};
    for (int64_t key = 0; key < count; ++key) {
      const Vec weight = Exp(Load(column + key * kRows) - top);
      Store(column + key * kRows, weight);
      total += weight;
    }
    const Vec fade = Exp(before - top);
    Store(tile.fade + v, fade);
    Store(tile.mass + v, Load(tile.mass + v) * fade + total);
    Store(tile.top + v, top);
  }
  const int64_t across[4] = {0, 1, 2, 3};
  for (int64_t dim = 0; dim < size; dim += 4) {
    MultiplyAll(tile, tile.out + dim * kRows, tile.fade, values + dim, across, size, tile.scores, count);
  }
}

struct Bounds {  // of the owners and positions of some tokens that are no padding
  int32_t first_owner = std::numeric_limits<int32_t>::max(), last_owner = -1;
  int32_t first = std::numeric_limits<int32_t>::max(), last = -1;
  bool padding = false;

  void Add(int32_t owner, int32_t position) {
    if (owner < 0) {
      padding = true;
      return;
    }
    first_owner = std::min(first_owner, owner), last_owner = std::max(last_owner, owner);
    first = std::min(first, position), last = std::max(last, position);
  }
};

template <typename T>
struct Prompt {
  const float *q, *keys, *values;  // [T, H, Q], [K, M, Q]
  const int32_t *owner, *position, *key_owner, *key_position;
  int64_t tokens, heads, kv_heads, num_keys;
  std::vector<Bounds> key_tiles;
  Pages<T> pages;
  const int32_t *rows, *slots, *starts;  // [slots, n]
  int64_t num_slots, held;
  const int32_t* floor;  // [T], where there is a window
  float scale, cap;
  int32_t window;  // 0 for none
  float *out, *mass;

  int64_t group() const { return heads / kv_heads; }
  int64_t tiles() const { return (tokens * group() + kRows - 1) / kRows; }

  // One key-value head and one tile of queries: rows are tokens and, of each, the query heads of the group.
  void Unit(int64_t head, int64_t number) const {
    const int64_t size = pages.size, begin = number * kRows, count = std::min(kRows, tokens * group() - begin);
    float* at = Scratch(kRows * (2 * size + kKeys + 7) + 2 * kKeys * size);
    const auto part = [&](int64_t length) { return std::exchange(at, at + length); };
    Tile tile;
    tile.queries = part(kRows * size), tile.out = part(kRows * size), tile.scores = part(kRows * kKeys);
    tile.top = part(kRows), tile.mass = part(kRows), tile.fade = part(kRows);
    tile.owner = reinterpret_cast<int32_t*>(part(kRows)), tile.position = reinterpret_cast<int32_t*>(part(kRows));
    tile.least = reinterpret_cast<int32_t*>(part(kRows)), tile.floor = reinterpret_cast<int32_t*>(part(kRows));
    float *wide_keys = part(kKeys * size), *wide_values = part(kKeys * size);
    tile.vectors = (count + kWidth - 1) / kWidth, tile.size = size, tile.cap = cap;

    Bounds bounds;
    for (int64_t row = 0; row < tile.vectors * kWidth; ++row) {
      const int64_t place = begin + std::min(row, count - 1), token = place / group();
      const float* from = q + (token * heads + head * group() + place % group()) * size;
      for (int64_t i = 0; i < size; ++i) tile.queries[i * kRows + row] = from[i] * scale, tile.out[i * kRows + row] = 0.f;
      bounds.Add(owner[token], position[token]);
      tile.owner[row] = owner[token] < 0 ? -2 : owner[token], tile.position[row] = position[token];
      tile.least[row] = window > 0 ? position[token] - window + 1 : 0, tile.floor[row] = floor != nullptr ? floor[token] : 0;
      tile.top[row] = kLeast, tile.mass[row] = 0.f;
    }
    for (int64_t t = 0; t < static_cast<int64_t>(key_tiles.size()); ++t) {
      const Bounds& found = key_tiles[t];
      if (found.last_owner < bounds.first_owner || found.first_owner > bounds.last_owner || found.first > bounds.last) continue;
      if (window > 0 && found.last <= bounds.first - window) continue;
      const bool one = found.first_owner == found.last_owner && bounds.first_owner == bounds.last_owner;
      const bool inside = window == 0 || found.first > bounds.last - window;
      const bool all = one && !found.padding && !bounds.padding && found.last <= bounds.first && inside;
      const int64_t first = t * kKeys, offset = (head * num_keys + first) * size;
      const int32_t *owners = key_owner + first, *positions = key_position + first, *least = window > 0 ? tile.least : nullptr;
      Absorb(tile, keys + offset, values + offset, std::min(kKeys, num_keys - first), owners, positions, 1, positions, least, all);
    }
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (slots[slot] < bounds.first_owner || slots[slot] > bounds.last_owner) continue;
      const bool alone = bounds.first_owner == bounds.last_owner && !bounds.padding;
      const int32_t always = std::numeric_limits<int32_t>::min();
      int32_t from = std::numeric_limits<int32_t>::max(), to = 0;  // the least and the largest floor of the slot's queries
      for (int64_t row = 0; row < count; ++row) {
        if (tile.owner[row] == slots[slot]) from = std::min(from, tile.floor[row]), to = std::max(to, tile.floor[row]);
      }
      int32_t places[kKeys];
      for (int64_t first = from; first < std::min<int64_t>(starts[slot], held * pages.length);) {
        const int64_t row = rows[slot * held + first / pages.length] + head, inside = first % pages.length;
        const int64_t seen = std::min({kKeys, pages.length - inside, starts[slot] - first});
        const int64_t from = row * pages.length + inside;
        const float* both[2] = {Wide(pages.keys, pages.key_scales, from, seen, wide_keys),
                                Wide(pages.values, pages.value_scales, from, seen, wide_values)};
        for (int64_t i = 0; i < seen; ++i) places[i] = static_cast<int32_t>(first + i);
        const int32_t* least = window > 0 ? tile.floor : nullptr;
        Absorb(tile, both[0], both[1], seen, slots + slot, &always, 0, places, least, alone && first >= to);
        first += seen;
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t place = begin + row, index = place / group() * heads + head * group() + place % group();
      const float kept = std::max(tile.mass[row], std::numeric_limits<float>::min());
      for (int64_t i = 0; i < size; ++i) out[index * size + i] = tile.out[i * kRows + row] / kept;
      mass[index] = tile.top[row] + std::log(kept);
    }
  }

 private:
  // `count` stored keys or values from token `from` on as float32: where they are, or in `to`.
  const float* Wide(const T* stored, const float* scales, int64_t from, int64_t count, float* to) const {
    const int64_t size = pages.size;
    if constexpr (std::is_same_v<T, float>) return stored + from * size;
    for (int64_t i = 0; i < count; ++i) {
      const float scale = std::is_same_v<T, int8_t> ? scales[from + i] : 1.f;
      for (int64_t c = 0; c < size; c += kWidth) Store(to + i * size + c, Load(stored + (from + i) * size + c) * scale);
    }
    return to;
  }
};

template <typename T>
Pages<T> PagesOf(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values, const Floats& key_scales, const Floats& value_scales) {
  const auto shape = keys.dimensions();
  return {static_cast<const T*>(keys.untyped_data()), static_cast<const T*>(values.untyped_data()), key_scales.typed_data(),
          value_scales.typed_data(), shape[1], shape[2]};
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

// q [T, H, Q], owner and position [T], keys and values [K, M, Q], their owner and position [M], pages [R, S, Q], scales [R, S] or empty,
// rows [slots, n], slots and starts [slots], floor [T] or empty → out [T, H, Q], mass [T, H].
ffi::Error Prefill(ffi::ThreadPool pool, Floats q, Ints owner, Ints position, Floats keys, Floats values, Ints key_owner,
                   Ints key_position, ffi::AnyBuffer page_keys, ffi::AnyBuffer page_values, Floats key_scales, Floats value_scales,
                   Ints rows, Ints slots, Ints starts, Ints floor, float scale, float cap, int32_t window, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> mass) {
  const auto shape = q.dimensions(), stored = keys.dimensions();
  std::vector<Bounds> key_tiles((stored[1] + kKeys - 1) / kKeys);
  for (int64_t key = 0; key < stored[1]; ++key) key_tiles[key / kKeys].Add(key_owner.typed_data()[key], key_position.typed_data()[key]);
  return ByType(page_keys.element_type(), [&](auto element) {
    using T = decltype(element);
    const Prompt<T> prompt = {q.typed_data(),         keys.typed_data(),
                              values.typed_data(),    owner.typed_data(),
                              position.typed_data(),  key_owner.typed_data(),
                              key_position.typed_data(), shape[0],
                              shape[1],               stored[0],
                              stored[1],              key_tiles,
                              PagesOf<T>(page_keys, page_values, key_scales, value_scales),
                              rows.typed_data(),      slots.typed_data(),
                              starts.typed_data(),    slots.dimensions()[0],
                              rows.dimensions()[1],   floor.element_count() > 0 ? floor.typed_data() : nullptr,
                              scale,                  cap,
                              window,                 out->typed_data(),
                              mass->typed_data()};
    const int64_t tiles = prompt.tiles();
    // The last tiles of a prompt see most keys: first, so that the threads end together.
    Spread(pool, prompt.kv_heads * tiles, [&](int64_t unit) {
      prompt.Unit(unit % prompt.kv_heads, tiles - 1 - unit / prompt.kv_heads);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_prefill, partinf::Prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Arg<Ints>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()
                                  .Attr<float>("scale").Attr<float>("cap").Attr<int32_t>("window")
                                  .Ret<Floats>().Ret<Floats>());
