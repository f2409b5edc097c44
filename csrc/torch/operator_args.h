// The sizes, constants and precision of an operator as the ops take them, checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/operator.h"

namespace eqr {

inline Precision precision_of(const std::string& name) {
  std::string names;
  for (Precision precision : kPrecisions) {
    if (name == precision_name(precision)) return precision;
    names += (names.empty() ? "" : ", ") + std::string(precision_name(precision));
  }
  throw std::invalid_argument("precision must be one of " + names + ", got '" + name + "'");
}

// sizes: tokens, features, vocabulary, mixer_hidden, hidden, heads, layers, H_cycles, L_cycles, rope_parts;
// constants: lambda_, rms_norm_eps, H_init_std, L_init_std. Throws std::invalid_argument naming what is out of range.
inline Shape shape_of(const std::vector<int64_t>& sizes, const std::vector<double>& constants, bool fixed_start) {
  const auto need = [](bool good, const char* name, const char* allowed, auto got) {
    if (good) return;
    std::ostringstream message;
    message << name << " must be " << allowed << ", got " << got;
    throw std::invalid_argument(message.str());
  };
  need(sizes.size() == 10, "sizes",
       "10 integers (tokens, features, vocabulary, mixer_hidden, hidden, heads, layers, "
       "H_cycles, L_cycles, rope_parts)",
       sizes.size());
  need(constants.size() == 4, "constants", "4 numbers (lambda_, rms_norm_eps, H_init_std, L_init_std)",
       constants.size());
  const Shape s{.tokens = sizes[0],
                .features = sizes[1],
                .vocabulary = sizes[2],
                .mixer_hidden = sizes[3],
                .hidden = sizes[4],
                .heads = sizes[5],
                .layers = sizes[6],
                .H_cycles = sizes[7],
                .L_cycles = sizes[8],
                .rope_parts = sizes[9],
                .fixed_start = fixed_start,
                .lambda = float(constants[0]),
                .keep = float(1.0 - constants[0]),
                .norm_eps = float(constants[1]),
                .H_std = float(constants[2]),
                .L_std = float(constants[3])};
  constexpr int64_t kMost = 1 << 28;  // so that the bytes of a matrix fit in 64 bits
  const auto count = [&](const char* name, int64_t value, int64_t least) {
    need(value >= least && value <= kMost, name, least ? "in 1..2**28" : "in 0..2**28", value);
  };
  count("sizes[0] (tokens)", s.tokens, 1);
  count("sizes[1] (features)", s.features, 1);
  count("sizes[2] (vocabulary)", s.vocabulary, 1);
  count("sizes[3] (mixer_hidden)", s.mixer_hidden, 0);
  count("sizes[4] (hidden)", s.hidden, 1);
  count("sizes[5] (heads)", s.heads, 0);
  count("sizes[6] (layers)", s.layers, 1);
  count("sizes[7] (H_cycles)", s.H_cycles, 1);
  count("sizes[8] (L_cycles)", s.L_cycles, 1);
  need(s.H_cycles * (s.L_cycles + 1) <= 254, "H_cycles * (L_cycles + 1)", "at most 254 (one noise stream each)",
       s.H_cycles * (s.L_cycles + 1));
  need(s.tokens * s.features < int64_t{1} << 34, "tokens * features", "below 2**34 (a counter of the noise)",
       s.tokens * s.features);
  need(s.hidden % 256 == 0, "sizes[4] (hidden)", "a multiple of 256", s.hidden);
  need(s.mixer_hidden % 256 == 0, "sizes[3] (mixer_hidden)", "a multiple of 256", s.mixer_hidden);
  need((s.mixer_hidden == 0) != (s.heads == 0), "one of mixer_hidden (token SwiGLU) and heads (attention)",
       "0 and the other not", std::to_string(s.mixer_hidden) + " and " + std::to_string(s.heads));
  need(s.heads == 0 || s.features % s.heads == 0, "features", "a multiple of heads",
       std::to_string(s.features) + " and " + std::to_string(s.heads));
  need(s.rope_parts >= 0 && s.rope_parts <= 2, "sizes[9] (rope_parts)", "0, 1 or 2", s.rope_parts);
  need(s.rope_parts == 0 || (s.heads && s.features / s.heads % (2 * s.rope_parts) == 0), "features / heads",
       "a multiple of 2 * rope_parts", std::to_string(s.features) + " and " + std::to_string(s.heads));
  need(std::isfinite(s.lambda) && s.lambda > 0 && s.lambda <= 1, "constants[0] (lambda_)", "in (0, 1]", s.lambda);
  const char* const names[] = {"constants[1] (rms_norm_eps)", "constants[2] (H_init_std)", "constants[3] (L_init_std)"};
  for (int i = 0; i < 3; ++i)
    need(std::isfinite(float(constants[i + 1])) && constants[i + 1] >= 0, names[i], "finite in float32 and at least 0",
         constants[i + 1]);
  return s;
}

}  // namespace eqr
