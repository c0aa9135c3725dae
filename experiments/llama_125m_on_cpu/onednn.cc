// Seconds of a core that oneDNN takes for products x [rows, 1024] · W [1024, 1024]ᵀ, with weights as they are stored here and packed as it likes.
#include <ctime>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"

using namespace dnnl;

static double Now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int count, char** rows) {
  constexpr int64_t kSize = 1024, kBytes = 8 << 20;
  engine cpu(engine::kind::cpu, 0);
  stream order(cpu);
  for (const auto type : {memory::data_type::f32, memory::data_type::bf16}) {
    const bool wide = type == memory::data_type::f32;
    const int64_t number = kBytes / (kSize * kSize * (wide ? 4 : 2));
    const memory::desc stored({kSize, kSize}, type, memory::format_tag::ba);
    std::vector<memory> weights;
    for (int64_t i = 0; i < number; ++i) {
      weights.emplace_back(stored, cpu);
      auto* to = static_cast<uint16_t*>(weights.back().get_data_handle());
      for (int64_t j = 0; j < kSize * kSize * (wide ? 2 : 1); ++j) to[j] = static_cast<uint16_t>(0x3f80 + rand() % 64);
    }
    for (int at = 1; at < count; ++at) {
      const int64_t few = atoll(rows[at]);
      const memory::desc x({few, kSize}, type, memory::format_tag::ab), out({few, kSize}, memory::data_type::f32, memory::format_tag::ab);
      memory from(x, cpu), to(out, cpu);
      std::fill_n(static_cast<uint16_t*>(from.get_data_handle()), few * kSize * (wide ? 2 : 1), uint16_t{0x3f80});
      double least[2] = {1e9, 1e9};
      for (int packed = 0; packed < 2; ++packed) {
        const memory::desc any({kSize, kSize}, type, memory::format_tag::any);
        const matmul::primitive_desc made(cpu, x, packed ? any : stored, out);
        const matmul product(made);
        std::vector<memory> laid;
        for (auto& each : weights) {
          if (!packed) {
            laid.push_back(each);
            continue;
          }
          laid.emplace_back(made.weights_desc(), cpu);
          reorder(each, laid.back()).execute(order, each, laid.back());
        }
        order.wait();
        for (int turn = 0; turn < 20; ++turn) {
          const double started = Now();
          for (auto& each : laid) product.execute(order, {{DNNL_ARG_SRC, from}, {DNNL_ARG_WEIGHTS, each}, {DNNL_ARG_DST, to}});
          order.wait();
          least[packed] = std::min(least[packed], (Now() - started) / number);
        }
      }
      std::printf("%s %lld %.9f %.9f\n", wide ? "f32" : "bf16", static_cast<long long>(few), least[0], least[1]);
    }
  }
}
