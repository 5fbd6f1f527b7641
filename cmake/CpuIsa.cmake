# One translation unit per instruction set, with its flags on that file alone: the choice is made at run
# time (csrc/kernels/cpu/dispatch.cpp), so the same binary runs on any x86-64. No -march=native and no LTO,
# which could move wide instructions into the scalar path; no -ffast-math, which would change results.
function(fips_add_isa_sources target)
  set(common -fno-math-errno -fno-trapping-math)
  target_sources(${target} PRIVATE csrc/kernels/cpu/isa_scalar.cpp)
  set_source_files_properties(csrc/kernels/cpu/isa_scalar.cpp PROPERTIES COMPILE_OPTIONS "${common}")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_definitions(${target} PRIVATE FIPS_X86)
    target_sources(${target} PRIVATE csrc/kernels/cpu/isa_avx2.cpp csrc/kernels/cpu/isa_avx512.cpp)
    set_source_files_properties(csrc/kernels/cpu/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS
      "${common};-mavx2;-mfma;-mf16c")
    # GCC 12 warns inside its own AVX-512 header (an "undefined" vector that is never read).
    set_source_files_properties(csrc/kernels/cpu/isa_avx512.cpp PROPERTIES COMPILE_OPTIONS
      "${common};-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mfma;-mf16c;-mprefer-vector-width=512;-Wno-maybe-uninitialized")
  endif()
endfunction()
