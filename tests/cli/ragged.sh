# Ragged batches: grids listed by + in problem lines, and nbhd run on packed arrays.
t plan "fwd f32 h2 d32 5x6+9x9*2+5x6 w5x5" --kernel cpu.fwd_scalar --threads 1 |
    sed 's/planned in .*/planned in N/; s/; the largest.*//'
t plan "d32 4x5+9x9*1+9x9 kv=7x7+2x3*2" --kernel cpu.fwd_scalar --json | sed 's/, "kernel.*//'
t check "bwd d8 5+1+33 w1" "h4/2 d8/3 4x5*3+9x9 kv=7x7+2x3+1x1*2 extra=2" "qk f16 d8 7*2+20 w7 ec" |
    awk '{ print $1 } END { print $NF }'
t bench "d8 7x7+8x8 w3x3" --kernel cpu.fwd_scalar --runs 3 --csv | sed -E 's/(,[0-9.e-]+){4},1017,.*/,times/'
# what cannot be
t plan "d8 4x5+9x9 w5x5"
t plan "d8 9x9+4x5 w5x5"
t plan "d8 9x9+4 w3x3"
t plan "d8 9x9+ w3x3"
t plan "d8 9x9*0 w3x3"
t plan "d8 9x9*2000000000 w3x3"
t plan "b3 d8 9x9*2 w3x3"
t plan "d8 9+8 kv=9"
t plan "d8 9+8 kv=9+8+7"
t mask "d8 9+8 w3"
export NBHD_ISA=scalar # for the last digits
npy() { # npy SHAPE BYTES: a float32 .npy
    local header="{'descr': '<f4', 'fortran_order': False, 'shape': ($1), }"
    while [ $(((${#header} + 11) % 64)) -ne 0 ]; do header="$header "; done
    printf "\\223NUMPY\\001\\000\\$(printf %03o $((${#header} + 1)))\\000%s\\n" "$header"
    printf "$2"
}
floats() { od -A n -t f4 -j 128 "$1" | tr -s ' ' | sed 's/^ //'; }
one='\0\0\200\077' two='\0\0\0\100' four='\0\0\200\100'
# [three tokens, one head, head_dim 1] as sequences of two tokens and of one; equal keys: (1 + 2) / 2 twice, and 4
npy '3, 1, 1' "$one$one$two" >q.npy
npy '3, 1, 1' "$one$one$one" >k.npy
npy '3, 1, 1' "$one$two$four" >v.npy
t run q.npy k.npy v.npy -o o.npy --lengths 2,1 --json | sed 's/ms": [0-9.e-]*/ms": X/g'
floats o.npy
head -c 128 o.npy | tr -d '\223\001\000' | tr -s ' '
# as planes of 1 x 2 and 1 x 1, with an extra key of value 2 for each: (1 + 2 + 2) / 3 and (4 + 2) / 2
npy '2, 1, 1, 1' "$one$one" >ek.npy
npy '2, 1, 1, 1' "$two$two" >ev.npy
t run q.npy k.npy v.npy -o o.npy --lengths 1x2,1x1 --extra-k ek.npy --extra-v ev.npy
floats o.npy
# the backward: dv is what the queries that see a key give it
t run q.npy k.npy v.npy --grad-out k.npy --dv dv.npy --dextra-v dev.npy --lengths 1x2+1x1 \
    --extra-k ek.npy --extra-v ev.npy
floats dv.npy
floats dev.npy
# two keys for the first query, one for the other two
npy '2, 1, 1' "$one$two" >q2.npy
t run q2.npy k.npy v.npy -o o.npy --lengths 1*2 --kv-lengths 2,1
floats o.npy
t run q.npy k.npy v.npy -o o.npy --lengths 2,2
t run q2.npy k.npy v.npy -o o.npy --lengths 1*2 --kv-lengths 2,2
t run q2.npy k.npy v.npy -o o.npy --lengths 1*2 --kv-lengths 3
t run q.npy k.npy v.npy -o o.npy --kv-lengths 3
t run q.npy k.npy v.npy -o o.npy --lengths 2,1 --window 2
t run q.npy k.npy v.npy -o o.npy --lengths 2,x
t run ek.npy ek.npy ev.npy -o o.npy --lengths 2
