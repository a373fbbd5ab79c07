# The only list of instruction-set flags. A file of src/cpu whose name ends in _<suffix>.c is compiled with that
# suffix's flags, and only for that processor; a suffix that stands here for another processor leaves the file out.
# Files without a listed suffix are baseline code.
set(NBHD_ISA_x86_64_avx2 -mavx2 -mfma -mf16c)
set(NBHD_ISA_x86_64_avx512 ${NBHD_ISA_x86_64_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(NBHD_ISA_x86_64_avx512bf16 ${NBHD_ISA_x86_64_avx512} -mavx512bf16)
set(NBHD_ISA_x86_64_amx ${NBHD_ISA_x86_64_avx512bf16} -mamx-tile -mamx-bf16)
set(NBHD_ISA_aarch64_neon -O3) # baseline there; the name keeps it out of other builds
set(NBHD_ISA_suffixes avx2 avx512 avx512bf16 amx neon)

# Compilers older than gcc 11 and clang 11 know no tiles: their build goes without the row.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    include(CheckCCompilerFlag)
    check_c_compiler_flag("-mamx-tile -mamx-bf16 -mavx512bf16" NBHD_COMPILER_KNOWS_AMX)
    if(NOT NBHD_COMPILER_KNOWS_AMX)
        set(NBHD_NO_AMX 1)
        unset(NBHD_ISA_x86_64_amx)
        add_compile_definitions(NBHD_NO_AMX=1)
    endif()
endif()

function(nbhd_isa_sources target)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        set(processor x86_64)
    elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
        set(processor aarch64)
    else()
        set(processor other)
    endif()
    foreach(file IN LISTS ARGN)
        string(REGEX REPLACE ".*_([a-z0-9]+)\\.c$" "\\1" suffix "${file}")
        if(NOT suffix IN_LIST NBHD_ISA_suffixes)
            target_sources(${target} PRIVATE ${file})
        elseif(DEFINED NBHD_ISA_${processor}_${suffix})
            target_sources(${target} PRIVATE ${file})
            set_source_files_properties(${file} TARGET_DIRECTORY ${target} PROPERTIES
                COMPILE_OPTIONS "${NBHD_ISA_${processor}_${suffix}}")
        endif()
    endforeach()
endfunction()
