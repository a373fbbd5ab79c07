# The installed package: nbhd::nbhd, and where it was built nbhd::nbhd_static, which links to the threads that it needs.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/nbhd-targets.cmake)
