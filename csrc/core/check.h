// Argument checks: the text has op, argument, expected, got. A failed check is a ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tpk {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace tpk

// std::invalid_argument is what both pybind11 and torch turn into ValueError.
#define TPK_CHECK(condition, ...)                                              \
  do {                                                                         \
    if (!(condition)) throw std::invalid_argument(::tpk::concat(__VA_ARGS__)); \
  } while (false)
