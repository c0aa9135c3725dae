// Attention of prompt tokens on a CPU: over the tokens of this step, and over what earlier steps stored of their sequences.
//
// Tiles of queries (`cpu_prompt_tile.h`) meet tiles of keys that any of them sees; the others are left out. Letters as in cpu_attention.h.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu_attention.h"
#include "cpu_prompt_tile.h"

namespace partinf {
namespace {

enum PromptForm : int32_t { kInFloat32, kInPairs, kInTiles };  // as `partinf.transformer.kernels.cpu` numbers them

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

  bool one_owner() const { return first_owner == last_owner; }
};

// `count` rows [Q] of what is stored, of which row i is number `place(i)`, as numbers that a tile takes, and their scales unless they went
// into those.
template <typename T, typename Number, typename Place>
void Copy(const T* stored, const float* scales, int64_t count, int64_t size, const Place& place, Number* to, float* to_scales) {
  for (int64_t i = 0; i < count; ++i, to += size) {
    const int64_t at = place(i);
    const T* from = stored + at * size;
    if constexpr (std::is_same_v<T, Number>) {
      std::memcpy(to, from, size * sizeof *to);
    } else if constexpr (std::is_same_v<Number, float>) {
      const float scale = std::is_same_v<T, int8_t> ? scales[at] : 1.f;
      for (int64_t c = 0; c < size; c += kWidth) Store(to + c, Load(from + c) * scale);
    } else if constexpr (std::is_same_v<T, int8_t>) {
      for (int64_t c = 0; c < size; c += 2 * kWidth) Narrow(from + c, reinterpret_cast<float*>(to + c));
      to_scales[i] = scales[at];
    }
  }
}

template <typename T, typename Tile>
struct Prompt {
  using Number = typename Tile::Number;
  static constexpr int64_t kRows = Tile::kRows, kKeys = Tile::kKeys;
  static constexpr bool kThere = Tile::kInPlace && std::is_same_v<T, Number>;    // stored numbers are taken where they lie
  static constexpr bool kScaled = !std::is_same_v<Number, float> && std::is_same_v<T, int8_t>;  // their scales come with them

  const Number *q, *keys, *values;  // [T, H, Q], [K, M, Q]
  const int32_t *owner, *position, *key_owner, *key_position;
  int64_t tokens, heads, kv_heads, num_keys;
  Pages<T> pages;
  const int32_t *rows, *slots, *starts;  // [slots, n]
  int64_t num_slots, held;
  const int32_t* floor;  // [T], where there is a window
  Scoring scoring;
  int32_t window;  // 0 for none
  Number* out;
  float* mass;
  std::vector<Bounds> key_tiles = {};

  void FindBounds() {
    key_tiles.resize((num_keys + kKeys - 1) / kKeys);
    for (int64_t key = 0; key < num_keys; ++key) key_tiles[key / kKeys].Add(key_owner[key], key_position[key]);
  }

  int64_t group() const { return heads / kv_heads; }
  int64_t tiles() const { return (tokens * group() + kRows - 1) / kRows; }

  // One key-value head and one tile of queries: rows are tokens and, of each, the query heads of the group.
  void Unit(int64_t head, int64_t number) const {
    const int64_t size = pages.size, begin = number * kRows, count = std::min(kRows, tokens * group() - begin);
    float* at = Scratch(Tile::Floats(size) + 2 * kKeys * (size + 1));
    Tile tile(at, count, size, scoring);
    Bounds bounds;
    const Number* from[kRows];
    for (int64_t row = 0; row < tile.vectors * kWidth; ++row) {
      const int64_t place = begin + std::min(row, count - 1), token = place / group();
      from[row] = q + Index(place, head) * size;
      bounds.Add(owner[token], position[token]);
      tile.owner[row] = owner[token] < 0 ? -2 : owner[token], tile.position[row] = position[token];
      tile.least[row] = window > 0 ? position[token] - window + 1 : 0, tile.floor[row] = floor != nullptr ? floor[token] : 0;
    }
    if (bounds.last_owner >= 0) {
      const typename Tile::InUse used;
      tile.Begin(from);
      for (int64_t t = 0; t < static_cast<int64_t>(key_tiles.size()); ++t) Fresh(tile, bounds, head, t);
      for (int64_t slot = 0; slot < num_slots; ++slot) Stored(tile, bounds, head, slot, count, at);
    } else {
      tile.Begin(from);
    }
    Number* to[kRows];
    float* masses[kRows];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t index = Index(begin + row, head);
      to[row] = out + index * size, masses[row] = mass + index;
    }
    tile.End(count, to, masses);
  }

 private:
  // The head's query number `place` among all [T, H].
  int64_t Index(int64_t place, int64_t head) const { return place / group() * heads + head * group() + place % group(); }

  // Whether any query of these bounds may see a key of this step.
  bool Seen(const Bounds& by, int64_t key) const {
    const int32_t of = key_owner[key], at = key_position[key];
    return of >= by.first_owner && of <= by.last_owner && at <= by.last && (window == 0 || at > by.first - window);
  }

  // Keys of this step: those of tile number `t`, without those at its ends that nobody sees.
  void Fresh(Tile& tile, const Bounds& bounds, int64_t head, int64_t t) const {
    const Bounds& found = key_tiles[t];
    if (found.last_owner < bounds.first_owner || found.first_owner > bounds.last_owner || found.first > bounds.last) return;
    if (window > 0 && found.last <= bounds.first - window) return;
    int64_t first = t * kKeys, end = std::min(first + kKeys, num_keys);
    while (first < end && !Seen(bounds, first)) ++first;
    while (first < end && !Seen(bounds, end - 1)) --end;
    if (first == end) return;
    const bool one = found.one_owner() && bounds.one_owner(), inside = window == 0 || found.first > bounds.last - window;
    const bool all = one && !found.padding && !bounds.padding && found.last <= bounds.first && inside;
    const int64_t offset = (head * num_keys + first) * pages.size;
    const int32_t* positions = key_position + first;
    const Sight sight = {key_owner + first, positions, 1, positions, window > 0 ? tile.least : nullptr, all};
    tile.Absorb(keys + offset, values + offset, nullptr, nullptr, end - first, sight);
  }

  // What is stored of a slot, of which `count` queries may be; `spare`: scratch memory.
  void Stored(Tile& tile, const Bounds& bounds, int64_t head, int64_t slot, int64_t count, float* spare) const {
    if (slots[slot] < bounds.first_owner || slots[slot] > bounds.last_owner) return;
    const bool alone = bounds.one_owner() && !bounds.padding;
    const int32_t always = std::numeric_limits<int32_t>::min();
    int32_t from = std::numeric_limits<int32_t>::max(), to = 0;  // the least and the largest floor of the slot's queries
    for (int64_t row = 0; row < count; ++row) {
      if (tile.owner[row] == slots[slot]) from = std::min(from, tile.floor[row]), to = std::max(to, tile.floor[row]);
    }
    const int64_t size = pages.size, end = std::min<int64_t>(starts[slot], held * pages.length);
    Number* copies[2] = {reinterpret_cast<Number*>(spare), reinterpret_cast<Number*>(spare + kKeys * size)};
    float* scales[2] = {spare + 2 * kKeys * size, spare + 2 * kKeys * size + kKeys};
    int32_t places[kKeys];
    for (int64_t first = from; first < end;) {
      const int64_t most = kThere ? pages.length - first % pages.length : kKeys, seen = std::min({kKeys, most, end - first});
      const auto place = [&](int64_t i) {
        const int64_t at = first + i;
        return (rows[slot * held + at / pages.length] + head) * pages.length + at % pages.length;
      };
      const Number* both[2];
      if constexpr (kThere) {
        both[0] = pages.keys + place(0) * size, both[1] = pages.values + place(0) * size;
      } else {
        Copy(pages.keys, pages.key_scales, seen, size, place, copies[0], scales[0]);
        Copy(pages.values, pages.value_scales, seen, size, place, copies[1], scales[1]);
        both[0] = copies[0], both[1] = copies[1];
      }
      for (int64_t i = 0; i < seen; ++i) places[i] = static_cast<int32_t>(first + i);
      const int32_t* least = window > 0 ? tile.floor : nullptr;
      const Sight sight = {slots + slot, &always, 0, places, least, alone && first >= to};
      tile.Absorb(both[0], both[1], kScaled ? scales[0] : nullptr, kScaled ? scales[1] : nullptr, seen, sight);
      first += seen;
    }
  }
};

// q [T, H, Q], owner and position [T], keys and values [K, M, Q], their owner and position [M], pages [R, S, Q], scales [R, S] or empty,
// rows [slots, n], slots and starts [slots], floor [T] or empty → out [T, H, Q], mass [T, H]. q, keys, values and out are float32, or
// bfloat16 in forms of it, which take no pages of float32.
ffi::Error Prefill(ffi::ThreadPool pool, ffi::AnyBuffer q, Ints owner, Ints position, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                   Ints key_owner, Ints key_position, ffi::AnyBuffer page_keys, ffi::AnyBuffer page_values, Floats key_scales,
                   Floats value_scales, Ints rows, Ints slots, Ints starts, Ints floor, float scale, float cap, int32_t window, int32_t form,
                   ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> mass) {
  const auto shape = q.dimensions(), stored = keys.dimensions();
  const bool narrow = q.element_type() == ffi::BF16;
  if (narrow != (form != kInFloat32) || (narrow && (shape[2] % 32 != 0 || page_keys.element_type() == ffi::F32)) ||
      (form == kInTiles && !TilesPermitted())) {
    return ffi::Error::InvalidArgument("prompts that this form does not take");
  }
  const auto run = [&](auto element, auto* tile) {
    using T = decltype(element);
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using Number = typename Tile::Number;
    const auto numbers = [](const ffi::AnyBuffer& buffer) { return static_cast<const Number*>(buffer.untyped_data()); };
    const int32_t* floors = floor.element_count() > 0 ? floor.typed_data() : nullptr;
    Prompt<T, Tile> prompt = {
        numbers(q), numbers(keys), numbers(values),
        owner.typed_data(), position.typed_data(), key_owner.typed_data(), key_position.typed_data(),
        shape[0], shape[1], stored[0], stored[1],
        PagesOf<T>(page_keys, page_values, key_scales, value_scales),
        rows.typed_data(), slots.typed_data(), starts.typed_data(), static_cast<int64_t>(slots.dimensions()[0]),
        static_cast<int64_t>(rows.dimensions()[1]), floors,
        {scale, cap}, window, static_cast<Number*>(out->untyped_data()), mass->typed_data()};
    prompt.FindBounds();
    const int64_t tiles = prompt.tiles();
    // The last tiles of a prompt see most keys: first, so that the threads end together.
    Spread(pool, prompt.kv_heads * tiles, [&](int64_t unit) {
      prompt.Unit(unit % prompt.kv_heads, tiles - 1 - unit / prompt.kv_heads);
    });
  };
  return ByType(page_keys.element_type(), [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), float>) {
      if (form == kInTiles) return run(element, static_cast<PairTile<InTiles>*>(nullptr));
      if (form == kInPairs) return run(element, static_cast<PairTile<InPairs>*>(nullptr));
    }
    run(element, static_cast<FloatTile*>(nullptr));
  });
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;
using partinf::Floats, partinf::Ints;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_prefill, partinf::Prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<Ints>().Arg<Ints>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<Ints>().Arg<Ints>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()
                                  .Attr<float>("scale").Attr<float>("cap").Attr<int32_t>("window").Attr<int32_t>("form")
                                  .Ret<ffi::AnyBuffer>().Ret<Floats>());
