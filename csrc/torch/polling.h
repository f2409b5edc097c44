// How a long op asks the thread that called it whether to go on.
#pragma once

namespace eqr {

// Of this thread, null where nobody wants to be asked; returning false cancels what is left.
inline thread_local bool (*poll)() = nullptr;

}  // namespace eqr
