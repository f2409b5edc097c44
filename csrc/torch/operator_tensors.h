// An operator's weights as the ops take them, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "common/operator.h"
#include "torch/checks.h"
#include "torch/operator_args.h"

namespace eqr {

// The arguments of pack_weights.
struct OperatorTensors {
  const torch::stable::Tensor& embedding;
  Shape shape;
  Precision precision;
  std::vector<BlockWeights> layers;
  OperatorWeights others;  // without `blocks`

  // Good as long as this is where it is.
  OperatorWeights weights() const {
    OperatorWeights all = others;
    all.blocks = layers.data();
    return all;
  }
};

// sizes and constants as in operator_args.h; all tensors float32 and where `embedding` is
inline OperatorTensors operator_tensors(
    const torch::stable::Tensor& embedding, const torch::stable::Tensor& lm_head, const torch::stable::Tensor& q_weight,
    const torch::stable::Tensor& q_bias, const std::vector<torch::stable::Tensor>& blocks,
    const std::optional<torch::stable::Tensor>& rope_cos, const std::optional<torch::stable::Tensor>& rope_sin,
    const std::optional<torch::stable::Tensor>& H_start, const std::optional<torch::stable::Tensor>& L_start,
    const std::vector<int64_t>& sizes, const std::vector<double>& constants, Precision precision) {
  OperatorTensors out{.embedding = embedding,
                      .shape = shape_of(sizes, constants, bool(H_start)),
                      .precision = precision,
                      .layers = {},
                      .others = {}};
  const Shape& s = out.shape;
  const int64_t S = s.tokens, d = s.features, V = s.vocabulary;
  const Place place = place_of(embedding);
  const auto data = [&](const std::string& name, const torch::stable::Tensor& t, const std::vector<int64_t>& expected) {
    check_tensor(name, t, torch::headeronly::ScalarType::Float, expected, place);
    return t.const_data_ptr<float>();
  };
  const auto pair = [&](const char* name, const std::optional<torch::stable::Tensor>& t,
                        const std::optional<torch::stable::Tensor>& twin, const std::vector<int64_t>& expected) {
    if (bool(t) != bool(twin)) fail(name, " must come with its twin (rope_cos and rope_sin, H_start and L_start)");
    return t ? data(name, *t, expected) : nullptr;
  };
  if (int64_t(blocks.size()) != 4 * s.layers)
    fail("blocks must be 4 tensors (mixer_in, mixer_out, gate_up, down) for each of the ", s.layers, " layers, got ",
         blocks.size());
  if (bool(rope_cos) != bool(s.rope_parts))
    fail("rope_cos and rope_sin must be given where rope_parts is not 0, and only there, got rope_parts ",
         s.rope_parts);
  const std::vector<int64_t> mixer_in = s.heads ? std::vector{3 * d, d} : std::vector{2 * s.mixer_hidden, S};
  const std::vector<int64_t> mixer_out = s.heads ? std::vector{d, d} : std::vector{S, s.mixer_hidden};
  for (int64_t i = 0; i < s.layers; ++i) {
    const auto part = [&](int64_t k, const std::vector<int64_t>& expected) {
      return data("blocks[" + std::to_string(4 * i + k) + "]", blocks[size_t(4 * i + k)], expected);
    };
    out.layers.push_back({.mixer_in = part(0, mixer_in),
                          .mixer_out = part(1, mixer_out),
                          .gate_up = part(2, {2 * s.hidden, d}),
                          .down = part(3, {d, s.hidden})});
  }
  const std::vector<int64_t> angles = {S, s.heads ? d / s.heads : 0};
  out.others = {
      .embedding = data("embedding", embedding, {V, d}),
      .lm_head = data("lm_head", lm_head, {V, d}),
      .q_weight = data("q_weight", q_weight, {2, d}),
      .q_bias = data("q_bias", q_bias, {2}),
      .blocks = nullptr,
      .cos = pair("rope_cos", rope_cos, rope_sin, angles),
      .sin = pair("rope_sin", rope_sin, rope_cos, angles),
      .H_start = pair("H_start", H_start, L_start, {d}),
      .L_start = pair("L_start", L_start, H_start, {d}),
  };
  return out;
}

}  // namespace eqr
