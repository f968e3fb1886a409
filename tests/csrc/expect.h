// The smallest test frame that names what failed: CASE(name) { EXPECT(condition, parts of a message...); }
#pragma once

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "core/check.h"

namespace tpk::testing {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

struct Failure : std::exception {};

// The name of the case that runs, and whether it was asked for on the command line.
inline const char* current = "";
inline bool alone = false;

[[noreturn]] inline void fail(const char* condition, const char* file, int line, const std::string& message) {
  std::printf("%s:%d: %s does not hold%s%s\n", file, line, condition, message.empty() ? "" : ": ", message.c_str());
  throw Failure();
}

}  // namespace tpk::testing

#define CASE(name)                                                     \
  static void name();                                                  \
  static const ::tpk::testing::Register register_##name(#name, &name); \
  static void name()

// The message is made only where it is printed.
#define EXPECT(condition, ...) \
  ((condition) ? void()        \
               : ::tpk::testing::fail(#condition, __FILE__, __LINE__, ::tpk::concat("" __VA_OPT__(, ) __VA_ARGS__)))

// One executable has one main. With an argument only the case of that name runs.
int main(int num_arguments, char** arguments) {
  int failed = 0;
  tpk::testing::alone = num_arguments > 1;
  for (const auto& test : tpk::testing::cases()) {
    if (tpk::testing::alone && std::string(arguments[1]) != test.name) continue;
    tpk::testing::current = test.name;
    try {
      test.body();
      std::printf("ok      %s\n", test.name);
    } catch (const tpk::testing::Failure&) {
      std::printf("FAILED  %s\n", test.name);
      ++failed;
    } catch (const std::exception& error) {
      std::printf("FAILED  %s: %s\n", test.name, error.what());
      ++failed;
    }
  }
  std::printf("%zu cases, %d failed\n", tpk::testing::cases().size(), failed);
  return failed == 0 && !tpk::testing::cases().empty() ? 0 : 1;
}
