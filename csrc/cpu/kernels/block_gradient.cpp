// A block forward and backward. Products are those of the inference kernels' tiles on bf16 operands; the residual
// stream and its gradient stay in fp32. Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/block_gradient.h"
#include "cpu/kernels/transpose.h"

namespace eqr::cpu::EQR_ISA {
namespace {

constexpr int kUnits = kTrainingRows / 4 * 2;  // of a tile of token mixing's gates and ups; even
alignas(64) constexpr uint16_t kNoRow[kPanel] = {};

// silu(gate) * up, and its slopes: by the gate, and by the up.
struct SwiGLU {
  Vec h, by_gate, by_up;
  EQR_INLINE SwiGLU of(Vec gate, Vec up) {
    const Vec power = minimum(splat(126.0f), gate * splat(-0x1.715476p0f));
    const Vec s = quotient<true>(splat(1.0f), splat(1.0f) + power_of_two<true>(power)), silu = gate * s;
    return {silu * up, up * fma(silu, splat(1.0f) - s, s), silu};
  }
};

EQR_INLINE void store_pair(uint16_t* to, Vec even, Vec odd) {
  const UVec both = pair_bf16(even, odd);
  memcpy(to, &both, sizeof both);
}

// to [kPanel][2] <- two rows of kPanel values
EQR_INLINE void pair_rows(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
#if defined(__AVX512BW__)
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + kPanel, _mm512_permutex2var_epi16(a, high, b));
#else
  for (int j = 0; j < 2; ++j) {
    HalfVec a, b;
    memcpy(&a, even + j * kLanes, sizeof a);
    memcpy(&b, odd + j * kLanes, sizeof b);
    const UVec both = __builtin_convertvector(a, UVec) | __builtin_convertvector(b, UVec) << 16;
    memcpy(to + j * kPanel, &both, sizeof both);
  }
#endif
}

// Pairs of units [rows][kPanel features][2] as pairs of features [rows / kLanes][kLanes][kPanel][2]: of kLanes rows the
// first units, then the second.
void put_feature_pairs(int64_t rows, const uint16_t* pairs, uint16_t* to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int j = 0; j < 2; ++j, to += kChunk / 2) {
      UVec of[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) memcpy(of + l, pairs + ((r + l) * kPanel + j * kLanes) * 2, sizeof(UVec));
      transpose(of);
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; i += 2) {
        uint16_t* at = to + i * kPanel;
        __builtin_prefetch(at + kChunk, 1);
        __builtin_prefetch(at + kChunk + kPanel, 1);
        const UVec first = (of[i] & 0xFFFFu) | of[i + 1] << 16, second = of[i] >> 16 | (of[i + 1] & 0xFFFF0000u);
        memcpy(at, &first, sizeof first);
        memcpy(at + kPanel, &second, sizeof second);
      }
    }
}

// state [S][width] as pairs of tokens and as the rows that the gradients of the weights want
EQR_INLINE void put_token_operand(const BlockPass& b, const float* state, uint16_t* rows) {
  const TrainingSizes& z = b.z;
  rows += b.module * z.width;
  for (int64_t t = 0; t < z.rows; t += 2)
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const auto value = [&](int64_t row) {
        if (row >= z.S) return Vec{};
        const Vec v = load(state + row * z.width + f);
        store_bf16(rows + row * z.f_stride + f, v);
        return v;
      };
      const Vec even = value(t);
      store_pair(b.s.p + pair_at(t, f, z.x_pairs), even, value(t + 1));
    }
}

// state [S][width], features of panel p, += the sums of a tile
EQR_INLINE void add_sums(const TrainingSizes& z, float* state, int64_t p, int64_t first, int64_t count,
                         const Vec* sums) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < 2; ++j) {
      float* to = state + (first + i) * z.width + p * kPanel + j * kLanes;
      store(to, load(to) + sums[2 * i + j]);
    }
}

void token_forward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  put_token_operand(b, b.s.u, b.kept.u);
  for (int64_t p = 0; p < z.panels; ++p) {
    const int64_t at = p * kPanel;
    uint16_t* slopes = b.kept.token_dgu + (b.module * z.panels + p) * z.token_dgu;
    // In units of two: their hidden units make a pair.
    Vec sums[2 * kUnits * 2];
    for (int64_t first = 0; first < z.token_k; first += kUnits) {
      const uint16_t* weights = b.w.token_in + 2 * first * z.rows;
      panel_tile<TrainingOp, false, kTrainingRows>(b.amx, 2 * kUnits, weights, z.rows, b.s.p + 2 * at, z.x_pairs,
                                                   z.rows / TrainingOp::kDepth, sums,
                                                   reinterpret_cast<const char*>(weights + 2 * kUnits * z.rows));
      for (int64_t i = 0; i < kUnits; i += 2)
        for (int j = 0; j < 2; ++j) {
          const Vec* s = sums + 4 * i + j;
          const SwiGLU even = SwiGLU::of(s[0], s[2]), odd = SwiGLU::of(s[4], s[6]);
          uint16_t* to = slopes + (2 * (first + i) + j) * kPanel;
          store_bf16(to, even.by_gate, even.by_up);
          store_bf16(to + 2 * kPanel, odd.by_gate, odd.by_up);
          store_pair(b.s.wide + pair_at(first + i, j * kLanes, 2 * kPanel), even.h, odd.h);
        }
    }
    put_feature_pairs(z.token_k / 2, b.s.wide, b.kept.token_h + (b.module * z.panels + p) * z.token_h);
    Vec squares[2] = {Vec{}, Vec{}};
    product<false>(b.amx, z.S, b.w.token_out, z.token_out, b.s.wide, 2 * kPanel, z.token_k / 2, b.w.token_in,
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
          if (row >= z.S) return Vec{};
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

// A row of a pairs form: element `column` of the even or the odd one.
EQR_INLINE Vec load_of_pair(const uint16_t* pairs, bool odd) {
  const UVec both = bits<UVec>(load_ints(reinterpret_cast<const int32_t*>(pairs)));
  return bits<Vec>((both << (odd ? 0 : 16)) & 0xFFFF0000u);
}

// Rows [S][stride], kPanel values of each, as the pairs of the present module in panel `panel` of pairs of tokens
template <int kAhead>
EQR_INLINE void put_token_pairs(const BlockPass& b, const uint16_t* rows, int64_t stride, int64_t panel, uint16_t* to) {
  const TrainingSizes& z = b.z;
  to += (panel * z.modules + b.module) * z.pairs * 2 * kPanel;
  const int64_t next = kAhead * z.modules * z.pairs * 2 * kPanel;
  const auto row = [&](int64_t t) { return t < z.S ? rows + t * stride : kNoRow; };
  for (int64_t t = 0; t < z.rows; t += 2, to += 2 * kPanel) {
    if (kAhead) __builtin_prefetch(to + next, 1), __builtin_prefetch(to + next + kPanel, 1);
    pair_rows(row(t), row(t + 1), to);
  }
}

void channel_forward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  const int64_t groups = z.k / kLanes;
  uint16_t* h = b.s.wide;
  const int64_t panel = z.modules * z.pairs * 2 * kPanel;
  uint16_t* slopes = b.kept.dgu + b.module * z.pairs * 2 * kPanel;
  for (int64_t g = 0; g < groups; ++g, slopes += panel) {
    const uint16_t* weights = b.w.gate_up + g * z.width * kPanel;
    Vec gate = Vec{}, up = Vec{};  // of an even token, until the odd one is there
    product<false>(b.amx, z.S, b.s.x, z.x_stride, weights, 2 * kPanel, z.width / 2, weights + z.width * kPanel,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i) {
                       const SwiGLU of = SwiGLU::of(sums[2 * i], sums[2 * i + 1]);
                       const int64_t t = first + i;
                       store_bf16(h + t * z.h_stride + g * kLanes, of.h);
                       uint16_t* to = slopes + t / 2 * 2 * kPanel;
                       __builtin_prefetch(to + panel + t % 2 * kPanel, 1);
                       if (t % 2) {
                         store_pair(to, gate, of.by_gate);
                         store_pair(to + kPanel, up, of.by_up);
                       } else {
                         gate = of.by_gate, up = of.by_up;
                       }
                     }
                   });
    if (z.S % 2) {
      store_pair(slopes + z.S / 2 * 2 * kPanel, gate, Vec{});
      store_pair(slopes + z.S / 2 * 2 * kPanel + kPanel, up, Vec{});
    }
    if (g % 2) put_token_pairs<1>(b, h + (g - 1) * kLanes, z.h_stride, g / 2, b.kept.h);
  }
  for (int64_t p = 0; p < z.panels; ++p) {
    const uint16_t* weights = b.w.down + p * z.k * kPanel;
    product<false>(b.amx, z.S, h, z.h_stride, weights, 2 * kPanel, z.k / 2, weights + z.k * kPanel,
                   [&](int64_t first, int64_t count, const Vec* sums) { add_sums(z, b.s.u, p, first, count, sums); });
  }
  uint16_t* out = b.kept.out + b.module * z.S * z.width;
  for (int64_t t = 0; t < z.S; ++t) {
    float* u = b.s.u + t * z.width;
    Vec squares = Vec{};
    for (int64_t f = 0; f < z.width; f += kLanes) squares = fma(load(u + f), load(u + f), squares);
    const float scale = 1.0f / sqrtf(sum(squares) / float(z.d) + b.norm_eps);
    b.kept.channel_scale[b.module * z.rows + t] = scale;
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const Vec v = load(u + f) * splat(scale);
      store(u + f, v);
      store_bf16(out + t * z.width + f, v);
    }
  }
}

void channel_backward(const BlockPass& b) {
  const TrainingSizes& z = b.z;
  const uint16_t* out = b.kept.out + b.module * z.S * z.width;
  uint16_t* dv = b.kept.dv + b.module * z.pairs * z.x_pairs;
  for (int64_t t = 0; t < z.S; ++t) {
    // The norm: dv = scale (g - out mean(g out))
    float* g = b.s.g + t * z.width;
    const uint16_t* o = out + t * z.width;
    Vec along = Vec{};
    for (int64_t f = 0; f < z.width; f += kLanes) along = fma(load(g + f), load_bf16(o + f), along);
    const Vec mean = splat(sum(along) / float(z.d)), scale = splat(b.kept.channel_scale[b.module * z.rows + t]);
    for (int64_t f = 0; f < z.width; f += kLanes) {
      const Vec v = scale * (load(g + f) - load_bf16(o + f) * mean);
      store(g + f, v);
      store_bf16(b.s.x + t * z.x_stride + f, v);
    }
  }
  const auto row = [&](int64_t t, int64_t f) { return t < z.S ? b.s.x + t * z.x_stride + f : kNoRow; };
  for (int64_t t = 0; t < z.rows; t += 2)
    for (int64_t f = 0; f < z.width; f += kPanel) pair_rows(row(t, f), row(t + 1, f), dv + pair_at(t, f, z.x_pairs));

  const int64_t panel = z.modules * z.pairs * 2 * kPanel;
  const uint16_t* slopes = b.kept.dgu + b.module * z.pairs * 2 * kPanel;
  uint16_t* rows = b.s.wide;
  for (int64_t p = 0; p < z.k / kPanel; ++p, slopes += 2 * panel) {
    const uint16_t* weights = b.w.down_t + p * z.width * kPanel;
    product<false>(b.amx, z.S, b.s.x, z.x_stride, weights, 2 * kPanel, z.width / 2, weights + z.width * kPanel,
                   [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         const Vec dh = sums[2 * i + j];
                         const int64_t t = first + i;
                         const uint16_t* by = slopes + j * panel + t / 2 * 2 * kPanel;
                         __builtin_prefetch(by + 2 * panel + t % 2 * kPanel, 1);
                         store_bf16(rows + t * z.gu_stride + (2 * p + j) * kPanel, dh * load_of_pair(by, t % 2),
                                    dh * load_of_pair(by + kPanel, t % 2));
                       }
                   });
    for (int j = 0; j < 2; ++j) put_token_pairs<0>(b, rows + (2 * p + j) * kPanel, z.gu_stride, 2 * p + j, b.kept.dgu);
  }
  for (int64_t p = 0; p < z.panels; ++p) {
    const uint16_t* weights = b.w.gate_up_t + p * 2 * z.k * kPanel;
    product<false>(b.amx, z.S, rows, z.gu_stride, weights, 2 * kPanel, z.k, weights + 2 * z.k * kPanel,
                   [&](int64_t first, int64_t count, const Vec* sums) { add_sums(z, b.s.g, p, first, count, sums); });
  }
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
  put_token_operand(b, b.s.g, b.kept.du);
  for (int64_t p = 0; p < z.panels; ++p) {
    uint16_t* slopes = b.kept.token_dgu + (b.module * z.panels + p) * z.token_dgu;
    product<false>(b.amx, z.token_k, b.w.token_out_t, z.rows, b.s.p + 2 * p * kPanel, z.x_pairs, z.pairs,
                   b.w.token_in_t, [&](int64_t first, int64_t count, const Vec* sums) {
                     for (int64_t i = 0; i < count; ++i)
                       for (int j = 0; j < 2; ++j) {
                         const Vec dh = sums[2 * i + j];
                         const uint16_t* by = slopes + (2 * (first + i) + j) * kPanel;
                         __builtin_prefetch(by + 2 * kTrainingRows * kPanel);
                         store_pair(b.s.wide + ((first + i) * kPanel + j * kLanes) * 2, dh * load_bf16(by),
                                    dh * load_bf16(by + kLanes));
                       }
                   });
    put_feature_pairs(z.token_k, b.s.wide, slopes);
    product<false>(b.amx, z.S, b.w.token_in_t, z.token_in, b.s.wide, 2 * kPanel, z.token_k, b.w.token_out_t,
                   [&](int64_t first, int64_t count, const Vec* sums) { add_sums(z, b.s.g, p, first, count, sums); });
  }
}

// gradient, of row `first` on, += the sums of a tile
EQR_INLINE void add_tile(float* gradient, int64_t first, int64_t count, const Vec* sums) {
  float* to = gradient + first * kPanel;
  for (int64_t i = 0; i < 2 * count; ++i) {
    store(to + i * kLanes, load(to + i * kLanes) + sums[i]);
    __builtin_prefetch(to + (2 * count + i) * kLanes, 1);  // of the next tile
  }
}

// rows [width][t_stride] <- pairs of tokens [modules][pairs][x_pairs]
void put_by_feature(const TrainingSizes& z, const uint16_t* pairs, uint16_t* to) {
  for (int64_t p = 0; p < z.modules * z.pairs; p += kLanes)
    for (int64_t f = 0; f < z.width; f += kLanes) {
      UVec of[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) memcpy(of + l, pairs + (p + l) * z.x_pairs + 2 * f, sizeof(UVec));
      transpose(of);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) memcpy(to + (f + i) * z.t_stride + 2 * p, of + i, sizeof(UVec));
    }
}

// gradient [panels][width][kPanel] += a @ b over the pairs of tokens of all modules, b in panels
void add_over_tokens(const TrainingSizes& z, const Scratch& s, AmxShape& amx, const uint16_t* a, int64_t panels,
                     const uint16_t* b, float* gradient) {
  constexpr bool kPairs = !kUsesAmx<TrainingOp>;
  const int64_t pairs = z.modules * z.pairs;
  if constexpr (!kPairs) put_by_feature(z, a, s.by_feature);
  for (int64_t p = 0; p < panels; ++p, b += pairs * 2 * kPanel, gradient += z.width * kPanel)
    product<kPairs>(amx, z.width, kPairs ? a : s.by_feature, kPairs ? z.x_pairs : z.t_stride, b, 2 * kPanel, pairs,
                    b + pairs * 2 * kPanel,
                    [&](int64_t first, int64_t count, const Vec* sums) { add_tile(gradient, first, count, sums); });
}

// `tile` of tile.h with b in chunks of kLanes steps. `prefetch` goes from chunk to chunk as b does.
template <int kRows>
__attribute__((noinline)) void chunks_tile(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t chunk_stride,
                                           int64_t chunks, Vec* __restrict out, const char* prefetch) {
  Vec c[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) c[i][0] = c[i][1] = Vec{};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint16_t* columns = b;
    for (int k = 0; k < kLanes; ++k) {
      const IVec first = Bf16Dot::load_b(columns), second = Bf16Dot::load_b(columns + kPanel);
      if (k % 4 == 0) __builtin_prefetch(prefetch + k / 4 * kPrefetchLine, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const IVec row = Bf16Dot::broadcast(a + i * a_stride);
        c[i][0] = Bf16Dot::multiply_add(row, first, c[i][0]);
        c[i][1] = Bf16Dot::multiply_add(row, second, c[i][1]);
      }
      a += Bf16Dot::kDepth;
      columns += 2 * kPanel;
    }
    b += chunk_stride;
    prefetch += 2 * chunk_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) out[2 * i] = c[i][0], out[2 * i + 1] = c[i][1];
}

static_assert(!kUsesAmx<TrainingOp> || TrainingOp::kDepth == 2 * kLanes, "a step of AMX takes a chunk");
template <int kRows = kTrainingRows>
EQR_INLINE void chunks_tile_of(AmxShape& amx, int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                               int64_t chunk_stride, int64_t chunks, Vec* out, const char* prefetch) {
  if constexpr (kUsesAmx<TrainingOp>) {
    amx.set(rows);
    return amx_tile<TrainingOp>(rows, {a, a_stride, TrainingOp::kDepth}, {b, 2 * kPanel, chunk_stride}, chunks, out,
                                prefetch, 2 * chunk_stride);
  } else {
    if (rows == kRows) return chunks_tile<kRows>(a, a_stride, b, chunk_stride, chunks, out, prefetch);
    if constexpr (kRows > 1) chunks_tile_of<kRows - 1>(amx, rows, a, a_stride, b, chunk_stride, chunks, out, prefetch);
  }
}

// gradient [panels][S][kPanel] += a @ b over the pairs of features of all modules, b in chunks
void add_over_features(const TrainingSizes& z, AmxShape& amx, const uint16_t* a, int64_t panels, const uint16_t* b,
                       int64_t chunk_stride, float* gradient) {
  constexpr int64_t kFetched = (kUsesAmx<TrainingOp> ? kAmxPrefetched : kLanes / 4) * kPrefetchLine;
  const Parts tiles = parts_of(z.S, kTrainingRows);
  for (int64_t p = 0; p < panels; ++p, b += kChunk, gradient += z.S * kPanel) {
    const char* fetch = reinterpret_cast<const char*>(b + kChunk);  // the next panel's chunk, a part by each tile
    for (int64_t t = 0; t < tiles.parts; ++t, fetch += kFetched) {
      const int64_t first = tiles.begin(t), count = tiles.begin(t + 1) - first;
      Vec sums[kTrainingRows * 2];
      chunks_tile_of(amx, count, a + first * z.f_stride, z.f_stride, b, chunk_stride, z.modules * z.panels, sums,
                     fetch);
      add_tile(gradient, first, count, sums);
    }
  }
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

void block_weights(const TrainingSizes& z, const Kept& k, const Scratch& s, AmxShape& amx, const Gradients& g) {
  add_over_tokens(z, s, amx, k.x, 2 * z.k / kPanel, k.dgu, g.gate_up);
  add_over_tokens(z, s, amx, k.dv, z.k / kPanel, k.h, g.down);
  add_over_features(z, amx, k.u, 2 * z.token_k / kPanel, k.token_dgu, z.token_dgu, g.token_in);
  add_over_features(z, amx, k.du, z.token_k / kPanel, k.token_h, z.token_h, g.token_out);
}

}  // namespace eqr::cpu::EQR_ISA
