// Token mixing by attention. Scores exist for a tile of queries and a chunk of keys at a time; sums are rescaled when a
// chunk raises a row's maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
// All of it in fp32 but for the projections. Built once per instruction set, with EQR_ISA naming the namespace.
#include "mixers.h"

namespace eqr::cpu::EQR_ISA {
namespace {

constexpr int64_t kChunkPanels = 8;
constexpr int64_t kChunk = kChunkPanels * kPanel;  // keys
constexpr float kMasked = -1e30f;

template <Precision kPrecision>
void project_qkv(const Context& c, const PackedLayer& layer) {
  typedef typename Ops<kPrecision>::Channel Op;
  const Sizes& z = c.z;
  const Rows<Op> x = rows_of<kPrecision>(c, c.w.x, z.x_stride, z.width);
  const int64_t panels = (3 * z.d + kPanel - 1) / kPanel;
  const PanelMatrix<Op> matrix = panel_matrix<Op>(c.packed, layer.mixer_in, panels, z.width);
  for (int64_t p = c.m.begin(panels); p < c.m.end(panels); ++p)
    panel_product<Op, false>(x.a, x.stride, z.S, matrix.panel(p), matrix.steps, matrix.panel(p + 1),
                             [&](int64_t first, int64_t count, const typename Op::Acc* sums) {
                               for (int64_t i = 0; i < count; ++i)
                                 for (int j = 0; j < 2; ++j)
                                   store(c.w.qkv + ((first + i) * panels + p) * kPanel + j * kLanes,
                                         value_of(sums[2 * i + j], matrix, x, first + i, p, j));
                             });
}

// Rotate-half within each of `parts` equal parts of a head, times `scale`: from, cos, sin [head_dim] -> to, whose
// elements lie `stride` apart.
EQR_INLINE void rotate(const float* from, const float* cos, const float* sin, int64_t head_dim, int64_t parts,
                       float scale, float* to, int64_t stride) {
  if (!parts) {
    for (int64_t f = 0; f < head_dim; ++f) to[f * stride] = scale * from[f];
    return;
  }
  const int64_t half = head_dim / parts / 2;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 2 * part * half; i < (2 * part + 1) * half; ++i) {
      to[i * stride] = scale * (from[i] * cos[i] - from[i + half] * sin[i]);
      to[(i + half) * stride] = scale * (from[i + half] * cos[i + half] + from[i] * sin[i + half]);
    }
}

// The own tokens' queries, keys and values in the order in which attend reads them.
void split_heads(const Context& c) {
  const Sizes& z = c.z;
  const Shape& s = c.packed->shape;
  const int64_t stride = round_up(3 * z.d, kPanel);
  const float scale = 1.0f / sqrtf(float(z.head_dim));
  const float *cos = at<float>(c.packed, c.packed->cos), *sin = at<float>(c.packed, c.packed->sin);
  for (int64_t t = c.m.begin(z.S); t < c.m.end(z.S); ++t)
    for (int64_t head = 0; head < z.heads; ++head) {
      const float* q = c.w.qkv + t * stride + head * z.head_dim;
      const int64_t angle = t * z.head_dim;
      rotate(q, cos + angle, sin + angle, z.head_dim, s.rope_parts, scale, c.w.q + (head * z.S + t) * z.head_dim, 1);
      float* key = c.w.keys + (head * z.key_panels + t / kPanel) * z.head_dim * kPanel + t % kPanel;
      rotate(q + z.d, cos + angle, sin + angle, z.head_dim, s.rope_parts, 1.0f, key, kPanel);
      memcpy(c.w.values + (head * z.S + t) * z.head_width, q + 2 * z.d, size_t(4 * z.head_dim));
    }
}

// The queries of one tile: `rows` tokens of a head from `first` on, into rows of x.
template <Precision kPrecision>
void attend(const Context& c, int64_t head, int64_t first, int64_t rows) {
  const Sizes& z = c.z;
  const float* q = c.w.q + (head * z.S + first) * z.head_dim;
  float* total = reinterpret_cast<float*>(c.w.h) + (head * z.S + first) * z.head_width;  // [rows][head_width]
  Vec scores[kTileRows * kChunk / kLanes];
  Vec sums[kTileRows * 2];
  float most[kTileRows], weight[kTileRows];
  for (int64_t i = 0; i < rows; ++i) most[i] = kMasked, weight[i] = 0.0f;
  memset(total, 0, size_t(4 * rows * z.head_width));
  for (int64_t p0 = 0; p0 < z.key_panels; p0 += kChunkPanels) {
    const int64_t panels = z.key_panels - p0 < kChunkPanels ? z.key_panels - p0 : kChunkPanels;
    const int64_t key0 = p0 * kPanel, keys = z.S - key0 < kChunk ? z.S - key0 : kChunk;
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = c.w.keys + (head * z.key_panels + p0 + p) * z.head_dim * kPanel;
      tile_of<F32, 2, false>(rows, q, z.head_dim, panel, kPanel, z.head_dim, scores + 2 * p, kChunk / kLanes,
                             reinterpret_cast<const char*>(panel + z.head_dim * kPanel));
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vec* row = scores + i * kChunk / kLanes;
      for (int64_t k = keys; k < panels * kPanel; ++k) row[k / kLanes][k % kLanes] = kMasked;
      Vec top = splat(most[i]);
      for (int64_t k = 0; k < 2 * panels; ++k) top = maximum(row[k], top);
      const float raised = largest(top);
      Vec part = Vec{};
      for (int64_t k = 0; k < 2 * panels; ++k) part += row[k] = exponential(row[k] - splat(raised));
      const Vec rescale = exponential(splat(most[i] - raised));
      weight[i] = weight[i] * rescale[0] + sum(part);
      most[i] = raised;
      for (int64_t f = 0; f < z.head_width; f += kLanes)
        store(total + i * z.head_width + f, load(total + i * z.head_width + f) * rescale);
    }
    const float* weights = reinterpret_cast<const float*>(scores);
    const float* values = c.w.values + (head * z.S + key0) * z.head_width;
    const char* near = reinterpret_cast<const char*>(values);
    for (int64_t f = 0; f < z.head_width;) {
      const int64_t columns = z.head_width - f >= kPanel ? 2 : 1;
      if (columns == 2)
        tile_of<F32, 2, false>(rows, weights, kChunk, values + f, z.head_width, keys, sums, columns, near);
      else
        tile_of<F32, 1, false>(rows, weights, kChunk, values + f, z.head_width, keys, sums, columns, near);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          float* to = total + i * z.head_width + f + j * kLanes;
          store(to, load(to) + sums[i * columns + j]);
        }
      f += columns * kLanes;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t index = (first + i) * z.x_stride + head * z.head_dim;
    const float* from = total + i * z.head_width;
    if (z.head_dim % kLanes == 0)
      for (int64_t f = 0; f < z.head_dim; f += kLanes)
        put_operand<kPrecision>(c.w.x, index + f, load(from + f) / splat(weight[i]));
    else
      for (int64_t f = 0; f < z.head_dim; ++f) put_operand<kPrecision>(c.w.x, index + f, from[f] / weight[i]);
  }
}

}  // namespace

template <Precision kPrecision>
void attention(const Context& c, const PackedLayer& layer) {
  const Sizes& z = c.z;
  project_qkv<kPrecision>(c, layer);
  c.m.sync();
  split_heads(c);
  c.m.sync();
  const Parts tiles = parts_of(z.S, kTileRows);
  const int64_t items = z.heads * tiles.parts;
  for (int64_t item = c.m.begin(items); item < c.m.end(items); ++item) {
    const int64_t t = item % tiles.parts;
    attend<kPrecision>(c, item / tiles.parts, tiles.begin(t), tiles.begin(t + 1) - tiles.begin(t));
  }
  c.m.sync();
  add_product<kPrecision>(c, rows_of<kPrecision>(c, c.w.x, z.x_stride, z.width), layer.mixer_out, z.width);
  c.m.sync();
}

template void attention<Precision::fp32>(const Context&, const PackedLayer&);
template void attention<Precision::bf16>(const Context&, const PackedLayer&);
template void attention<Precision::int8>(const Context&, const PackedLayer&);

}  // namespace eqr::cpu::EQR_ISA
