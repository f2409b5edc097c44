// A block forward and backward. Products are those of the inference kernels' tiles on bf16 operands; the residual
// stream and its gradient stay in fp32. Built once per instruction set, with EQR_ISA naming the namespace.
#include "block_gradient.h"

namespace eqr::cpu::EQR_ISA {
namespace {

typedef Bf16Dot Op;
constexpr int kEvenRows = kTrainingRows / 2 * 2;
constexpr int kUnits = kTrainingRows / 4 * 2;  // of a tile of token mixing's gates and ups; even

// What a gate and an up gave, and the gradients of both from that of silu(gate) * up.
struct SwiGLUGradient {
  Vec h, gate, up;
  EQR_INLINE SwiGLUGradient of(Vec gate, Vec up, Vec dh) {
    const Vec power = minimum(splat(126.0f), gate * splat(-0x1.715476p0f));
    const Vec s = quotient<true>(splat(1.0f), splat(1.0f) + power_of_two<true>(power)), silu = gate * s;
    return {silu * up, dh * up * fma(silu, splat(1.0f) - s, s), dh * silu};
  }
};

EQR_INLINE void store_pair(uint16_t* to, Vec even, Vec odd) {
  const UVec both = pair_bf16(even, odd);
  memcpy(to, &both, sizeof both);
}

// state [S][width] as pairs of rows, and what of it a transposed pairs form [width / 2][columns][2] wants
EQR_INLINE void put_token_operand(const BlockPass& b, const float* state, uint16_t* transposed) {
  const TrainingSizes& z = b.z;
  for (int64_t t = 0; t < z.rows; t += 2)
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const Vec even = load(state + t * z.width + f), odd = t + 1 < z.S ? load(state + (t + 1) * z.width + f) : Vec{};
      store_pair(b.s.p + pair_at(t, f, z.x_pairs), even, odd);
      store_bf16(b.s.x + t * z.x_stride + f, even);
      store_bf16(b.s.x + (t + 1) * z.x_stride + f, odd);
    }
  constexpr int64_t kFeatures = 16;  // pairs of them at a time, a cache line of what is read
  for (int64_t f = 0; f < z.width / 2; f += kFeatures) {
    const int64_t end = f + kFeatures < z.width / 2 ? f + kFeatures : z.width / 2;
    for (int64_t t = 0; t < z.S; ++t)
      for (int64_t i = f; i < end; ++i)
        memcpy(transposed + (i * z.columns + t) * 2, b.s.x + t * z.x_stride + 2 * i, 4);
  }
}

void token_forward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  uint16_t* kept = b.kept.token_gu + b.module * 2 * z.token_k * z.width;
  put_token_operand(b, b.s.u, b.kept.u_t + b.module * z.width * z.columns);
  for (int64_t p = 0; p < z.panels; ++p) {
    const int64_t at = p * kPanel;
    const auto put_units = [&](int64_t first, int64_t count, const Vec* sums) {
      for (int64_t i = 0; i < count; i += 4)
        for (int j = 0; j < 2; ++j) {
          const Vec* unit = sums + 2 * i + j;
          for (int r = 0; r < 4; ++r) store_bf16(kept + (first + i + r) * z.width + at + j * kLanes, unit[2 * r]);
          store_pair(b.s.wide + pair_at((first + i) / 2, j * kLanes, 2 * kPanel), swiglu<true>(unit[0], unit[2]),
                     swiglu<true>(unit[4], unit[6]));
        }
    };
    // In units of two: their hidden units make a pair.
    Vec sums[2 * kUnits * 2];
    for (int64_t first = 0; first < 2 * z.token_k; first += 2 * kUnits) {
      tile<Op, 2 * kUnits, 2, false>(b.w.token_in + first * z.rows, z.rows, b.s.p + 2 * at, z.x_pairs, z.pairs, sums, 2,
                                     reinterpret_cast<const char*>(b.w.token_in + (first + 2 * kUnits) * z.rows));
      put_units(first, 2 * kUnits, sums);
    }
    Vec squares[2] = {Vec{}, Vec{}};
    product<false>(z.S, b.w.token_out, z.token_out, b.s.wide, 2 * kPanel, z.token_k / 2,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         float* u = b.s.u + (first + i) * z.width + at + j * kLanes;
                         const Vec v = load(u) + sums[2 * i + j];
                         squares[j] = fma(v, v, squares[j]);
                         store(u, v);
                       }
                   });
    uint16_t* x = b.kept.x + b.module * z.pairs * z.x_pairs;
    for (int j = 0; j < 2; ++j) {
      const int64_t f = at + j * kLanes;
      const Vec norm = square_root(squares[j] / splat(float(z.S)) + splat(b.norm_eps));
      // The padding is zero and stays so, whatever 1 / norm is there.
      const Vec scale = first_lanes(splat(1.0f) / norm, z.d - f);
      store(b.kept.token_scale + b.module * z.width + f, scale);
      for (int64_t t = 0; t < z.rows; t += 2) {
        const auto normal = [&](int64_t row) {
          if (row == z.S) return Vec{};
          float* u = b.s.u + row * z.width + f;
          const Vec v = load(u) * scale;
          store(u, v);
          store_bf16(b.s.x + row * z.x_stride + f, v);
          return v;
        };
        const Vec even = normal(t);
        store_pair(x + pair_at(t, f, z.x_pairs), even, normal(t + 1));
      }
    }
  }
}

void channel_forward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  uint16_t* kept = b.kept.channel_gu + b.module * z.rows * z.gu_stride;
  uint16_t* h = b.s.wide;
  if (z.S < z.rows) memset(kept + z.S * z.gu_stride, 0, size_t(2 * z.gu_stride));  // the other half of the last pair
  for (int64_t p = 0; p < z.k / kLanes; ++p)
    product<false>(z.S, b.s.x, z.x_stride, b.w.gate_up + p * z.width * kPanel, 2 * kPanel, z.width / 2,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i) {
                       uint16_t* gu = kept + (first + i) * z.gu_stride + p * kPanel;
                       store_bf16(gu, sums[2 * i]);
                       store_bf16(gu + kLanes, sums[2 * i + 1]);
                       store_bf16(h + (first + i) * z.h_stride + p * kLanes, swiglu<true>(sums[2 * i], sums[2 * i + 1]));
                     }
                   });
  for (int64_t p = 0; p < z.panels; ++p)
    product<false>(z.S, h, z.h_stride, b.w.down + p * z.k * kPanel, 2 * kPanel, z.k / 2,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         float* u = b.s.u + (first + i) * z.width + p * kPanel + j * kLanes;
                         store(u, load(u) + sums[2 * i + j]);
                       }
                   });
  uint16_t* out = b.kept.out + b.module * z.rows * z.x_stride;
  for (int64_t t = 0; t < z.S; ++t) {
    float* u = b.s.u + t * z.width;
    Vec squares = Vec{};
    for (int64_t f = 0; f < z.width; f += kLanes) squares = fma(load(u + f), load(u + f), squares);
    const float scale = 1.0f / sqrtf(sum(squares) / float(z.d) + b.norm_eps);
    b.kept.channel_scale[b.module * z.rows + t] = scale;
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const Vec v = load(u + f) * splat(scale);
      store(u + f, v);
      store_bf16(out + t * z.x_stride + f, v);
    }
  }
}

void channel_backward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  const uint16_t* out = b.kept.out + b.module * z.rows * z.x_stride;
  uint16_t* dv = b.kept.dv + b.module * z.pairs * z.x_pairs;
  for (int64_t t = 0; t < z.S; ++t) {
    // The norm: dv = scale (g - out mean(g out))
    float* g = b.s.g + t * z.width;
    const uint16_t* o = out + t * z.x_stride;
    Vec along = Vec{};
    for (int64_t f = 0; f < z.width; f += kLanes) along = fma(load(g + f), load_bf16(o + f), along);
    const Vec mean = splat(sum(along) / float(z.d)), scale = splat(b.kept.channel_scale[b.module * z.rows + t]);
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const Vec v = scale * (load(g + f) - load_bf16(o + f) * mean);
      store(g + f, v);
      store_bf16(b.s.x + t * z.x_stride + f, v);
    }
  }
  for (int64_t f = 0; f < z.width && z.S < z.rows; f += kLanes) store_bf16(b.s.x + z.S * z.x_stride + f, Vec{});
  for (int64_t t = 0; t < z.rows; t += 2)
    for (int64_t f = 0; f < z.width; f += kLanes)
      store_pair(dv + pair_at(t, f, z.x_pairs), load(b.s.g + t * z.width + f),
                 t + 1 < z.S ? load(b.s.g + (t + 1) * z.width + f) : Vec{});

  const uint16_t* gu = b.kept.channel_gu + b.module * z.rows * z.gu_stride;
  uint16_t* h = b.kept.h + b.module * z.pairs * z.h_pairs;
  uint16_t* dgu = b.kept.dgu + b.module * z.pairs * z.gu_pairs;
  uint16_t* rows = b.s.wide;
  const Parts tiles = parts_of(z.pairs, kEvenRows / 2);
  for (int64_t p = 0; p < z.k / kPanel; ++p)
    for (int64_t part = 0; part < tiles.parts; ++part) {
      const int64_t first = 2 * tiles.begin(part), count = 2 * tiles.begin(part + 1) - first;
      Vec sums[kEvenRows * 2];
      tile_of<Op, 2, false, kEvenRows>(count, b.s.x + first * z.x_stride, z.x_stride,
                                       b.w.down_t + p * z.width * kPanel, 2 * kPanel, z.width / 2, sums, 2,
                                       reinterpret_cast<const char*>(b.w.down_t));
      for (int64_t i = 0; i < count; i += 2)
        for (int j = 0; j < 2; ++j) {
          const int64_t unit = p * kPanel + j * kLanes, column = channel_column(unit, false);
          SwiGLUGradient of[2];
          for (int r = 0; r < 2; ++r) {
            const int64_t row = first + i + r;
            const uint16_t* from = gu + row * z.gu_stride + column;
            of[r] = SwiGLUGradient::of(load_bf16(from), load_bf16(from + kLanes), sums[2 * (i + r) + j]);
            store_bf16(rows + row * z.gu_stride + column, of[r].gate);
            store_bf16(rows + row * z.gu_stride + column + kLanes, of[r].up);
          }
          store_pair(h + pair_at(first + i, unit, z.h_pairs), of[0].h, of[1].h);
          store_pair(dgu + pair_at(first + i, column, z.gu_pairs), of[0].gate, of[1].gate);
          store_pair(dgu + pair_at(first + i, column + kLanes, z.gu_pairs), of[0].up, of[1].up);
        }
    }
  for (int64_t p = 0; p < z.panels; ++p)
    product<false>(z.S, rows, z.gu_stride, b.w.gate_up_t + p * 2 * z.k * kPanel, 2 * kPanel, z.k,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         float* g = b.s.g + (first + i) * z.width + p * kPanel + j * kLanes;
                         store(g, load(g) + sums[2 * i + j]);
                       }
                   });
}

// A row of a pairs form: element `column` of the even or the odd one.
EQR_INLINE Vec load_of_pair(const uint16_t* pairs, bool odd) {
  const UVec both = bits<UVec>(load_ints(reinterpret_cast<const int32_t*>(pairs)));
  return odd ? bits<Vec>(both & 0xFFFF0000u) : bits<Vec>(both << 16);
}

void token_backward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  const uint16_t* x = b.kept.x + b.module * z.pairs * z.x_pairs;
  for (int64_t f = 0; f < z.width; f += kLanes) {
    Vec along = Vec{};
    for (int64_t t = 0; t < z.S; ++t)
      along = fma(load(b.s.g + t * z.width + f), load_of_pair(x + pair_at(t, f, z.x_pairs), t & 1), along);
    const Vec mean = along / splat(float(z.S)), scale = load(b.kept.token_scale + b.module * z.width + f);
    for (int64_t t = 0; t < z.S; ++t) {
      float* g = b.s.g + t * z.width + f;
      store(g, scale * (load(g) - load_of_pair(x + pair_at(t, f, z.x_pairs), t & 1) * mean));
    }
  }
  put_token_operand(b, b.s.g, b.kept.dv_t + b.module * z.width * z.columns);
  const uint16_t* gu = b.kept.token_gu + b.module * 2 * z.token_k * z.width;
  uint16_t* dgu = b.kept.token_dgu + b.module * z.width;
  uint16_t* h = b.kept.token_h + b.module * z.width;
  for (int64_t p = 0; p < z.panels; ++p) {
    product<false>(z.token_k, b.w.token_out_t, z.rows, b.s.p + 2 * p * kPanel, z.x_pairs, z.pairs,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         const int64_t unit = first + i, f = p * kPanel + j * kLanes;
                         const uint16_t* from = gu + 2 * unit * z.width + f;
                         const SwiGLUGradient of =
                             SwiGLUGradient::of(load_bf16(from), load_bf16(from + z.width), sums[2 * i + j]);
                         store_bf16(h + unit * z.f_stride + f, of.h);
                         store_bf16(dgu + 2 * unit * z.f_stride + f, of.gate);
                         store_bf16(dgu + (2 * unit + 1) * z.f_stride + f, of.up);
                         store_pair(b.s.wide + (unit * kPanel + j * kLanes) * 2, of.gate, of.up);
                       }
                   });
    product<false>(z.S, b.w.token_in_t, z.token_in, b.s.wide, 2 * kPanel, z.token_k,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         float* g = b.s.g + (first + i) * z.width + p * kPanel + j * kLanes;
                         store(g, load(g) + sums[2 * i + j]);
                       }
                   });
  }
}

// gradient [rows][columns] += a @ b, columns a multiple of kPanel
template <bool kPairs>
EQR_INLINE void add_outer(int64_t rows, int64_t columns, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                          int64_t b_stride, int64_t steps, float* gradient) {
  for (int64_t c = 0; c < columns; c += kPanel)
    product<kPairs>(rows, a, a_stride, b + 2 * c, b_stride, steps, [&](int64_t first, int64_t count, const Vec* sums) {
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < 2; ++j) {
          float* to = gradient + (first + i) * columns + c + j * kLanes;
          store(to, load(to) + sums[2 * i + j]);
        }
    });
}

}  // namespace

void block_forward(const BlockPass& b) {
  token_forward(b);
  channel_forward(b);
}

void block_backward(const BlockPass& b) {
  channel_backward(b);
  token_backward(b);
}

void block_weights(const TrainingSizes& z, const Kept& k, const Gradients& g) {
  const int64_t tokens = z.modules * z.pairs, features = z.modules * z.width / 2;
  add_outer<true>(2 * z.k, z.width, k.dgu, z.gu_pairs, k.x, z.x_pairs, tokens, g.gate_up);
  add_outer<true>(z.width, z.k, k.dv, z.x_pairs, k.h, z.h_pairs, tokens, g.down);
  add_outer<false>(2 * z.token_k, z.columns, k.token_dgu, z.f_stride, k.u_t, 2 * z.columns, features, g.token_in);
  add_outer<false>(z.token_k, z.columns, k.token_h, z.f_stride, k.dv_t, 2 * z.columns, features, g.token_out_t);
}

}  // namespace eqr::cpu::EQR_ISA
