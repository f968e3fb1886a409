// Where everything that the emulator finds goes.
#pragma once

#include <source_location>
#include <string>

#include "control.h"

namespace tpk::emu {

// The same text is kept once.
void report(Kind kind, const std::string& text);

std::string text_of(const std::source_location& where);  // "all_reduce.cu:40"
std::string text_of_code(uintptr_t address);             // the same, of an address in a program with debug information

}  // namespace tpk::emu
