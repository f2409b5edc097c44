// A trajectory's way from its start to its end, by the threads that compute. `Machine` has what differs between the
// kernels: `sync()` and `sync_operand()` (barriers of those threads; the second also shows what they stored to the
// products), `weights` and `multiply` (the two products of the channel mixer).
#pragma once

#include "cuda/outer_step.h"

namespace eqr::cuda {

template <class Be, int D, class Machine>
struct Walk {
  const Problem& p;
  Scratch<D>& s;
  Machine& machine;

  EQR_DEVICE Slot<D> slot() const { return Slot<D>::of(p, p.parked ? s.control.number : Be::cta()); }
  EQR_DEVICE Trajectory<Be> trajectory() const { return {p, s.control, slot().changes()}; }
  EQR_DEVICE OuterStep<Be, D> step() const { return {p, s}; }
  EQR_DEVICE static Lane lane() { return Lane::of<Be>(Machine::kFirstThread); }
  EQR_DEVICE static bool leader() { return Be::thread() == Machine::kFirstThread; }

  // Rows of the operand that pad the tokens for the products.
  EQR_DEVICE void clear_padding() const {
    for (int i = int(lane().thread) * 16; i < (kTokensK - kTokens) * D * 2; i += Sizes<D>::kThreads * 16)
      *reinterpret_cast<Words*>(s.operand + kTokens * D * 2 + i) = Words{};
  }

  // Goes on with the trajectory in flight, or takes the next one; without either, `live` is 0. What the caller cancels
  // ends here.
  EQR_DEVICE void ready() const {
    for (;;) {
      machine.sync();
      if (leader()) {
        Trajectory<Be> t = trajectory();
        s.control.ended = s.control.live && t.cancelled();
        if (s.control.ended) t.cancel();
      }
      machine.sync();
      if (!s.control.ended) break;
      record();
    }
    if (s.control.live) return;
    machine.sync();
    if (leader()) s.control.live = trajectory().take();
    machine.sync();
    if (!s.control.live) return;
    if (s.control.steps)
      step().inject(lane(), slot());
    else
      step().start(lane(), slot());
  }

  EQR_DEVICE void run() const {
    const OuterStep<Be, D> outer = step();
    const int updates = int(p.shape.H_cycles * (p.shape.L_cycles + 1));
    for (int number = 0; number < updates; ++number) module(outer, number);
    machine.sync_operand();
    outer.heads(lane(), slot());
    machine.sync();
    if (leader()) trajectory().advance(outer.sums());
    machine.sync();
    if (s.control.leaves)
      record();
    else {
      trajectory().record(int(lane().thread), Sizes<D>::kThreads, slot().logits(s.control.logits));
      outer.inject(lane(), slot());
    }
  }

 private:
  EQR_DEVICE void module(const OuterStep<Be, D>& outer, int number) const {
    TokenMixer<Be, D> mixer = {s.operand, int(p.shape.tokens), p.shape.norm_eps};
    for (int layer = 0; layer < p.shape.layers; ++layer) {
      machine.sync();
      mixer.run(lane(), machine.weights, int(p.shape.mixer_hidden) / kTokenUnits);
      machine.sync_operand();
      const Lane l = lane();
      Sums<D> y;
      start_channel_mixer(l, s, y);
      machine.multiply(l, y);
      finish_channel_mixer<Be>(l, s, p.shape.norm_eps, y, [&] { machine.sync(); });
      if (layer + 1 == p.shape.layers)
        outer.update(l, slot(), number, y);
      else
        for_each_quad<D>([&](int pair, int tile, int odd) {
          store_operand<Be>(s, l.quad_at<D>(pair, tile, odd), quad_of<D>(y, pair, tile, odd));
        });
    }
  }

  // The trajectory leaves, by all.
  EQR_DEVICE void record() const {
    trajectory().record(int(lane().thread), Sizes<D>::kThreads, slot().logits(s.control.logits));
    machine.sync();
    if (leader()) trajectory().leave();
    machine.sync();
  }
};

}  // namespace eqr::cuda
