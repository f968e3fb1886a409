#include "report.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "detector.h"

namespace tpk::emu {
namespace {

constexpr size_t kMostOfAKind = 20;

struct Reports {
  std::mutex mutex;
  std::vector<Report> all;
  std::map<Kind, size_t> counts;
  bool loud = true;

  // A test that does not ask fails nevertheless.
  ~Reports() {
    if (all.empty()) return;
    std::fprintf(stderr, "emulator: %zu reports that no test has asked for, the first:\n%s\n", all.size(),
                 all.front().text.c_str());
    std::fflush(nullptr);
    _exit(86);
  }
};

Reports& reports() {
  static Reports all;
  return all;
}
[[maybe_unused]] const Reports& made_before_main = reports();

const char* file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// Lines that belong to the emulator's own headers say nothing about a kernel.
bool is_own(const std::string& line) {
  for (const char* name : {"primitives.h", "emu.h", "builtins.h", "device.cuh", "hopper.cuh", "/bits/"}) {
    if (line.find(name) != std::string::npos) return true;
  }
  return line.find("??") != std::string::npos;
}

// The lines that addr2line prints about an address of this program.
std::vector<std::string> ask_debugger(const char* flags, uintptr_t address) {
  std::vector<std::string> lines;
  Dl_info info{};
  if (address == 0 || dladdr(reinterpret_cast<void*>(address), &info) == 0) return lines;
  char command[512], line[4096];
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::snprintf(command, sizeof command, "addr2line %s -e '%s' 0x%zx 2>/dev/null", flags, info.dli_fname,
                static_cast<size_t>(offset));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return lines;
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    line[std::strcspn(line, "\n")] = '\0';
    lines.emplace_back(line).erase(std::min(lines.back().size(), lines.back().find(" (discriminator")));
  }
  pclose(pipe);
  return lines;
}

}  // namespace

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"race",     "scope",      "uninitialised", "divergence",
                                   "deadlock", "misaligned", "overflow",      "misuse"};
  return names[static_cast<size_t>(kind)];
}

void report(Kind kind, const std::string& text) {
  Reports& reports = emu::reports();
  const std::lock_guard lock(reports.mutex);
  const std::string whole = std::string(name_of(kind)) + ": " + text;
  for (const Report& known : reports.all) {
    if (known.text == whole) return;
  }
  if (++reports.counts[kind] > kMostOfAKind) return;
  if (options().loud) std::fprintf(stderr, "emulator: %s\n", whole.c_str());
  reports.all.push_back({kind, whole});
}

std::vector<Report> take_reports() {
  Reports& reports = emu::reports();
  const std::lock_guard lock(reports.mutex);
  reports.counts.clear();
  if (detector() != nullptr) detector()->forget_reports();
  return std::exchange(reports.all, {});
}

size_t count(Kind kind) {
  Reports& reports = emu::reports();
  const std::lock_guard lock(reports.mutex);
  return reports.counts[kind];
}

std::string text_of(const std::source_location& where) {
  return std::string(file_name(where.file_name())) + ":" + std::to_string(where.line());
}

std::string text_of_code(uintptr_t address) {
  static std::mutex mutex;
  static auto* const known = new std::map<uintptr_t, std::string>;
  const std::lock_guard lock(mutex);
  std::string& text = (*known)[address];
  if (!text.empty()) return text;
  for (const std::string& line : ask_debugger("-i", address)) {
    if (!is_own(line)) return text = file_name(line.c_str());
  }
  return text = "unknown code";
}

std::string text_of_kernel(const void* kernel, const char* otherwise) {
  static std::mutex mutex;
  static auto* const known = new std::map<const void*, std::string>;
  const std::lock_guard lock(mutex);
  std::string& text = (*known)[kernel];
  if (!text.empty()) return text;
  const std::vector<std::string> lines = ask_debugger("-f -C", reinterpret_cast<uintptr_t>(kernel));
  text = lines.empty() || lines[0].find("??") != std::string::npos ? otherwise : lines[0];
  if (text.rfind("void ", 0) == 0) text.erase(0, 5);
  if (!text.empty() && text.back() == ')') {  // the types of the parameters
    size_t start = text.size();
    for (int depth = 0; start-- > 0;) {
      depth += text[start] == ')' ? 1 : text[start] == '(' ? -1 : 0;
      if (depth == 0) break;
    }
    text.erase(start);
  }
  return text;
}

}  // namespace tpk::emu
