# One translation unit per instruction set, with its flags on that file alone: the choice is made at run
# time (csrc/kernels/cpu/dispatch.cpp), so the same binary runs on any x86-64. No -march=native and no LTO,
# which could move wide instructions into the scalar path; no -ffast-math, which would change results.
function(fips_add_isa_sources target)
  set(common -fno-math-errno -fno-trapping-math)
  target_sources(${target} PRIVATE csrc/kernels/cpu/isa_scalar.cpp)
  set_source_files_properties(csrc/kernels/cpu/isa_scalar.cpp PROPERTIES COMPILE_OPTIONS "${common}")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_definitions(${target} PRIVATE FIPS_X86)
    set(avx2 -mavx2 -mfma -mf16c)
    # GCC 12 warns inside its own AVX-512 header (an "undefined" vector that is never read).
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512
      -Wno-maybe-uninitialized -Wno-uninitialized)
    set(avx512_bf16 ${avx512} -mavx512bf16 -mavx512vbmi2)
    set(amx ${avx512_bf16} -mamx-tile -mamx-bf16)
    foreach(isa IN ITEMS avx2 avx512 avx512_bf16 amx)
      target_sources(${target} PRIVATE csrc/kernels/cpu/isa_${isa}.cpp)
      set_source_files_properties(csrc/kernels/cpu/isa_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${common};${${isa}}")
    endforeach()
  endif()
endfunction()
