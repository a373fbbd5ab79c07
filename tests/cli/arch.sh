# Plans for GPUs that are not here, and deterministic ones. A build without CUDA has nothing of it to show.
nbhd list | grep -q ^cuda || exec cat "$ROOT/tests/cli/arch.exact"
line="bwd bf16 h4 d64 128x128 w33x33"
t plan "$line" --arch sm_80 --kernel cuda.bwd_sm90
t plan "$line" --arch sm_80a,
t plan "$line" --arch sm_80,90,sm
t plan "$line" --arch sm_77
t plan "$line" --arch ""
t plan "$line" --arch sm_80 --device cpu
t jit --deterministic
t jit --arch sm_80
t jit "$line" --arch "sm_80 sm_90"
t jit "$line" --arch sm_90 --dump no/folder
# Where no compiler is found the plan fails, and which rows would do is told.
NBHD_NVRTC=/dev/null/nvrtc NBHD_CACHE_DIR=$PWD t plan "$line" --arch sm_75,86 --explain |
    grep -E 'cuda.bwd_s|^nbhd|exit'
# What a deterministic plan does on Hopper, and what is compiled for it; without a compiler, as the test expects it.
nbhd jit "$line" --arch sm_90 >/dev/null 2>&1 || exec sed -n '/^Hopper/,$p' "$ROOT/tests/cli/arch.exact"
echo "Hopper:"
for flag in "" --deterministic; do
    nbhd plan "$line" --arch 90a $flag | grep -oE 'on sm.*|dQ added up in [a-z0-9]*|dQ: queries'
    nbhd plan "$line" --arch sm_90 $flag --json | grep -oE '"arch".*"deterministic": [a-z]*'
    nbhd jit "$line" --arch sm_90 $flag | grep -o '^bwd_sm90[a-z_]*' | sort | tr '\n' ' '
    echo
done
