// Where everything of a training step lies: sizes, the operands made of the weights, and a worker's workspace.
// The operands of products are bf16, in one of two forms:
//   rows   [rows][columns], the summed axis along the columns
//   pairs  [rows / 2][columns][2], the summed axis along the rows
// A product broadcasts either and loads pairs; a tile of AMX takes rows and pairs. What is large is held in panels of
// kPanel columns, so that it is written and read in the order of its addresses.
#pragma once

#include "cpu/kernels/layout.h"
#include "cpu/training_step.h"

namespace eqr::cpu::EQR_ISA {

typedef Best<Bf16Amx, Bf16Dot, Bf16Dot> TrainingOp;

// Strides are padded by a cache line: powers of two would let rows compete for the same sets of the caches.
constexpr int64_t kPad = 32;
constexpr int64_t kChunk = kLanes * 2 * kPanel;  // bf16 values of a panel's features, in pairs, of kPanel columns

struct TrainingSizes {
  int64_t S, d, V, k, token_k, layers, modules;  // modules: updates of the last latent recursion
  int64_t pairs, rows;                           // of tokens, padded by zeros to whole steps of a product
  int64_t width, panels;                         // of features, with the padding of the last panel
  int64_t x_stride, h_stride, gu_stride;         // bf16 values of a row: features, hidden units, gates and ups
  int64_t x_pairs;                               // bf16 values of a pair of rows of features
  int64_t token_out, token_in;                   // bf16 values of a row of mixer_out, of mixer_in transposed
  int64_t token_h, token_dgu;                    // bf16 values of a panel's pairs of features
  int64_t f_stride, t_stride;                    // bf16 values of a row of all modules' features, and tokens
};

EQR_INLINE TrainingSizes training_sizes(const Shape& s) {
  TrainingSizes z;
  z.S = s.tokens, z.d = s.features, z.V = s.vocabulary, z.k = s.hidden, z.token_k = s.mixer_hidden;
  z.layers = s.layers, z.modules = s.L_cycles + 1;
  z.rows = round_up(z.S, TrainingOp::kDepth), z.pairs = z.rows / 2;
  z.width = round_up(z.d, kPanel), z.panels = z.width / kPanel;
  z.x_stride = z.width + kPad, z.h_stride = z.k + kPad, z.gu_stride = 2 * z.k + kPad;
  z.x_pairs = 2 * z.width + kPad;
  z.token_out = z.token_k + kPad, z.token_in = 2 * z.token_k + kPad;
  z.token_h = z.token_k * kPanel + kChunk, z.token_dgu = 2 * z.token_k * kPanel + kChunk;
  z.f_stride = z.modules * z.width + kPad, z.t_stride = z.modules * z.rows + kPad;
  return z;
}

// Lays one thing after another, at multiples of 64 bytes.
struct Laying {
  char* base;
  int64_t bytes;
  template <class T>
  [[gnu::always_inline]] T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * int64_t(sizeof(T)), 64);
    return here;
  }
};

// Gates and ups lie side by side. Token mixing: row 2 i is unit i's gate, row 2 i + 1 its up. Channel mixing: kLanes
// gates, then the ups of the same units.
EQR_INLINE int64_t channel_column(int64_t unit, bool up) {
  return unit / kLanes * kPanel + (up ? kLanes : 0) + unit % kLanes;
}

struct TrainedLayer {
  uint16_t* token_in;     // rows [2 token_k][rows]
  uint16_t* token_out;    // rows [S][token_k]
  uint16_t* token_out_t;  // rows [token_k][rows]
  uint16_t* token_in_t;   // rows [S][2 token_k]
  uint16_t* gate_up;      // panels of [2 k] columns, summed over features
  uint16_t* down;         // panels of [d], over k
  uint16_t* down_t;       // panels of [k], over features
  uint16_t* gate_up_t;    // panels of [d], over 2 k
};

struct TrainedHeads {
  uint16_t* lm_head;         // panels of [V], over features
  float* lm_rows;            // [V][width], rounded to bf16
  float* embedding;          // [V][width], sqrt(d) times what is rounded to bf16
  float *q_weight, *q_bias;  // [width], [1], rounded
};

EQR_INLINE int64_t panels_size(int64_t columns, int64_t depth) {
  return round_up(columns, kPanel) * round_up(depth, 2);
}

EQR_INLINE TrainedHeads lay_heads(const TrainingSizes& z, Laying& l) {
  TrainedHeads h;
  h.lm_head = l.take<uint16_t>(panels_size(z.V, z.width));
  h.lm_rows = l.take<float>(z.V * z.width), h.embedding = l.take<float>(z.V * z.width);
  h.q_weight = l.take<float>(z.width), h.q_bias = l.take<float>(1);
  return h;
}

EQR_INLINE TrainedLayer lay_layer(const TrainingSizes& z, Laying& l) {
  TrainedLayer w;
  w.token_in = l.take<uint16_t>(2 * z.token_k * z.rows), w.token_out = l.take<uint16_t>(z.S * z.token_out);
  w.token_out_t = l.take<uint16_t>(z.token_k * z.rows), w.token_in_t = l.take<uint16_t>(z.S * z.token_in);
  w.gate_up = l.take<uint16_t>(panels_size(2 * z.k, z.width)), w.down = l.take<uint16_t>(panels_size(z.d, z.k));
  w.down_t = l.take<uint16_t>(panels_size(z.k, z.width)), w.gate_up_t = l.take<uint16_t>(panels_size(z.d, 2 * z.k));
  return w;
}

// What a layer's forward passes keep for the backward ones, and what both leave for the gradients of the weights: of
// all modules, so that those are products over the tokens or features of all of them.
// The slopes of a SwiGLU are kLanes of its result by the gate, then as many by the up.
struct Kept {
  float* token_scale;    // [modules][width], 1 / norm over tokens
  float* channel_scale;  // [modules][rows], 1 / norm over features
  uint16_t* out;         // [modules][S][width], the block's result
  uint16_t* x;           // pairs [modules][pairs][x_pairs], what channel mixing reads
  uint16_t* dv;          // pairs, like x: gradient of what channel mixing adds
  uint16_t* h;           // pairs in panels [k / kPanel][modules][pairs][kPanel][2], hidden units of channel mixing
  uint16_t* dgu;         // the same, [2 k / kPanel] panels: its slopes, then in their place the gradient
  uint16_t* u;           // rows [S][f_stride], what token mixing reads
  uint16_t* du;          // rows, like u: gradient of what token mixing adds
  uint16_t* token_h;     // pairs of features [modules][panels][token_k / kPanel][kLanes][kPanel][2], padded
  uint16_t* token_dgu;   // the same, of [2 token_k / kPanel]: slopes [token_k][2][2][kLanes], then the gradient
};

// fp32, of a layer, in panels of kPanel columns. Those of gates and ups are in the order of channel_column; unit u of
// token_out is where unit u / 2 has its gate (u even) or its up.
struct Gradients {
  float* token_in;   // [2 token_k / kPanel][S][kPanel]
  float* token_out;  // [token_k / kPanel][S][kPanel]
  float* gate_up;    // [2 k / kPanel][width][kPanel]
  float* down;       // [k / kPanel][width][kPanel]
};

struct HeadGradients {
  float *embedding, *lm_head;  // [V][width]
  float *q_weight, *q_bias;    // [width], [1]
};

struct Scratch {
  float *z_H, *z_L, *u, *g, *g_L, *eps;  // [rows][width]; eps [S d] and a block more
  uint16_t* x;                           // rows [rows][x_stride]
  uint16_t* p;                           // pairs [pairs][x_pairs]
  uint16_t* by_feature;                  // with AMX, rows [width][t_stride]: x or dv of all modules, transposed
  uint16_t* wide;  // rows [rows][gu_stride], or a panel's pairs of token mixing [token_k][kPanel][2]
  float* logits;   // [S][V rounded up to panels], then their gradients
};

EQR_INLINE Kept lay_kept(const TrainingSizes& z, Laying& l) {
  Kept k;
  const int64_t m = z.modules, tokens = m * z.pairs, features = m * z.width;
  k.token_scale = l.take<float>(features);
  k.channel_scale = l.take<float>(m * z.rows);
  k.out = l.take<uint16_t>(m * z.S * z.width);
  k.x = l.take<uint16_t>(tokens * z.x_pairs), k.dv = l.take<uint16_t>(tokens * z.x_pairs);
  k.h = l.take<uint16_t>(2 * tokens * z.k), k.dgu = l.take<uint16_t>(4 * tokens * z.k);
  k.u = l.take<uint16_t>(z.S * z.f_stride), k.du = l.take<uint16_t>(z.S * z.f_stride);
  k.token_h = l.take<uint16_t>(m * z.panels * z.token_h), k.token_dgu = l.take<uint16_t>(m * z.panels * z.token_dgu);
  return k;
}

EQR_INLINE Gradients lay_gradients(const TrainingSizes& z, Laying& l) {
  Gradients g;
  g.token_in = l.take<float>(2 * z.token_k * z.S), g.token_out = l.take<float>(z.token_k * z.S);
  g.gate_up = l.take<float>(2 * z.k * z.width), g.down = l.take<float>(z.width * z.k);
  return g;
}

// The gradients come first: they are what begins at zero in every training step.
EQR_INLINE HeadGradients lay_head_gradients(const TrainingSizes& z, Laying& l) {
  HeadGradients g;
  g.embedding = l.take<float>(z.V * z.width), g.lm_head = l.take<float>(z.V * z.width);
  g.q_weight = l.take<float>(z.width), g.q_bias = l.take<float>(1);
  return g;
}

EQR_INLINE Scratch lay_scratch(const TrainingSizes& z, Laying& l) {
  Scratch s;
  const int64_t state = z.rows * z.width, wide = z.rows * z.gu_stride, panel = 2 * z.token_k * kPanel;
  s.z_H = l.take<float>(state), s.z_L = l.take<float>(state), s.u = l.take<float>(state), s.g = l.take<float>(state);
  s.g_L = l.take<float>(state), s.eps = l.take<float>(z.S * z.d + kBlock + kPanel);
  s.x = l.take<uint16_t>(z.rows * z.x_stride), s.p = l.take<uint16_t>(z.pairs * z.x_pairs);
  s.by_feature = l.take<uint16_t>(kUsesAmx<TrainingOp> ? z.width * z.t_stride : 0);
  s.wide = l.take<uint16_t>(wide > panel ? wide : panel);
  s.logits = l.take<float>(z.S * round_up(z.V, kPanel));
  return s;
}

}  // namespace eqr::cpu::EQR_ISA
