// Weights in the order in which the kernels read them.
// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/layout.h"

namespace eqr::cpu::EQR_ISA {
namespace {

EQR_INLINE void put(float value, float* out) { *out = value; }
EQR_INLINE void put(float value, uint16_t* out) { *out = to_bf16(value); }

// A PanelMatrix of `padded` depth. Column c of panel p is row(p, c), [depth], or null for padding.
template <class Op, class Row>
void pack_panels(int64_t panels, int64_t depth, int64_t padded, const Row& row, char* out) {
  const int64_t steps = steps_of<Op>(padded), bytes = panel_matrix_bytes<Op>(panels, padded);
  memset(out, 0, size_t(bytes));
  typename Op::B* weights = reinterpret_cast<typename Op::B*>(out);
  float* scale = reinterpret_cast<float*>(out + bytes - 2 * panels * kPanel * 4);
  int32_t* correction = reinterpret_cast<int32_t*>(scale + panels * kPanel);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t c = 0; c < kPanel; ++c) {
      const float* from = row(p, c);
      if (!from) continue;
      typename Op::B* to = weights + p * steps * kPanel * Op::kDepth + c * Op::kB;
      const auto place = [=](int64_t k) { return to + k / Op::kB * kPanel * Op::kB + k % Op::kB; };
      if constexpr (kIsInt8<Op>) {
        float most = 0.0f, probe = 0.0f;  // probe: NaN where a weight is not finite
        for (int64_t k = 0; k < depth; ++k) {
          most = fabsf(from[k]) > most ? fabsf(from[k]) : most;
          probe += from[k] - from[k];
        }
        const float unit = most >= 127.0f * kLeastUnit ? most / 127.0f : 1.0f;
        int32_t total = 0;
        for (int64_t k = 0; k < depth && probe == 0.0f; ++k) {
          const int32_t q = int32_t(rintf(from[k] / unit));
          *place(k) = int8_t(q);
          total += q;
        }
        scale[p * kPanel + c] = unit + probe;
        correction[p * kPanel + c] = Op::kZeroPoint * total;
      } else {
        for (int64_t k = 0; k < depth; ++k) put(from[k], place(k));
      }
    }
}

// Rows to broadcast, in tiles: [tiles][steps][rows of the tile][kDepth]. A tile holds the rows that row(first, count,
// r) names, r in 0..each * count - 1, for its `count` items from `first` on.
template <class Op, class Row>
void pack_tiles(const Parts& parts, int64_t each, int64_t depth, bool round, const Row& row, char* out) {
  const int64_t steps = steps_of<Op>(depth);
  for (int64_t t = 0; t < parts.parts; ++t) {
    const int64_t first = parts.begin(t), count = parts.begin(t + 1) - first, rows = each * count;
    typename Op::A* to = reinterpret_cast<typename Op::A*>(out) + first * each * steps * Op::kDepth;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = row(first, count, r);
      for (int64_t k = 0; k < steps * Op::kDepth; ++k) {
        const float value = k < depth ? from[k] : 0.0f;
        put(round ? round_bf16(value) : value, to + (k / Op::kDepth * rows + r) * Op::kDepth + k % Op::kDepth);
      }
    }
  }
}

// Lays one thing after another; without memory it only counts.
template <Precision kPrecision>
class Packer {
 public:
  Packer(const Shape& shape, char* base) : shape_(shape), z_(sizes_of(shape)), base_(base) {}

  int64_t run(const OperatorWeights* w) {
    Packed head = {};
    take(sizeof(Packed));
    head.magic = kPackedMagic, head.isa = Isa::EQR_ISA, head.precision = kPrecision, head.shape = shape_;
    head.layers = take(shape_.layers * int64_t(sizeof(PackedLayer)));
    // sqrt(d) * embedding, in feature panels as the state: [panels][V][kPanel]
    head.embedding = take(4 * z_.panels * z_.V * kPanel);
    const float scale = float(sqrt(double(z_.d)));
    if (base_)
      for (int64_t token = 0; token < z_.V; ++token)
        place_features(w->embedding + token * z_.d, z_.V, token, scale, head.embedding);
    head.lm_head = panels<Head>(z_.V, z_.d, z_.width, [=, this](int64_t n) { return w->lm_head + n * z_.d; });
    head.q_weight = take(4 * z_.width);
    head.q_bias = take(64);
    if (base_) {
      place_features(w->q_weight, 1, 0, 1.0f, head.q_weight);
      *reinterpret_cast<float*>(base_ + head.q_bias) = kRound ? round_bf16(w->q_bias[0]) : w->q_bias[0];
    }
    if (shape_.rope_parts) {
      head.cos = copy(base_ ? w->cos : nullptr, z_.S * z_.head_dim);
      head.sin = copy(base_ ? w->sin : nullptr, z_.S * z_.head_dim);
    }
    if (shape_.fixed_start) {
      head.H_start = take(4 * z_.width);
      head.L_start = take(4 * z_.width);
      if (base_) {
        place_features(w->H_start, 1, 0, 1.0f, head.H_start);
        place_features(w->L_start, 1, 0, 1.0f, head.L_start);
      }
    }
    for (int64_t i = 0; i < shape_.layers; ++i) {
      const PackedLayer packed = layer(base_ ? w->blocks[i] : BlockWeights{});
      if (base_) reinterpret_cast<PackedLayer*>(base_ + head.layers)[i] = packed;
    }
    head.bytes = end_;
    if (base_) memcpy(base_, &head, sizeof head);
    return end_;
  }

 private:
  typedef typename Ops<kPrecision>::Token Token;
  typedef typename Ops<kPrecision>::Channel Channel;
  typedef typename Ops<kPrecision>::Head Head;
  static constexpr bool kRound = kPrecision != Precision::fp32;

  int64_t take(int64_t bytes) {
    const int64_t offset = end_;
    end_ += round_up(bytes, 64);
    return offset;
  }

  int64_t copy(const float* from, int64_t count) {
    const int64_t offset = take(4 * count);
    if (from) memcpy(base_ + offset, from, size_t(4 * count));
    return offset;
  }

  // from [d] to row `row` of [panels][rows][kPanel], the padding zero
  void place_features(const float* from, int64_t rows, int64_t row, float scale, int64_t offset) {
    float* to = reinterpret_cast<float*>(base_ + offset);
    for (int64_t f = 0; f < z_.width; ++f) {
      const float value = f < z_.d ? (kRound ? round_bf16(from[f]) : from[f]) : 0.0f;
      to[(f / kPanel * rows + row) * kPanel + f % kPanel] = scale * value;
    }
  }

  template <class Op, class Row>
  int64_t panels(int64_t rows, int64_t depth, int64_t padded, const Row& row) {
    const int64_t count = (rows + kPanel - 1) / kPanel, offset = take(panel_matrix_bytes<Op>(count, padded));
    const auto column = [&](int64_t p, int64_t c) -> const float* {
      const int64_t n = p * kPanel + c;
      return n < rows ? row(n) : nullptr;
    };
    if (base_) pack_panels<Op>(count, depth, padded, column, base_ + offset);
    return offset;
  }

  PackedLayer layer(const BlockWeights& w) {
    PackedLayer p;
    const int64_t S = z_.S, d = z_.d, k = z_.k, token_k = z_.token_k;
    if (z_.heads) {
      p.mixer_in = panels<Channel>(3 * d, d, z_.width, [=](int64_t n) { return w.mixer_in + n * d; });
      p.mixer_out = panels<Channel>(d, d, z_.width, [=](int64_t n) { return w.mixer_out + n * d; });
    } else {
      p.mixer_in = take(2 * token_k * steps_of<Token>(S) * Token::kDepth * int64_t(sizeof(typename Token::A)));
      p.mixer_out = take(S * steps_of<Token>(token_k) * Token::kDepth * int64_t(sizeof(typename Token::A)));
      if (base_) {
        // A tile holds the gate rows of its units, then their up rows.
        const auto gate_up = [=](int64_t first, int64_t count, int64_t r) {
          return w.mixer_in + (r < count ? first + r : token_k + first + r - count) * S;
        };
        const auto down = [=](int64_t first, int64_t, int64_t r) { return w.mixer_out + (first + r) * token_k; };
        pack_tiles<Token>(parts_of(token_k, kUnitsOf<Token>), 2, S, kRound, gate_up, base_ + p.mixer_in);
        pack_tiles<Token>(parts_of(S, kRowsOf<Token>), 1, token_k, kRound, down, base_ + p.mixer_out);
      }
    }
    // A panel holds a vector of gate rows, then the up rows of the same units.
    const int64_t pairs = k / kLanes;
    p.gate_up = take(panel_matrix_bytes<Channel>(pairs, z_.width));
    const auto gate_up = [=](int64_t panel, int64_t c) {
      return w.gate_up + (c < kLanes ? panel * kLanes + c : k + panel * kLanes + c - kLanes) * d;
    };
    if (base_) pack_panels<Channel>(pairs, d, z_.width, gate_up, base_ + p.gate_up);
    p.down = panels<Channel>(d, k, k, [=](int64_t n) { return w.down + n * k; });
    return p;
  }

  const Shape& shape_;
  const Sizes z_;
  char* base_;
  int64_t end_ = 0;
};

int64_t run(const Shape& shape, Precision precision, const OperatorWeights* w, Packed* out) {
  char* base = reinterpret_cast<char*>(out);
  switch (precision) {
    case Precision::fp32: return Packer<Precision::fp32>(shape, base).run(w);
    case Precision::bf16: return Packer<Precision::bf16>(shape, base).run(w);
    default: return Packer<Precision::int8>(shape, base).run(w);
  }
}

}  // namespace

int64_t packed_bytes(const Shape& shape, Precision precision) { return run(shape, precision, nullptr, nullptr); }

void pack(const Shape& shape, Precision precision, const OperatorWeights& w, Packed* out) {
  run(shape, precision, &w, out);
}

int64_t workspace_bytes(const Packed* packed) { return workspace_of(packed, sizes_of(packed->shape), nullptr).bytes; }

}  // namespace eqr::cpu::EQR_ISA
