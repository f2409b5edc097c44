#include "operator_oracle.h"

#include <cmath>
#include <random>

#include "common/philox.h"

namespace eqr::test {
namespace {

constexpr double kPi = 3.14159265358979323846;

uint32_t word(const int64_t* rng, uint32_t stream, int64_t element) {
  const Words4 w = philox_block(rng_row(rng, stream), uint32_t(element / 4));
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  return words[element % 4];
}

double uniform(uint32_t w) { return (double(w >> 9) + 0.5) * 0x1p-23; }

double normal(const int64_t* rng, uint32_t stream, int64_t element) {
  const int64_t even = element - element % 2;
  const double radius = std::sqrt(-2.0 * std::log(uniform(word(rng, stream, even))));
  const double angle = 2.0 * kPi * uniform(word(rng, stream, even + 1));
  return radius * (element % 2 ? std::sin(angle) : std::cos(angle));
}

double inverse_erf(double y) {
  double x = 0.0;
  for (int i = 0; i < 60; ++i) x -= (std::erf(x) - y) / (2.0 / std::sqrt(kPi) * std::exp(-x * x));
  return x;
}

double truncated_normal(double u) {
  return std::sqrt(2.0) * inverse_erf(std::erf(std::sqrt(2.0)) * (2.0 * u - 1.0)) / 0.8796256610342398;
}

// x [n, depth] @ w^T, w [rows, depth] -> [n, rows]
Matrix linear(const Matrix& x, const float* w, int64_t n, int64_t depth, int64_t rows) {
  Matrix out(size_t(n * rows));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0.0;
      for (int64_t k = 0; k < depth; ++k) sum += x[size_t(i * depth + k)] * double(w[r * depth + k]);
      out[size_t(i * rows + r)] = sum;
    }
  return out;
}

// RMSnorm over rows of (x + y), [n, m]
Matrix norm_of_sum(const Matrix& x, const Matrix& y, int64_t n, int64_t m, double eps) {
  Matrix out(x.size());
  for (int64_t i = 0; i < n; ++i) {
    double square = 0.0;
    for (int64_t j = 0; j < m; ++j) {
      const size_t at = size_t(i * m + j);
      out[at] = x[at] + y[at];
      square += out[at] * out[at];
    }
    for (int64_t j = 0; j < m; ++j) out[size_t(i * m + j)] /= std::sqrt(square / double(m) + eps);
  }
  return out;
}

Matrix swiglu(const Matrix& x, const float* gate_up, const float* down, int64_t n, int64_t m, int64_t k) {
  const Matrix both = linear(x, gate_up, n, m, 2 * k);
  Matrix hidden(size_t(n * k));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const double gate = both[size_t(i * 2 * k + j)], up = both[size_t(i * 2 * k + k + j)];
      hidden[size_t(i * k + j)] = gate / (1.0 + std::exp(-gate)) * up;
    }
  return linear(hidden, down, n, k, m);
}

Matrix transpose(const Matrix& x, int64_t rows, int64_t columns) {
  Matrix out(x.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[size_t(j * rows + i)] = x[size_t(i * columns + j)];
  return out;
}

Matrix attention(const RandomModel& model, const BlockWeights& w, const Matrix& u) {
  const Shape& s = model.shape;
  const int64_t S = s.tokens, d = s.features, width = d / s.heads;
  const Matrix qkv = linear(u, w.mixer_in, S, d, 3 * d);
  Matrix mixed(size_t(S * d));
  for (int64_t head = 0; head < s.heads; ++head) {
    const auto part = [&](int which) {
      Matrix out(size_t(S * width));
      for (int64_t t = 0; t < S; ++t)
        for (int64_t f = 0; f < width; ++f)
          out[size_t(t * width + f)] = qkv[size_t(t * 3 * d + which * d + head * width + f)];
      if (which == 2 || !s.rope_parts) return out;
      const Matrix plain = out;
      const int64_t half = width / s.rope_parts / 2;
      for (int64_t t = 0; t < S; ++t)
        for (int64_t f = 0; f < width; ++f) {
          const bool first = f / half % 2 == 0;
          const double other = first ? -plain[size_t(t * width + f + half)] : plain[size_t(t * width + f - half)];
          out[size_t(t * width + f)] = plain[size_t(t * width + f)] * double(model.cos[size_t(t * width + f)]) +
                                       other * double(model.sin[size_t(t * width + f)]);
        }
      return out;
    };
    const Matrix q = part(0), k = part(1), v = part(2);
    for (int64_t t = 0; t < S; ++t) {
      std::vector<double> weight(static_cast<size_t>(S));
      double top = -INFINITY, total = 0.0;
      for (int64_t j = 0; j < S; ++j) {
        double dot = 0.0;
        for (int64_t f = 0; f < width; ++f) dot += q[size_t(t * width + f)] * k[size_t(j * width + f)];
        weight[size_t(j)] = dot / std::sqrt(double(width));
        top = std::max(top, weight[size_t(j)]);
      }
      for (double& x : weight) total += x = std::exp(x - top);
      for (int64_t f = 0; f < width; ++f) {
        double sum = 0.0;
        for (int64_t j = 0; j < S; ++j) sum += weight[size_t(j)] * v[size_t(j * width + f)];
        mixed[size_t(t * d + head * width + f)] = sum / total;
      }
    }
  }
  return linear(mixed, w.mixer_out, S, d, d);
}

Matrix block(const RandomModel& model, const BlockWeights& w, Matrix u) {
  const Shape& s = model.shape;
  const int64_t S = s.tokens, d = s.features;
  const double eps = s.norm_eps;
  if (s.heads) {
    u = norm_of_sum(u, attention(model, w, u), S, d, eps);
  } else {
    const Matrix t = transpose(u, S, d);
    u = transpose(norm_of_sum(t, swiglu(t, w.mixer_in, w.mixer_out, d, S, s.mixer_hidden), d, S, eps), d, S);
  }
  return norm_of_sum(u, swiglu(u, w.gate_up, w.down, S, d, s.hidden), S, d, eps);
}

std::vector<float> draw(std::mt19937_64& random, int64_t count, double std) {
  std::normal_distribution<double> normal(0.0, std);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = float(normal(random));
  return out;
}

}  // namespace

RandomModel::RandomModel(const Shape& given, uint64_t seed) : shape(given) {
  std::mt19937_64 random(seed);
  const int64_t S = shape.tokens, d = shape.features, V = shape.vocabulary;
  embedding = draw(random, V * d, 1.0 / std::sqrt(double(d)));
  lm_head = draw(random, V * d, 1.0 / std::sqrt(double(d)));
  q_weight = draw(random, 2 * d, 1.0 / std::sqrt(double(d)));
  q_bias = draw(random, 2, 1.0);
  if (shape.fixed_start) H_start = draw(random, d, 1.0), L_start = draw(random, d, 1.0);
  if (shape.rope_parts)
    for (int64_t i = 0; i < S * (d / shape.heads); ++i) {
      const double angle = std::uniform_real_distribution<double>(0.0, 6.0)(random);
      cos.push_back(float(std::cos(angle)));
      sin.push_back(float(std::sin(angle)));
    }
  for (int64_t i = 0; i < shape.layers; ++i) {
    const bool attends = shape.heads > 0;
    const int64_t in = attends ? 3 * d * d : 2 * shape.mixer_hidden * S, out = attends ? d * d : S * shape.mixer_hidden;
    matrices.push_back(draw(random, in, 1.0 / std::sqrt(double(attends ? d : S))));
    matrices.push_back(draw(random, out, 1.0 / std::sqrt(double(attends ? d : shape.mixer_hidden))));
    matrices.push_back(draw(random, 2 * shape.hidden * d, 1.0 / std::sqrt(double(d))));
    matrices.push_back(draw(random, d * shape.hidden, 1.0 / std::sqrt(double(shape.hidden))));
  }
  for (size_t i = 0; i < matrices.size(); i += 4)
    blocks.push_back({matrices[i].data(), matrices[i + 1].data(), matrices[i + 2].data(), matrices[i + 3].data()});
}

OperatorWeights RandomModel::weights() const {
  return {embedding.data(), lm_head.data(), q_weight.data(), q_bias.data(), blocks.data(),
          cos.data(),       sin.data(),     H_start.data(),  L_start.data()};
}

OracleState oracle_start(const RandomModel& model, const cpu::StepInput& in) {
  const Shape& s = model.shape;
  OracleState state;
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t f = 0; f < s.features; ++f) {
      const int64_t element = t * s.features + f;
      if (s.fixed_start) {
        state.z_H.push_back(double(model.H_start[size_t(f)]));
        state.z_L.push_back(double(model.L_start[size_t(f)]));
      } else {
        state.z_H.push_back(double(s.H_std) * truncated_normal(uniform(word(in.rng, 0, element))));
        state.z_L.push_back(double(s.L_std) * truncated_normal(uniform(word(in.rng, 1, element))));
      }
    }
  return state;
}

void oracle_outer_step(const RandomModel& model, const cpu::StepInput& in, OracleState& state) {
  const Shape& s = model.shape;
  const int64_t S = s.tokens, d = s.features;
  const OracleState old = state;
  uint32_t stream = 2;
  const auto module = [&](const Matrix& z, const Matrix& injection) {
    Matrix u(z.size()), out(z.size());
    for (size_t i = 0; i < z.size(); ++i) u[i] = z[i] + injection[i];
    for (const BlockWeights& w : model.blocks) u = block(model, w, u);
    for (size_t i = 0; i < z.size(); ++i) {
      out[i] = (1.0 - double(s.lambda)) * z[i] + double(s.lambda) * u[i];
      if (in.noise_scale != 0.0f) out[i] += double(in.noise_scale) * normal(in.rng, stream, int64_t(i));
    }
    ++stream;
    return out;
  };
  for (int64_t h = 0; h < s.H_cycles; ++h) {
    for (int64_t l = 0; l < s.L_cycles; ++l) {
      Matrix injection = state.z_H;
      for (int64_t t = 0; t < S; ++t)
        for (int64_t f = 0; f < d; ++f)
          injection[size_t(t * d + f)] += std::sqrt(double(d)) * double(model.embedding[size_t(in.tokens[t] * d + f)]);
      state.z_L = module(state.z_L, injection);
    }
    state.z_H = module(state.z_H, state.z_L);
  }
  state.logits = linear(state.z_H, model.lm_head.data(), S, d, s.vocabulary);
  state.q_halt = double(model.q_bias[0]);
  for (int64_t f = 0; f < d; ++f) state.q_halt += state.z_H[size_t(f)] * double(model.q_weight[size_t(f)]);
  state.change_sq = state.size_sq = 0.0;
  for (size_t i = 0; i < state.z_H.size(); ++i) {
    state.change_sq += std::pow(state.z_H[i] - old.z_H[i], 2) + std::pow(state.z_L[i] - old.z_L[i], 2);
    state.size_sq += std::pow(state.z_H[i], 2) + std::pow(state.z_L[i], 2);
  }
}

}  // namespace eqr::test
