# FIPS_CUDA (ON or OFF) and FIPS_CUDA_ARCHS from FIPS_WITH_CUDA. AUTO builds the CUDA kernels when a compiler
# is found, never because a GPU is visible: what a build contains must not depend on the machine's cards.
#
# Architectures, first one set wins: CMAKE_CUDA_ARCHITECTURES, $CUDAARCHS (CMake's own),
# $TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), the release list. sm_90a holds Hopper's own instructions; the last
# entry also carries PTX, for GPUs that do not exist yet.
set(FIPS_RELEASE_CUDA_ARCHS 80-real 86-real 89-real 90a-real 100-real 120)

# "8.0;9.0a+PTX" -> 80-real;90a (real machine code, and PTX too where +PTX asks for it).
function(fips_archs_from_torch list out)
  string(REGEX REPLACE "[ ,]+" ";" entries "${list}")
  set(archs)
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${entry}' is not understood; write numbers such as "
        "\"8.0;9.0a+PTX\", or set CMAKE_CUDA_ARCHITECTURES")
    endif()
    set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    if(NOT CMAKE_MATCH_4)
      string(APPEND arch "-real")
    endif()
    list(APPEND archs ${arch})
  endforeach()
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
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}: architectures ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "CUDA: off (FIPS_WITH_CUDA=${FIPS_WITH_CUDA})")
endif()
