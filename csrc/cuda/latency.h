// The latency regime: the whole grid on one trajectory at a time, with a barrier of the grid behind every product.
//
// A CTA's warps share the sum of a product: each reads its part of the weights and of the states from the L2 cache
// straight into fragments, once, and what they come to is added up in shared memory. Token mixing, with all that is
// element by element, is done for 16 features at a time, always the same ones by a CTA; the channel mixer's products
// are cut into pieces of 16 hidden units, and of 16 features for some of the tokens.
#pragma once

#include "cuda/latency_scratch.h"
#include "cuda/token_mixer.h"
#include "cuda/trajectory.h"

namespace eqr::cuda {

template <class Be, int D>
struct Latency {
  static constexpr int kThreads = 256, kWarps = 8;
  static constexpr Order kOrder = {16, D, false};
  static constexpr int kFeatureParts = D / 16, kTokenParts = 4, kWide = (kTiles + kTokenParts - 1) / kTokenParts;

  struct Shared {
    alignas(128) char u[kTokensK * 16 * 2];  // bf16 [96, 16] in cores
    float partial[kWarps][32][kTokens];      // what each warp has of a product
    float scale[kTokens];
    float sums[kWarps][2];
  };

  const Problem& p;
  LatencyScratch<D> w = LatencyScratch<D>::of(p);
  Shared& shared = *reinterpret_cast<Shared*>(Be::shared());
  uint32_t passed = 0;  // arrivals of all barriers of the grid so far; kept by thread 0

  EQR_DEVICE void run() {
    for (int i = Be::thread() * 16; i < (kTokensK - kTokens) * 16 * 2; i += kThreads * 16)
      *reinterpret_cast<Words*>(shared.u + kTokens * 16 * 2 + i) = Words{};
    if (leads() && Be::thread() == 0) w.control().live = 0;
    for (;;) {
      if (leads()) ready();
      grid_sync();
      if (!w.control().live) break;
      if (p.parked) w.own = p.slots + w.control().number * p.slot_bytes;
      if (w.control().steps == 0) start();
      outer_step();
      if (leads()) advance();
    }
  }

 private:
  enum class Begin { inject, normalise, update };  // how the operand of a block comes about

  EQR_DEVICE static Lane lane() { return Lane::of<Be>(0); }
  EQR_DEVICE static bool leads() { return Be::cta() == 0; }
  EQR_DEVICE Trajectory<Be> trajectory() const { return {p, w.control(), w.changes()}; }

  EQR_DEVICE void grid_sync() {
    Be::sync();
    if (Be::thread() == 0) {
      passed += uint32_t(Be::ctas());
      Be::add_release(&p.counters->arrived, 1);
      while (int32_t(Be::load_acquire(&p.counters->arrived) - passed) < 0) Be::pause();
    }
    Be::sync();
  }

  // Goes on with the trajectory in flight, or takes the next one. By the CTA that leads.
  EQR_DEVICE void ready() const {
    Control& c = w.control();
    for (;;) {
      Be::sync();
      if (Be::thread() == 0) {
        Trajectory<Be> t = trajectory();
        c.ended = c.live && t.cancelled();
        if (c.ended) t.cancel();
      }
      Be::sync();
      if (!c.ended) break;
      record();
    }
    Be::sync();  // all have seen that nothing has ended, before `take` writes there
    if (Be::thread() == 0 && !c.live) c.live = trajectory().take();
  }

  EQR_DEVICE void advance() const {
    if (Be::thread() == 0) trajectory().advance(w.step_sums(int(p.shape.tokens)));
    Be::sync();
    record();
  }

  EQR_DEVICE void record() const {
    Control& c = w.control();
    trajectory().record(Be::thread(), kThreads, w.logits(c.logits));
    Be::sync();
    if (Be::thread() == 0 && c.leaves) trajectory().leave();
    Be::sync();
  }

  template <class Visit>
  EQR_DEVICE static void for_each_part(int parts, Visit visit) {
    for (int part = Be::cta(); part < parts; part += Be::ctas()) visit(part);
  }

  // Calls visit(token, feature, index) for every four of a part's 16 features; a thread always has the same ones.
  template <class Visit>
  EQR_DEVICE static void for_each_quad(int part, Visit visit) {
    for (int i = Be::thread(); i < kTokens * 4; i += kThreads)
      visit(i / 4, part * 16 + i % 4 * 4, part * kTokens * 4 + i);
  }

  EQR_DEVICE void start() const {
    const Elements<Be, D> of = Elements<Be, D>::of(p, w.control());
    const RngRow of_H = of.rng(kStreamH), of_L = of.rng(kStreamL);
    for_each_part(kFeatureParts, [&](int part) {
      for_each_quad(part, [&](int token, int feature, int index) {
        w.z_H(0)[index] = of.real(token) ? of.start(of_H, true, token, feature) : Quad{};
        w.z_L(0)[index] = of.real(token) ? of.start(of_L, false, token, feature) : Quad{};
      });
    });
    if (leads())
      for (int i = Be::thread(); i < p.shape.tokens * p.shape.vocabulary; i += kThreads) w.logits(0)[i] = 0;
  }

  EQR_DEVICE void outer_step() {
    const int updates = int(p.shape.H_cycles * (p.shape.L_cycles + 1));
    for (int number = 0; number < updates; ++number)
      for (int layer = 0; layer < p.shape.layers; ++layer) {
        const Begin begin = layer ? Begin::normalise : number ? Begin::update : Begin::inject;
        for_each_part(kFeatureParts, [&](int part) {
          make_operand(part, begin, number - 1);
          mix_features(part, layer);
        });
        grid_sync();
        for_each_part(int(p.shape.hidden) / 16, [&](int part) { multiply_up(part, layer); });
        grid_sync();
        for_each_part(kFeatureParts * kTokenParts,
                      [&](int part) { multiply_down(part / kTokenParts, part % kTokenParts * kWide, layer); });
        grid_sync();
      }
    for_each_part(kFeatureParts, [&](int part) { make_operand(part, Begin::update, updates - 1); });
    grid_sync();
    for_each_part(kTiles, [&](int tile) { heads(tile); });
    grid_sync();
  }

  // The operand of a part's 16 features, in shared memory; after a step's last update in global memory, for the heads.
  EQR_DEVICE void make_operand(int part, Begin begin, int number) const {
    const Elements<Be, D> of = Elements<Be, D>::of(p, w.control());
    if (begin != Begin::inject) {
      if (const int token = Be::thread(); token < kTokens) {
        float squares = 0;
        for (int i = 0; i < kFeatureParts; ++i) squares += w.squares()[i * kTokens + token];
        shared.scale[token] = Be::rsqrt(squares / float(D) + p.shape.norm_eps);
      }
      Be::sync();
    }
    const Update step = begin == Begin::update ? Update::of(p.shape, number, of.steps) : Update{};
    const RngRow row = of.rng(kFirstUpdate + uint32_t(number));
    float change_sq = 0, size_sq = 0;
    for_each_quad(part, [&](int token, int feature, int index) {
      Quad u = {};
      if (!of.real(token)) {
      } else if (begin == Begin::inject) {
        const int now = int(of.steps & 1);
        u = of.injected(w.z_L(now)[index], w.z_H(now)[index], true, token, feature);
      } else {
        u = w.v()[index];
        EQR_UNROLL
        for (int i = 0; i < 4; ++i) u.v[i] *= shared.scale[token];
        if (begin == Begin::update) u = update(of, row, step, u, token, feature, index, change_sq, size_sq);
      }
      char* const to = step.last ? w.operand() + operand_at<D>(token / 8, token % 8, feature / 8, feature % 8)
                                 : shared.u + operand_at<16>(token / 8, token % 8, feature / 8 % 2, feature % 8);
      *reinterpret_cast<Two*>(to) = pack<Be>(u);
    });
    if (step.measure) {
      const Lane l = lane();
      change_sq = sum_places<Be>(sum_groups<Be>(change_sq));
      size_sq = sum_places<Be>(sum_groups<Be>(size_sq));
      if (l.lane == 0) shared.sums[l.warp][0] = change_sq, shared.sums[l.warp][1] = size_sq;
    }
    Be::sync();
    if (step.measure && Be::thread() < 2) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp][Be::thread()];
      w.sums()[(part * 2 + step.is_H) * 2 + Be::thread()] = sum;
    }
  }

  EQR_DEVICE Quad update(const Elements<Be, D>& of, const RngRow& row, const Update& step, const Quad& u, int token,
                         int feature, int index, float& change_sq, float& size_sq) const {
    const Quad* from = step.is_H ? w.z_H(step.from) : w.z_L(step.from);
    const Quad* old = step.is_H ? w.z_H(step.old) : w.z_L(step.old);
    const Quad* other = step.is_H ? w.z_L(step.other) : w.z_H(step.other);
    Quad* to = step.is_H ? w.z_H(step.to) : w.z_L(step.to);
    const Quad z = of.damped(row, from[index], u, token, feature);
    if (step.measure) measure(z, old[index], change_sq, size_sq);
    to[index] = z;
    return step.last ? z : of.injected(z, other[index], !step.next_is_H, token, feature);
  }

  // Adds what each warp has: element (row, token) of the product.
  EQR_DEVICE float total(int row, int token) const {
    float sum = 0;
    EQR_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.partial[warp][row][token];
    return sum;
  }

  // A fragment of 16 rows and 8 tokens, for `total`.
  EQR_DEVICE void put_partial(const Lane& l, int row, int token, const float (&c)[4]) const {
    EQR_UNROLL
    for (int i = 0; i < 4; ++i) shared.partial[l.warp][row + l.group + i / 2 * 8][token + l.place * 2 + i % 2] = c[i];
  }

  // The token mixer's half of a block for 16 features: the warps share the hidden units.
  EQR_DEVICE void mix_features(int part, int layer) const {
    const Lane l = lane();
    uint32_t u[1][kTokenSteps][4];
    EQR_UNROLL
    for (int k = 0; k < kTokenSteps; ++k) {
      const int matrix = l.lane / 8;
      Be::load_matrices_transposed(u[0][k], shared.u + operand_at<16>(2 * k + matrix / 2, l.lane % 8, matrix % 2, 0));
    }
    const char* tiles = p.packed + layer * p.layout.layer_bytes + p.layout.mixer;
    float y[1][kTiles][4] = {};
    for (int tile = int(l.warp); tile < p.shape.mixer_hidden / kTokenUnits; tile += kWarps)
      mix_tokens<Be, 1>(l, tiles + int64_t{tile} * kTokenTileBytes, u, y);
    EQR_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) put_partial(l, 0, tile * 8, y[0][tile]);
    Be::sync();
    for (int row = int(l.warp); row < 16; row += kWarps) {
      constexpr int kEach = (kTokens + 31) / 32;
      float x[kEach], squares = 0;
      EQR_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const int token = int(l.lane) + 32 * i;
        const auto at = shared.u + operand_at<16>(token / 8, token % 8, row / 8, row % 8);
        x[i] = token < kTokens ? from_bf16(*reinterpret_cast<const uint16_t*>(at)) + total(row, token) : 0.0f;
        squares += x[i] * x[i];
      }
      squares = sum_places<Be>(sum_groups<Be>(squares));
      const float scale = Be::rsqrt(squares / float(p.shape.tokens) + p.shape.norm_eps);
      EQR_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const int token = int(l.lane) + 32 * i;
        const auto at = w.operand() + operand_at<D>(token / 8, token % 8, part * 2 + row / 8, row % 8);
        if (token < kTokens) *reinterpret_cast<uint16_t*>(at) = uint16_t(Be::pack_bf16(x[i] * scale, 0.0f));
      }
    }
    Be::sync();
  }

  // Fragments straight from global memory, of cores that lie `across` to a row.
  EQR_DEVICE static void load_rows(const Lane& l, const char* cores, int across, uint32_t (&a)[4]) {
    EQR_UNROLL
    for (int i = 0; i < 4; ++i)
      a[i] = *reinterpret_cast<const uint32_t*>(cores + (i % 2 * across + i / 2) * 128 + l.lane * 4);
  }
  EQR_DEVICE static void load_tokens(const Lane& l, const char* cores, uint32_t (&b)[2]) {
    EQR_UNROLL
    for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint32_t*>(cores + i * 128 + l.lane * 4);
  }

  // SwiGLU's first product and the gate of 16 hidden units: the warps share the features.
  EQR_DEVICE void multiply_up(int part, int layer) const {
    constexpr int kAcross = D / 8, kSteps = D / 16 / kWarps;
    const Lane l = lane();
    const char* weights = p.packed + layer * p.layout.layer_bytes + p.layout.gate_up + int64_t{part} * 32 * D * 2;
    float h[2][kTiles][4] = {};
    EQR_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const int core = (int(l.warp) * kSteps + i) * 2;
      uint32_t a[2][4];
      EQR_UNROLL
      for (int tile = 0; tile < 2; ++tile) load_rows(l, weights + (tile * 2 * kAcross + core) * 128, kAcross, a[tile]);
      EQR_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[2];
        load_tokens(l, w.operand() + operand_at<D>(tile, 0, core, 0), b);
        Be::mma(h[0][tile], a[0], b[0], b[1]);
        Be::mma(h[1][tile], a[1], b[0], b[1]);
      }
    }
    EQR_UNROLL
    for (int i = 0; i < 2; ++i) EQR_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) put_partial(l, i * 16, tile * 8, h[i][tile]);
    Be::sync();
    const int across = int(p.shape.hidden) / 8;
    for (int i = Be::thread(); i < 16 * kTokens; i += kThreads) {
      const int unit = i / kTokens, token = i % kTokens, gate = unit / 8 * 16 + unit % 8;
      const float value = swiglu<Be>(total(gate, token), total(gate + 8, token));
      const auto at =
          w.hidden() + (int64_t{token / 8} * across + part * 2 + unit / 8) * 128 + token % 8 * 16 + unit % 8 * 2;
      *reinterpret_cast<uint16_t*>(at) = uint16_t(Be::pack_bf16(value, 0.0f));
    }
    Be::sync();
  }

  // SwiGLU's second product and the residual, of 16 features for some tiles of tokens: the warps share the hidden
  // units.
  EQR_DEVICE void multiply_down(int part, int first, int layer) const {
    const Lane l = lane();
    const int across = int(p.shape.hidden) / 8, steps = across / 2 / kWarps;
    const int count = first + kWide < kTiles ? kWide : kTiles - first;
    const char* weights = p.packed + layer * p.layout.layer_bytes + p.layout.down + int64_t{part} * 16 * across * 8 * 2;
    float y[kWide][4] = {};
    for (int i = 0; i < steps; ++i) {
      const int core = (int(l.warp) * steps + i) * 2;
      uint32_t a[4];
      load_rows(l, weights + int64_t{core} * 128, across, a);
      EQR_UNROLL
      for (int j = 0; j < kWide; ++j)
        if (j < count) {
          uint32_t b[2];
          load_tokens(l, w.hidden() + (int64_t{first + j} * across + core) * 128, b);
          Be::mma(y[j], a, b[0], b[1]);
        }
    }
    EQR_UNROLL
    for (int j = 0; j < kWide; ++j)
      if (j < count) put_partial(l, 0, j * 8, y[j]);
    Be::sync();
    // Warps as a whole, for the sum over a token's features.
    const int quad = Be::thread(), token = first * 8 + quad / 4, feature = part * 16 + quad % 4 * 4;
    if (quad / 32 < count) {
      const auto at = w.operand() + operand_at<D>(token / 8, token % 8, feature / 8, feature % 8);
      Quad v = unpack(*reinterpret_cast<const Two*>(at));
      float squares = 0;
      EQR_UNROLL
      for (int i = 0; i < 4; ++i) {
        v.v[i] += total(quad % 4 * 4 + i, quad / 4);
        squares += v.v[i] * v.v[i];
      }
      w.v()[(part * kTokens + token) * 4 + quad % 4] = v;
      squares = sum_places<Be>(squares);
      if (quad % 4 == 0) w.squares()[part * kTokens + token] = squares;
    }
    Be::sync();
  }

  // Logits of 8 tokens, into the buffer that does not hold the last finite ones, and how they have changed.
  EQR_DEVICE void heads(int tile) const {
    constexpr int kSteps = D / 16 / kWarps;
    const Lane l = lane();
    const int V = int(p.shape.vocabulary), S = int(p.shape.tokens), thread = Be::thread();
    const float* old = w.logits(w.control().logits);
    float* to = w.logits(w.control().logits ^ 1);
    float squares = 0, bad = 0;  // of a token, in the first 8 threads
    for (int first = 0; first < head_rows(p.shape); first += 16) {
      float c[4] = {};
      EQR_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const int core = (int(l.warp) * kSteps + i) * 2;
        uint32_t a[4], b[2];
        load_rows(l, p.packed + p.layout.heads + (int64_t{first} * (D / 8) / 8 + core) * 128, D / 8, a);
        load_tokens(l, w.operand() + operand_at<D>(tile, 0, core, 0), b);
        Be::mma(c, a, b[0], b[1]);
      }
      put_partial(l, 0, 0, c);
      Be::sync();
      if (thread < 8)
        for (int row = 0; row < 16; ++row) {
          const int v = first + row, token = tile * 8 + thread;
          const float value = total(row, thread);
          if (v < V && token < S) {
            const float difference = value - old[token * V + v];
            to[token * V + v] = value;
            squares += difference * difference;
            if (value - value != 0.0f) bad = 1;
          } else if (v == V && token == 0) {
            w.of_step().q_halt = value + *reinterpret_cast<const float*>(p.packed + p.layout.q_bias);
          }
        }
      Be::sync();
    }
    if (thread < 8) {
      w.of_step().change[tile * 8 + thread] = Be::sqrt(squares);
      w.of_step().bad[tile * 8 + thread] = bad;
    }
  }
};

}  // namespace eqr::cuda
