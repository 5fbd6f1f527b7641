# The torch-free kernels as a CMake package: cmake --install BUILD --component cpp --prefix PREFIX, then
#   find_package(fips) and link fips::cpu, or fips::cuda where it was built.
include(CMakePackageConfigHelpers)

set(fips_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fips)
set(fips_targets fips_core fips_cpu)
# What a caller sees; implementations stay inside.
set(fips_header_patterns
  PATTERN "*.h"
  PATTERN "cpu" EXCLUDE
  PATTERN "cuda" EXCLUDE)
install(DIRECTORY csrc/core csrc/kernels DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/fips COMPONENT cpp
  FILES_MATCHING ${fips_header_patterns})
install(FILES csrc/kernels/cpu/dispatch.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/fips/kernels/cpu COMPONENT cpp)
if(FIPS_CUDA)
  list(APPEND fips_targets fips_cuda)
  if(TARGET fips_cuda_sm90)
    list(APPEND fips_targets fips_cuda_sm90)
  endif()
  install(DIRECTORY csrc/kernels/cuda DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/fips/kernels COMPONENT cpp
    FILES_MATCHING PATTERN "*.h")
endif()
foreach(target IN LISTS fips_targets)
  string(REGEX REPLACE "^fips_" "" name ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
endforeach()

install(TARGETS ${fips_targets} EXPORT fipsTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
install(EXPORT fipsTargets NAMESPACE fips:: DESTINATION ${fips_cmake_dir} COMPONENT cpp)
configure_package_config_file(cmake/fipsConfig.cmake.in ${PROJECT_BINARY_DIR}/fipsConfig.cmake
  INSTALL_DESTINATION ${fips_cmake_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fipsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fipsConfig.cmake ${PROJECT_BINARY_DIR}/fipsConfigVersion.cmake
  DESTINATION ${fips_cmake_dir} COMPONENT cpp)
