// A training step of one row on every instruction set: its state against the operator in double precision, and its
// gradient against the slope of the loss there, along the gradient itself. Forward and backward apart are the same.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "cpu/training_step.h"
#include "operator_oracle.h"

namespace eqr::test {
namespace {

using cpu::Isa;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<char, Free> buffer(int64_t bytes, int fill) {
  const size_t size = size_t(bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, size);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(std::memset(p, fill, size)));
}

// One outer step is one latent recursion, so that all of it carries the gradient.
Shape shape_of(int64_t S, int64_t d, int64_t V, int64_t layers, int64_t L) {
  Shape s = mlp_shape(S, d, V, layers, 1, L);
  s.lambda = 0.9f, s.keep = 0.1f;
  return s;
}

struct Example {
  RandomModel model;
  std::vector<int64_t> tokens, labels;
  cpu::StepInput in;

  Example(const Shape& s, uint64_t seed) : model(s, seed), in{nullptr, {3, 1, 12345, 0}, 0.05f} {
    for (int64_t t = 0; t < s.tokens; ++t) {
      tokens.push_back(int64_t(seed + 7 * uint64_t(t)) % s.vocabulary);
      labels.push_back(t % 5 == 2 ? 0 : int64_t(seed + 3 * uint64_t(t)) % s.vocabulary);
    }
    in.tokens = tokens.data();
    // The halting head starts at zero in training; here it should act.
    model.q_bias = {0.3f, 0.0f};
  }

  double loss(const OracleState& z) const {
    const int64_t V = model.shape.vocabulary;
    int64_t labelled = 0, right = 0;
    double total = 0;
    for (size_t t = 0; t < labels.size(); ++t) {
      if (!labels[t]) continue;
      const double* x = z.logits.data() + int64_t(t) * V;
      const auto s = [](double a) { return a < 0 ? 1 / (1 - a) : a + 1; };
      double all = 0;
      int64_t most = 0;
      for (int64_t v = 0; v < V; ++v) all += s(x[v]), most = x[v] > x[most] ? v : most;
      total -= std::log(s(x[labels[t]]) / all);
      ++labelled, right += most == labels[t];
    }
    const double q = labelled && right == labelled ? -z.q_halt : z.q_halt;
    return total / double(labelled ? labelled : 1) + 0.5 * std::log1p(std::exp(q));
  }

  // Of the loss, by logits [S, V], which are replaced, and by q_halt, which is returned.
  float slopes(std::vector<float>& logits, float q_halt) const {
    const int64_t V = model.shape.vocabulary;
    int64_t labelled = 0, right = 0;
    for (int64_t label : labels) labelled += label != 0;
    for (size_t t = 0; t < labels.size(); ++t) {
      float* x = logits.data() + int64_t(t) * V;
      const auto s = [](double a) { return a < 0 ? 1 / (1 - a) : a + 1; };
      double all = 0;
      int64_t most = 0;
      for (int64_t v = 0; v < V; ++v) all += s(x[v]), most = x[v] > x[most] ? v : most;
      right += labels[t] && most == labels[t];
      const double of_label = s(x[labels[t]]);
      for (int64_t v = 0; v < V; ++v) {
        const double slope = x[v] < 0 ? s(x[v]) * s(x[v]) : 1;
        const double g = slope * (1 / all - (v == labels[t] ? 1 / of_label : 0)) / double(labelled);
        x[v] = labels[t] ? float(g) : 0.0f;
      }
    }
    return float(0.5 / (1 + std::exp(-double(q_halt))) - (labelled && right == labelled ? 0.5 : 0));
  }

  double loss_of_oracle() const {
    OracleState z = oracle_start(model, in);
    oracle_outer_step(model, in, z);
    return loss(z);
  }

  // All weights, in the order of their gradients.
  std::vector<std::vector<float>*> weights() {
    std::vector<std::vector<float>*> all = {&model.embedding, &model.lm_head, &model.q_weight, &model.q_bias};
    for (auto& matrix : model.matrices) all.push_back(&matrix);
    return all;
  }
};

void check(const Shape& s, Isa isa, uint64_t seed, int fill) {
  Example e(s, seed);
  const auto what = text(isa_name(isa), "S", s.tokens, "d", s.features, "V", s.vocabulary, "layers", s.layers);
  const OperatorWeights weights = e.model.weights();
  const auto packed = buffer(EQR_DISPATCH_TO(isa, training_packed_bytes, s), fill);
  const int64_t parts = s.layers * cpu::kTrainingParts + 1, bytes = cpu::training_scratch(s, isa).training;
  for (int64_t i = 0; i < parts; ++i) EQR_DISPATCH_TO(isa, training_pack, s, weights, i, packed.get());
  const auto first = buffer(bytes, 0), second = buffer(bytes, 0);
  void* const workers[] = {first.get(), second.get()};
  for (void* worker : workers) EQR_DISPATCH_TO(isa, training_begin, s, worker);

  const OracleState start = oracle_start(e.model, e.in);
  const std::vector<float> H(start.z_H.begin(), start.z_H.end()), L(start.z_L.begin(), start.z_L.end());
  std::vector<float> z_H = H, z_L = L;
  const cpu::TrainingRow row = {e.tokens.data(), e.in.rng, z_H.data(), z_L.data(), e.in.noise_scale};
  const cpu::TrainingResult got = EQR_DISPATCH_TO(isa, training_row, s, packed.get(), first.get(), row,
                                                  {e.labels.data(), H.data(), L.data(), 1.0f}, z_H.data(), z_L.data());
  OracleState want = start;
  oracle_outer_step(e.model, e.in, want);
  double error = 0, size = 0;
  for (size_t i = 0; i < z_H.size(); ++i) {
    error += std::pow(z_H[i] - want.z_H[i], 2) + std::pow(z_L[i] - want.z_L[i], 2);
    size += std::pow(want.z_H[i], 2) + std::pow(want.z_L[i], 2);
  }
  CHECK(std::sqrt(error / size) < 0.05, what, std::sqrt(error / size));
  CHECK(std::abs(got.loss - e.loss(want)) < 0.05 * (1 + e.loss(want)), what, got.loss, e.loss(want));
  CHECK(std::abs(got.residual - std::sqrt(want.change_sq / want.size_sq)) < 0.05 * got.residual, what, got.residual);

  std::vector<float> gradient(size_t(cpu::gradient_floats(s)));
  for (int64_t i = 0; i < parts; ++i) EQR_DISPATCH_TO(isa, training_gradients, s, workers, 2, i, gradient.data());
  const auto third = buffer(bytes, 0);
  void* const alone[] = {third.get()};
  EQR_DISPATCH_TO(isa, training_begin, s, third.get());
  const cpu::TrainingRow same = {e.tokens.data(), e.in.rng, H.data(), L.data(), e.in.noise_scale};
  std::vector<float> other_H(H.size()), other_L(L.size()), logits(size_t(s.tokens * s.vocabulary));
  const float q_halt = EQR_DISPATCH_TO(isa, training_forward, s, packed.get(), third.get(), same, other_H.data(),
                                       other_L.data(), logits.data());
  CHECK(other_H == z_H && other_L == z_L && q_halt == got.q_halt, what, q_halt, got.q_halt);
  const float of_q_halt = e.slopes(logits, q_halt);
  EQR_DISPATCH_TO(isa, training_backward, s, packed.get(), third.get(), same, logits.data(), of_q_halt);
  std::vector<float> apart(gradient.size());
  for (int64_t i = 0; i < parts; ++i) EQR_DISPATCH_TO(isa, training_gradients, s, alone, 1, i, apart.data());
  double difference = 0, whole = 0;
  for (size_t i = 0; i < apart.size(); ++i)
    difference += std::pow(double(apart[i]) - double(gradient[i]), 2), whole += std::pow(double(gradient[i]), 2);
  CHECK(difference <= 1e-6 * whole, what, difference, whole);

  double squares = 0;
  for (float g : gradient) squares += double(g) * double(g);
  const double norm = std::sqrt(squares), h = 1e-3;
  CHECK(norm > 0 && std::isfinite(norm), what, norm);
  double slope = 0;
  for (const double sign : {1.0, -1.0}) {
    size_t at = 0;
    for (auto* matrix : e.weights())
      for (float& w : *matrix) w += float(sign * (sign < 0 ? 2 : 1) * h * double(gradient[at++]) / norm);
    CHECK(at == gradient.size(), what, at);
    slope += sign * e.loss_of_oracle() / (2 * h);
  }
  // The slope along the gradient is its norm.
  CHECK(std::abs(slope - norm) < 0.05 * norm, what, slope, norm);
}

TEST(a_training_step_against_double_precision) {
  const Shape shapes[] = {shape_of(81, 64, 11, 1, 2), shape_of(7, 40, 3, 2, 1), shape_of(10, 33, 70, 1, 1),
                          shape_of(33, 17, 5, 1, 3), shape_of(2, 8, 4, 1, 1)};
  for (const Shape& s : shapes)
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
      if (cpu::runs(isa)) check(s, isa, 11, 0x5a);
}

}  // namespace
}  // namespace eqr::test
