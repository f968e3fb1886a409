// Where everything that the emulator finds goes.
#pragma once

#include <source_location>
#include <string>

#include "control.h"

namespace tpk::emu {

// The same text is kept once.
void report(Kind kind, const std::string& text);

std::string text_of(const std::source_location& where);  // "all_reduce.cu:40"
// The name of a kernel with its template arguments; `otherwise` when there is no debug information.
std::string text_of_kernel(const void* kernel, const char* otherwise);
std::string text_of_code(uintptr_t address);  // the same, of an address in a program with debug information

}  // namespace tpk::emu
