// The weights of a training step as the operands of its products, and the workers' gradients as those of the weights.
// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/training_layout.h"
#include "cpu/kernels/transpose.h"

namespace eqr::cpu::EQR_ISA {
namespace {

// The first `count` of kLanes values, zeros behind them.
EQR_INLINE Vec load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float some[kLanes] = {};
  if (count > 0) memcpy(some, from, size_t(4 * count));
  return load(some);
}

// rows [rows][stride], their padding zero: row(r) has `depth` values
template <class RowAt>
EQR_INLINE void put_rows(int64_t rows, int64_t depth, int64_t stride, uint16_t* out, const RowAt& row) {
  for (int64_t r = 0; r < rows; ++r, out += stride) {
    const float* from = row(r);
    for (int64_t k = 0; k < depth; ++k) out[k] = to_bf16(from[k]);
    memset(out + depth, 0, size_t(2 * (stride - depth)));
  }
}

// The same of columns: column(k) has `rows` values
template <class ColumnAt>
EQR_INLINE void put_transposed(int64_t rows, int64_t depth, int64_t stride, uint16_t* out, const ColumnAt& column) {
  for (int64_t k = 0; k < stride; k += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      UVec square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
        square[l] = bits<UVec>(k + l < depth ? load_some(column(k + l) + r, rows - r) : Vec{});
      transpose(square);
      const int64_t values = stride - k < kLanes ? stride - k : kLanes;
      for (int64_t i = 0; i < kLanes && r + i < rows; ++i) {
        uint16_t some[kLanes];
        store_bf16(some, bits<Vec>(square[i]));
        memcpy(out + (r + i) * stride + k, some, size_t(2 * values));
      }
    }
}

// Panels [panels][padded / 2][kPanel][2], with zeros from `columns` and from `depth` on: row(column) has `depth` values
template <class RowAt>
EQR_INLINE void put_panels(int64_t columns, int64_t depth, int64_t padded, uint16_t* out, const RowAt& row) {
  for (int64_t c = 0; c < round_up(columns, kPanel); c += kLanes)
    for (int64_t k = 0; k < padded; k += kPanel) {
      UVec square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        square[l] = UVec{};
        if (c + l >= columns) continue;
        const float* from = row(c + l) + k;
        uint16_t some[kPanel];
        store_bf16(some, load_some(from, depth - k), load_some(from + kLanes, depth - k - kLanes));
        memcpy(square + l, some, sizeof some);
      }
      transpose(square);
      uint16_t* to = out + (c / kPanel * padded + k) * kPanel + c % kPanel * 2;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) memcpy(to + i * 2 * kPanel, square + i, sizeof(UVec));
    }
}

// The same of rows of the summed axis: row(k) has `columns` values
template <class RowAt>
EQR_INLINE void put_panels_of_rows(int64_t columns, int64_t depth, int64_t padded, uint16_t* out, const RowAt& row) {
  for (int64_t c = 0; c < columns; c += kPanel)
    for (int64_t k = 0; k < padded; k += 2)
      for (int64_t j = 0; j < kPanel; j += kLanes, out += 2 * kLanes) {
        const auto half = [&](int64_t n) { return n < depth ? load_some(row(n) + c + j, columns - c - j) : Vec{}; };
        const UVec both = pair_bf16(half(k), half(k + 1));
        memcpy(out, &both, sizeof both);
      }
}

// Row of [gates | ups] that stands at a position where they lie side by side.
EQR_INLINE int64_t token_row(int64_t position, int64_t units) { return position % 2 * units + position / 2; }
EQR_INLINE int64_t channel_row(int64_t position, int64_t units) {
  const int64_t in_panel = position % kPanel, unit = position / kPanel * kLanes + in_panel % kLanes;
  return in_panel < kLanes ? unit : units + unit;
}

EQR_INLINE TrainedLayer layer_at(const TrainingSizes& z, Laying l, int64_t layer) {
  TrainedLayer w = lay_layer(z, l);
  for (int64_t i = 0; i < layer; ++i) w = lay_layer(z, l);
  return w;
}

void pack_heads(const TrainingSizes& z, const OperatorWeights& w, const TrainedHeads& h) {
  put_panels(z.V, z.d, z.width, h.lm_head, [&](int64_t v) { return w.lm_head + v * z.d; });
  const float scale = float(sqrt(double(z.d)));
  for (int64_t f = 0; f < z.width; ++f) {
    for (int64_t v = 0; v < z.V; ++v) {
      h.lm_rows[v * z.width + f] = f < z.d ? round_bf16(w.lm_head[v * z.d + f]) : 0.0f;
      h.embedding[v * z.width + f] = f < z.d ? scale * round_bf16(w.embedding[v * z.d + f]) : 0.0f;
    }
    h.q_weight[f] = f < z.d ? round_bf16(w.q_weight[f]) : 0.0f;
  }
  *h.q_bias = round_bf16(w.q_bias[0]);
}

void pack_part(const TrainingSizes& z, const BlockWeights& w, int64_t part, const TrainedLayer& to) {
  const int64_t S = z.S, d = z.d, k = z.k, token_k = z.token_k;
  const auto token_in = [&](int64_t r) { return w.mixer_in + token_row(r, token_k) * S; };
  const auto token_out = [&](int64_t t) { return w.mixer_out + t * token_k; };
  const auto gate_up = [&](int64_t n) { return w.gate_up + channel_row(n, k) * d; };
  const auto down = [&](int64_t f) { return w.down + f * k; };
  switch (part) {
    case 0:
      put_rows(2 * token_k, S, z.rows, to.token_in, token_in);
      return put_transposed(S, 2 * token_k, z.token_in, to.token_in_t, token_in);
    case 1:
      put_rows(S, token_k, z.token_out, to.token_out, token_out);
      return put_transposed(token_k, S, z.rows, to.token_out_t, token_out);
    case 2:
      put_panels(2 * k, d, z.width, to.gate_up, gate_up);
      return put_panels_of_rows(d, 2 * k, 2 * k, to.gate_up_t, gate_up);
    default: put_panels(d, k, k, to.down, down); return put_panels_of_rows(k, d, z.width, to.down_t, down);
  }
}

// out [rows][columns] <- the workers' sum of what lies at from(worker, row)[column * stride]
template <class From>
EQR_INLINE float* gather(int64_t rows, int64_t columns, int64_t stride, int64_t workers, float* out, const From& from) {
  for (int64_t r = 0; r < rows; ++r, out += columns)
    for (int64_t i = 0; i < workers; ++i) {
      const float* given = from(i, r);
      for (int64_t c = 0; c < columns; ++c) out[c] = (i ? out[c] : 0.0f) + given[c * stride];
    }
  return out;
}

// Where a column of panels of `rows` rows begins; its rows lie kPanel apart.
EQR_INLINE int64_t column_at(int64_t column, int64_t rows) { return column / kPanel * rows * kPanel + column % kPanel; }

void head_gradients(const TrainingSizes& z, void* const* workspaces, int64_t workers, float* out) {
  const auto heads = [&](int64_t i) {
    Laying l = {static_cast<char*>(workspaces[i]), 0};
    return lay_head_gradients(z, l);
  };
  const float scale = float(sqrt(double(z.d)));
  float* embedding = out;
  out = gather(z.V, z.d, 1, workers, out, [&](int64_t i, int64_t v) { return heads(i).embedding + v * z.width; });
  for (float* e = embedding; e < out; ++e) *e *= scale;
  out = gather(z.V, z.d, 1, workers, out, [&](int64_t i, int64_t v) { return heads(i).lm_head + v * z.width; });
  out = gather(1, z.d, 1, workers, out, [&](int64_t i, int64_t) { return heads(i).q_weight; });
  // The second row of the halting head decides nothing.
  for (int64_t f = 0; f < z.d; ++f) *out++ = 0.0f;
  out = gather(1, 1, 1, workers, out, [&](int64_t i, int64_t) { return heads(i).q_bias; });
  *out = 0.0f;
}

}  // namespace

int64_t training_packed_bytes(const Shape& shape) {
  const TrainingSizes z = training_sizes(shape);
  Laying l = {nullptr, 0};
  lay_heads(z, l);
  for (int64_t i = 0; i < z.layers; ++i) lay_layer(z, l);
  return l.bytes;
}

void training_pack(const Shape& shape, const OperatorWeights& w, int64_t part, void* packed) {
  const TrainingSizes z = training_sizes(shape);
  Laying l = {static_cast<char*>(packed), 0};
  const TrainedHeads heads = lay_heads(z, l);
  const int64_t layer = part / kTrainingParts;
  if (layer == z.layers) return pack_heads(z, w, heads);
  pack_part(z, w.blocks[layer], part % kTrainingParts, layer_at(z, l, layer));
}

void training_gradients(const Shape& shape, void* const* workspaces, int64_t workers, int64_t part, float* out) {
  const TrainingSizes z = training_sizes(shape);
  const int64_t layer = part / kTrainingParts, S = z.S, d = z.d, k = z.k, token_k = z.token_k;
  if (layer == z.layers) return head_gradients(z, workspaces, workers, out);
  out += 2 * z.V * d + 2 * d + 2 + layer * 3 * (token_k * S + k * d);
  const auto of = [&](int64_t i) {
    Laying l = {static_cast<char*>(workspaces[i]), 0};
    lay_head_gradients(z, l);
    Gradients g = lay_gradients(z, l);
    for (int64_t j = 0; j < layer; ++j) g = lay_gradients(z, l);
    return g;
  };
  switch (part % kTrainingParts) {
    case 0:
      gather(2 * token_k, S, kPanel, workers, out, [&](int64_t i, int64_t r) {
        return of(i).token_in + column_at(channel_column(r % token_k, r >= token_k), S);
      });
      return;
    case 1:
      for (int64_t u = 0; u < token_k; ++u) {
        const int64_t at = column_at(channel_column(u / 2, u % 2), S);
        float* to = out + 2 * token_k * S + u;
        for (int64_t t = 0; t < S; ++t) {
          float sum = 0.0f;
          for (int64_t i = 0; i < workers; ++i) sum += of(i).token_out[at + t * kPanel];
          to[t * token_k] = sum;
        }
      }
      return;
    case 2:
      gather(2 * k, d, kPanel, workers, out + 3 * token_k * S,
             [&](int64_t i, int64_t r) { return of(i).gate_up + column_at(channel_column(r % k, r >= k), z.width); });
      return;
    default:
      out += 3 * token_k * S + 2 * k * d;
      for (int64_t f = 0; f < d; ++f)
        for (int64_t u = 0; u < k; u += kPanel)
          out = gather(1, kPanel, 1, workers, out,
                       [&](int64_t i, int64_t) { return of(i).down + column_at(u, z.width) + f * kPanel; });
  }
}

}  // namespace eqr::cpu::EQR_ISA
