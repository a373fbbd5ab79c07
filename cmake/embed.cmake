# Embeds the text of the kernel files in the library: `struct nbhd_source nbhd_embedded[]` of src/cuda/jit.h.
# Included, it gives nbhd_embed_kernels(target); run as `cmake -DOUTPUT=x.c -DROOT=src -P embed.cmake`, it writes x.c.
if(NOT CMAKE_SCRIPT_MODE_FILE)
    set(nbhd_embed_script ${CMAKE_CURRENT_LIST_FILE})
    function(nbhd_embed_kernels target)
        file(GLOB texts CONFIGURE_DEPENDS src/nbhd_*.h src/cuda/*.cu src/cuda/device/*.cuh)
        set(output ${CMAKE_CURRENT_BINARY_DIR}/embedded.c)
        add_custom_command(
            OUTPUT ${output}
            COMMAND ${CMAKE_COMMAND} -DOUTPUT=${output} -DROOT=${CMAKE_CURRENT_SOURCE_DIR}/src -P ${nbhd_embed_script}
            DEPENDS ${texts} ${nbhd_embed_script}
            COMMENT "Embedding kernel files")
        target_sources(${target} PRIVATE ${output})
    endfunction()
    return()
endif()

cmake_minimum_required(VERSION 3.20) # a script has no project's policies: before CMake 4 no IN_LIST
file(GLOB shared RELATIVE ${ROOT} ${ROOT}/nbhd_*.h)
file(GLOB kernels RELATIVE ${ROOT}/cuda ${ROOT}/cuda/*.cu ${ROOT}/cuda/device/*.cuh)
list(SORT kernels)
set(arrays "")
set(table "const struct nbhd_source nbhd_embedded[] = {\n")
set(index 0)
foreach(name IN LISTS kernels shared)
    set(path ${ROOT}/cuda/${name})
    if(name IN_LIST shared)
        set(path ${ROOT}/${name})
    endif()
    file(READ ${path} hex HEX) # hexadecimal, since a compiler need not take a string of over 4095 bytes
    file(SIZE ${path} size)
    string(REGEX REPLACE "(..)" "0x\\1," hex "${hex}")
    string(APPEND arrays "static const unsigned char text${index}[] = {${hex}0};\n")
    string(APPEND table "    {\"${name}\", (const char *)text${index}, ${size}},\n")
    math(EXPR index "${index} + 1")
endforeach()
file(WRITE ${OUTPUT} "#include \"cuda/jit.h\"\n${arrays}${table}    {0, 0, 0},\n};\n")
