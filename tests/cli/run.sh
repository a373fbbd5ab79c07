# nbhd run on small files made by hand. One query, two keys: the answer is known.
export NBHD_ISA=scalar # for the last digits
npy() { # npy SHAPE BYTES [DESCR]: a float32 .npy
    local header="{'descr': '${3:-<f4}', 'fortran_order': False, 'shape': ($1), }"
    while [ $(((${#header} + 11) % 64)) -ne 0 ]; do header="$header "; done
    printf "\\223NUMPY\\001\\000\\$(printf %03o $((${#header} + 1)))\\000%s\\n" "$header"
    printf "$2"
}
floats() { od -A n -t f4 -j "$2" "$1" | tr -s ' ' | sed 's/^ //'; }
one='\0\0\200\077' two='\0\0\0\100' zero='\0\0\0\0'
# [batch 1, two tokens, one head, head_dim 1]; equal keys, so the output is the mean of the values: 1.5
npy '1, 2, 1, 1' "$one$two" >q.npy
npy '1, 2, 1, 1' "$one$one" >k.npy
npy '1, 2, 1, 1' "$one$two" >v.npy
t run q.npy k.npy v.npy -o o.npy --lse l.npy
floats o.npy 128
floats l.npy 128
head -c 128 o.npy | tr -d '\223\001\000' | tr -s ' '
t run q.npy k.npy v.npy -o o.npy --edge c
floats o.npy 128
t run q.npy k.npy v.npy -o o.npy --window 1
floats o.npy 128
# one number for both axes, and an output that keeps its permissions
npy '1, 2, 2, 1, 1' "$one$two$one$two" >square.npy
chmod 600 o.npy
t run square.npy square.npy square.npy -o o.npy --window 1 --edge t --json | sed 's/", "kernel.*//'
t run square.npy square.npy square.npy -o o.npy --edge tcn
ls -l o.npy | cut -c1-10
# an extra key of value 4, as alike as the others: (1 + 2 + 4) / 3 with self attention
npy '1, 1, 1, 1' "$one" >ek.npy
npy '1, 1, 1, 1' '\0\0\200\100' >ev.npy
# a bias of log 2 for the key one to the left: weights 2/3 and 1/3 of the second query; its gradient
npy '1, 5' "$zero"'\030\162\061\077'"$zero$zero$zero" >bias.npy
npy '1, 3, 1, 1' "$one$one$two" >three.npy
npy '1, 3, 1, 1' "$zero$zero$zero" >zeros.npy
t run zeros.npy zeros.npy three.npy -o o.npy --window 3 --bias bias.npy --grad-out three.npy --dbias db.npy
floats o.npy 128
floats db.npy 128
t run zeros.npy zeros.npy three.npy -o o.npy --window 1 --bias bias.npy
t run zeros.npy zeros.npy three.npy -o o.npy --dbias db.npy --grad-out three.npy
npy '1, 2, 1, 1' "$one$one$one$one" '<f8' >double.npy
t run q.npy double.npy v.npy -o o.npy
t run q.npy k.npy v.npy -o o.npy --lengths 1,1 --kv-lengths 2
t run q.npy k.npy v.npy -o o.npy --extra-k ek.npy --extra-v ev.npy
floats o.npy 128
# safetensors out and in, both outputs in one file, and onto an input
t run q.npy k.npy v.npy -o all.safetensors:o --lse all.safetensors:lse
grep -ao '{.*}' all.safetensors
t run all.safetensors:o k.npy v.npy -o all.safetensors:new --lse all.safetensors:lse
t run all.safetensors:o k.npy v.npy -o all.safetensors:o
t run all.safetensors k.npy v.npy -o o.npy
floats o.npy 128
t run q.npy k.npy v.npy -o o.npy --json --kernel cpu.fwd_scalar | sed 's/ms": [0-9.e-]*/ms": X/g'
# the backward, by hand: dk = -+ 0.25 (q1 + q2), dq = 0, dv = 1
t run q.npy k.npy v.npy --grad-out k.npy --dq g.safetensors:dq --dk dk.npy --dv g.safetensors:dv --kernel cpu.bwd_scalar
floats dk.npy 128
grep -ao '{.*}' g.safetensors
floats g.safetensors $(($(od -A n -t u1 -N 1 g.safetensors) + 8))
# what cannot be
npy '1, 2, 1' "$one$one" >flat.npy
t run q.npy k.npy v.npy --grad-out flat.npy --dk dk.npy
t run q.npy k.npy v.npy -o o.txt
t run q.npy k.npy v.npy -o nofolder/o.npy
t run q.npy k.npy v.npy -o o.npy --lse o.npy
t run q.npy k.npy v.npy -o o.npy --lse ./o.npy
ln -s o.npy link.npy
t run q.npy k.npy v.npy -o o.npy --lse link.npy
rm link.npy
t run q.npy k.npy v.npy -o o.safetensors:a --lse o.safetensors:a
t run q.npy k.npy v.npy -o o.safetensors --lse o.safetensors
t run q.npy k.npy v.npy -o o.safetensors:__metadata__
t run q.npy k.npy v.npy -o o.safetensors:$'na\377me' | cat -v
printf '\002\0\0\0\0\0\0\0{}' >none.safetensors
t run none.safetensors k.npy v.npy -o o.npy
rm none.safetensors
t run q.npy k.npy v.npy -o o.safetensors:a --lse ./o.safetensors:b
t run q.npy k.npy nofile.npy -o o.npy
t run q.npy "" v.npy -o o.npy
t run q.npy k.npy all.safetensors:nosuch -o o.npy
t run q.npy k.npy v.npy -o o.npy --window 3
t run q.npy k.npy v.npy -o o.npy --window 1x1
t run q.npy k.npy v.npy -o o.npy --edge cc
t run q.npy k.npy v.npy -o o.npy --edge x
t run q.npy k.npy v.npy -o o.npy --scale 0
t run q.npy k.npy v.npy -o o.npy --scale 1e-46
t run q.npy k.npy v.npy -o o.npy --extra-k ek.npy --extra-v q.npy
t run flat.npy k.npy v.npy -o o.npy
npy '1, 0, 1, 1' '' >empty.npy
t run empty.npy empty.npy empty.npy -o o.npy
npy '1, 2, 1, 3' "$one$one$one$one$one$one" >wide.npy
t run q.npy wide.npy v.npy -o o.npy
npy '1, 2, 1, 1' "$one" >short.npy
t run q.npy short.npy v.npy -o o.npy
head -c 40 q.npy >cut.npy
t run cut.npy k.npy v.npy -o o.npy
: >nothing.npy
t run nothing.npy k.npy v.npy -o o.npy
printf '\377\377\377\377\377\377\377\177{}' >lie.safetensors
t run lie.safetensors:q k.npy v.npy -o o.npy
mkdir folder.npy
t run folder.npy k.npy v.npy -o o.npy
t run q.npy k.npy v.npy -o folder.npy
# nothing half-written stays behind
ls
