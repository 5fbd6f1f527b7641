# Warnings for our own targets only, and the sanitizer switch for everything.
add_library(fips_warnings INTERFACE)
target_compile_options(fips_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow=local -Wnon-virtual-dtor>)
if(FIPS_WERROR)
  target_compile_options(fips_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(FIPS_SANITIZE)
  set(FIPS_SANITIZE_FLAGS -fsanitize=${FIPS_SANITIZE} -fno-sanitize-recover=all)
  add_compile_options(${FIPS_SANITIZE_FLAGS} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${FIPS_SANITIZE})
endif()
