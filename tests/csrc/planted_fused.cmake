# Planted bugs of the fused GEMMs: copies of the kernels themselves, each with one mistake, in a namespace of its own
# (tpk::cuda::<name>). They are found or the tests are blind. Text that is not there any more stops the configuration.

set(planted_files fused_gemm_sm90.cu gather_block.cuh reduce_block.cuh coded_tiles.cuh bulk_rows.cuh fused_block.cuh
                  tile_moves.cuh tile_turn.cuh gemm_sm90.cuh)
set(planted_sources "")

# tpk_plant(name file "right" "wrong"): every place in that file.
function(tpk_plant name file right wrong)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/emu/${name})
  foreach(one IN LISTS planted_files)
    file(READ ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels/${one} text)
    if(one STREQUAL file)
      string(FIND "${text}" "${right}" place)
      if(place EQUAL -1 AND NOT right STREQUAL "")
        message(FATAL_ERROR "planted_fused.cmake: ${file} has no \"${right}\" to plant ${name} at")
      endif()
      string(REPLACE "${right}" "${wrong}" text "${text}")
    endif()
    string(REPLACE "namespace tpk::cuda {" "namespace tpk::cuda::${name} {" text "${text}")
    # One instance has to do: that of wide tiles where the name says so.
    set(other 256)
    if(name MATCHES "wide_tile")
      set(other 128)
    endif()
    string(REGEX REPLACE "[^\n]*Columns<${other}>{}[^\n]*\n|[^\n]*Half{}, Columns[^\n]*\n" "" text "${text}")
    file(CONFIGURE OUTPUT ${folder}/${one} CONTENT "${text}" @ONLY)
  endforeach()
  file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "#include \"${folder}/fused_gemm_sm90.cu\"\n" @ONLY)
  set(planted_sources ${planted_sources} ${folder}/${name}.cpp PARENT_SCOPE)
endfunction()

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS tests/csrc/planted_fused.cmake)
foreach(one IN LISTS planted_files)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/cuda/kernels/${one})
endforeach()

tpk_plant(nothing_planted gemm_sm90.cuh "" "")
tpk_plant(flag_at_the_wrong_owner tile_turn.cuh
          "signals(static_cast<int>(owner)).tiles" "signals((static_cast<int>(owner) + 1) % peers_.world_size).tiles")
tpk_plant(nothing_planted_in_a_wide_tile gemm_sm90.cuh "" "")
tpk_plant(flag_before_the_tile_is_written reduce_block.cuh
          "stores_wait<0>();\n      turn_.raise_tile(tile.owner, tile.number);"
          "turn_.raise_tile(tile.owner, tile.number);\n      stores_wait<0>();")
tpk_plant(staged_over_what_is_not_stored fused_block.cuh "await(&barriers().stored, ++handed & 1);" "++handed;")
tpk_plant(stored_before_it_is_staged fused_block.cuh "await(&barriers().staged, stored++ & 1);" "++stored;")
tpk_plant(stored_without_a_fence fused_block.cuh "fence_async_shared();" "")
tpk_plant(given_back_before_the_store_has_read fused_block.cuh "stores_wait_read<0>();" "")
tpk_plant(given_back_before_the_store_of_a_wide_tile_has_read fused_block.cuh "stores_wait_read<0>();" "")
tpk_plant(staged_over_what_is_multiplied_in_a_wide_tile fused_block.cuh
          "sync_product_threads();  // the products of all warps have read the stage" "")
tpk_plant(stage_given_back_too_early gemm_sm90.cuh "products_wait<1>();" "")
tpk_plant(transposed_w_read_as_the_other fused_block.cuh "return args_.gemm.w_transposed ?" "return false ?")
tpk_plant(transposed_w_advances_as_the_other gemm_sm90.cuh "w + (transposed ? 128 : 2) * j" "w + 2 * j")
tpk_plant(no_fence_after_the_gather gather_block.cuh "fence_async();  // the flag is a generic one, the loads" "//")
tpk_plant(no_fence_before_the_copy gather_block.cuh "fence_async();  // the flag is a generic one, and" "//")
tpk_plant(slot_of_another_call reduce_block.cuh "args_.gemm.y[turn_.slot_number()]" "args_.gemm.y[0]")
tpk_plant(one_rank_is_not_waited_for reduce_block.cuh
          "if (thread < ranks()) await_tiles" "if (thread + 1 < ranks()) await_tiles")
tpk_plant(one_tile_of_a_scale_is_waited_for reduce_block.cuh
          "k < kTilesOfSum; ++k) {\n      if (!turn_.await_tile" "k < 1; ++k) {\n      if (!turn_.await_tile")
tpk_plant(sum_announced_too_early reduce_block.cuh
          "if (!everywhere_) continue;\n      sync_product_threads();" "if (!everywhere_) continue;")
tpk_plant(rows_announced_too_early gather_block.cuh "__syncwarp();\n      sync_product_threads();" "__syncwarp();")
tpk_plant(rows_announced_before_they_are_written gather_block.cuh "stores_wait<0>();" "stores_wait_read<0>();")
tpk_plant(rows_stored_before_they_have_come bulk_rows.cuh
          "await(&brought_[stored_ % kCopyStages], stored_ / kCopyStages & 1);" "")
tpk_plant(rows_loaded_over_those_that_are_not_stored bulk_rows.cuh "    stores_wait_read<0>();\n" "")
tpk_plant(rows_of_a_peer_are_not_waited_for gather_block.cuh "if (items.distance == 0) return true;" "return fence_async(), true;")
tpk_plant(rows_are_not_waited_for gather_block.cuh
          "return lies_there(tile) || await_item(tile, step);" "return lies_there(tile) || step < ~uint32_t{0};")

add_library(emu_planted_fused_race OBJECT EXCLUDE_FROM_ALL ${planted_sources})
target_include_directories(emu_planted_fused_race PRIVATE csrc/cuda/kernels)
target_link_libraries(emu_planted_fused_race PRIVATE emu_race_flags)
tpk_emu_test(planted_fused NIGHTLY race SOURCES tests/csrc/planted_fused.cpp
             LIBRARIES emu_planted_fused emu_driver emu_fused emu_cpu)
