// Token mixing by attention. Scores exist for a tile of queries and a chunk of keys at a time; sums are rescaled when a
// chunk raises a row's maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
// All of it in fp32 but for the projections. Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/mixers.h"

namespace eqr::cpu::EQR_ISA {
namespace {

constexpr int64_t kChunkPanels = 8;
constexpr int64_t kChunk = kChunkPanels * kPanel;  // keys
constexpr int64_t kGroupTiles = 8;                 // of queries, that a thread takes at a time
constexpr float kMasked = -1e30f;

template <Precision kPrecision>
void project_qkv(Context& c, const PackedLayer& layer) {
  typedef typename Ops<kPrecision>::Channel Op;
  const Sizes& z = c.z;
  const Rows<Op> x = rows_of<kPrecision>(c, c.w.x, z.x_stride, z.width);
  const int64_t panels = (3 * z.d + kPanel - 1) / kPanel;
  const PanelMatrix<Op> matrix = panel_matrix<Op>(c.packed, layer.mixer_in, panels, z.width);
  product(c, x, matrix, panels, [&](int64_t p, int64_t first, int64_t count, const typename Op::Acc* sums) {
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
  const float scale = 0x1.715476p0f / sqrtf(float(z.head_dim));  // 1 / ln 2: the softmax is taken in powers of two
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

// Softmax sums of a tile of queries, so far.
struct Sums {
  float most[kTileRows], weight[kTileRows];  // largest score, and the sum of the powers relative to it
};

// Takes in one chunk of keys: q [rows][head_dim], total [rows][head_width].
void take_chunk(const Context& c, int64_t head, int64_t first_panel, const float* q, int64_t rows, Sums* sums,
                float* total) {
  const Sizes& z = c.z;
  const int64_t left = z.key_panels - first_panel, panels = left < kChunkPanels ? left : kChunkPanels;
  const int64_t key = first_panel * kPanel, keys = z.S - key < kChunk ? z.S - key : kChunk;
  Vec scores[kTileRows * kChunk / kLanes];
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = c.w.keys + (head * z.key_panels + first_panel + p) * z.head_dim * kPanel;
    tile_of<F32, 2, false>(rows, q, z.head_dim, panel, kPanel, z.head_dim, scores + 2 * p, kChunk / kLanes,
                           reinterpret_cast<const char*>(panel + z.head_dim * kPanel));
  }
  for (int64_t i = 0; i < rows; ++i) {
    Vec* row = scores + i * kChunk / kLanes;
    for (int64_t k = keys; k < panels * kPanel; ++k) row[k / kLanes][k % kLanes] = kMasked;
    // Two chains each: one alone would wait for itself.
    Vec top[2] = {splat(sums->most[i]), splat(sums->most[i])}, part[2] = {Vec{}, Vec{}};
    for (int64_t p = 0; p < panels; ++p)
      for (int j = 0; j < 2; ++j) top[j] = maximum(row[2 * p + j], top[j]);
    const float raised = largest(maximum(top[0], top[1]));
    for (int64_t p = 0; p < panels; ++p)
      for (int j = 0; j < 2; ++j) part[j] += row[2 * p + j] = power_of_two(row[2 * p + j] - splat(raised));
    const Vec rescale = power_of_two(splat(sums->most[i] - raised));
    sums->weight[i] = sums->weight[i] * rescale[0] + sum(part[0] + part[1]);
    sums->most[i] = raised;
    for (int64_t f = 0; f < z.head_width; f += kLanes)
      store(total + i * z.head_width + f, load(total + i * z.head_width + f) * rescale);
  }
  const float* weights = reinterpret_cast<const float*>(scores);
  const float* values = c.w.values + (head * z.S + key) * z.head_width;
  Vec added[kTileRows * 2];
  for (int64_t f = 0; f < z.head_width;) {
    const char* near = reinterpret_cast<const char*>(values + f);
    const int64_t columns = z.head_width - f >= kPanel ? 2 : 1;
    if (columns == 2)
      tile_of<F32, 2, false>(rows, weights, kChunk, values + f, z.head_width, keys, added, columns, near);
    else
      tile_of<F32, 1, false>(rows, weights, kChunk, values + f, z.head_width, keys, added, columns, near);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float* to = total + i * z.head_width + f + j * kLanes;
        store(to, load(to) + added[i * columns + j]);
      }
    f += columns * kLanes;
  }
}

// Tiles [begin, end) of a head's queries, at most kGroupTiles, into rows of x. A chunk of keys serves all of them while
// it is in the first-level cache.
template <Precision kPrecision>
void attend(const Context& c, int64_t head, const Parts& tiles, int64_t begin, int64_t end) {
  const Sizes& z = c.z;
  Sums sums[kGroupTiles];
  const int64_t rows = tiles.begin(end) - tiles.begin(begin), first_row = head * z.S + tiles.begin(begin);
  float* totals = reinterpret_cast<float*>(c.w.h) + first_row * z.head_width;  // [rows][head_width]
  memset(totals, 0, size_t(4 * rows * z.head_width));
  for (Sums& s : sums)
    for (int i = 0; i < kTileRows; ++i) s.most[i] = kMasked, s.weight[i] = 0.0f;
  for (int64_t p = 0; p < z.key_panels; p += kChunkPanels)
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = head * z.S + tiles.begin(t);
      take_chunk(c, head, p, c.w.q + row * z.head_dim, tiles.begin(t + 1) - tiles.begin(t), sums + t - begin,
                 totals + (row - first_row) * z.head_width);
    }
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = tiles.begin(t); i < tiles.begin(t + 1); ++i) {
      const float weight = sums[t - begin].weight[i - tiles.begin(t)];
      const float* from = totals + (i - tiles.begin(begin)) * z.head_width;
      const int64_t index = i * z.x_stride + head * z.head_dim;
      if (z.head_dim % kLanes == 0)
        for (int64_t f = 0; f < z.head_dim; f += kLanes)
          put_operand<kPrecision>(c.w.x, index + f, load(from + f) / splat(weight));
      else
        for (int64_t f = 0; f < z.head_dim; ++f) put_operand<kPrecision>(c.w.x, index + f, from[f] / weight);
    }
}

}  // namespace

template <Precision kPrecision>
void attention(Context& c, const PackedLayer& layer) {
  const Sizes& z = c.z;
  project_qkv<kPrecision>(c, layer);
  c.m.sync();
  split_heads(c);
  c.m.sync();
  const Parts tiles = parts_of(z.S, kTileRows), groups = parts_of(tiles.parts, kGroupTiles);
  c.share.each(z.heads * groups.parts, [&](int64_t item) {
    const int64_t group = item % groups.parts;
    attend<kPrecision>(c, item / groups.parts, tiles, groups.begin(group), groups.begin(group + 1));
  });
  c.m.sync();
  add_product<kPrecision>(c, rows_of<kPrecision>(c, c.w.x, z.x_stride, z.width), layer.mixer_out, z.width);
  c.m.sync();
}

template void attention<Precision::fp32>(Context&, const PackedLayer&);
template void attention<Precision::bf16>(Context&, const PackedLayer&);
template void attention<Precision::int8>(Context&, const PackedLayer&);

}  // namespace eqr::cpu::EQR_ISA
