# Planted bugs of first light: a copy of its kernels with a mistake in each, as a device would make it that does
# otherwise than its documents say. Text that is not there any more stops the configuration.

set(folder ${CMAKE_CURRENT_BINARY_DIR}/emu/planted_first_light)
set(light ${CMAKE_CURRENT_SOURCE_DIR}/tests/csrc/gpu)
file(READ ${light}/first_light_kernels.cuh kernels)
file(READ ${light}/first_light.cu checks)

# tpk_plant_light("right" "wrong"): every place in the kernels.
function(tpk_plant_light right wrong)
  string(FIND "${kernels}" "${right}" place)
  if(place EQUAL -1)
    message(FATAL_ERROR "planted_first_light.cmake: first_light_kernels.cuh has no \"${right}\"")
  endif()
  string(REPLACE "${right}" "${wrong}" text "${kernels}")
  set(kernels "${text}" PARENT_SCOPE)
endfunction()

tpk_plant_light("out[i] = 3 * i + 1" "out[i] = 3 * i + (i == 77 ? 2 : 1)")
tpk_plant_light("*passed = global_time_ns() - start" "*passed = start > 0 ? 7 : 0")
tpk_plant_light("load16_peer(from + i)" "load16_peer(from + (i ^ 1))")
tpk_plant_light("rounded_pair<Half>(values[i], values[i ^ 1])" "rounded_pair<Half>(values[i ^ 1], values[i])")
tpk_plant_light("args.next[t] = message(round, args.rank, t)" "args.next[t] = message(round, args.rank, t) + (round == 3 && t == 5)")
tpk_plant_light("sum += values[(warp + 1) % 4]" "sum += values[warp]")
tpk_plant_light("warp_max(t * 7 % 61)" "t * 7 % 61")
tpk_plant_light("memcpy(args.tile + i, tile + 2 * i, 2)" "memcpy(args.tile + i, tile + 2 * (i ^ (i >= 512 ? 8 : 0)), 2)")
tpk_plant_light("x + 2 * j, w + (transposed ? 128 : 2) * j" "x + 2 * j, w + (transposed ? 128 * j : 2 * (j ^ 2))")
tpk_plant_light("transposed_operand(of_w)" "transposed_operand(of_w) - (uint64_t{256} << 16)")
tpk_plant_light("args.second + piece * kPieceWords" "args.second + (piece ^ 1) * kPieceWords")
tpk_plant_light("args.x[i] = static_cast<uint16_t>(round * 512 + i)"
                "args.x[i] = static_cast<uint16_t>(round * 512 + i + (round == 7 && i == 3))")
tpk_plant_light("store_tile(&args.map, tile, args.column, args.row)"
                "store_tile(&args.map, tile, args.column, args.row + (round == 4))")

string(REPLACE "int main(" "int first_light_main(" checks "${checks}")
file(CONFIGURE OUTPUT ${folder}/gpu/first_light_kernels.cuh CONTENT "${kernels}" @ONLY)
file(CONFIGURE OUTPUT ${folder}/gpu/first_light.cu CONTENT "${checks}" @ONLY)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS tests/csrc/planted_first_light.cmake
             ${light}/first_light_kernels.cuh ${light}/first_light.cu)

target_include_directories(planted_first_light_host_plain PRIVATE ${folder} tests/csrc/gpu)
target_include_directories(planted_first_light_host_asan PRIVATE ${folder} tests/csrc/gpu)
