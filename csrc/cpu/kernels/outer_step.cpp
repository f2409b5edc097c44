// One outer step of one trajectory: H_cycles latent recursions, each L_cycles updates of z_L and one of z_H, then the
// heads; or recursions alone. Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/mixers.h"
#include "cpu/kernels/normal_block.h"
#include "cpu/kernels/state.h"

namespace eqr::cpu::EQR_ISA {
namespace {

constexpr int64_t kTokens = 64;  // that normalise takes at a time; even

// What is to be made of u, and who reads it then: nothing yet, at the start of the step; a block within a module; or,
// at a module's end, the next module or the heads.
enum class Next { first, block, L, H, L_from_H, heads };

template <Precision kPrecision>
class OuterStep {
 public:
  OuterStep(const Packed* packed, void* workspace, const StepInput& in, const Member& m)
      : packed_(packed),
        shape_(packed->shape),
        z_(sizes_of(packed->shape)),
        w_(workspace_of(packed, z_, workspace)),
        in_(in),
        m_(m),
        context_{packed, z_, w_, m, Share(m, w_.phase, w_.claims)} {}

  void run() {
    uint32_t update = 0;
    for (int64_t h = 0; h < shape_.H_cycles; ++h) {
      const bool last = h == shape_.H_cycles - 1;
      for (int64_t l = 0; l < shape_.L_cycles; ++l)
        l < shape_.L_cycles - 1 ? module(update++, Next::L, false) : module(update++, Next::H, last);
      module(update++, last ? Next::heads : Next::L_from_H, last);
    }
    heads();
  }

  void run(const Recursions& r) {
    given_ = &r;
    to_panels(z_, r.z_H, w_.z_H);
    to_panels(z_, r.z_L, w_.z_L);
    uint32_t update = 0;
    for (int64_t h = 0; h < r.count; ++h) {
      for (int64_t l = 0; l < shape_.L_cycles; ++l)
        module(update++, l < shape_.L_cycles - 1 ? Next::L : Next::H, false);
      module(update++, Next::L_from_H, false);
    }
    finish_all();
    from_panels(z_, w_.z_H, r.z_H);
    from_panels(z_, w_.z_L, r.z_L);
  }

 private:
  typedef typename Ops<kPrecision>::Token Token;
  typedef typename Ops<kPrecision>::Head Head;

  // Leaves u without what comes `next`, for which whoever reads it has each panel at hand.
  void module(uint32_t update, Next next, bool measure) {
    for (int64_t i = 0; i < shape_.layers; ++i) {
      const PackedLayer& layer = layer_of(packed_, i);
      z_.heads ? mix_by_attention(layer) : mix_by_tokens(layer);
      channel_gate_up<kPrecision>(context_, layer);
      m_.sync();
      channel_down<kPrecision>(context_, layer);
      const bool last = i == shape_.layers - 1;
      if (last && in_.noise_scale != 0.0f) draw_noise(update);
      m_.sync();
      last ? follow(next, measure) : follow(Next::block, false);
    }
  }

  void mix_by_tokens(const PackedLayer& layer) {
    // As much scratch as there are panels, and so for no more members.
    float* hidden = reinterpret_cast<float*>(w_.h) + m_.rank * z_.token_k * kPanel;
    context_.share.each(
        z_.panels,
        [&](int64_t p) {
          finish(p);
          token_mixer<kPrecision>(context_, layer, p, hidden);
        },
        z_.panels);
    m_.sync();
  }

  void mix_by_attention(const PackedLayer& layer) {
    finish_all();
    attention<kPrecision>(context_, layer);
    follow(Next::block, false);
    finish_all();
  }

  void follow(Next next, bool measure) {
    next_ = next;
    measure_ = measure;
  }

  void finish_all() {
    context_.share.each(z_.panels, [&](int64_t p) { finish(p); });
    m_.sync();
  }

  void finish(int64_t p) {
    switch (next_) {
      case Next::first: return begin(p);
      case Next::block: return normalise<Next::block>(p);
      case Next::L: return normalise<Next::L>(p);
      case Next::H: return normalise<Next::H>(p);
      case Next::L_from_H: return normalise<Next::L_from_H>(p);
      case Next::heads: return normalise<Next::heads>(p);
    }
  }

  void begin(int64_t p) {
    const int64_t at = p * z_.S * kPanel;
    const size_t panel = size_t(4 * z_.S * kPanel);
    memcpy(w_.old_H + at, w_.z_H + at, panel);
    memcpy(w_.old_L + at, w_.z_L + at, panel);
    for (int64_t t = 0; t < z_.S; t += 2) put_u_pair(p, t, [&](int64_t row, int j) { return injected_L(p, row, j); });
  }

  void draw_noise(uint32_t update) {
    if (given_ && given_->eps) {
      memcpy(w_.eps, given_->eps + update * given_->eps_stride, size_t(4 * z_.S * z_.d));
      return;
    }
    const int64_t count = z_.S * z_.d, blocks = (count + kBlock - 1) / kBlock;
    const RngRow row = rng_row(in_.rng, kFirstUpdate + update);
    alignas(64) float eps[kBlock];
    context_.share.each(blocks, [&](int64_t b) {
      const Span s = span(b, count, blocks);
      normal_block(row, s.first_counter, s.counters, eps);
      memcpy(w_.eps + s.start, eps, size_t(4 * s.count));
    });
  }

  // u <- RMSnorm over features of u, from the squares; after a module's last block also the damped update and the sum
  // that the next module starts from.
  template <Next kNext>
  void normalise(int64_t p) {
    alignas(64) float scale[kTokens];
    Vec change = Vec{}, size = Vec{};
    for (int64_t t0 = 0; t0 < z_.S; t0 += kTokens) {
      const int64_t end = t0 + kTokens < z_.S ? t0 + kTokens : z_.S;
      token_scales(t0, end, scale);
      for (int64_t t = t0; t < end; t += 2)
        put_u_pair<kNext == Next::heads>(p, t, [&](int64_t row, int j) {
          const int64_t at = (p * z_.S + row) * kPanel + j * kLanes;
          const Vec u = load(w_.u + at) * splat(scale[row - t0]);
          if constexpr (kNext == Next::block) return u;
          constexpr bool kIsL = kNext == Next::L || kNext == Next::H;
          float* state = kIsL ? w_.z_L : w_.z_H;
          const Vec z = updated(load(state + at), u, p, row, j);
          store(state + at, z);
          if (measure_) {
            const Vec difference = z - load((kIsL ? w_.old_L : w_.old_H) + at);
            change = fma(difference, difference, change);
            size = fma(z, z, size);
          }
          if constexpr (kNext == Next::H) return load(w_.z_H + at) + z;
          if constexpr (kNext == Next::heads) return z;
          return injected_L(p, row, j);
        });
    }
    if (measure_) {
      float* norms = w_.norms + 4 * p + (kNext == Next::heads ? 0 : 2);
      norms[0] = sum(change);
      norms[1] = sum(size);
    }
  }

  // 1 / sqrt(mean over features of u^2 + eps) of tokens [begin, end)
  void token_scales(int64_t begin, int64_t end, float* scale) const {
    const int64_t count = end - begin;
    for (int64_t i = 0; i < count; ++i) scale[i] = 0.0f;
    for (int64_t p = 0; p < z_.panels; ++p)
      for (int64_t i = 0; i < count; ++i) scale[i] += w_.squares[p * z_.S + begin + i];
    for (int64_t i = 0; i < count; ++i) scale[i] = 1.0f / sqrtf(scale[i] / float(z_.d) + shape_.norm_eps);
  }

  Vec updated(Vec z, Vec u, int64_t p, int64_t t, int j) const {
    Vec out = fma(splat(shape_.lambda), u, splat(shape_.keep) * z);
    if (in_.noise_scale != 0.0f) {
      const int64_t first = p * kPanel + j * kLanes;
      Vec eps = load(w_.eps + t * z_.d + first);
      if (first + kLanes > z_.d) eps = first_lanes(eps, z_.d - first);
      out = fma(splat(in_.noise_scale), eps, out);
    }
    return out;
  }

  // z_L + (z_H + e)
  Vec injected_L(int64_t p, int64_t t, int j) const {
    const int64_t at = (p * z_.S + t) * kPanel + j * kLanes;
    const float* e = eqr::cpu::EQR_ISA::at<float>(packed_, packed_->embedding) + (p * z_.V + in_.tokens[t]) * kPanel;
    return load(w_.z_L + at) + (load(w_.z_H + at) + load(e + j * kLanes));
  }

  // Stores what value(token, vector of the panel) gives for tokens t and t + 1 where whoever comes next reads it.
  template <bool kForHeads = false, class Value>
  void put_u_pair(int64_t p, int64_t t, const Value& value) {
    const bool pair = t + 1 < z_.S;
    for (int j = 0; j < 2; ++j) {
      const Vec a = value(t, j), b = pair ? value(t + 1, j) : Vec{};
      put_u<kForHeads>(p, t, j, a);
      if (pair) put_u<kForHeads>(p, t + 1, j, b);
      if constexpr (Token::kB == 2 && !kForHeads) {
        if (!z_.heads) {
          const UVec both = pair_bf16(a, b);
          const int64_t at = (p * steps_of<Token>(z_.S) * Token::kDepth / 2 + t / 2) * kPanel + j * kLanes;
          memcpy(w_.token_operand + 4 * at, &both, sizeof both);
        }
      }
    }
  }

  template <bool kForHeads>
  void put_u(int64_t p, int64_t t, int j, Vec value) {
    const int64_t at = (p * z_.S + t) * kPanel + j * kLanes, x = t * z_.x_stride + p * kPanel + j * kLanes;
    if constexpr (kForHeads) {
      // The heads take bf16 operands in int8 too.
      put_operand<kPrecision == Precision::int8 ? Precision::bf16 : kPrecision>(w_.x, x, value);
    } else {
      store(w_.u + at, value);
      if (z_.heads) {
        put_operand<kPrecision>(w_.x, x, value);
      } else if constexpr (Token::kB == 1 && kRoundsToBf16<kPrecision>) {
        store(reinterpret_cast<float*>(w_.token_operand) + at, round_bf16(value));
      }
    }
  }

  void heads() {
    finish_all();
    put_logits();
    if (m_.rank == 0) put_output();
    context_.share.end();
    m_.sync();
  }

  void put_logits() {
    const int64_t panels = (z_.V + kPanel - 1) / kPanel;
    const PanelMatrix<Head> matrix = panel_matrix<Head>(packed_, packed_->lm_head, panels, z_.width);
    const typename Head::A* x = reinterpret_cast<const typename Head::A*>(w_.x);
    const Parts tiles = parts_of(z_.S, kRowsOf<Head>);
    Vec sums[kRowsOf<Head> * 2];
    AmxShape shape;
    for (int64_t i = m_.begin(tiles.parts); i < m_.end(tiles.parts); ++i)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = tiles.begin(i), rows = tiles.begin(i + 1) - first;
        panel_tile<Head, false>(shape, rows, x + first * z_.x_stride, z_.x_stride, matrix.panel(p), kPanel * Head::kB,
                                matrix.steps, sums, reinterpret_cast<const char*>(matrix.panel(p)));
        const int64_t columns = z_.V - p * kPanel < kPanel ? z_.V - p * kPanel : kPanel;
        for (int64_t r = 0; r < rows; ++r)
          memcpy(w_.logits + (first + r) * z_.V + p * kPanel, sums + 2 * r, size_t(4 * columns));
      }
  }

  void put_output() {
    const float* weight = at<float>(packed_, packed_->q_weight);
    Vec q = Vec{};
    for (int64_t p = 0; p < z_.panels; ++p)
      for (int j = 0; j < 2; ++j)
        q = fma(load(w_.z_H + p * z_.S * kPanel + j * kLanes), load(weight + p * kPanel + j * kLanes), q);
    float change = 0.0f, size = 0.0f;
    for (int64_t p = 0; p < z_.panels; ++p) {
      change += w_.norms[4 * p] + w_.norms[4 * p + 2];
      size += w_.norms[4 * p + 1] + w_.norms[4 * p + 3];
    }
    *w_.out = {w_.logits, sum(q) + *at<float>(packed_, packed_->q_bias), change, size};
  }

  const Packed* packed_;
  const Shape& shape_;
  const Sizes z_;
  const Workspace w_;
  const StepInput& in_;
  const Member m_;
  Context context_;
  Next next_ = Next::first;
  bool measure_ = false;
  const Recursions* given_ = nullptr;
};

}  // namespace

void outer_step(const Packed* packed, void* workspace, const StepInput& in, const Member& m) {
  switch (packed->precision) {
    case Precision::fp32: return OuterStep<Precision::fp32>(packed, workspace, in, m).run();
    case Precision::bf16: return OuterStep<Precision::bf16>(packed, workspace, in, m).run();
    default: return OuterStep<Precision::int8>(packed, workspace, in, m).run();
  }
}

void recur(const Packed* packed, void* workspace, const Recursions& r) {
  StepInput in = {r.tokens, {0, 0, 0, 0}, r.eps || r.rng ? r.noise_scale : 0.0f};
  for (int i = 0; r.rng && i < 4; ++i) in.rng[i] = r.rng[i];
  const Member alone = {nullptr, 0, 1};
  switch (packed->precision) {
    case Precision::fp32: return OuterStep<Precision::fp32>(packed, workspace, in, alone).run(r);
    case Precision::bf16: return OuterStep<Precision::bf16>(packed, workspace, in, alone).run(r);
    default: return OuterStep<Precision::int8>(packed, workspace, in, alone).run(r);
  }
}

}  // namespace eqr::cpu::EQR_ISA
