// What an error says.
#include <dlfcn.h>

#include <sstream>

#include "machine.h"

namespace eqr::emu {

std::string Operation::text() const {
  if (!kind) return "its start";
  std::ostringstream out;
  out << kind->name;
  for (int i = 0; i < kind->numbers; ++i) out << (i ? ", " : "(") << numbers[i];
  if (kind->numbers) out << ")";
  return out.str();
}

std::string Thread::name() const {
  std::ostringstream out;
  out << "thread " << index << " (warp " << index / kLanes << ", lane " << lane() << ") of CTA " << cta->index;
  return out.str();
}

void fail(const std::string& what) {
  const Thread* thread = machine ? machine->current : nullptr;
  throw Error(thread ? thread->name() + " " + what : what);
}

std::string code_text(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info) || !info.dli_fname) return "";
  std::ostringstream out;
  out << "; see  addr2line -Cfipe " << info.dli_fname << " 0x" << std::hex
      << static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  return out.str();
}

// Who waits where, neighbours at the same place in one line.
std::string Machine::table() const {
  constexpr int kLines = 60;
  std::ostringstream out;
  int lines = 0;
  const auto place = [](const Thread& thread) {
    switch (thread.state) {
      case Thread::kEnded: return std::string("ended");
      case Thread::kPaused: return std::string("pauses");
      case Thread::kWaiting: return "waits at " + thread.at.text();
      default: return std::string("can go on");
    }
  };
  for (const auto& cta : ctas_) {
    if (!cta || cta->ended) continue;
    const size_t n = cta->threads.size();
    for (size_t first = 0, last; first < n; first = last) {
      const std::string here = place(*cta->threads[first]);
      for (last = first + 1; last < n && place(*cta->threads[last]) == here; ++last) continue;
      if (++lines > kLines) continue;
      out << "  CTA " << cta->index << ", threads " << first << " to " << last - 1 << ": " << here << "\n";
    }
    for (int id = 0; id < 16; ++id) {
      const Gathering& gathering = cta->gatherings[id];
      if (!gathering.arrived || ++lines > kLines) continue;
      out << "  CTA " << cta->index << ", barrier " << id << ": " << gathering.arrived << " threads have come\n";
    }
    for (const auto& [offset, barrier] : cta->mbarriers) {
      if (barrier.waiting.empty() || ++lines > kLines) continue;
      out << "  CTA " << cta->index << ", " << mbarrier_text(*cta, offset) << "\n";
    }
  }
  if (lines > kLines) out << "  and " << lines - kLines << " more lines\n";
  if (!queue_.empty()) out << "  " << queue_.size() * launch_.cluster << " CTAs have not started\n";
  return out.str();
}

}  // namespace eqr::emu
