// Every instruction set's kernels against the operator in double precision, over odd sizes and seeds; and bit for bit
// against themselves for any team.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>

#include "check.h"
#include "operator_oracle.h"

namespace eqr::test {
namespace {

using cpu::Isa;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer zeroed(int64_t bytes) {
  const size_t size = size_t(bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, size);
  if (!p) throw std::bad_alloc();
  return Buffer(std::memset(p, 0, size));
}

Shape attention_shape(int64_t S, int64_t heads, int64_t head_dim, int64_t V, int64_t rope_parts) {
  Shape s = mlp_shape(S, heads * head_dim, V);
  s.mixer_hidden = 0, s.heads = heads, s.rope_parts = rope_parts;
  return s;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all = {
      mlp_shape(1, 1, 1),
      mlp_shape(2, 3, 2),
      mlp_shape(81, 64, 11),
      mlp_shape(7, 23, 3, 2, 2, 2),
      mlp_shape(9, 33, 40),
      mlp_shape(65, 32, 6, 1, 2),
      mlp_shape(130, 17, 5),
      mlp_shape(10, 130, 11, 3),
      attention_shape(1, 1, 2, 2, 1),
      attention_shape(5, 3, 6, 3, 1),
      attention_shape(81, 2, 16, 11, 1),
      attention_shape(140, 2, 20, 4, 2),
      attention_shape(37, 5, 1, 3, 0),
      attention_shape(300, 1, 48, 6, 1),
  };
  all[3].fixed_start = 1;
  all[4].H_std = 0.25f, all[4].L_std = 3.0f;
  all[5].lambda = 0.6f, all[5].keep = 0.4f;
  all[6].norm_eps = 0.1f;
  return all;
}

std::string name_of(const Shape& s) {
  return text("S", s.tokens, "d", s.features, "V", s.vocabulary, "heads", s.heads, "layers", s.layers);
}

struct Output {
  std::vector<float> logits;
  float q_halt, change_sq, size_sq;
};

bool same_bits(const Output& a, const Output& b) {
  const float x[3] = {a.q_halt, a.change_sq, a.size_sq}, y[3] = {b.q_halt, b.change_sq, b.size_sq};
  return a.logits.size() == b.logits.size() && !std::memcmp(x, y, sizeof x) &&
         !std::memcmp(a.logits.data(), b.logits.data(), 4 * a.logits.size());
}

Output copy_of(const cpu::StepOutput& out, const cpu::Engine& engine) {
  return {{out.logits, out.logits + engine.tokens * engine.vocabulary}, out.q_halt, out.change_sq, out.size_sq};
}

// The outputs of `steps` outer steps by a team of `size` threads.
std::vector<Output> run(const RandomModel& model, Isa isa, Precision precision, cpu::StepInput in, int steps,
                        int size) {
  const int64_t bytes = cpu::packed_bytes(model.shape, precision, isa);
  const Buffer packed = zeroed(bytes);
  cpu::pack(model.shape, precision, isa, model.weights(), static_cast<cpu::Packed*>(packed.get()));
  const cpu::Engine engine = cpu::engine(static_cast<cpu::Packed*>(packed.get()), bytes);
  const Buffer workspace = zeroed(engine.workspace_bytes);
  cpu::Barrier barrier{};
  std::vector<Output> outputs;
  const auto work = [&](int rank) {
    cpu::StepInput mine = in;
    const cpu::Member member{&barrier, rank, size};
    engine.start(engine.packed, workspace.get(), mine, member);
    for (int step = 0; step < steps; ++step) {
      mine.rng[3] = step;
      engine.outer_step(engine.packed, workspace.get(), mine, member);
      if (rank == 0) {
        const auto& out = *static_cast<const cpu::StepOutput*>(workspace.get());
        outputs.push_back(copy_of(out, engine));
      }
    }
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < size; ++rank) others.emplace_back(work, rank);
  work(0);
  for (std::thread& other : others) other.join();
  return outputs;
}

std::vector<int64_t> random_tokens(const Shape& s, uint64_t seed) {
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < s.tokens; ++t)
    tokens.push_back(int64_t((seed * 2654435761u + uint64_t(t) * 40503u) >> 3) % s.vocabulary);
  return tokens;
}

std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    if (cpu::runs(isa)) found.push_back(isa);
  return found;
}

// Relative to what logits of random weights come to, which is about 1 each.
double relative(const std::vector<float>& got, const Matrix& expected) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double(got[i]) - expected[i], 2);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / std::max(size, double(expected.size())));
}

// Most that an outer step may be off, relative to the size of the logits. bf16 and int8 round every operand; an int8
// row of activations has 8 bits and a bf16 one as many, so they are off by about as much.
double limit(Precision precision, const Shape& s) {
  const double modules = double(s.H_cycles * (s.L_cycles + 1) * s.layers);
  return precision == Precision::fp32 ? 2e-5 : precision == Precision::bf16 ? 0.02 * modules : 0.05 * modules;
}

}  // namespace

TEST(operator_against_double_precision) {
  for (const Shape& shape : shapes())
    for (uint64_t seed = 0; seed < 10; ++seed) {
      const RandomModel model(shape, seed);
      const std::vector<int64_t> tokens = random_tokens(shape, seed);
      const cpu::StepInput in{tokens.data(), {int64_t(seed), 3, int64_t(seed) - 5, 0}, seed % 3 ? 0.01f : 0.0f};
      OracleState oracle = oracle_start(model, in);
      oracle_outer_step(model, in, oracle);
      for (Isa isa : isas())
        for (Precision precision : kPrecisions) {
          // A norm over a few values may divide by next to nothing, which blows up any rounding.
          if (precision != Precision::fp32 && (shape.tokens < 5 || shape.features < 5)) continue;
          const Output out = run(model, isa, precision, in, 1, 1)[0];
          const double most = limit(precision, shape), error = relative(out.logits, oracle.logits);
          const std::string where = text(cpu::isa_name(isa), int(precision), name_of(shape), "seed", seed);
          CHECK(error <= most, where, error);
          CHECK(std::abs(out.q_halt - oracle.q_halt) <= most * 10.0, where, out.q_halt, oracle.q_halt);
          CHECK(std::abs(out.size_sq / oracle.size_sq - 1.0) <= most, where, out.size_sq, oracle.size_sq);
          CHECK(std::abs(out.change_sq / oracle.change_sq - 1.0) <= 2.0 * most, where, out.change_sq, oracle.change_sq);
        }
    }
}

TEST(operator_same_bits_for_any_team) {
  for (const Shape& shape : shapes()) {
    const RandomModel model(shape, 1);
    const std::vector<int64_t> tokens = random_tokens(shape, 1);
    const cpu::StepInput in{tokens.data(), {1, 2, 3, 0}, 0.01f};
    for (Isa isa : isas())
      for (Precision precision : kPrecisions) {
        const std::vector<Output> alone = run(model, isa, precision, in, 2, 1);
        for (int size : {2, 3}) {
          const std::vector<Output> together = run(model, isa, precision, in, 2, size);
          for (size_t step = 0; step < alone.size(); ++step)
            CHECK(same_bits(alone[step], together[step]), cpu::isa_name(isa), int(precision), name_of(shape), size);
        }
      }
  }
}

TEST(operator_leaves_nothing_to_the_next_trajectory) {
  std::vector<Shape> all = shapes();
  all.push_back(mlp_shape(9, 20, 5));
  all.push_back(mlp_shape(9, 36, 5));
  for (const Shape& shape : all) {
    RandomModel model(shape, 1);
    if (shape.vocabulary < 2) continue;
    for (int64_t f = 0; f < shape.features; ++f) model.embedding[size_t(f)] = NAN;  // of token 0
    const std::vector<int64_t> bad(size_t(shape.tokens), 0), good(size_t(shape.tokens), 1);
    cpu::StepInput in{good.data(), {1, 2, 3, 0}, 0.01f}, spoilt{bad.data(), {1, 2, 4, 0}, 0.01f};
    for (Isa isa : isas())
      for (Precision precision : kPrecisions) {
        const int64_t bytes = cpu::packed_bytes(shape, precision, isa);
        const Buffer packed = zeroed(bytes);
        cpu::pack(shape, precision, isa, model.weights(), static_cast<cpu::Packed*>(packed.get()));
        const cpu::Engine engine = cpu::engine(static_cast<cpu::Packed*>(packed.get()), bytes);
        const Buffer workspace = zeroed(engine.workspace_bytes);
        cpu::Barrier barrier{};
        const cpu::Member alone{&barrier, 0, 1};
        const auto step = [&](const cpu::StepInput& input) {
          engine.start(engine.packed, workspace.get(), input, alone);
          engine.outer_step(engine.packed, workspace.get(), input, alone);
          return copy_of(*static_cast<const cpu::StepOutput*>(workspace.get()), engine);
        };
        const Output first = step(in);
        CHECK(!std::isfinite(step(spoilt).size_sq), cpu::isa_name(isa), int(precision), name_of(shape));
        CHECK(same_bits(step(in), first), cpu::isa_name(isa), int(precision), name_of(shape));
      }
  }
}

TEST(operator_without_a_norm_epsilon) {
  for (Shape shape : {mlp_shape(9, 20, 5), mlp_shape(9, 36, 5), attention_shape(9, 2, 10, 5, 1)}) {
    shape.norm_eps = 0.0f;
    const RandomModel model(shape, 1);
    const std::vector<int64_t> tokens = random_tokens(shape, 1);
    const cpu::StepInput in{tokens.data(), {1, 2, 3, 0}, 0.01f};
    OracleState oracle = oracle_start(model, in);
    oracle_outer_step(model, in, oracle);
    for (Isa isa : isas())
      CHECK(relative(run(model, isa, Precision::fp32, in, 1, 1)[0].logits, oracle.logits) < 2e-5, cpu::isa_name(isa),
            name_of(shape));
  }
}

TEST(operator_passes_on_what_is_not_finite) {
  for (const Shape& shape : {mlp_shape(9, 20, 5), attention_shape(9, 2, 10, 5, 1)})
    for (float bad : {NAN, INFINITY})
      for (int which = 0; which < 5; ++which) {
        RandomModel model(shape, 1);
        (which < 4 ? model.matrices[size_t(which)] : model.embedding)[3] = bad;
        const std::vector<int64_t> tokens(9, 0);
        const cpu::StepInput in{tokens.data(), {1, 2, 3, 0}, 0.01f};
        for (Isa isa : isas())
          for (Precision precision : kPrecisions) {
            const Output out = run(model, isa, precision, in, 1, 1)[0];
            CHECK(!std::isfinite(out.size_sq) || !std::isfinite(out.change_sq), cpu::isa_name(isa), int(precision), bad,
                  which, name_of(shape));
          }
      }
}

}  // namespace eqr::test
