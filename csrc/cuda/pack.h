// Packs weights as packed.h lays them out, one element after another: `first` and `step` are the caller's share.
#pragma once

#include "cuda/packed.h"
#include "cuda/throughput.h"

namespace eqr::cuda {

struct Pack {
  Shape shape;
  Order order;
  Layout layout;
  OperatorWeights weights;  // of the device, but `blocks`, which is not read
  BlockWeights block;       // of the layer
  char* packed;
};

template <class Be>
EQR_DEVICE uint16_t rounded(const float* matrix, int64_t columns, const Source& from) {
  return from.row < 0 ? uint16_t{0} : uint16_t(Be::pack_bf16(matrix[from.row * columns + from.column], 0.0f));
}

template <class Be>
EQR_DEVICE void pack_layer(const Pack& a, int64_t layer, int64_t first, int64_t step) {
  const Shape& s = a.shape;
  char* const base = a.packed + layer * a.layout.layer_bytes;
  uint16_t* out = reinterpret_cast<uint16_t*>(base + a.layout.mixer);
  for (int64_t i = first; i < (a.layout.gate_up - a.layout.mixer) / 2; i += step) {
    bool is_out;
    const Source from = mixer_source(s, i, &is_out);
    out[i] =
        is_out ? rounded<Be>(a.block.mixer_out, s.mixer_hidden, from) : rounded<Be>(a.block.mixer_in, s.tokens, from);
  }
  out = reinterpret_cast<uint16_t*>(base + a.layout.gate_up);
  for (int64_t i = first; i < 2 * s.hidden * s.features; i += step)
    out[i] = rounded<Be>(a.block.gate_up, s.features, gate_up_source(s, a.order, i));
  out = reinterpret_cast<uint16_t*>(base + a.layout.down);
  for (int64_t i = first; i < s.hidden * s.features; i += step)
    out[i] = rounded<Be>(a.block.down, s.hidden, down_source(s, a.order, i));
}

// What is not of a layer: heads, injection (sqrt(d) times the embedding, in fp32), fixed start states, bias of q_halt.
template <class Be>
EQR_DEVICE void pack_rest(const Pack& a, int64_t first, int64_t step) {
  const Shape& s = a.shape;
  uint16_t* heads = reinterpret_cast<uint16_t*>(a.packed + a.layout.heads);
  for (int64_t i = first; i < int64_t{head_rows(s)} * s.features; i += step) {
    const Source from = head_source(s, i);
    heads[i] = from.row == s.vocabulary ? rounded<Be>(a.weights.q_weight, s.features, {0, from.column})
                                        : rounded<Be>(a.weights.lm_head, s.features, from);
  }
  float* injection = reinterpret_cast<float*>(a.packed + a.layout.injection);
  const float scale = Be::sqrt(float(s.features));
  for (int64_t i = first; i < s.vocabulary * s.features; i += step) injection[i] = scale * a.weights.embedding[i];
  float* starts = reinterpret_cast<float*>(a.packed + a.layout.starts);
  for (int64_t i = first; s.fixed_start && i < s.features; i += step) {
    starts[i] = a.weights.H_start[i];
    starts[s.features + i] = a.weights.L_start[i];
  }
  if (first == 0) *reinterpret_cast<float*>(a.packed + a.layout.q_bias) = *a.weights.q_bias;
}

}  // namespace eqr::cuda
