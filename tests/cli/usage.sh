# Usage: what is told of every mistake on the command line.
t
t nosuch
t --version | sed 's/[0-9][0-9.]*$/X/'
nbhd --help | head -n 3
for command in run denoise plan check bench list info; do
    nbhd $command --help >help.txt && head -n 1 help.txt
    nbhd $command --help | awk 'length > 120 { print "too long: " $0 }'
done
t run
t run a b c
t run a b c --windw 3
t run a b c --window
t run a b c --window=
t run a b c --window 3y3
t run a b c --window 0x3
t run a b c --window 1x2x3x4
t run a b c -o x.npy --threads 1.5
t run a b c --threads 0
t run a b c --threads 99999999999999999999
t run a b c --scale fast
t run a b c --device gpu
t run a b c --json=yes
t run a b c -x
t run a b c d
t run a b c --extra-k e.npy -o o.npy
t run a b c --dq e.npy
t run a b c --grad-out e.npy -o o.npy
t run a b c --grad-lse e.npy -o o.npy
t run a b c --dextra-k e.npy --grad-out g.npy
t plan
t plan @nofile
t plan d64
t plan "d64 8x8 w9x9"
t plan "d64 8x8 w3x3" --kernel cpu.nosuch
t check "d64 8x8" --all --kernel cpu.fwd_scalar
t bench "d64 8x8" --json --csv
t list what
nbhd list >/dev/full
echo "exit status $?"
for command in run denoise plan jit check bench list info; do
    nbhd $command --help 2>/dev/null | grep -oE -- '--[a-z0-9-]+' | sort -u | while read -r option; do
        sed 's/\\-/-/g' "$ROOT/docs/nbhd.1" | grep -q -- "$option\b" ||
            echo "docs/nbhd.1 lacks $option of nbhd $command"
    done
done
