# The torch-free kernels as a CMake package: cmake --install BUILD --component cpp --prefix PREFIX, then
#   find_package(fips)                        and link fips::cpu,
#   find_package(fips COMPONENTS cuda)        and link fips::cuda, where it was built.
include(CMakePackageConfigHelpers)

set(fips_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fips)

# Installed headers say "fips/core/..." where ours say "core/...": a program may have a core/types.h of its own.
file(GLOB fips_headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc csrc/core/*.h csrc/kernels/*.h)
list(APPEND fips_headers kernels/cpu/dispatch.h)
if(FIPS_CUDA)
  file(GLOB cuda_headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc csrc/kernels/cuda/*.h)
  list(FILTER cuda_headers EXCLUDE REGEX "emulation")
  list(APPEND fips_headers ${cuda_headers})
endif()
foreach(header IN LISTS fips_headers)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/${header})
  file(READ csrc/${header} content)
  string(REGEX REPLACE "#include \"(core|kernels)/" "#include \"fips/\\1/" content "${content}")
  file(WRITE ${PROJECT_BINARY_DIR}/include/fips/${header} "${content}")
endforeach()
install(DIRECTORY ${PROJECT_BINARY_DIR}/include/fips DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)

function(fips_export set)
  foreach(target IN LISTS ARGN)
    string(REGEX REPLACE "^fips_" "" name ${target})
    set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
  endforeach()
  install(TARGETS ${ARGN} EXPORT ${set} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
  install(EXPORT ${set} NAMESPACE fips:: DESTINATION ${fips_cmake_dir} COMPONENT cpp)
endfunction()

fips_export(fipsTargets fips_core fips_cpu)
if(TARGET fips_cuda_sm90)
  fips_export(fipsCudaTargets fips_cuda fips_cuda_sm90)
elseif(FIPS_CUDA)
  fips_export(fipsCudaTargets fips_cuda)
endif()
configure_file(cmake/fipsConfig.cmake ${PROJECT_BINARY_DIR}/fipsConfig.cmake COPYONLY)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fipsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fipsConfig.cmake ${PROJECT_BINARY_DIR}/fipsConfigVersion.cmake
  DESTINATION ${fips_cmake_dir} COMPONENT cpp)
