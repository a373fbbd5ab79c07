# plan, check, bench, list and info: the parts of their output that every machine has.
numbers() { sed -E 's/[0-9][0-9.e+-]*( us|%)?/N/g; s/  +/ /g'; }
t plan "fwd f32 b2 h4 d32 16x16 w5x5" --kernel cpu.fwd_scalar | sed 's/planned in .*/planned in N/'
t plan d32 16x16 w5x5 --kernel cpu.fwd_scalar --json | sed -E 's/"plan_ms": [0-9.]*/"plan_ms": N/; s/"refused": .*//'
nbhd plan d32 16x16 w5x5 --explain | grep -c chosen
nbhd plan bwd f16 d32 16x16 w5x5 --explain --json | grep -c '"why": "'
printf 'd8 9 w3 # the first\n\n# none here\n  fwd d8 9x9 w3x3\n' >lines.txt
t plan @lines.txt --kernel cpu.fwd_scalar | grep -v visible
t plan @- --kernel cpu.fwd_scalar <lines.txt | grep -v visible
printf 'd8 9 w3\nd8 9 w10\nd8 9 w2\n' >lines.txt
t plan @lines.txt --kernel cpu.fwd_scalar | grep -v visible
printf '# empty\n' >lines.txt
t plan @lines.txt
printf 'd8 %0600d' 9 >lines.txt
t plan @lines.txt
t check "d8 7x7 w3x3" --kernel cpu.fwd_scalar | numbers
t check "d8 7x7 w3x3 enc" "f16 h4/2 d8/3 12 w4 s2 extra=3" --all | awk '{print $1}' |
    sort | uniq -c | sed 's/ *[0-9]* / /'
t check "d8 7x7 w3x3" --kernel cpu.fwd_scalar --layout strided --json | numbers
t check "d64 4096x4096 w7x7" | sed 's/; a smaller.*//'
t bench "d8 7x7 w3x3" --kernel cpu.fwd_scalar --runs 3 --csv |
    sed -E 's/,[0-9.e-]+,[0-9.e-]+,[0-9.e-]+,[0-9.e-]+,441,.*/,times/'
t bench "d8 7x7 w3x3" --kernel cpu.fwd_scalar --runs 3 --json --threads 1 |
    sed -E 's/(ms_[a-z0-9]*|plan_ms|gflops|peak_[a-z]*)": [0-9.e-]*/\1": N/g'
t bench "d8 7x7 w3x3" --kernel cpu.fwd_scalar --runs 3 | awk '{print $1, $2}'
t plan d32 16x16 w5x5 --kernel cpu.fwd_scalar --deterministic | grep -v visible
t check "bwd d8 7x7 w3x3" "d8 5+9 w3" --deterministic | sed -E 's/^(ok ) .*  (.*  )/\1 \2/'
t check "d8 9 w3" --kernel cpu.fwd_scalar --deterministic --json | numbers
t bench "d8 7x7 w3x3" --kernel cpu.fwd_scalar --runs 3 --deterministic | sed -E 's/ .*  (.*  )/ \1/'
t mask "d8 9 w3" --deterministic
nbhd list | grep -c '^cpu.fwd_scalar  *runs: f32 f64 f16 bf16$'
nbhd list --json | grep '"cpu.fwd_scalar"'
nbhd info | cut -c 1-8
nbhd info --json | grep -o '"[a-z_]*":' | head -n 8 | tr '\n' ' '
