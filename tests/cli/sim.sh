# The simulator: rows, JSON, search, fit, pictures, and what is wrong with wrong input.
hunyuan="bf16 h24 d128 30x48x80 w18x24x24"
tiles=(--q-tile 4x8x8 --kv-tile 2x8x8)
t sim "$hunyuan s16x8x8" "${tiles[@]}" --static --share 0.607 --steps 50 --dense-steps 15
t sim "$hunyuan" --q-tile 2x8x8 --kv-tile 2x8x8 --static --dynamic --permuted --flat -m h200
t sim "$hunyuan" --q-tile 1x16x8 --kv-tile 18x1x8 --dynamic --warpgroups 2 --json
t sim "bwd $hunyuan" --q-tile 2x4x8 --kv-tile 2x8x8 --dynamic
t sim d64 30x48 w7x9 -n 3
t sim "d64 100 w20" --flat --q-tile 10 --kv-tile 7 --json
t sim --find "bf16 h24 d128 256x256" --sparsity 0.9 --perfect --q-tile 16x16 --kv-tile 16x8 -n 3
t sim --find "bf16 h24 d128 30x48x80" --window-min 18x24x24 --window-max 18x24x24 "${tiles[@]}" --static --json -n 1
cp "$ROOT/bench/results/h200-forward-sm90.csv" measured.csv
t sim --fit measured.csv -m h200 | grep -vE 'measured,|processors'

# Measured points: a ring each, relative to self attention.
printf '%s\n' line,ms "bf16 d128 64x64,8" "bf16 d128 64x64 w16x16,2" "bf16 d128 64x64 w16x16 s8x8,1" >points.csv
t sim "bf16 d128 64x64 w16x16" --q-tile 8x16 --kv-tile 8x16 --plot plot.svg --measured points.csv
grep -c "<circle .*r='5'" plot.svg
tail -n 1 plot.svg

echo "# wrong input"
t sim
t sim "d64 30x48 w50x3"
t sim "d64 30x48 w5x3" --q-tile 0x4 --kv-tile 4x4
t sim "d64 30x48 w5x3" --q-tile=-4x4 --kv-tile 4x4
t sim "d64 30x48 w5x3" --q-tile 31x4 --kv-tile 4x4
t sim "d64 30x48 w5x3" --q-tile 4 --kv-tile 4x4
t sim "d64 300x300x300 w5x5x5" --q-tile 100x100x100 --kv-tile 4x4x4
t sim "d64 1000000x1000000x1000000 w1x1x1"
t sim "d64 300x300x300 w200x200x200" --flat
t sim "bwd d64 30x48 w5x3" --flat
t sim "d64 30x48 w5x3" --warpgroups 3 --q-tile 4x4 --kv-tile 4x4
t sim --find "d64 30x48" --window-min 40x1
t sim --find "d64 30x48" --sparsity 1.2
t sim "d64 8 w3" --share 0.5
t sim "d64 8 w3" --share 1.5 --steps 3
t sim "d64 8 w3" --share 0.5 --steps 3 --dense-steps 4
t sim "d64 8 w3" --share 0 --steps 3 | grep model
t sim "d64 8 w3" --dense-steps 4
t sim "d64 8 w3" --sparsity 0.5
t sim "d64 8 w3" --perfect
t sim --find "bf16 d64 800" -m h200
t sim "d64 8 w3" --plot plot.svg --json
t sim "d64 8 w3" --plot plot.svg --static --dynamic
t sim "d64 3000000000 w3"
t sim "d64 8x8 w3" # one number for two axes
t sim "d64 8 w3" -m abacus
t sim "d64 8 w3" -m h200
t sim "d64 8 w3" -m matrix=3
t sim "d64 8 w3" -m "h200 mask=lots"
t sim --fit nowhere.csv -m h200
t sim --fit points.csv -m h200
t sim --fit points.csv -m h200 "d64 8 w3"
t sim "bf16 d128 64x64 w16x16" --plot plot.gif
t sim "bf16 d128 32x32 w16x16" --plot plot.svg --measured points.csv
# columns stay apart where numbers are large
nbhd sim "d8 1073741824 w3" | tail -n 1
