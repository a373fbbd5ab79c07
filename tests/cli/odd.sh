# What happens to a program sooner or later: inputs that are no files, streams that are closed, disks that are full.
npy() { # npy SHAPE BYTES: a float32 .npy
    local header="{'descr': '<f4', 'fortran_order': False, 'shape': ($1), }"
    while [ $(((${#header} + 11) % 64)) -ne 0 ]; do header="$header "; done
    printf "\\223NUMPY\\001\\000\\$(printf %03o $((${#header} + 1)))\\000%s\\n" "$header"
    head -c "$2" /dev/zero
}
npy '1, 8, 8, 1, 64' 16384 >q.npy
# a FIFO is not waited for, neither as input nor as output
mkfifo fifo.npy fifo.png
timeout 10 nbhd run fifo.npy q.npy q.npy -o o.npy 2>&1 || echo "exit status $?"
timeout 10 nbhd run q.npy q.npy q.npy -o fifo.npy 2>&1 || echo "exit status $?"
timeout 10 nbhd denoise fifo.png -o out.png 2>&1 || echo "exit status $?"
# a file may not grow: a sentence, and nothing is left
(ulimit -f 8; nbhd run q.npy q.npy q.npy -o o.npy --window 3 2>&1; echo "exit status $?") | sed 's#: /.*/#: #'
# closed streams: nothing is written into what takes their numbers, and not to be able to write is a failure
NBHD_LOG=2 nbhd run q.npy q.npy q.npy -o o.npy --lse l.npy --grad-out q.npy --dq dq.npy --window 3 <&- >&- 2>&-
for file in o l dq; do head -c 6 $file.npy | tail -c 5; done
echo
nbhd plan "d8 9 w3" 2>/dev/null >&-
echo "exit status $?"
nbhd run q.npy q.npy q.npy -o o.npy --window 99 --lse l.npy 2>&- >&-
echo "exit status $?"
# an environment that says what cannot be
NBHD_KERNEL=cpu.nosuch t plan "d8 9 w3"
NBHD_KERNEL=cpu.nosuch t plan "d8 9+8 w3"
NBHD_KERNEL=cpu.bwd_scalar t plan "d8 9 w3" --kernel cpu.fwd_scalar | grep -v visible
NBHD_THREADS=2x t plan "d8 9x9 w3x3" --kernel cpu.fwd_scalar | sed 's/, [0-9]* threads/, N threads/; /visible/d'
NBHD_THREADS=3 nbhd info --json | grep -o '"threads": [0-9]*'
NBHD_THREADS=3 nbhd bench "d8 9 w3" --runs 5 --csv | cut -d, -f4
# problem files that are no text
printf 'd8 9\0 w3\nd8 9\n' >zero.txt
t plan @zero.txt
printf '\357\273\277d8 9 w10\r\n' >marked.txt
t plan @marked.txt
t plan @fifo.npy/x
nbhd help plan | head -n 1
t help nosuch
ls
