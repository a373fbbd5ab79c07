# What a query sees, in letters and as pictures; the pictures of the documentation are those that the command draws.
t mask "d64 10x20 w3x5" --query 2,3
t mask "d64 10x20 w3x5" --query 2,3 --dynamic
t mask "d64 9x20 w3x4 r2x3" --query 4,10 --q-tile 1x1 --kv-tile 1x1
t mask "d64 70 w20 ec"
t mask "d64 3x6x8 w2x3x3" --query 0,5,7
t mask "d64 20 kv=30" --query 3
t mask "bwd d64 10x20 w3x5" --query 1,3
t mask "bwd d64 12 kv=20" --query 13
NBHD=nbhd "$ROOT/scripts/draw-mask-pictures" "$PWD/img" &&
    diff -r img "$ROOT/docs/img" && echo "the pictures are current"
echo "# wrong input"
t mask
t mask "d64 30x48 w5x3" --query 30,1
t mask "d64 30x48 w5x3" --query 3
t mask "d64 30x48 w5x3" --query a,b
t mask "d64 30x48 w5x3" --query=-1,2
t mask "d64 30x48 w5x3" --query 1,2,3,4
t mask "d64 6x14 w3x5 enp" --query 2,0
t mask "d64 12 w5 s2 ep" --dynamic
t mask "bwd d64 12 w5 ep" --query 11
t sim "d64 24x48 w5x7 enp" --flat
t mask "d64 30x48 w5x3" --flat
t mask "d64 30x48 w5x3" --dynamic --permuted
t mask "d64 30x48 w5x3" -o picture.gif
t mask "d64 30x48 w5x3" -o nowhere/picture.svg
t mask "d64 3000 w5" -o picture.svg
t mask "d64 30x48 w5x3" "d64 9 w3" -o picture.svg
