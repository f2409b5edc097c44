// The order in which a CTA goes through the packed weights of a module: for every layer the token mixer's tiles, once a
// pass, then the channel mixer's.
#pragma once

#include "cuda/throughput.h"

namespace eqr::cuda {

// kUnits hidden units a chunk. kAhead: the first product of a chunk comes before the second one of the chunk before.
template <int D, int kUnits, bool kAhead>
struct Stream {
  static constexpr int kGateUp = kUnits / 8, kDown = kUnits / 16;  // tiles of a chunk, of 32 D bytes each
  static constexpr int kSlab = D / kGateUp;
  static constexpr Order kOrder = {kUnits, kSlab, true};

  const Problem& p;
  int passes;  // of the token mixer
  int layer = 0, i = 0;

  EQR_DEVICE int mixer_tiles() const { return int(p.shape.mixer_hidden) / kTokenUnits; }
  EQR_DEVICE int chunks() const { return int(p.shape.hidden) / kUnits; }
  EQR_DEVICE int layer_tiles() const { return passes * mixer_tiles() + chunks() * (kGateUp + kDown); }

  // The next tile, and its bytes. Starts anew after the last layer.
  EQR_DEVICE const char* next(int* bytes) {
    const char* base = p.packed + layer * p.layout.layer_bytes;
    const int in_layer = i, in_channel = i - passes * mixer_tiles();
    if (++i == layer_tiles()) {
      i = 0;
      layer = layer + 1 == p.shape.layers ? 0 : layer + 1;
    }
    *bytes = in_channel < 0 ? kTokenTileBytes : 32 * D;
    return base + (in_channel < 0 ? int64_t{in_layer % mixer_tiles()} * kTokenTileBytes : channel_tile(in_channel));
  }

 private:
  EQR_DEVICE int64_t channel_tile(int at) const {
    constexpr int kBoth = kGateUp + kDown;
    int chunk = at / kBoth, in = at % kBoth, ahead = 0;
    if (kAhead) {
      if (at < kGateUp) return p.layout.gate_up + int64_t{at} * 32 * D;
      chunk = (at - kGateUp) / kBoth, in = (at - kGateUp) % kBoth, ahead = 1;
      if (chunk + 1 == chunks()) in += kGateUp;
    }
    return in < kGateUp ? p.layout.gate_up + int64_t{(chunk + ahead) * kGateUp + in} * 32 * D
                        : p.layout.down + int64_t{chunk * kDown + in - kGateUp} * 32 * D;
  }
};

}  // namespace eqr::cuda
