// Where everything lies: the sizes that follow from a Shape, a trajectory's workspace, and the packed weights.
// The state is held in feature panels, [panels][S][kPanel], so that a vector is always a run of features of one token:
// neither mixer needs a transpose.
#pragma once

#include "cpu/block.h"
#include "cpu/kernels/tile.h"
#include "cpu/packed.h"

namespace eqr::cpu::EQR_ISA {

// Which operands the products of a precision take.
template <Precision>
struct Ops;
template <>
struct Ops<Precision::fp32> {
  typedef F32 Token;    // token mixing: weights are broadcast, activations are the panel
  typedef F32 Channel;  // channel mixing and attention projections: activations are broadcast, weights are the panel
  typedef F32 Head;
};
template <bool kYes, class Yes, class No>
struct Choose {
  typedef Yes Type;
};
template <class Yes, class No>
struct Choose<false, Yes, No> {
  typedef No Type;
};
// What the level has: of whole tiles, of bf16 pairs and int8 quadruples, or neither.
template <class Amx, class Dot, class Plain>
using Best = typename Choose<kHasAmx, Amx, typename Choose<kHasBf16, Dot, Plain>::Type>::Type;
template <>
struct Ops<Precision::bf16> {
  typedef Best<Bf16Amx, Bf16Dot, F32> Token;
  typedef Best<Bf16Amx, Bf16Dot, F32Bf16> Channel;
  typedef Channel Head;
};
template <>
struct Ops<Precision::int8> {
  typedef Ops<Precision::bf16>::Token Token;
  typedef Best<Int8Amx, Int8Dot, Int8Pair> Channel;
  typedef Ops<Precision::bf16>::Head Head;
};

// x and h: the operand that channel mixing broadcasts or, in int8, what it is quantised from.
template <Precision kPrecision>
struct Operand {
  typedef typename Ops<kPrecision>::Channel::A Type;
};
template <>
struct Operand<Precision::int8> {
  typedef float Type;
};

template <Precision kPrecision>
constexpr bool kRoundsToBf16 = kPrecision != Precision::fp32;

// What is smaller counts as zero in int8, or its reciprocal would overflow.
constexpr float kLeastUnit = 0x1p-120f;

template <class Op>
constexpr bool kIsInt8 = sizeof(typename Op::B) == 1;

EQR_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
// Never a power of two, or rows would compete for the same sets of the first-level cache; with AMX, which loads whole
// cache lines, each row of any operand begins one.
EQR_INLINE int64_t row_stride(int64_t count) {
  constexpr int64_t kPad = kHasAmx ? 64 : 16;
  return round_up(count, 2 * kPad) + kPad;
}

template <class Op>
EQR_INLINE int64_t steps_of(int64_t depth) {
  return (depth + Op::kDepth - 1) / Op::kDepth;
}

struct Sizes {
  int64_t S, d, V, k, token_k, heads, head_dim;
  int64_t panels;              // of features
  int64_t width;               // features with the padding of the last panel
  int64_t head_width;          // features of a head, padded to whole vectors
  int64_t key_panels;          // of kPanel keys
  int64_t x_stride, h_stride;  // elements, of any operand of channel mixing and of its hidden units
  int64_t items;               // most that a phase is divided into
};

// The rows of a product in groups of tiles, each group about as much work as any other item of a phase: some ten
// microseconds.
struct RowGroups {
  Parts tiles, groups;  // of rows; of tiles
};
template <class Op>
EQR_INLINE RowGroups row_groups(int64_t rows, int64_t steps) {
  constexpr int64_t kSteps = kUsesAmx<Op> ? 384 : 2304;  // a step of AMX takes longer
  const Parts tiles = parts_of(rows, kRowsOf<Op>);
  return {tiles, parts_of(tiles.parts, steps < kSteps ? kSteps / steps : 1)};
}

EQR_INLINE int64_t most_items(const Shape& s, const Sizes& z) {
  const int64_t tiles = parts_of(z.S, kTileRows).parts, columns = 3 * z.d > z.k * 2 ? 3 * z.d : z.k * 2;
  const int64_t of_products = (columns + kPanel - 1) / kPanel * tiles, of_heads = s.heads * tiles;
  const int64_t of_noise = (z.S * z.d + kBlock - 1) / kBlock;
  const int64_t most = of_products > of_heads ? of_products : of_heads;
  return most > of_noise ? most : of_noise;
}

EQR_INLINE Sizes sizes_of(const Shape& s) {
  Sizes z;
  z.S = s.tokens, z.d = s.features, z.V = s.vocabulary, z.k = s.hidden, z.token_k = s.mixer_hidden, z.heads = s.heads;
  z.head_dim = s.heads ? s.features / s.heads : 0;
  z.panels = (s.features + kPanel - 1) / kPanel;
  z.width = z.panels * kPanel;
  z.head_width = round_up(z.head_dim, kLanes);
  z.key_panels = (s.tokens + kPanel - 1) / kPanel;
  z.x_stride = row_stride(z.width);
  z.h_stride = row_stride(z.k);
  z.items = most_items(s, z);
  return z;
}

// A trajectory's buffers. Those marked * hold fp32, bf16 or integers, as the precision's operands want them.
struct Workspace {
  StepOutput* out;
  float *z_H, *z_L, *old_H, *old_L;  // [panels][S][kPanel]; old: at the start of the outer step
  float* u;                          // [panels][S][kPanel], the residual stream
  char* token_operand;               // * [panels][depth / kB][kPanel][kB], u as token mixing reads it; fp32: u itself
  char* x;                           // * [S][x_stride], u as channel mixing reads it
  char* h;                           // * [S][h_stride], hidden units
  char* quantised;                   // * [S][h_stride], x or h in int8
  float* quantised_scale;            // [S]
  float* squares;                    // [panels][S], each panel's part of the squared norm of a token
  float* eps;                        // [S d] and a panel more, the noise of an update
  float* norms;                      // [panels][4]: change and size of z_H, then of z_L
  float* logits;                     // [S][V]
  float* qkv;                        // [S][3 d rounded up to panels]
  float* q;                          // [heads][S][head_dim], scaled
  float* keys;                       // [heads][key_panels][head_dim][kPanel]
  float* values;                     // [heads][S][head_width]
  uint32_t* phase;                   // the last one that a team has shared
  uint32_t* claims;                  // [items of a phase], the phase in which each was last claimed
  int64_t bytes;
};

EQR_INLINE Workspace workspace_of(const Packed* packed, const Sizes& z, void* base) {
  Workspace w;
  uintptr_t at = reinterpret_cast<uintptr_t>(base);
  const auto take = [&](int64_t bytes) {
    char* here = reinterpret_cast<char*>(at);
    at += uintptr_t(round_up(bytes, 64));
    return here;
  };
  const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
  const int64_t state = z.S * z.width;
  w.out = reinterpret_cast<StepOutput*>(take(sizeof(StepOutput)));
  w.z_H = floats(state), w.z_L = floats(state), w.old_H = floats(state), w.old_L = floats(state), w.u = floats(state);
  w.token_operand = reinterpret_cast<char*>(w.u);
  if (packed->precision != Precision::fp32 && !z.heads)
    w.token_operand = take(4 * round_up(z.S, Ops<Precision::bf16>::Token::kDepth) * z.width);
  w.x = take(4 * z.S * z.x_stride);
  int64_t hidden = z.S * z.h_stride;
  // The token mixer keeps a panel's hidden units here, the attention its sums: neither while channel mixing needs it.
  const int64_t mixer = z.heads ? z.heads * z.S * z.head_width : z.width * z.token_k;
  w.h = take(4 * (hidden > mixer ? hidden : mixer));
  const bool int8 = packed->precision == Precision::int8;
  const int64_t widest = z.h_stride > z.x_stride ? z.h_stride : z.x_stride;
  w.quantised = take(int8 ? 2 * z.S * widest : 0);
  w.quantised_scale = floats(int8 ? z.S : 0);
  w.squares = floats(z.panels * z.S);
  w.eps = floats(z.S * z.d + kPanel);
  w.norms = floats(z.panels * 4);
  w.logits = floats(z.S * z.V);
  w.qkv = floats(z.heads ? z.S * round_up(3 * z.d, kPanel) : 0);
  w.q = floats(z.heads ? z.heads * z.S * z.head_dim : 0);
  w.keys = floats(z.heads ? z.heads * z.key_panels * z.head_dim * kPanel : 0);
  w.values = floats(z.heads ? z.heads * z.S * z.head_width : 0);
  w.phase = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t)));
  w.claims = reinterpret_cast<uint32_t*>(take(4 * z.items));
  w.bytes = int64_t(at - reinterpret_cast<uintptr_t>(base));
  return w;
}

// ---- packed weights ------------------------------------------------------------------------------------------------

template <class T>
EQR_INLINE const T* at(const Packed* packed, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(packed) + offset);
}

EQR_INLINE const PackedLayer& layer_of(const Packed* packed, int64_t layer) {
  return at<PackedLayer>(packed, packed->layers)[layer];
}

// A matrix [n, depth] that is read as panels of kPanel rows of it: [panels][depth / kB][kPanel][kB] and, in int8, the
// scales of the rows and kZeroPoint times their sums, [panels][kPanel] each.
template <class Op>
struct PanelMatrix {
  const typename Op::B* weights;
  const float* scale;
  const int32_t* correction;
  int64_t steps;
  const typename Op::B* panel(int64_t p) const { return weights + p * steps * kPanel * Op::kDepth; }
};

template <class Op>
EQR_INLINE int64_t panel_matrix_bytes(int64_t panels, int64_t depth) {
  const int64_t weights = panels * steps_of<Op>(depth) * kPanel * Op::kDepth * int64_t(sizeof(typename Op::B));
  return round_up(weights, 64) + (kIsInt8<Op> ? 2 * panels * kPanel * 4 : 0);
}

template <class Op>
EQR_INLINE PanelMatrix<Op> panel_matrix(const Packed* packed, int64_t offset, int64_t panels, int64_t depth) {
  PanelMatrix<Op> m;
  m.steps = steps_of<Op>(depth);
  m.weights = at<typename Op::B>(packed, offset);
  m.scale = at<float>(packed, offset + panel_matrix_bytes<Op>(panels, depth) - 2 * panels * kPanel * 4);
  m.correction = reinterpret_cast<const int32_t*>(m.scale + panels * kPanel);
  return m;
}

}  // namespace eqr::cpu::EQR_ISA
