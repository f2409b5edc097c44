// The weights in the order in which the kernels read them: one stream of tiles for each layer, whose copies into shared
// memory are plain and whose 8 x 8 parts ("cores", 128 contiguous bytes: 8 rows of 8 elements) are what ldmatrix and
// wgmma take without bank conflicts.
#pragma once

#include "common/operator.h"
#include "cuda/device.h"

namespace eqr::cuda {

// Tokens are padded to 88, a multiple of 8 for the n side of the tensor cores, and to 96, one of 16, for their k side.
constexpr int kTokens = 88, kTokensK = 96;
constexpr int kTiles = kTokens / 8, kTokenSteps = kTokensK / 16;
constexpr int kTokenUnits = 16;  // hidden units of a tile of the token mixer
constexpr int kMixerInBytes = kTokenSteps * 2 * 512, kMixerOutBytes = kTiles * 256;
constexpr int kTokenTileBytes = kMixerInBytes + kMixerOutBytes;

// How a kernel takes the channel mixer's weights.
//   A tile of gate_up holds the gate and up rows of `units` hidden units, times `slab` features. Of every 16 rows the
//   first 8 are gates and the others the same units' ups, so that a thread has both in its registers.
//   down by_unit: tiles of 16 hidden units for all features; else tiles of 16 features for all hidden units.
struct Order {
  int units, slab;
  bool by_unit;
};

// Byte offsets within the packed weights; every part at a multiple of 128.
struct Layout {
  int64_t mixer, gate_up, down;  // within a layer
  int64_t layer_bytes;
  int64_t heads, injection, starts, q_bias;  // behind the layers
  int64_t bytes;
};

// `bytes` rounded up, for what lies behind them.
EQR_HOST_DEVICE int64_t whole_lines(int64_t bytes) { return (bytes + 127) / 128 * 128; }

EQR_HOST_DEVICE int head_rows(const Shape& s) { return int((s.vocabulary + 1 + 15) / 16 * 16); }

EQR_HOST_DEVICE Layout layout_of(const Shape& s) {
  Layout l{};
  l.mixer = 0;
  l.gate_up = s.mixer_hidden / kTokenUnits * kTokenTileBytes;
  l.down = l.gate_up + 2 * s.hidden * s.features * 2;
  l.layer_bytes = l.down + s.hidden * s.features * 2;
  l.heads = s.layers * l.layer_bytes;
  l.injection = l.heads + int64_t{head_rows(s)} * s.features * 2;
  l.starts = l.injection + whole_lines(s.vocabulary * s.features * 4);
  l.q_bias = l.starts + 2 * s.features * 4;
  l.bytes = l.q_bias + 128;
  return l;
}

// Rows of `down`, by units: by tiles of 64 rows, a thread holds four features in a row, a pair from each of two tiles.
// Position 128 p + 64 i + 16 w + 8 h + g is feature 128 p + 32 w + 4 g + 2 i + h.
EQR_HOST_DEVICE int dealt(int row) {
  return row / 128 * 128 + row / 16 % 4 * 32 + row % 8 * 4 + row / 64 % 2 * 2 + row / 8 % 2;
}

// A place in a row-major tile of cores: `across` cores lie side by side along k.
struct Place {
  int row, k;
};

EQR_HOST_DEVICE Place place_in_cores(int64_t element, int across) {
  const int core = int(element / 64), in = int(element % 64);
  return {core / across * 8 + in / 8, core % across * 8 + in % 8};
}

// Each gives the source of element i of a part: row and column of the weight matrix; row < 0 is padding.
struct Source {
  int64_t row, column;
};

// mixer_in [2 k(S), S] and mixer_out [S, k(S)]. A tile holds mixer_in as B fragments of the tensor cores, a lane's gate
// and up pairs together, then mixer_out as such fragments.
EQR_HOST_DEVICE Source mixer_source(const Shape& s, int64_t i, bool* out) {
  const int64_t tile = i / (kTokenTileBytes / 2);
  int at = int(i % (kTokenTileBytes / 2));
  const int64_t first = tile * kTokenUnits;
  *out = at >= kMixerInBytes / 2;
  if (!*out) {
    const int step = at / 512, j = at / 256 % 2, lane = at / 8 % 32, up = at / 4 % 2, high = at / 2 % 2, odd = at % 2;
    const int64_t unit = first + 8 * j + lane / 4, token = 16 * step + 8 * high + lane % 4 * 2 + odd;
    return {token < s.tokens ? up * s.mixer_hidden + unit : -1, token};
  }
  at -= kMixerInBytes / 2;
  const int j = at / 128, lane = at / 4 % 32, high = at / 2 % 2, odd = at % 2;
  const int64_t token = 8 * j + lane / 4, unit = first + 8 * high + lane % 4 * 2 + odd;
  return {token < s.tokens ? token : -1, unit};
}

// gate_up [2 k, d], gate rows first
EQR_HOST_DEVICE Source gate_up_source(const Shape& s, const Order& o, int64_t i) {
  const int64_t tile_size = int64_t{2} * o.units * o.slab, slabs = s.features / o.slab;
  const int64_t tile = i / tile_size, chunk = tile / slabs, slab = tile % slabs;
  const Place p = place_in_cores(i % tile_size, o.slab / 8);
  const int64_t unit = chunk * o.units + p.row / 16 * 8 + p.row % 8, up = p.row / 8 % 2;
  return {up * s.hidden + unit, slab * o.slab + p.k};
}

// down [d, k]
EQR_HOST_DEVICE Source down_source(const Shape& s, const Order& o, int64_t i) {
  if (o.by_unit) {
    const int64_t tile_size = s.features * 16, tile = i / tile_size;
    const Place p = place_in_cores(i % tile_size, 2);
    return {dealt(p.row), tile * 16 + p.k};
  }
  const int64_t tile_size = s.hidden * 16, tile = i / tile_size;
  const Place p = place_in_cores(i % tile_size, int(s.hidden / 8));
  return {tile * 16 + p.row, p.k};
}

// lm_head [V, d], and as row V the first of q_weight [2, d]
EQR_HOST_DEVICE Source head_source(const Shape& s, int64_t i) {
  const Place p = place_in_cores(i, int(s.features / 8));
  return {p.row <= s.vocabulary ? p.row : -1, p.k};
}

}  // namespace eqr::cuda
