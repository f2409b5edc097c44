// One row of a training step: the last latent recursion forward, the heads, the objective, and all of it backward; or
// forward and backward apart, for an objective of the caller's.
// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/block_gradient.h"
#include "cpu/kernels/normal_block.h"
#include "cpu/kernels/objective.h"

namespace eqr::cpu::EQR_ISA {
namespace {

struct Layout {  // of a worker's workspace, whose gradients come first
  HeadGradients heads;
  char* layers;  // Gradients of each
  int64_t gradient_bytes;
  Scratch scratch;
  char* kept;  // Kept of each layer
  int64_t bytes;
};

Layout layout(const TrainingSizes& z, void* workspace) {
  Layout out;
  Laying l = {static_cast<char*>(workspace), 0};
  out.heads = lay_head_gradients(z, l);
  out.layers = l.base + l.bytes;
  for (int64_t i = 0; i < z.layers; ++i) lay_gradients(z, l);
  out.gradient_bytes = l.bytes;
  out.scratch = lay_scratch(z, l);
  out.kept = l.base + l.bytes;
  for (int64_t i = 0; i < z.layers; ++i) lay_kept(z, l);
  out.bytes = l.bytes;
  return out;
}

class Row {
 public:
  Row(const Shape& shape, void* packed, void* workspace, const TrainingRow& row)
      : shape_(shape), z_(training_sizes(shape)), at_(layout(z_, workspace)), s_(at_.scratch), row_(row) {
    Laying l = {static_cast<char*>(packed), 0};
    heads_ = lay_heads(z_, l);
    weights_ = l.base + l.bytes;
  }

  TrainingResult run(const TrainingTarget& target, float* z_H, float* z_L) {
    recurse();
    const float q_halt = heads();
    const Objective o = objective(z_.S, z_.V, columns(), s_.logits, q_halt, target.labels, target.share);
    backward(o.dq);
    double change = 0.0, size = 0.0;
    measure(s_.z_H, target.start_H, change, size);
    measure(s_.z_L, target.start_L, change, size);
    give_states(z_H, z_L);
    return {o.loss, q_halt, float(sqrt(change / size)), o.exact};
  }

  float run_forward(float* z_H, float* z_L, float* logits) {
    recurse();
    const float q_halt = heads();
    for (int64_t t = 0; t < z_.S; ++t) memcpy(logits + t * z_.V, s_.logits + t * columns(), size_t(4 * z_.V));
    give_states(z_H, z_L);
    return q_halt;
  }

  void run_backward(const float* of_logits, float of_q_halt) {
    recurse();
    put_head_operand();
    for (int64_t t = 0; t < z_.S; ++t) memcpy(s_.logits + t * columns(), of_logits + t * z_.V, size_t(4 * z_.V));
    backward(of_q_halt);
  }

 private:
  int64_t columns() const { return round_up(z_.V, kPanel); }  // of s_.logits
  const float* embedding(int64_t t) const { return heads_.embedding + row_.tokens[t] * z_.width; }

  void recurse() {
    take(row_.last_H, s_.z_H);
    take(row_.last_L, s_.z_L);
    const int64_t last = z_.modules - 1;
    for (int64_t m = 0; m < last; ++m) {
      for_all([&](int64_t i, int64_t t, int64_t f) {
        return load(s_.z_L + i) + (load(s_.z_H + i) + load(embedding(t) + f));
      });
      forward(m, s_.z_L);
    }
    for_all([&](int64_t i, int64_t, int64_t) { return load(s_.z_H + i) + load(s_.z_L + i); });
    forward(last, s_.z_H);
  }

  void take(const float* from, float* state) const {
    for (int64_t t = 0; t < z_.S; ++t) {
      memcpy(state + t * z_.width, from + t * z_.d, size_t(4 * z_.d));
      // A row that diverged may have left NaN in the padding.
      memset(state + t * z_.width + z_.d, 0, size_t(4 * (z_.width - z_.d)));
    }
  }
  void give_states(float* z_H, float* z_L) const {
    for (int64_t t = 0; t < z_.S; ++t) {
      memcpy(z_H + t * z_.d, s_.z_H + t * z_.width, size_t(4 * z_.d));
      memcpy(z_L + t * z_.d, s_.z_L + t * z_.width, size_t(4 * z_.d));
    }
  }
  void measure(const float* state, const float* start, double& change, double& size) const {
    for (int64_t t = 0; t < z_.S; ++t) {
      float changed = 0.0f, squares = 0.0f;
      for (int64_t f = 0; f < z_.d; ++f) {
        const float v = state[t * z_.width + f], difference = v - start[t * z_.d + f];
        changed += difference * difference;
        squares += v * v;
      }
      change += double(changed), size += double(squares);
    }
  }

  // u <- value(index in a state, token, feature)
  template <class Value>
  void for_all(const Value& value) {
    for (int64_t t = 0; t < z_.S; ++t)
      for (int64_t f = 0; f < z_.width; f += kLanes) store(s_.u + t * z_.width + f, value(t * z_.width + f, t, f));
  }

  template <class Visit>
  void each_layer(int64_t module, bool backwards, const Visit& visit) {
    for (int64_t n = 0; n < z_.layers; ++n) {
      const int64_t layer = backwards ? z_.layers - 1 - n : n;
      Laying w = {weights_, 0}, k = {at_.kept, 0};
      TrainedLayer weights = lay_layer(z_, w);
      Kept kept = lay_kept(z_, k);
      for (int64_t i = 0; i < layer; ++i) weights = lay_layer(z_, w), kept = lay_kept(z_, k);
      visit(BlockPass{z_, weights, kept, s_, amx_, module, shape_.norm_eps});
    }
  }

  // state <- keep * state + lambda * blocks(u) + noise
  void forward(int64_t module, float* state) {
    each_layer(module, false, block_forward);
    const bool noisy = row_.noise_scale != 0.0f;
    if (noisy) draw_noise(uint32_t((shape_.H_cycles - 1) * z_.modules + module));
    for (int64_t t = 0; t < z_.S; ++t)
      for (int64_t f = 0; f < z_.width; f += kLanes) {
        const int64_t i = t * z_.width + f;
        Vec out = fma(splat(shape_.lambda), load(s_.u + i), splat(shape_.keep) * load(state + i));
        if (noisy) {
          Vec eps = load(s_.eps + t * z_.d + f);
          if (f + kLanes > z_.d) eps = first_lanes(eps, z_.d - f);
          out = fma(splat(row_.noise_scale), eps, out);
        }
        store(state + i, out);
      }
  }

  void draw_noise(uint32_t update) {
    const int64_t count = z_.S * z_.d, blocks = (count + kBlock - 1) / kBlock;
    const RngRow row = rng_row(row_.rng, kFirstUpdate + update);
    for (int64_t b = 0; b < blocks; ++b) {
      const Span s = span(b, count, blocks);
      normal_block(row, s.first_counter, s.counters, s_.eps + s.start);
    }
  }

  // s_.x <- z_H
  void put_head_operand() {
    for (int64_t t = 0; t < z_.S; ++t)
      for (int64_t f = 0; f < z_.width; f += kLanes)
        store_bf16(s_.x + t * z_.x_stride + f, load(s_.z_H + t * z_.width + f));
  }

  // s_.logits <- logits; returns q_halt
  float heads() {
    put_head_operand();
    for (int64_t v = 0; v < columns(); v += kPanel)
      product<false>(amx_, z_.S, s_.x, z_.x_stride, heads_.lm_head + v * z_.width, 2 * kPanel, z_.width / 2,
                     heads_.lm_rows, [&](int64_t first, int64_t count, const Vec* sums) {
                       for (int64_t i = 0; i < count; ++i)
                         for (int j = 0; j < 2; ++j)
                           store(s_.logits + (first + i) * columns() + v + j * kLanes, sums[2 * i + j]);
                     });
    Vec q = Vec{};
    for (int64_t f = 0; f < z_.width; f += kLanes) q = fma(load(s_.z_H + f), load(heads_.q_weight + f), q);
    return sum(q) + *heads_.q_bias;
  }

  // From the gradients of the logits, in their place, and of q_halt. s_.g <- gradient of z_H
  void heads_backward(float dq) {
    for (int64_t f = 0; f < z_.width; f += kLanes) {
      for (int64_t t = 0; t < z_.S; ++t) {
        Vec g = t == 0 ? splat(dq) * load(heads_.q_weight + f) : Vec{};
        const float* d = s_.logits + t * columns();
        for (int64_t v = 0; v < z_.V; ++v) g = fma(splat(d[v]), load(heads_.lm_rows + v * z_.width + f), g);
        store(s_.g + t * z_.width + f, g);
      }
      for (int64_t v = 0; v < z_.V; ++v) {
        Vec w = load(at_.heads.lm_head + v * z_.width + f);
        for (int64_t t = 0; t < z_.S; ++t)
          w = fma(splat(s_.logits[t * columns() + v]), load_bf16(s_.x + t * z_.x_stride + f), w);
        store(at_.heads.lm_head + v * z_.width + f, w);
      }
      float* weight = at_.heads.q_weight + f;
      store(weight, fma(splat(dq), load(s_.z_H + f), load(weight)));
    }
    *at_.heads.q_bias += dq;
  }

  // As heads_backward. Of the states that the last recursion began with no gradient is wanted.
  void backward(float dq) {
    heads_backward(dq);
    const int64_t state = z_.S * z_.width;
    for (int64_t m = z_.modules - 1; m >= 0; --m) {
      for (int64_t i = 0; i < state; i += kLanes) store(s_.g + i, splat(shape_.lambda) * load(s_.g + i));
      each_layer(m, true, block_backward);
      if (m == z_.modules - 1) {
        memcpy(s_.g_L, s_.g, size_t(4 * state));
        continue;
      }
      for (int64_t t = 0; t < z_.S; ++t) {
        float* of_token = at_.heads.embedding + row_.tokens[t] * z_.width;
        for (int64_t f = 0; f < z_.width; f += kLanes) {
          const int64_t i = t * z_.width + f;
          const Vec g = load(s_.g + i), next = fma(splat(shape_.keep), load(s_.g_L + i), g);
          store(of_token + f, load(of_token + f) + g);
          store(s_.g_L + i, next);
          store(s_.g + i, next);
        }
      }
    }
    Laying kept = {at_.kept, 0}, gradients = {at_.layers, 0};
    for (int64_t i = 0; i < z_.layers; ++i)
      block_weights(z_, lay_kept(z_, kept), s_, amx_, lay_gradients(z_, gradients));
  }

  const Shape& shape_;
  const TrainingSizes z_;
  const Layout at_;
  const Scratch& s_;
  const TrainingRow& row_;
  TrainedHeads heads_;
  char* weights_;
  AmxShape amx_;
};

}  // namespace

int64_t training_workspace_bytes(const Shape& shape) { return layout(training_sizes(shape), nullptr).bytes; }

void training_begin(const Shape& shape, void* workspace) {
  memset(workspace, 0, size_t(layout(training_sizes(shape), workspace).gradient_bytes));
}

TrainingResult training_row(const Shape& shape, const void* packed, void* workspace, const TrainingRow& row,
                            const TrainingTarget& target, float* z_H, float* z_L) {
  return Row(shape, const_cast<void*>(packed), workspace, row).run(target, z_H, z_L);
}

float training_forward(const Shape& shape, const void* packed, void* workspace, const TrainingRow& row, float* z_H,
                       float* z_L, float* logits) {
  return Row(shape, const_cast<void*>(packed), workspace, row).run_forward(z_H, z_L, logits);
}

void training_backward(const Shape& shape, const void* packed, void* workspace, const TrainingRow& row,
                       const float* of_logits, float of_q_halt) {
  Row(shape, const_cast<void*>(packed), workspace, row).run_backward(of_logits, of_q_halt);
}

}  // namespace eqr::cpu::EQR_ISA
