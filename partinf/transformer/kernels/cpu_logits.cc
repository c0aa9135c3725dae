// What a step reads off every row of logits: the largest one, where it first stands, and the sum of exp(logit − largest).
//
// XLA makes each of them a pass of its own over all logits, on one core; here a row is read twice while it is in a core's cache.

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_vectors.h"

namespace partinf {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();

struct Ends {
  float top;      // NaN where any logit is
  int32_t place;  // kNowhere where no logit equals the largest
  float mass;     // 0 where all are -inf, as another device may hold what the row consists of
};

// Calls visit(vector, first place) for a row; places beyond its end are -inf.
template <typename Visit>
inline void EachVector(const float* row, int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) visit(Load(row + i), i);
  if (i == count) return;
  Vec last = Splat(0.f) + kNone;
  std::memcpy(&last, row + i, (count - i) * sizeof(float));
  visit(last, i);
}

Ends EndsOf(const float* row, int64_t count) {
  Vec most = Splat(0.f) + kNone;
  IntVec numbers = ~IntVec{};
  EachVector(row, count, [&](Vec v, int64_t) {
    numbers &= v == v;
    most = Max(most, v);
  });
  for (int i = 0; i < kWidth; ++i) {
    if (numbers[i] == 0) return {std::numeric_limits<float>::quiet_NaN(), kNowhere, std::numeric_limits<float>::quiet_NaN()};
  }
  const float top = Largest(most);
  if (top == kNone) return {top, 0, 0.f};
  Vec mass = {};
  IntVec first = IntVec{} + kNowhere, places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  EachVector(row, count, [&](Vec v, int64_t) {
    const IntVec here = v == top ? places : IntVec{} + kNowhere;
    first = here < first ? here : first;
    mass += Exp(v - top);
    places += kWidth;
  });
  int32_t place = kNowhere;
  for (int i = 0; i < kWidth; ++i) place = std::min(place, first[i]);
  return {top, place, Sum(mass)};
}

// logits [R, V] → the largest of every row, its first place, and the sum of exp(logit − largest): [R] each.
ffi::Error LogitEnds(ffi::ThreadPool pool, Floats logits, ffi::ResultBuffer<ffi::F32> top, ffi::ResultBuffer<ffi::S32> place,
                     ffi::ResultBuffer<ffi::F32> mass) {
  const int64_t rows = logits.dimensions()[0], count = logits.dimensions()[1];
  Spread(pool, rows, [&](int64_t row) {
    const Ends found = EndsOf(logits.typed_data() + row * count, count);
    top->typed_data()[row] = found.top, place->typed_data()[row] = found.place, mass->typed_data()[row] = found.mass;
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace partinf

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(partinf_logit_ends, partinf::LogitEnds,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<partinf::Floats>()
                                  .Ret<partinf::Floats>().Ret<partinf::Ints>().Ret<partinf::Floats>());
