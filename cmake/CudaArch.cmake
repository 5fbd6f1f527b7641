# FIPS_CUDA (ON or OFF) and FIPS_CUDA_ARCHS from FIPS_WITH_CUDA. AUTO builds the CUDA kernels when a compiler
# is found, never because a GPU is visible: what a build contains must not depend on the machine's cards.
#
# Architectures, first one set wins: CMAKE_CUDA_ARCHITECTURES, $CUDAARCHS (CMake's own),
# $TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), the release list. sm_90a holds Hopper's own instructions; 100 also
# carries PTX, for later GPUs.
set(FIPS_RELEASE_CUDA_ARCHS 80-real 86-real 89-real 90a-real 100 120-real)

# "8.0;9.0+PTX" -> 80-real;90a-real;90-virtual: machine code, and PTX too where +PTX asks for it. Hopper's own
# instructions need 90a, which every GPU of capability 9.0 runs; as PTX it would run nowhere else. What is
# older than 8.0 is left out: a container's list is about torch, not about us.
function(fips_archs_from_torch list out)
  string(REGEX REPLACE "[ ,]+" ";" entries "${list}")
  set(archs)
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${entry}' is not understood; write numbers such as "
        "\"8.0;9.0a+PTX\", or set CMAKE_CUDA_ARCHITECTURES")
    endif()
    set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    set(suffix "${CMAKE_MATCH_3}")
    set(ptx "${CMAKE_MATCH_4}")
    if(arch LESS 80)
      message(STATUS "TORCH_CUDA_ARCH_LIST: ${entry} is left out, the kernels need 8.0 or later")
      continue()
    endif()
    if(arch EQUAL 90)
      set(suffix a)
    endif()
    list(APPEND archs ${arch}${suffix}-real)
    if(ptx)
      list(APPEND archs ${arch}-virtual)
    endif()
  endforeach()
  if(NOT archs)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${list}' has nothing from 8.0 on; set CMAKE_CUDA_ARCHITECTURES")
  endif()
  set(${out} "${archs}" PARENT_SCOPE)
endfunction()

function(fips_choose_cuda_archs)
  if(CMAKE_CUDA_ARCHITECTURES OR NOT "$ENV{CUDAARCHS}" STREQUAL "")
    return()
  endif()
  set(archs ${FIPS_RELEASE_CUDA_ARCHS})
  if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    fips_archs_from_torch("$ENV{TORCH_CUDA_ARCH_LIST}" archs)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${archs}" CACHE STRING "CUDA architectures" FORCE)
endfunction()

set(FIPS_CUDA OFF)
if(NOT FIPS_WITH_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FIPS_WITH_CUDA is '${FIPS_WITH_CUDA}'; allowed are AUTO, ON and OFF")
endif()
if(NOT FIPS_WITH_CUDA STREQUAL "OFF")
  fips_choose_cuda_archs()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FIPS_CUDA ON)
  elseif(FIPS_WITH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FIPS_WITH_CUDA=ON, but no CUDA compiler works: put nvcc (12.8 or later) on PATH or "
      "set CUDACXX, or build for the CPU with FIPS_WITH_CUDA=OFF")
  endif()
endif()
if(FIPS_CUDA)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  string(REGEX REPLACE "-(real|virtual)" "" FIPS_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
  string(REPLACE ";" " " FIPS_CUDA_ARCHS "${FIPS_CUDA_ARCHS}")  # one string for a compile definition
  if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90" AND NOT "${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
    message(WARNING "CMAKE_CUDA_ARCHITECTURES has 90 without 90a: Hopper's own kernels (TMA, wgmma) are not built; "
      "write 90a-real")
  endif()
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}: architectures ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "CUDA: off (FIPS_WITH_CUDA=${FIPS_WITH_CUDA})")
endif()
