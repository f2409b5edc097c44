// A trajectory in flight: its outer steps in a workspace, and its state while it has none.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/loop/fixed_point.h"
#include "cpu/loop/open_team.h"
#include "cpu/loop/selection.h"
#include "cpu/loop/trajectory.h"

namespace eqr::cpu {

class Flight {
 public:
  // `race` is the problem's, null where it is none.
  Flight(const FixedPoint&, Race* race);

  static int64_t bytes(const FixedPoint&);

  void begin(int64_t number);
  // A sibling has won the race.
  bool hopeless() const;

  // Puts its state into the workspace: where it starts, or as it was parked.
  void enter(OpenTeam&, void* workspace);
  // Takes its state out of the workspace, which is then free for another.
  void park(const void* workspace);
  // One outer step, counted and recorded; in a race it may have lost by then.
  void step(OpenTeam&, void* workspace);
  // Records the end of a trajectory that goes on no more, and gives what a selection takes in. The workspace is null
  // where the state is not in one.
  Ended end(const void* workspace);
  // Counts it as finished.
  void finish() const { count(1); }

  Trajectory trajectory;

 private:
  void turn(void* workspace);
  void count(int what) const;

  const FixedPoint& p_;
  Race* race_;
  StepInput input_{};
  int64_t before_ = 0;  // outer steps that its start has behind it
  bool parked_ = false;
  std::vector<float> z_H_, z_L_;  // [S, d], while parked or turning, and at its end where states are kept
  std::vector<int64_t> tokens_;   // [S], since the last turn
  std::vector<int64_t> places_;   // [S], while turning: where each cell of the puzzle was
  std::vector<float> moved_;      // [S, d], while turning
};

}  // namespace eqr::cpu
